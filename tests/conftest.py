"""What the tests share: who serves each operation on this machine, inputs, and the parity data beside the repository.

B batch, H heads, S sequence, D head size, T text.
"""

import dataclasses
import functools
import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # threads that wait for work must not keep the other processes from theirs
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from dalle_fast import _extension
from dalle_fast.nn import functional as F

# Their fixtures compile CUDA for the host or a GPU, or run another process with all their cases.
TOGETHER = (
    "test_codebook_cuda",
    "test_codebook_cuda_host",
    "test_processes",
    "test_triton_interpreter",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `-n`, any process runs any test, but one process all tests of a file that share what takes long to make.

    xdist_group, which pytest-xdist has for that, is not heeded with pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return file if Path(file).stem in TOGETHER else nodeid

    return Scheduling(config, log)


TESTS = Path(__file__).resolve().parent
GOLDENS = TESTS.parents[1] / "shared" / "goldens"


@dataclasses.dataclass(frozen=True)
class Server:
    """An implementation, and the device its tensors live on."""

    impl: str
    device: str

    def __call__(self, *args, **keywords):
        return F.sparse_attention(*args, impl=self.impl, **keywords)


# "cpu" is here whether it was built or not: tests must not pass because the kernels are missing. Triton's interpreter
# has tests of its own.
SERVERS = [Server("reference", "cpu"), Server("cpu", "cpu")]
if torch.cuda.is_available():
    SERVERS.append(Server("triton", "cuda"))


@pytest.fixture(params=SERVERS, ids=lambda server: server.impl)
def server(request):
    return request.param


@dataclasses.dataclass(frozen=True)
class CodebookServer:
    """An implementation of the codebook operation, and the device its tensors live on.

    Its attributes are the functions: `serve.codebook_argmax(hidden, weight)`.
    """

    impl: str
    device: str

    def __getattr__(self, name):
        return functools.partial(getattr(F, name), impl=self.impl)


CODEBOOK_SERVERS = [CodebookServer("reference", "cpu"), CodebookServer("cpu", "cpu")]
if torch.cuda.is_available():
    CODEBOOK_SERVERS.append(CodebookServer("cuda", "cuda"))


@pytest.fixture(params=CODEBOOK_SERVERS, ids=lambda serve: serve.impl)
def serve(request):
    return request.param


@pytest.fixture
def make():
    """make(shape, dtype, device, seed, count): tensors of standard normal numbers, the same in every run."""

    def make(shape, dtype=torch.float32, device="cpu", *, seed=0, count=3):
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(count)]

    return make


@pytest.fixture
def golden():
    """golden(name): tensors of the parity data `name`, as a dictionary."""

    def load(name):
        path = GOLDENS / f"{name}.safetensors"
        if not path.exists():
            pytest.skip(f"no parity data: {path.name} is expected in shared/goldens beside the repository")
        return pytest.importorskip("safetensors.torch").load_file(path)

    return load


@pytest.fixture(scope="module")
def one_thread():
    """For models that are smaller than what a second thread costs: `pytestmark = pytest.mark.usefixtures("one_thread")`."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_kernels(monkeypatch):
    """Whoever asks for one of our CPU kernels fails: what runs is the reference."""

    def native():
        raise AssertionError("a kernel was asked for")

    monkeypatch.setattr(_extension, "native", native)


@pytest.fixture
def threads():
    """torch.set_num_threads, restored after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def assert_same_bits_with_any_threads(threads):
    """assert_same_bits_with_any_threads(everything, product): the tensors of everything(), on 1, 2 and 3 threads.

    product() is torch's matrix product that they are made of. Where its own sums depend on the number of threads, as
    MKL's do on AVX2, the tensors are the same to rounding.
    """

    def check(everything, product):
        first, product_before = everything(), product()
        for count in (1, 2, 3):
            threads(count)
            if torch.equal(product_before, product()):
                assert all(torch.equal(a, b) for a, b in zip(first, everything(), strict=True)), f"{count} threads"
            else:
                torch.testing.assert_close(everything(), first, msg=lambda text: f"{count} threads: {text}")

    return check
