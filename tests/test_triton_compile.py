"""The Triton attention kernels compile for NVIDIA GPUs, without one, into code that is worth running.

Compiled through the package's own launchers: a driver that only knows its target stands in for the GPU, and launches
stop after compiling, so that arguments are specialised (strides of 1, divisibility by 16) exactly as in a real launch.
Nothing here ran on a GPU: these tests prove no spills, shared memory within the limit, and tensor-core instructions.

DALLE_FAST_COMPILE=all compiles every combination; the default is a subset that takes a minute or two.
Shown with -s, and after the run when it fails: registers and shared memory of every kernel.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from dalle_fast.masks import column_mask, conv_mask, row_mask

triton = pytest.importorskip("triton", reason="the package triton is not installed")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("TRITON_INTERPRET is set: kernels are interpreted, not compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget

from dalle_fast.ops.attention.triton import bwd, dec, fwd, launch

KERNELS = {
    "forward": fwd._attention_fwd_kernel,
    "delta": bwd._attention_delta_kernel,
    "grad_query": bwd._attention_grad_query_kernel,
    "grad_key_value": bwd._attention_grad_key_value_kernel,
    "decode": dec._attention_decode_kernel,
    "decode_merge": dec._attention_decode_merge_kernel,
}
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may use, CUDA C++ guide
EVERYTHING = os.environ.get("DALLE_FAST_COMPILE") == "all"
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"  # ships in the Triton wheel
# What a matrix product on tensor cores looks like in machine code.
TENSOR_CORE = {80: r"\bHMMA\b", 90: r"\bHGMMA\b", 100: r"\bUTC[A-Z]*MMA\b|\bHMMA\b"}
MASKS = {
    "row": row_mask(256, 32),
    "column": column_mask(256, 32),
    "conv": conv_mask(256, 32, 11),
    "patch": conv_mask(256, 64, 11),
}


class TargetOnly:
    """As much of a Triton driver as compiling for `arch` needs; the device's number is the architecture."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)


def kernel_usage(kernel, tmp_path):
    """(registers, local memory bytes, shared memory bytes, machine code) of a compiled kernel."""
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    # A spilled register goes to the thread's stack frame, in local memory.
    local = sum(int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("STACK", "LOCAL"))
    code = subprocess.run([CUOBJDUMP, "-sass", binary], capture_output=True, text=True, check=True).stdout
    return registers, local, kernel.metadata.shared, code


def attend(mask, head_size, dtype, text_lengths):
    packed = torch.zeros(1, mask.seq_len, 3, 2, head_size, dtype=dtype)  # a packed projection: (B, S, 3, H, D)
    query, key, value = packed.permute(2, 0, 3, 1, 4)
    out, lse = fwd.attention_forward(query, key, value, text_lengths, mask, 0.125)
    bwd.attention_backward(out, lse, query, key, value, out, lse, text_lengths, mask, 0.125)


def decode(mask, head_size, dtype, text_lengths):
    query = torch.zeros(64, 3, 2, head_size, dtype=dtype)[:, 0]  # of a packed projection: (B, 3, H, D)
    text = torch.zeros(1, 2, mask.text_len, head_size, dtype=dtype)
    image = torch.zeros(64, 2, mask.cache_slots, head_size, dtype=dtype)
    position = torch.tensor(3)
    dec.attention_decode(query, text, text, image, image, position, text_lengths, mask, 0.125)


@pytest.fixture
def compile_for(monkeypatch, tmp_path):
    """compile_for(arch, mask, head_size, dtype, text_lengths, call) -> {kernel name: compiled kernel}"""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    compiled = {}

    def stop_before_launch(name, run):
        def compile_only(*args, grid, warmup, **kwargs):
            compiled[name] = run(*args, grid=grid, warmup=True, **kwargs)

        return compile_only

    for name, kernel in KERNELS.items():
        monkeypatch.setattr(kernel, "run", stop_before_launch(name, kernel.run))

    def compile_for(arch, mask, head_size, dtype, text_lengths=None, call=attend):
        compiled.clear()
        monkeypatch.setattr(triton.runtime.driver, "_active", TargetOnly(arch))
        monkeypatch.setattr(launch, "capability_of", lambda tensor: divmod(arch, 10))
        call(mask, head_size, dtype, text_lengths)
        return dict(compiled)

    return compile_for


ALL = [
    (arch, name, head_size, dtype)
    for arch in (80, 90, 100)
    for name in MASKS
    for head_size in (64, 128)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
]
SUBSET = [
    *((arch, "row", 64, torch.bfloat16) for arch in (80, 90, 100)),
    (90, "column", 64, torch.bfloat16),
    (90, "conv", 64, torch.bfloat16),
    (90, "patch", 64, torch.float16),
    (80, "column", 128, torch.float16),
    (90, "conv", 128, torch.bfloat16),
    (100, "patch", 128, torch.bfloat16),
    (90, "row", 64, torch.float32),
    (80, "conv", 128, torch.float32),
]


@pytest.mark.parametrize(("arch", "name", "head_size", "dtype"), ALL if EVERYTHING else SUBSET)
def test_compiles_well(compile_for, tmp_path, arch, name, head_size, dtype):
    assert not shortcomings(compile_for(arch, MASKS[name], head_size, dtype), tmp_path, arch, name, head_size, dtype)


DECODING = [
    *((arch, "row", 64, torch.bfloat16) for arch in (80, 90, 100)),
    (90, "column", 128, torch.float16),
    (80, "conv", 128, torch.bfloat16),
    (100, "patch", 128, torch.float32),
    (90, "conv", 64, torch.float32),
]


@pytest.mark.parametrize(("arch", "name", "head_size", "dtype"), ALL if EVERYTHING else DECODING)
def test_decoding_compiles_well(compile_for, tmp_path, arch, name, head_size, dtype):
    lengths = torch.tensor([3], dtype=torch.int32)
    kernels = compile_for(arch, MASKS[name], head_size, dtype, lengths, decode)
    assert set(kernels) == {"decode", "decode_merge"}
    assert not shortcomings(kernels, tmp_path, arch, name, head_size, dtype)


def shortcomings(kernels, tmp_path, arch, name, head_size, dtype):
    """What is wrong with compiled kernels, as a list of words; says how large they are."""
    wrong = []
    for kernel_name, kernel in kernels.items():
        registers, local, shared, code = kernel_usage(kernel, tmp_path)
        print(
            f"sm_{arch} {name:6} D {head_size:3} {str(dtype)[6:]:8} {kernel_name:14} "
            f"{kernel.metadata.num_warps} warps {registers:3} registers {shared / 1024:5.1f} KiB shared"
        )
        if local:
            wrong.append(f"{kernel_name} spills {local} bytes")
        if shared > SHARED_LIMIT[arch]:
            wrong.append(f"{kernel_name} needs {shared} bytes of shared memory, {SHARED_LIMIT[arch]} are there")
        # Products of 16 rows, as decode has them, are HMMA on every architecture.
        product = {"delta": "", "decode_merge": "", "decode": r"\bHMMA\b"}.get(kernel_name, TENSOR_CORE[arch])
        if dtype != torch.float32 and not re.search(product, code):
            wrong.append(f"{kernel_name} has no instruction {product}")
    return wrong
