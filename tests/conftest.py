"""What the tests share: who serves each operation on this machine, inputs, and the parity data beside the repository.

B batch, H heads, S sequence, D head size, T text.
"""

import dataclasses
import functools
from pathlib import Path

import pytest
import torch

from dalle_fast.nn import functional as F

GOLDENS = Path(__file__).resolve().parents[2] / "shared" / "goldens"


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


@pytest.fixture
def threads():
    """torch.set_num_threads, restored after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
