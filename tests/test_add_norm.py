"""A residual's sum and its norm: torch's, to the bit, wherever the kernel does not serve; and where it does.

The kernel is in test_triton_interpreter.py and test_triton_compile.py.

R rows, W width.
"""

import pytest
import torch

from dalle_fast.ops import norm as norm_ops
from dalle_fast.ops.norm import add_norm
from dalle_fast.testing import assert_as_exact_as_eager

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


def operands(make, R, W, dtype=torch.float32, device="cpu"):
    """x, update and a norm whose weight and bias are not those of a new one."""
    x, update = make((R, W), dtype, device, count=2)
    norm = torch.nn.LayerNorm(W, dtype=dtype, device=device).requires_grad_(False)
    norm.weight.normal_()
    norm.bias.normal_()
    return x, update, norm


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_cpu_it_is_torchs(make, dtype):
    x, update, norm = operands(make, 3, 40, dtype)
    total, out = add_norm(x, update, norm)
    assert torch.equal(total, x + update) and torch.equal(out, norm(x + update))
    total, out = add_norm(x, None, norm)
    assert total is x and torch.equal(out, norm(x))


def test_a_gradient_goes_through_torch(make):
    x, update, norm = operands(make, 3, 40)
    total, out = add_norm(x.requires_grad_(), update, norm)
    (total.sum() + out.square().sum()).backward()
    assert x.grad.abs().min() > 0


class OnGpu(torch.Tensor):
    """A CPU tensor that says that it is on a GPU: who serves is decided before anything is computed."""

    is_cuda = True


@pytest.fixture
def served(monkeypatch):
    """Calls that the kernel would serve, on a machine without a GPU."""
    calls = []
    monkeypatch.setattr(norm_ops.on_triton, "why_not", lambda tensor, name: [])
    monkeypatch.setattr(norm_ops, "_add_norm_op", lambda *tensors: calls.append(tensors) or tensors[:2])
    return calls


class Louder(torch.nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_the_kernel_serves_and_what_is_torchs(make, served, monkeypatch):
    x, update, norm = operands(make, 3, 40)
    x = x.as_subclass(OnGpu)
    add_norm(x, update, norm)
    add_norm(x, None, norm)
    assert len(served) == 2
    parameters = torch.nn.LayerNorm(40)
    with torch.no_grad():
        add_norm(x, update, parameters)
    assert len(served) == 3
    hooked, patched = (torch.nn.LayerNorm(40).requires_grad_(False) for _ in range(2))
    hooked.register_forward_hook(lambda module, arguments, out: 2 * out)
    patched.forward = torch.neg
    wide = torch.zeros(1, norm_ops.MAX_WIDTH + 1).as_subclass(OnGpu)
    calls = {
        "reference": lambda: add_norm(x, update, norm, impl="reference"),
        "a CPU": lambda: add_norm(x.as_subclass(torch.Tensor), update, norm),
        "a gradient": lambda: add_norm(x, update, parameters),
        "float64": lambda: add_norm(x.double(), update.double(), norm.double()),
        "two dtypes": lambda: add_norm(x, update.half(), norm.float()),
        "one row": lambda: add_norm(x[0], update[0], norm),
        "another shape": lambda: add_norm(x, update[:1], norm),
        "strides": lambda: add_norm(x, update.T.contiguous().T, norm),
        "no bias": lambda: add_norm(x, update, torch.nn.LayerNorm(40, bias=False).requires_grad_(False)),
        "a hook": lambda: add_norm(x, update, hooked),
        "a forward of its own": lambda: add_norm(x, update, patched),
        "a subclass": lambda: add_norm(x, update, Louder(40).requires_grad_(False)),
        "another norm": lambda: add_norm(x, update, torch.nn.RMSNorm(40).requires_grad_(False)),
        "two dimensions": lambda: add_norm(x, update, torch.nn.LayerNorm((3, 40)).requires_grad_(False)),
        "too wide": lambda: add_norm(wide, None, torch.nn.LayerNorm(wide.shape[1]).requires_grad_(False)),
        "a transformation": lambda: torch.func.vmap(lambda y: add_norm(y, y, norm)[1])(torch.stack((x, x))),
    }
    for name, call in calls.items():
        call()
        assert len(served) == 3, name
    assert torch.equal(add_norm(x, update, hooked)[1], 2 * torch.nn.LayerNorm(40)(x + update))
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, arguments, out: 2 * out)
    add_norm(x, update, norm)
    hook.remove()
    assert len(served) == 3
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")  # refused without a GPU
    add_norm(x, update, norm)
    assert len(served) == 3


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(make, dtype):
    for R, W in ((1, 1), (5, 129), (64, 2048), (3, 8191)):
        x, update, norm = operands(make, R, W, dtype, "cuda")
        for added in (update, None):
            total, out = add_norm(x, added, norm)
            expected, eager = add_norm(x, added, norm, impl="reference")
            assert torch.equal(total, expected)
            exact = norm.double()(expected.double())
            norm.to(dtype)
            assert_as_exact_as_eager(f"{R} x {W}", out, eager, exact)
