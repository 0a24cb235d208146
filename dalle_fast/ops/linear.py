"""A linear layer of few rows as one torch operation: what generating one token after another spends most time in.

`dalle_fast::linear` is registered as in attention/op.py. It has no gradient; where one is needed, and wherever torch's is
as fast, a call goes to torch. CPU kernels are in csrc/cpu/linear_kernels.cpp, the one for GPUs in linear_triton.py.

R rows (all dimensions but the last), K in, N out.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys

import torch
from torch.overrides import has_torch_function

from dalle_fast import _extension
from dalle_fast.ops import on_triton
from dalle_fast.ops.calls import autocast_dtype, is_transformed, needs_grad
from dalle_fast.ops.choice import check_impl
from dalle_fast.ops.dtypes import DTYPES, address
from dalle_fast.ops.registry import register

IMPLS = ("auto", "reference", "cpu", "triton")
ACTIVATIONS = (None, "gelu")

# Numbers of rows for which ours is faster than torch's, by the instruction set in use, in the dtypes' order: in float32, where
# MKL does not pack for one or two, and in 16 bits, which oneDNN multiplies with instructions of their own, as ours does
# bfloat16 with AMX. Measured on an Intel Sapphire Rapids, the 48 layers of a model of 12 blocks of width 512 one after another.
NO_ROWS = range(1, 1)
ROWS = {
    "portable": (NO_ROWS, NO_ROWS, NO_ROWS),
    "avx2": (range(4, 17), NO_ROWS, NO_ROWS),
    "avx512": (range(3, 17), range(1, 5), range(1, 5)),
    "avx512_bf16": (range(3, 17), range(1, 5), range(1, 5)),
    "avx512_amx": (range(3, 17), range(1, 5), range(1, 65)),
}


# What "auto" leaves to torch on a GPU: more rows, and weights that are read faster than a kernel starts. Not measured.
TRITON_ROWS = range(1, 65)
LEAST_COLUMNS, LEAST_WEIGHTS = 512, 1 << 20


def linear(x, weight, bias=None, *, activation=None, impl="auto"):
    """See `dalle_fast.nn.functional.linear`, the public name of this function."""
    check_impl(impl, IMPLS)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or 'gelu', got {activation!r}")
    if impl == "auto":
        impl = _automatic(x, weight, bias)
    elif impl != "reference" and (reasons := _why_not(impl, x, weight, bias)):
        raise ValueError(f"impl={impl!r} cannot serve this call: {'; '.join(reasons)}")
    if impl == "reference":
        return _activate(torch.nn.functional.linear(x, weight, bias), activation)
    return _linear_op(x, weight, bias, activation, impl)


def _activate(out, activation):
    return torch.nn.functional.gelu(out) if activation == "gelu" else out


def _automatic(x, weight, bias):
    """The implementation for "auto"; few operations of torch for the calls that are none of ours."""
    if torch.compiler.is_compiling() or x.dim() == 0:  # compilers have their own ways
        return "reference"
    if has_torch_function((x, weight, bias)):  # and so have subclasses, as of quantized weights
        return "reference"
    rows = math.prod(x.shape[:-1])
    if x.is_cpu and x.dtype in DTYPES and rows in _rows()[DTYPES[x.dtype]]:
        impl = "cpu"
    elif x.is_cuda and rows in TRITON_ROWS and _is_worth_it(x, weight, bias):
        impl = "triton"
    else:
        return "reference"
    return "reference" if _why_not(impl, x, weight, bias) else impl


def _is_worth_it(x, weight, bias):
    """Is the weight large, and are all rows where 16 bytes can be read at once?"""
    if weight.dim() != 2:
        return False
    N, K = weight.shape
    addresses = [tensor.data_ptr() for tensor in (x, weight, bias) if tensor is not None]
    strides = [tensor.stride(-2) * tensor.element_size() for tensor in (x, weight) if tensor.dim() > 1]
    even = N % 16 == 0 and K % 16 == 0 and not any(number % 16 for number in addresses + strides)
    return even and K >= LEAST_COLUMNS and N * K >= LEAST_WEIGHTS


@functools.cache
def _rows():
    return (NO_ROWS,) * len(DTYPES) if _extension.why_missing() else ROWS[_extension.native().instruction_set()]


def few_rows(dtype) -> int:
    """The most rows for which weights are read where they lie on this CPU, not packed; 0 where that never is best."""
    return _rows()[DTYPES[dtype]].stop - 1


def _why_not(impl, x, weight, bias) -> list[str]:
    """Every reason why this implementation, "cpu" or "triton", cannot serve; empty if it can."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    dtypes = tuple(DTYPES)
    reasons = []
    if any(tensor.layout != torch.strided for tensor in tensors):
        return [f"it needs dense tensors, got {', '.join(str(tensor.layout) for tensor in tensors)}"]
    if impl == "cpu":
        if not all(tensor.is_cpu for tensor in tensors):
            reasons.append("it needs CPU tensors")
    else:
        reasons += on_triton.why_not(x, "x")
        dtypes = (torch.float16, torch.bfloat16)
        if any(tensor.device != x.device for tensor in tensors):
            reasons.append(f"it needs one device, got {', '.join(str(tensor.device) for tensor in tensors)}")
        if (rows := math.prod(x.shape[:-1])) not in TRITON_ROWS:
            reasons.append(f"it needs 1 to {TRITON_ROWS[-1]} rows, got {rows}")
        if x.is_cuda and not reasons and _is_captured_too_early(x.device):
            reasons.append("the first call on a device must not be captured in a CUDA graph")
    if x.dtype not in dtypes or any(tensor.dtype != x.dtype for tensor in tensors):
        kinds = ", ".join(str(tensor.dtype) for tensor in tensors)
        names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        reasons.append(f"it computes in one dtype, {', '.join(names[:-1])} or {names[-1]}, got {kinds}")
    if autocast_dtype(x):
        reasons.append("autocast is on")
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        shapes = f"{tuple(x.shape)} and {tuple(weight.shape)}"
        reasons.append(f"it needs x (..., K) and weight (N, K), got {shapes}")
    elif weight.stride(1) != 1 and weight.numel():
        reasons.append("it needs weights whose rows lie side by side")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_contiguous()):
        reasons.append(f"it needs a contiguous bias ({weight.shape[0]},), got {tuple(bias.shape)}")
    if needs_grad(tensors):
        reasons.append("a gradient is needed")
    if is_transformed():
        reasons.append("a transformation of functions is active")
    if impl == "cpu" and (missing := _extension.why_missing()):
        reasons.append(missing)
    return reasons


def _is_captured_too_early(device):
    with torch.cuda.device(device):
        if not torch.cuda.is_current_stream_capturing():
            return False
    from dalle_fast.ops import linear_triton

    return not linear_triton.can_be_captured(device)


def counters_of_graph(device):
    """A context for capturing a CUDA graph that will be replayed on the current stream alone.

    It gives what must live as long as the graph. Without it the graph takes of what its device has for all, for good.
    """
    module = sys.modules.get("dalle_fast.ops.linear_triton")  # where it is not loaded, captured calls are torch's
    return contextlib.nullcontext() if module is None else module.counters_of_graph(device)


# -- the operation -----------------------------------------------------------------------------------------------------


def _linear_kernel(x, weight, bias, activation, impl):
    if impl == "cpu":
        return linear_product(x, weight, bias, activation).to(x.dtype)
    from dalle_fast.ops import linear_triton

    return linear_triton.linear(x, weight, bias, activation)


def linear_product(x, weight, bias=None, activation=None):
    """x (..., K) @ weight (N, K).T + bias (N,), in float32, on a CPU.

    x, and weight with bias, in a dtype of DTYPES; neighbours in a row of weight side by side.
    """
    # Few operations of torch: weights have just gone through the caches, so that each costs ten times what it does alone.
    N, K = weight.shape
    rows = x if x.dtype == torch.float32 else x.to(torch.float32)
    if not rows.is_contiguous():
        rows = rows.contiguous()
    out = torch.empty((*x.shape[:-1], N), dtype=torch.float32, device=x.device)
    _extension.native().linear(
        (math.prod(x.shape[:-1]), N, K),
        DTYPES[weight.dtype],
        (rows.data_ptr(), weight.data_ptr(), address(bias), out.data_ptr()),
        weight.stride(0),
        activation == "gelu",
        torch.get_num_threads(),
    )
    return out


def _linear_fake(x, weight, bias, activation, impl):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_linear_op = register(
    "linear(Tensor x, Tensor weight, Tensor? bias, str? activation, str impl) -> Tensor",
    _linear_kernel,
    _linear_fake,
)
