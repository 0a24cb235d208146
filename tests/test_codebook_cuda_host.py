"""From the operation down to the CUDA kernels, without a GPU: `chunked` over `cuda.py` over the bindings of the native
module, with the kernels compiled for the host (tests/simt). Only streams and the vendor's products are stand-ins.

N rows, K codes, I size of hidden, D size of an embedding.
"""

import importlib.machinery
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sysconfig
from types import SimpleNamespace

import pytest
import torch

from dalle_fast.ops.codebook import chunked, cuda, reference

ROOT = pathlib.Path(__file__).parent.parent
N, K, I, D = 37, 200, 24, 12


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        pytest.skip("no C++ compiler to compile the CUDA source for the host")
    pybind11 = pytest.importorskip("pybind11", reason="pybind11, of the build environment, is not installed")
    path = tmp_path_factory.mktemp("simt") / "cuda_on_host.so"
    simt, sources = ROOT / "tests/simt", sorted((ROOT / "csrc/cuda").glob("*binding.cpp"))
    includes = [simt, pybind11.get_include(), sysconfig.get_path("include")]
    if not pathlib.Path(includes[-1], "Python.h").exists():
        pytest.skip("no headers of Python")
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-include", simt / "mma.h"]
    command += [f"-I{folder}" for folder in includes]
    kernels = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    subprocess.run([*command, simt / "native.cpp", *sources, "-x", "c++", *kernels, "-o", path], check=True)
    loader = importlib.machinery.ExtensionFileLoader("cuda_on_host", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("cuda_on_host", loader))
    loader.exec_module(module)
    return module


@pytest.fixture
def on_host(module, monkeypatch):
    """`chunked` over `cuda`, with chunks of 16 rows in poisoned memory."""
    monkeypatch.setattr(cuda, "_extension", SimpleNamespace(native=lambda: module))
    monkeypatch.setattr(cuda, "_stream", lambda: 0)
    monkeypatch.setattr(cuda, "scratch", lambda size, device: torch.full((size,), torch.nan))
    monkeypatch.setattr(cuda, "chunk_rows", lambda *args, **options: 16)
    mm, addmm = torch.mm, torch.addmm

    def add_up_in_float32(a, b, out=None, out_dtype=None):  # on a CPU there is no out_dtype
        assert out is None or out.dtype == (out_dtype or a.dtype)
        product = mm(a.float(), b.float())
        return product if out is None else out.copy_(product)

    monkeypatch.setattr(torch, "mm", add_up_in_float32)
    monkeypatch.setattr(
        torch, "addmm", lambda x, a, b, out=None, out_dtype=None: addmm(x, a.float(), b.float(), out=out)
    )
    return chunked.Chunked(cuda)


def make_tensors(dtype, seed_per_row):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator).to(dtype)

    return SimpleNamespace(
        hidden=normal(N, I),
        weight=normal(K, I),
        bias=normal(K),
        codebook=normal(K, D),
        grad_embedding=normal(N, D),
        grad_kl=normal(N, dtype=torch.float32),
        tau=torch.tensor([0.7]),
        seed=torch.randint(-(2**63), 2**63 - 1, (N if seed_per_row else 1,), generator=generator),
        target=torch.randint(0, K, (N,), generator=generator),
        row_weight=torch.rand(N, generator=generator),
    )


def assert_close(actual, expected, dtype):
    if actual is None or expected is None:
        assert actual is expected
        return
    assert actual.dtype == expected.dtype
    tolerance = 2e-5 if dtype == torch.float32 else 6 * torch.finfo(dtype).eps
    error = (actual.double() - expected.double()).abs().max()
    assert error <= tolerance * (1 + expected.double().abs().max())


@pytest.mark.parametrize("dtype", cuda.DTYPES)
@pytest.mark.parametrize("seed_per_row", [False, True])
@pytest.mark.parametrize("hard", [False, True])
def test_gumbel_codebook(on_host, dtype, seed_per_row, hard):
    x = make_tensors(dtype, seed_per_row)
    args = (x.hidden, x.weight, x.bias, x.codebook, x.tau, x.seed, seed_per_row, hard)
    results = [serving.gumbel_codebook(*args) for serving in (on_host, reference)]
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, dtype)
    _, kl, codes, stats = results[1]
    for grad_kl, needs in ((x.grad_kl, (True,) * 4), (None, (True, False, True, False))):
        grads = [
            serving.gumbel_codebook_backward(
                x.grad_embedding, grad_kl, x.hidden, x.weight, x.bias, x.codebook, x.tau, x.seed, kl, codes, stats,
                seed_per_row, hard, needs,
            )
            for serving in (on_host, reference)
        ]  # fmt: skip
        for actual, expected in zip(*grads, strict=True):
            assert_close(actual, expected, dtype)


@pytest.mark.parametrize("dtype", cuda.DTYPES)
@pytest.mark.parametrize("seed_per_row", [False, True])
def test_samples(on_host, dtype, seed_per_row):
    x = make_tensors(dtype, seed_per_row)
    for temperature, seed in ((torch.tensor([0.8]), x.seed), (None, None)):
        args = (x.hidden, x.weight, x.bias, temperature, seed, seed_per_row and seed is not None)
        codes = on_host.sample(*args)
        assert torch.equal(codes, reference.sample(*args))
        # Four of these do not begin at a multiple of 16 bytes.
        unaligned = x.bias.new_empty(K + 1)[1:].copy_(x.bias)
        assert torch.equal(on_host.sample(*args[:2], unaligned, *args[3:]), codes)
        if dtype != torch.float32:
            bias = x.bias.float()
            options = {"seed_per_row": args[-1]}
            assert torch.equal(cuda.sample_streaming(x.hidden, x.weight, bias, seed, temperature, **options), codes)


@pytest.mark.parametrize("dtype", cuda.DTYPES)
def test_cross_entropy(on_host, dtype):
    x = make_tensors(dtype, False)
    x.target[3] = -100
    for row_weight in (x.row_weight, x.row_weight[:1], None):
        needs = (row_weight is not None,) * 3
        args = (x.hidden, x.weight, x.bias, x.target, -100, row_weight, needs)
        results = [serving.cross_entropy(*args) for serving in (on_host, reference)]
        for actual, expected in zip(*results, strict=True):
            assert_close(actual, expected, dtype)
    if dtype != torch.float32:
        loss = cuda.cross_entropy_streaming(x.hidden, x.weight, x.bias.float(), x.target, -100)
        assert_close(loss, results[1][0], torch.float32)


@pytest.mark.parametrize("dtype", cuda.DTYPES)
def test_gumbel_softmax(on_host, dtype):
    x = make_tensors(dtype, False)
    logits = x.hidden @ x.weight.T
    results = [serving.gumbel_softmax(logits, 0.7, x.seed) for serving in (on_host, reference)]
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, dtype)
