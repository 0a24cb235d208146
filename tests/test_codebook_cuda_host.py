"""From the operation down to the CUDA kernels, without a GPU: `cuda.py` over the bindings of the native module, with the
loops over chunks and the kernels compiled for the host (tests/simt). Only cuBLAS and streams are stand-ins.

N rows, K codes, I size of hidden, D size of an embedding.
"""

import functools
import importlib.machinery
import importlib.util
import itertools
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
from types import SimpleNamespace

import pytest
import torch

from dalle_fast.ops.codebook import cuda, reference

ROOT = pathlib.Path(__file__).parent.parent
N, K, I, D = 37, 200, 24, 12
ALL = (True,) * 4
BLAS = 77  # the handle that tests/simt/blas.cpp knows


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        pytest.skip("no C++ compiler to compile the CUDA source for the host")
    pybind11 = pytest.importorskip("pybind11", reason="pybind11, of the build environment, is not installed")
    folder = tmp_path_factory.mktemp("simt")
    path, whole = folder / "cuda_on_host.so", folder / "whole.cpp"
    simt, cuda_sources = ROOT / "tests/simt", ROOT / "csrc/cuda"
    sources = [*sorted(set(cuda_sources.glob("*.cpp")) - {cuda_sources / "blas_library.cpp"}), simt / "blas.cpp"]
    includes = [simt, pybind11.get_include(), sysconfig.get_path("include")]
    if not pathlib.Path(includes[-1], "Python.h").exists():
        pytest.skip("no headers of Python")
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden"]
    command += [f"-I{folder}" for folder in includes]
    # As one source: half of the time goes into pybind11's headers, which most of them include.
    sources = [simt / "native.cpp", *sources, *sorted(cuda_sources.glob("*.cu"))]
    whole.write_text("".join(f'#include "{source}"\n' for source in sources))
    subprocess.run([*command, whole, "-o", path], check=True)
    loader = importlib.machinery.ExtensionFileLoader("cuda_on_host", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("cuda_on_host", loader))
    loader.exec_module(module)
    return module


@pytest.fixture
def on_host(module, monkeypatch):
    """`cuda`, with chunks of 16 rows in poisoned memory: what nobody wrote is NaN."""
    monkeypatch.setattr(cuda, "_extension", SimpleNamespace(native=lambda: module))
    monkeypatch.setattr(cuda, "_stream", lambda: 0)
    monkeypatch.setattr(cuda, "_blas", lambda: BLAS)
    monkeypatch.setattr(cuda, "FORWARD_BYTES", 1)
    monkeypatch.setattr(cuda, "BACKWARD_BYTES", 1)
    monkeypatch.setattr(torch, "empty", functools.partial(poisoned, torch.empty))
    monkeypatch.setattr(torch, "empty_like", functools.partial(poisoned, torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", functools.partialmethod(new_poisoned, torch.Tensor.new_empty))
    return cuda


def poisoned(empty, *args, **options):
    memory = empty(*args, **options)
    return memory.fill_(torch.nan if memory.is_floating_point() else -1)


def new_poisoned(like, new_empty, *args, **options):
    return poisoned(functools.partial(new_empty, like), *args, **options)


def make_tensors(dtype, seed_per_row=False, sizes=(N, K, I, D)):
    N, K, I, D = sizes
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
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    if not actual.numel():
        return
    tolerance = 2e-5 if dtype == torch.float32 else 6 * torch.finfo(dtype).eps
    error = (actual.double() - expected.double()).abs().max()
    assert error <= tolerance * (1 + expected.double().abs().max())


def check_all(results, dtype):
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, dtype)


def check_gumbel_codebook(on_host, x, dtype, seed_per_row=False, hard=False, needs=ALL, grad_kl=True):
    args = (x.hidden, x.weight, x.bias, x.codebook, x.tau, x.seed, seed_per_row, hard)
    results = [serving.gumbel_codebook(*args) for serving in (on_host, reference)]
    check_all(results, dtype)
    _, kl, codes, stats = results[1]
    args = (
        x.grad_embedding, x.grad_kl if grad_kl else None, x.hidden, x.weight, x.bias, x.codebook, x.tau, x.seed, kl,
        codes, stats, seed_per_row, hard, needs,
    )  # fmt: skip
    check_all([serving.gumbel_codebook_backward(*args) for serving in (on_host, reference)], dtype)


@pytest.mark.parametrize("dtype", cuda.DTYPES)
@pytest.mark.parametrize("seed_per_row", [False, True])
@pytest.mark.parametrize("hard", [False, True])
def test_gumbel_codebook(on_host, dtype, seed_per_row, hard):
    x = make_tensors(dtype, seed_per_row)
    check_gumbel_codebook(on_host, x, dtype, seed_per_row, hard)
    check_gumbel_codebook(on_host, x, dtype, seed_per_row, hard, grad_kl=False)


@pytest.mark.parametrize("K", [1, 70, 300])
def test_codes_are_drawn_of_logits(on_host, K):
    """Of all of them, and of those that are left."""
    logits = torch.randn(9, K, generator=torch.Generator().manual_seed(1))
    seeds = torch.arange(9) * 977 - 5
    few = logits.masked_fill(torch.arange(K) % 7 != 0, -torch.inf)
    for z in (logits, few):
        assert torch.equal(on_host.sample_of_logits(z, seeds), reference.sample_of_logits(z, seeds))


@pytest.mark.parametrize("dtype", cuda.DTYPES)
@pytest.mark.parametrize("hard", [False, True])
def test_only_the_gradients_that_are_needed(on_host, dtype, hard):
    x = make_tensors(dtype, sizes=(20, 70, 5, 3))
    for needs in itertools.product([False, True], repeat=4):
        check_gumbel_codebook(on_host, x, dtype, hard=hard, needs=needs)
    for needs in itertools.product([False, True], repeat=3):
        args = (x.hidden, x.weight, x.bias, x.target, -100, x.row_weight, needs)
        check_all([serving.cross_entropy(*args) for serving in (on_host, reference)], dtype)


# Of one row or code, of odd numbers, of none.
SIZES = [(1, 1, 1, 1), (16, 64, 8, 8), (32, 65, 7, 5), (33, 201, 9, 13), (0, 70, 5, 3), (18, 70, 0, 0), (17, 3, 2, 40)]


@pytest.mark.parametrize("dtype", cuda.DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_every_size(on_host, sizes, dtype):
    x = make_tensors(dtype, sizes=sizes)
    for bias, needs in ((x.bias, ALL), (None, (True, True, False, True))):
        x.bias = bias
        for hard in (False, True):
            check_gumbel_codebook(on_host, x, dtype, hard=hard, needs=needs)
        args = (x.hidden, x.weight, x.bias, x.target, -100, x.row_weight[:1], needs[:3])
        if sizes[0]:
            check_all([serving.cross_entropy(*args) for serving in (on_host, reference)], dtype)
        args = (x.hidden, x.weight, x.bias, x.tau, x.seed, False)
        assert torch.equal(on_host.sample(*args), reference.sample(*args))


def test_every_stride(on_host):
    """Transposed matrices and those with gaps between rows go to cuBLAS as they are, others are copied."""
    x = make_tensors(torch.float32)

    def with_gaps(t, rows, columns):
        wide = torch.full((t.shape[0] * rows, t.shape[1] * columns + 3), torch.nan)[
            ::rows, : -3 if columns > 1 else None
        ]
        return wide[:, ::columns][:, : t.shape[1]].copy_(t)

    for change in (
        lambda t: t.T.contiguous().T,
        lambda t: with_gaps(t, 2, 1),
        lambda t: with_gaps(t, 1, 2),
        lambda t: with_gaps(t.T, 2, 1).T,
        lambda t: (t[:, :1] / 4).expand(t.shape),
    ):
        for name in ("hidden", "weight", "codebook", "grad_embedding"):
            tensors = {**vars(x), name: change(getattr(x, name))}
            check_gumbel_codebook(on_host, SimpleNamespace(**tensors), torch.float32)


def test_chunks_as_they_are_in_use(on_host, monkeypatch):
    """With more than one chunk of a size that is no power of 2."""
    monkeypatch.setattr(cuda, "FORWARD_BYTES", 48 * 4 * 70)
    monkeypatch.setattr(cuda, "BACKWARD_BYTES", 40 * 6 * 70)
    assert cuda.chunk_rows(6 * 70, gradients=True) == 32 and cuda.chunk_rows(4 * 70, gradients=False) == 48
    check_gumbel_codebook(on_host, make_tensors(torch.bfloat16, sizes=(100, 70, 5, 3)), torch.bfloat16)


def test_what_cublas_refuses_is_an_error(on_host, monkeypatch):
    monkeypatch.setattr(cuda, "_blas", lambda: BLAS + 1)
    x = make_tensors(torch.float32)
    with pytest.raises(RuntimeError, match="cublas[A-Za-z]* returned cublasStatus_t 1"):
        on_host.sample(x.hidden, x.weight, x.bias, None, None, False)


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


@pytest.mark.parametrize("dtype", cuda.DTYPES)
def test_gumbel_softmax(on_host, dtype):
    x = make_tensors(dtype, False)
    logits = x.hidden @ x.weight.T
    results = [serving.gumbel_softmax(logits, 0.7, x.seed) for serving in (on_host, reference)]
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, dtype)


WHICH_CUBLAS = """
import ctypes, sys
find, *_ = [ctypes.CDLL(path) for path in sys.argv[1:]]
print(find.found_version())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a module with CUDA is for Linux")
def test_the_cublas_that_torch_is_linked_with_is_taken(tmp_path):
    """Whichever others are loaded: a handle of one is not to be given to another."""
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        pytest.skip("no C++ compiler")

    def library(name, text, *options):
        source, path = tmp_path / f"{name}.cpp", tmp_path / name
        source.write_text(text)
        command = [compiler, "-std=c++17", "-shared", "-fPIC", source, f"-Wl,-soname,{name}", "-o", path, *options]
        subprocess.run(command, check=True)
        return path

    old, new = (
        library(f"libcublas.so.{version}", f'extern "C" int cublasGemmEx() {{ return {version}; }}')
        for version in (12, 13)
    )
    torch_of_old = library("libtorch_cuda.so", "", "-Wl,--no-as-needed", old, "-Wl,-rpath,$ORIGIN")
    asks = f'#include "{ROOT}/csrc/cuda/blas_library.cpp"\n' + (
        'extern "C" int found_version() {\n'
        '    void* const found = dalle_fast::find_in_cublas("cublasGemmEx");\n'
        "    return found ? reinterpret_cast<int (*)()>(found)() : 0;\n"
        "}\n"
    )
    find = library("find.so", asks, "-ldl")
    for loaded, expected in (((new, torch_of_old), "12"), ((torch_of_old, new), "12"), ((new,), "13"), ((), "0")):
        command = [sys.executable, "-c", WHICH_CUBLAS, find, *loaded]
        assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == expected
