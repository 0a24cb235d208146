"""Every Triton and CUDA kernel compiled for sm_80, sm_90 and sm_100: no spills, tensor-core instructions, memory.

Of the codebook's Triton kernels the sizes that their own tests have, which are also interpreted there.
"""

from __future__ import annotations

from dalle_fast.verify.checkout import must_pass

CASES = (
    ("tests/test_cuda_compile.py",),
    ("tests/test_codebook_triton.py", "tests/test_codebook_triton_gradients.py"),
    ("tests/test_triton_compile.py",),  # takes over an hour
)


def case(number: int, device: str) -> dict:
    return must_pass(*CASES[number], DALLE_FAST_COMPILE="all")
