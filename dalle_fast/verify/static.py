"""Every Triton and CUDA kernel compiled for sm_80, sm_90 and sm_100: no spills, tensor-core instructions, memory."""

from __future__ import annotations

from dalle_fast.verify.checkout import must_pass

CASES = ("tests/test_cuda_compile.py", "tests/test_triton_compile.py")  # the second takes over an hour


def case(number: int, device: str) -> dict:
    return must_pass(CASES[number], DALLE_FAST_COMPILE="all")
