"""The C++ kernels under the address, undefined-behaviour and thread sanitizers, the host-compiled CUDA under the first two.

Of the C++ kernels the portable instruction set, and the one in use on this machine. The others are the same code but
for what `simd.h` spells out, and `guard` holds them to their tensors. What AMX's registers load and store no sanitizer
sees.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from dalle_fast import _extension
from dalle_fast.verify.checkout import copy_of_sources, must_pass, rebuild
from dalle_fast.verify.figures import NotRun

CASES = ("address and undefined behaviour", "the same with the instruction set in use", "cuda on the host", "threads")
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O1"
# OpenMP's barriers are hidden from the thread sanitizer, so the threads are the language's, and torch has one alone.
SANITIZE_THREADS = "-fsanitize=thread -DDALLE_FAST_STD_THREADS -fno-omit-frame-pointer -g1 -O1"
FOUR_THREADS = """
import torch
torch.get_num_threads = lambda: 4  # what the kernels ask for theirs
from dalle_fast.masks import column_mask, row_mask
from dalle_fast.nn import KVCache, Transformer
from dalle_fast.nn.functional import sparse_attention
from dalle_fast.verify import diff
for number in range(96):
    diff.case(number, "cpu")
for dtype in (torch.float32, torch.bfloat16):  # fewer heads than threads, which take over parts of them
    query = torch.randn(1, 3, 310, 72).to(dtype)
    for _ in range(8):
        sparse_attention(query, query, query, row_mask(150, (4, 40)))
masks = (row_mask(40, (4, 4)), column_mask(40, (4, 4)))
for dtype in (torch.float32, torch.bfloat16):
    with torch.no_grad():
        model = Transformer(masks, 256, 4).to(dtype)
        cache = KVCache(masks, num_prompts=2, num_images=2, num_heads=4, head_dim=64, dtype=dtype)
        model(torch.randn(2, 40, 256).to(dtype), None, cache)
        for _ in range(16):
            model.step(torch.randn(4, 256).to(dtype), cache)
"""
CPU_TESTS = (
    "tests/test_attention.py", "tests/test_attention_grad.py", "tests/test_codebook.py", "tests/test_decode.py",
    "tests/test_linear.py", "tests/test_blocks.py",
)  # fmt: skip
CUDA_TESTS = ("tests/test_codebook_cuda.py",)


def case(number: int, device: str) -> dict:
    if CASES[number] == "cuda on the host":
        return must_pass(*CUDA_TESTS)
    if CASES[number] == "threads":
        return _threads()
    best = "" if number == 0 else _extension.native().instruction_set()
    if best == "portable":
        return {}  # as the first case
    options = f"-DDALLE_FAST_INSTRUCTION_SETS={best} -DDALLE_FAST_OPTIMIZE=-O1"
    libraries = _sanitizer_libraries("libasan.so")
    with copy_of_sources() as folder:
        rebuild(Path(folder), CXXFLAGS=SANITIZE, CMAKE_ARGS=options)
        # The interpreter is not built with it, so it is loaded first; what Python keeps until its end is no leak.
        environment = {"LD_PRELOAD": libraries, "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0"}
        return must_pass(*CPU_TESTS, folder=Path(folder), **environment)


def _threads() -> dict:
    libraries = _sanitizer_libraries("libtsan.so")
    with copy_of_sources() as folder:
        rebuild(Path(folder), CXXFLAGS=SANITIZE_THREADS)
        environment = {**os.environ, "LD_PRELOAD": libraries, "OMP_NUM_THREADS": "1", "PYTHONPATH": folder}
        command = [sys.executable, "-c", FOUR_THREADS]
        ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    said = ran.stdout + ran.stderr
    if ran.returncode or "WARNING: ThreadSanitizer" in said:
        at = max(0, said.find("WARNING: ThreadSanitizer"))
        raise AssertionError(f"ended with {ran.returncode}: {said[at : at + 1200]}")
    return {}


def _sanitizer_libraries(runtime: str) -> str:
    """For LD_PRELOAD. The C++ library too: the sanitizer looks for what throws exceptions when it is loaded."""
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        raise NotRun("there is no C++ compiler")
    paths = []
    for name in (runtime, "libstdc++.so.6"):
        command = [compiler, f"-print-file-name={name}"]
        paths.append(subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip())
        if not os.path.isabs(paths[-1]):
            raise NotRun(f"{compiler} has no {name}")
    return " ".join(paths)
