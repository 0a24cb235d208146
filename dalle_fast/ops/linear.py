"""A linear layer of few rows as one torch operation: what generating one token after another spends most time in.

`dalle_fast::linear` is registered as in attention/op.py. It has no gradient; where one is needed, and wherever torch's is
as fast, a call goes to torch.

R rows (all dimensions but the last), K in, N out.
"""

from __future__ import annotations

import functools
import math

import torch
from torch.autograd import forward_ad

from dalle_fast import _extension

IMPLS = ("auto", "reference", "cpu")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # the order of DType in csrc/cpu/attention.h

# Numbers of rows for which ours is faster than torch's, by the instruction set in use: in float32, where MKL does not pack
# for one or two, and in 16 bits, which oneDNN multiplies with instructions of their own. Measured on an Intel Sapphire
# Rapids, the 48 layers of a model of 12 blocks of width 512 one after another.
ROWS = {
    "portable": (range(0), range(0)),
    "avx2": (range(4, 17), range(0)),
    "avx512": (range(3, 17), range(1, 5)),
    "avx512_bf16": (range(3, 17), range(1, 5)),
    "avx512_amx": (range(3, 17), range(1, 5)),
}


def linear(x, weight, bias=None, *, impl="auto"):
    """See `dalle_fast.nn.functional.linear`, the public name of this function."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    ours = impl == "cpu" or (impl == "auto" and _is_short(x) and not _why_not(x, weight, bias))
    if not ours:
        return torch.nn.functional.linear(x, weight, bias)
    if impl == "cpu" and (reasons := _why_not(x, weight, bias)):
        raise ValueError(f"impl='cpu' cannot serve this call: {'; '.join(reasons)}")
    return _linear_op(x, weight, bias)


def _is_short(x):
    if torch.compiler.is_compiling():  # compilers have their own ways
        return False
    if x.device.type != "cpu" or x.dim() == 0:
        return False
    return math.prod(x.shape[:-1]) in _rows()[x.dtype != torch.float32]


@functools.cache
def _rows():
    return (range(0), range(0)) if _extension.why_missing() else ROWS[_extension.native().instruction_set()]


def _why_not(x, weight, bias) -> list[str]:
    """Every reason why the kernel cannot serve; empty if it can."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    reasons = []
    if any(tensor.device.type != "cpu" for tensor in tensors):
        reasons.append("it needs CPU tensors")
    if x.dtype not in DTYPES or any(tensor.dtype != x.dtype for tensor in tensors):
        kinds = ", ".join(str(tensor.dtype) for tensor in tensors)
        reasons.append(f"it computes in one dtype, float32, float16 or bfloat16, got {kinds}")
    if torch.is_autocast_enabled("cpu"):
        reasons.append("autocast is on")
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        shapes = f"{tuple(x.shape)} and {tuple(weight.shape)}"
        reasons.append(f"it needs x (..., K) and weight (N, K), got {shapes}")
    elif weight.stride(1) != 1 and weight.numel():
        reasons.append("it needs weights whose rows lie side by side")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_contiguous()):
        reasons.append(f"it needs a contiguous bias ({weight.shape[0]},), got {tuple(bias.shape)}")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        reasons.append("a gradient is needed")
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        reasons.append("a transformation of functions is active")
    if missing := _extension.why_missing():
        reasons.append(missing)
    return reasons


# -- the operation -----------------------------------------------------------------------------------------------------

_library = torch.library.Library("dalle_fast", "FRAGMENT")
_library.define(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_linear_op = torch.ops.dalle_fast.linear.default


def _linear_kernel(x, weight, bias):
    # Few operations of torch: weights have just gone through the caches, so that each costs ten times what it does alone.
    N, K = weight.shape
    rows = x if x.dtype == torch.float32 else x.to(torch.float32)
    if not rows.is_contiguous():
        rows = rows.contiguous()
    out = torch.empty((*x.shape[:-1], N), dtype=torch.float32)
    _extension.native().linear(
        (math.prod(x.shape[:-1]), N, K),
        DTYPES[weight.dtype],
        (rows.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr()),
        weight.stride(0),
        torch.get_num_threads(),
    )
    return out if x.dtype == torch.float32 else out.to(x.dtype)


def _linear_fake(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_library.impl("linear", _linear_kernel, "CompositeExplicitAutograd")
torch.library.register_fake("dalle_fast::linear", _linear_fake, lib=_library)
