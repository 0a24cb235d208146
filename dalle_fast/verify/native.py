"""The C++ kernels and the host-compiled CUDA kernels under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from dalle_fast.verify.checkout import copy_of_sources, must_pass, rebuild
from dalle_fast.verify.figures import NotRun

CASES = ("cpu", "cuda on the host")
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O1"
CPU_TESTS = ("tests/test_attention.py", "tests/test_attention_grad.py", "tests/test_codebook.py")
CUDA_TESTS = ("tests/test_codebook_cuda.py", "tests/test_codebook_streaming.py", "tests/test_masks_cuda.py")


def case(number: int, device: str) -> dict:
    if CASES[number] != "cpu":
        return must_pass(*CUDA_TESTS)
    library = _sanitizer_library()
    with copy_of_sources() as folder:
        rebuild(Path(folder), CXXFLAGS=SANITIZE)
        # The interpreter is not built with it, so it is loaded first; what Python keeps until its end is no leak.
        options = {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0"}
        return must_pass(*CPU_TESTS, folder=Path(folder), keyword="not instruction_set", **options)


def _sanitizer_library() -> str:
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        raise NotRun("there is no C++ compiler")
    command = [compiler, "-print-file-name=libasan.so"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if not os.path.isabs(found):
        raise NotRun(f"{compiler} has no address sanitizer")
    return found
