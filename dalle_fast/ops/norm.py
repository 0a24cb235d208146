"""A residual's sum and the layer norm behind it as one torch operation: on a GPU two launches fewer for each residual.

`dalle_fast::add_norm` is registered as in attention/op.py. It has no gradient; where one is needed, and off the GPU, a
call goes to torch.

R rows, W width.
"""

from __future__ import annotations

import torch

from dalle_fast.ops import on_triton
from dalle_fast.ops.calls import has_global_hooks, is_hooked, is_transformed, needs_grad
from dalle_fast.ops.dtypes import DTYPES
from dalle_fast.ops.registry import register

MAX_WIDTH = 8192  # a row is in the registers of one program


def add_norm(x, update, norm, *, impl="auto"):
    """(x + update, norm(x + update)), both in x's dtype.

    Args:
        x: (R, W). update: (R, W), or None for nothing to add.
        norm: a torch.nn.LayerNorm; another module, or one with hooks, is called.
        impl: "reference" is torch's; anything else takes one launch on a GPU, where that serves.
    """
    if impl != "reference" and x.is_cuda and _is_served(x, update, norm):
        return _add_norm_op(x, update, norm.weight, norm.bias, norm.eps)
    x = x if update is None else x + update
    return x, norm(x)


def _is_served(x, update, norm):
    if type(norm) is not torch.nn.LayerNorm or is_hooked(norm) or has_global_hooks():
        return False
    if torch.compiler.is_compiling() or is_transformed():
        return False
    if torch.is_autocast_enabled("cuda") or x.dtype not in DTYPES or x.dim() != 2 or not 1 <= x.shape[1] <= MAX_WIDTH:
        return False
    rows, columns = (x,) if update is None else (x, update), (norm.weight, norm.bias)
    if any(tensor is None or tensor.shape != x.shape[1:] for tensor in columns):
        return False
    if any(tensor.shape != x.shape for tensor in rows):
        return False
    tensors = rows + columns
    if any(t.dtype != x.dtype or t.device != x.device or not t.is_contiguous() for t in tensors):
        return False
    return not needs_grad(tensors) and not on_triton.why_not(x, "x")


# -- the operation -----------------------------------------------------------------------------------------------------


def _add_norm_kernel(x, update, weight, bias, eps):
    from dalle_fast.ops.norm_triton import add_norm

    return add_norm(x, update, weight, bias, eps)


def _add_norm_fake(x, update, weight, bias, eps):
    return torch.empty_like(x), torch.empty_like(x)


_add_norm_op = register(
    # Without an update the sum is a copy: what an operation returns must not be what it was given.
    "add_norm(Tensor x, Tensor? update, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)",
    _add_norm_kernel,
    _add_norm_fake,
)
