"""The CUDA text of the mask rule means what `AttentionMask.allows` means: on a GPU, and compiled for the host."""

import ctypes
import os
import pathlib
import shutil
import subprocess

import pytest
import torch

from dalle_fast import _extension
from dalle_fast.masks import RULES, AttentionMask

HERE = pathlib.Path(__file__).parent
SHAPES = ((0, (3, 5), 3, 1), (7, (5, 7), 5, 1), (2, (8, 4), 3, 2), (3, (1, 6), 5, 1), (4, (6, 1), 3, 3))
MASKS = [
    AttentionMask(rule, text_len, grid, *(window if rule.startswith("conv") else (1, 1)))
    for rule in RULES
    for text_len, grid, *window in SHAPES
]


def why_no_gpu():
    if missing := _extension.why_missing():
        return missing
    if reason := _extension.native().build_info()["why_no_cuda"]:
        return f"the native module was built without CUDA: {reason}"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


needs_gpu = pytest.mark.skipif(why_no_gpu() is not None, reason=str(why_no_gpu()))


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        pytest.skip("no C++ compiler to compile the CUDA source for the host")
    library = tmp_path_factory.mktemp("simt") / "mask.so"
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", f"-I{HERE / 'simt'}", HERE / "simt/mask.cpp"]
    subprocess.run([*command, "-o", library], check=True)
    function = ctypes.CDLL(str(library)).dense_mask_on_host

    def dense_mask(mask, seq_len):
        out = torch.zeros(seq_len, seq_len, dtype=torch.bool)
        function((ctypes.c_int * 6)(*mask.encode()), seq_len, ctypes.c_void_p(out.data_ptr()))
        return out

    return dense_mask


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_the_kernel_compiled_for_the_host(on_host, mask):
    for seq_len in (0, 1, mask.seq_len // 2, mask.seq_len):
        torch.testing.assert_close(on_host(mask, seq_len), mask.to_dense(seq_len=seq_len))


def test_more_pairs_than_threads_of_a_launch_on_the_host(on_host):
    mask = AttentionMask("column", 100, (41, 100), 1, 1)  # 4,200 positions: 17.6 million pairs, 16.8 million threads
    torch.testing.assert_close(on_host(mask, mask.seq_len), mask.to_dense())


@needs_gpu
@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_the_kernel_on_a_gpu(mask):
    for seq_len in (0, 1, mask.seq_len // 2, mask.seq_len):
        out = torch.zeros(seq_len, seq_len, dtype=torch.bool, device="cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        _extension.native().cuda_dense_mask(mask.encode(), seq_len, out.data_ptr(), stream.cuda_stream)
        stream.synchronize()
        torch.testing.assert_close(out.cpu(), mask.to_dense(seq_len=seq_len))


@needs_gpu
def test_more_pairs_than_threads_of_a_launch_on_a_gpu():
    mask = AttentionMask("conv_flat", 100, (90, 90), 5, 1)  # 8,200 positions, 67 million pairs, 16.8 million threads
    out = torch.zeros(mask.seq_len, mask.seq_len, dtype=torch.bool, device="cuda")
    _extension.native().cuda_dense_mask(
        mask.encode(), mask.seq_len, out.data_ptr(), torch.cuda.current_stream().cuda_stream
    )
    torch.testing.assert_close(out, mask.to_dense("cuda"))


@pytest.mark.skipif(
    _extension.why_missing() is not None or _extension.native().build_info()["cuda"] is None,
    reason="the native module has no CUDA kernels",
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, so a launch succeeds")
def test_a_launch_without_a_driver_is_a_runtime_error():
    out = torch.zeros(4, 4, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="launching dense_mask_kernel: cudaError"):
        _extension.native().cuda_dense_mask(AttentionMask("row", 2, (1, 2), 1, 1).encode(), 4, out.data_ptr(), 0)
