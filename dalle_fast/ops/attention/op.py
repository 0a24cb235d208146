"""Sparse attention as one torch operation: arguments checked once, then one of the implementations.

`dalle_fast::sparse_attention` and `dalle_fast::sparse_attention_backward` are registered with `torch.library` from
Python. Which implementation serves is decided when real tensors arrive, below autograd and below tracing, so that a
compiled graph holds one opaque operation. A mask travels as the six integers of `AttentionMask.encode`.

The operation returns lse in any case, as the backward pass takes it. An implementation is told who will see it:
lse="exact" for a caller who asked for it; "rounded" for the backward pass alone, to which the logarithm of the sum that
out was divided by, of probabilities as they were rounded, is as good; "none" where nobody will, and it may return None.

B batch, H heads, S sequence, D head size, T text, N vmapped dimension.
"""

from __future__ import annotations

import functools
import importlib
import numbers
import sys
import warnings

import numpy as np
import torch

from dalle_fast.masks import AttentionMask
from dalle_fast.ops.attention import reference
from dalle_fast.ops.calls import (
    SingleLevelFunction,
    autocast_dtype,
    below_autograd,
    device_type,
    has_tangent,
    has_transforms,
    is_forward_mode,
    is_plain,
    needs_grad,
    single_level,
    with_forward_mode,
)
from dalle_fast.ops.choice import callers_level, check_impl, choose
from dalle_fast.ops.dtypes import check_dense, check_tensor
from dalle_fast.ops.registry import LIBRARY, register

MAX_HEAD_DIM = 128
_LARGEST = sys.float_info.max
LENGTH_DTYPES = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)

IMPLS = ("auto", "reference", "cpu", "triton")
AUTO = {"cpu": ("cpu",), "cuda": ("triton",)}
_NAME_AND_COST = ("sparse_attention", "holds S x S logits in memory")


def sparse_attention(query, key, value, mask, *, scale=None, text_lengths=None, return_lse=False, impl="auto"):
    """See `dalle_fast.nn.functional.sparse_attention`, the public name of this function."""
    if scale is None and text_lengths is None and not return_lse and impl in ("auto", "cpu"):
        out = _at_once(query, key, value, mask)
        if out is not None:
            return out
    scale = _check(query, key, value, mask, scale, text_lengths, impl)
    _, H, S, _ = query.shape
    # Not what is compiled: sizes may be open, and to look at them would close them.
    if not torch.compiler.is_compiling() and H == mask.seq_len != S:
        warn_of_layout(query, f"(batch, heads, sequence, head size): {S} positions of {H} heads", "use transpose(1, 2)")
    if dtype := autocast_dtype(query):
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if impl == "reference" and is_forward_mode():  # plain torch, which has forward-mode derivatives
        out, lse = reference.forward(query, key, value, canonical_lengths(text_lengths, mask.text_len), mask, scale)
    else:
        out, lse = _forward(query, key, value, text_lengths, mask.encode(), scale, bool(return_lse), impl)
    return (out, lse) if return_lse else out


def _at_once(query, key, value, mask):
    """out of the plainest calls on a CPU, those that ask nothing special, by the shortest way; None for all others.

    It takes nothing that `_check` would refuse, and gives what the longer way gives.
    """
    tensors = (query, key, value)
    if not (type(query) is type(key) is type(value) is torch.Tensor and type(mask) is AttentionMask and query.is_cpu):
        return None
    if needs_grad(tensors) or not is_plain(tensors) or autocast_dtype(query):
        return None
    return implementation("cpu").forward_at_once(query, key, value, mask)


# -- checks ------------------------------------------------------------------------------------------------------------


def _check(query, key, value, mask, scale, text_lengths, impl) -> float:
    """Raise TypeError or ValueError for what no implementation takes; returns the scale."""
    if not isinstance(mask, AttentionMask):
        raise TypeError(f"mask must be an AttentionMask (see dalle_fast.masks), got {type(mask).__name__}")
    check_impl(impl, IMPLS)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor)
    if query.dim() != 4:
        raise ValueError(f"query must have 4 dimensions (batch, heads, sequence, head size), got {tuple(query.shape)}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != query.shape:
            raise ValueError(f"{name} must have shape {tuple(query.shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype != query.dtype and (tensor.dtype == torch.float64 or autocast_dtype(query) is None):
            raise TypeError(f"{name} must have query's dtype {query.dtype}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on query's device {query.device}, got {tensor.device}")
    B, _, S, D = query.shape
    if S > mask.seq_len:
        raise ValueError(f"query must have at most the mask's {mask.seq_len} positions, got {S} ({mask!r})")
    if not 1 <= D <= MAX_HEAD_DIM:
        raise ValueError(f"query must have a head size from 1 to {MAX_HEAD_DIM}, got {D}")
    if text_lengths is not None:
        check_text_lengths(text_lengths, B, query.device)
    return check_scale(scale, D)


def warn_of_layout(query, read_as, otherwise):
    """Of a query that would be as long as the mask in another layout, and is a short prefix in this one."""
    warnings.warn(
        f"query of shape {tuple(query.shape)} is read as {read_as}, as many as the mask has positions: if they are the "
        f"sequence, {otherwise}",
        stacklevel=callers_level(),
    )


def check_scale(scale, D) -> float:
    """The factor of the logits as a float; D ** -0.5 for None. Raises TypeError or ValueError."""
    if scale is None:
        return D**-0.5
    if isinstance(scale, torch.Tensor) and scale.dim() == 0 and scale.is_cpu and not scale.requires_grad:
        scale = scale.item()  # torch takes one for a number too
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(f"scale must be a number or None, got {scale!r} of type {type(scale).__name__}")
    if isinstance(scale, np.generic):
        scale = scale.item()  # NumPy's float32 would round the largest float to infinity, and be equal to it
    # Not math.isfinite, which takes neither a number that a compiled graph leaves open nor any integer.
    if not -_LARGEST <= scale <= _LARGEST:
        raise ValueError(f"scale must be finite, got {scale!r}")
    return float(scale)


def check_text_lengths(text_lengths, B, device):
    """Raise for all but the range, which only a look at the numbers can tell: see `canonical_lengths`."""
    if not isinstance(text_lengths, torch.Tensor):
        raise TypeError(f"text_lengths must be an integer tensor or None, got {type(text_lengths).__name__}")
    check_dense("text_lengths", text_lengths)
    if text_lengths.dtype not in LENGTH_DTYPES:
        raise TypeError(f"text_lengths must be an integer tensor (int32 or int64), got {text_lengths.dtype}")
    if text_lengths.shape != (B,):
        raise ValueError(f"text_lengths must have shape ({B},), got {tuple(text_lengths.shape)}")
    if text_lengths.device != device:
        raise ValueError(f"text_lengths must be on query's device {device}, got {text_lengths.device}")


def canonical_lengths(text_lengths, T):
    """Contiguous: on a CPU int32, checked to be in [0, T]; elsewhere, where a look would wait for the device, int32 or
    int64 as they are, and who computes clamps what it reads: a launch for that would be one of every layer and token.
    """
    if text_lengths is None:
        return None
    if not text_lengths.is_cpu:
        wide = text_lengths.dtype in (torch.int32, torch.int64)
        return (text_lengths if wide else text_lengths.to(torch.int32)).contiguous()
    if text_lengths.numel():
        low, high = (int(x) for x in torch.aminmax(text_lengths))
        if low < 0 or high > T:
            raise ValueError(f"text_lengths must be from 0 to the mask's text_len {T}, got values from {low} to {high}")
    return text_lengths.to(torch.int32).contiguous()


# -- who serves --------------------------------------------------------------------------------------------------------


@functools.cache
def implementation(name):
    """The module that is called `name`; those but the reference are imported when first asked for."""
    return reference if name == "reference" else importlib.import_module(f"dalle_fast.ops.attention.{name}")


def _choose(impl, query, key, value, mask):
    return choose(_NAME_AND_COST, impl, device_type(query), implementation, AUTO, query, key, value, mask)


torch.serialization.add_safe_globals([AttentionMask])  # checked as it is loaded; masks does without torch

# -- the operations ----------------------------------------------------------------------------------------------------


def _forward_kernel(query, key, value, text_lengths, mask, scale, exact_lse, impl, *, if_unseen="rounded"):
    mask = AttentionMask.decode(mask)
    text_lengths = canonical_lengths(text_lengths, mask.text_len)
    serving = _choose(impl, query, key, value, mask)
    lse = "exact" if exact_lse else if_unseen
    return serving.forward(query, key, value, text_lengths, mask, scale, lse=lse)


_forward_alone = functools.partial(_forward_kernel, if_unseen="none")  # without a backward pass


# The dispatcher's. Who computes is given addresses, and an operation may be called past the public function: by a program
# that was compiled ahead of time, which looks at no shape that it is fed.


def _checked_forward(query, key, value, text_lengths, mask, scale, exact_lse, impl):
    _check(query, key, value, AttentionMask.decode(mask), scale, text_lengths, impl)
    return _forward_kernel(query, key, value, text_lengths, mask, scale, exact_lse, impl)


def _checked_backward(grad_out, grad_lse, query, key, value, out, lse, text_lengths, mask, scale, impl):
    _check(query, key, value, AttentionMask.decode(mask), scale, text_lengths, impl)
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    for name, tensor, shape, dtype in (
        ("grad_out", grad_out, query.shape, query.dtype),
        ("out", out, query.shape, query.dtype),
        ("lse", lse, query.shape[:3], lse_dtype),
        ("grad_lse", grad_lse, query.shape[:3], lse_dtype),
    ):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype):
            got = f"{tensor.dtype} and {tuple(tensor.shape)}"
            raise ValueError(f"{name} must have dtype {dtype} and shape {tuple(shape)}, got {got}")
    return _backward_kernel(grad_out, grad_lse, query, key, value, out, lse, text_lengths, mask, scale, impl)


def _backward_kernel(grad_out, grad_lse, query, key, value, out, lse, text_lengths, mask, scale, impl):
    mask = AttentionMask.decode(mask)
    text_lengths = canonical_lengths(text_lengths, mask.text_len)
    serving = _choose(impl, query, key, value, mask)
    return serving.backward(grad_out, grad_lse, query, key, value, out, lse, text_lengths, mask, scale)


def _forward_fake(query, key, value, text_lengths, mask, scale, exact_lse, impl):
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=lse_dtype)


def _backward_fake(grad_out, grad_lse, query, key, value, out, lse, text_lengths, mask, scale, impl):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


# -- gradients ---------------------------------------------------------------------------------------------------------


# Our autograd kernels run below functorch's transforms, once per level, so these are functions of a single level: with
# torch.autograd.Function in their place torch.func.grad would be refused.


def _below_autograd(op, *args):
    """Inside a function's forward: call an operation past this level's autograd."""
    with below_autograd():
        if not has_transforms():
            return op(*args)
        # The function has turned gradients off, for the levels below its own too, whose gradients are still wanted.
        with torch.enable_grad(), with_forward_mode():
            return op(*args)


class _Attention(SingleLevelFunction):
    """`compute` is the operation without its autograd, or the kernel alone."""

    @staticmethod
    def forward(ctx, compute, query, key, value, text_lengths, mask, scale, exact_lse, impl):
        out, lse = compute(query, key, value, text_lengths, mask, scale, exact_lse, impl)
        ctx.save_for_backward(query, key, value, out, lse, text_lengths)
        ctx.set_materialize_grads(False)
        ctx.rest = mask, scale, impl
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        if grad_out is None and grad_lse is None:
            return (None,) * 9
        query, key, value, out, lse, text_lengths = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grads = _backward(grad_out, grad_lse, query, key, value, out, lse, text_lengths, *ctx.rest)
        return None, *grads, *(None,) * 5


class _AttentionBackward(SingleLevelFunction):
    """The backward operation, itself differentiable: the second derivative goes through the dense reference."""

    @staticmethod
    def forward(ctx, compute, grad_out, grad_lse, query, key, value, out, lse, text_lengths, mask, scale, impl):
        grads = compute(grad_out, grad_lse, query, key, value, out, lse, text_lengths, mask, scale, impl)
        ctx.save_for_backward(grad_out, grad_lse, query, key, value, text_lengths)
        ctx.rest = mask, scale
        return grads

    @staticmethod
    def backward(ctx, *grad_grads):
        grad_out, grad_lse, query, key, value, text_lengths = ctx.saved_tensors
        mask, scale = ctx.rest
        mask = AttentionMask.decode(mask)

        def gradients(grad_out, query, key, value, grad_lse=None):
            return reference.backward(grad_out, grad_lse, query, key, value, None, None, text_lengths, mask, scale)

        inputs = (grad_out, query, key, value) if grad_lse is None else (grad_out, query, key, value, grad_lse)
        of_grad_out, of_query, of_key, of_value, *of_grad_lse = torch.func.vjp(gradients, *inputs)[1](grad_grads)
        # out and lse get none: they are functions of query, key and value, through which everything has been counted.
        return None, of_grad_out, *(of_grad_lse or [None]), of_query, of_key, of_value, *(None,) * 6


def _with_autograd(op, function, tensors):
    """The kernel at the autograd key: `function` where a gradient is needed, straight to `op` elsewhere."""
    compute = functools.partial(_below_autograd, op)

    def autograd_kernel(*args):
        if has_tangent(args[:tensors]):
            raise NotImplementedError(
                f'sparse_attention has forward-mode derivatives with impl="reference" only, got impl={args[-1]!r}'
            )
        if needs_grad(args[:tensors]):
            if not has_transforms():
                return function.apply(compute, *args)
            with single_level():
                return function.apply(compute, *args)
        with below_autograd():
            return op(*args)

    return autograd_kernel


def _directly(op, kernel, alone, function, tensors):
    """`op` by a shorter way, where nothing stands in it: see `is_plain`."""

    def call(*args):
        given = tuple(x for x in args[:tensors] if x is not None)
        if not is_plain(given):
            return op(*args)
        return function.apply(kernel, *args) if needs_grad(given) else alone(*args)

    return call


def _vmapped(op, tensors):
    """The vmap rule: (N, B, ...) is a batch of N * B samples."""

    def rule(info, in_dims, *args):
        N = info.batch_size
        fronted = [
            None if x is None else x.expand(N, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(args[:tensors], in_dims[:tensors], strict=True)
        ]
        outputs = op(*(None if x is None else x.flatten(0, 1) for x in fronted), *args[tensors:])
        return tuple(x.unflatten(0, fronted[0].shape[:2]) for x in outputs), (0,) * len(outputs)

    return rule


def _register(schema, checked, kernel, alone, fake, function, tensors):
    """All that torch needs of one operation; `tensors` counts its leading tensor arguments, text_lengths the last.

    `checked` is the kernel for whom the dispatcher sends. `alone` is that for plain calls without a gradient: it may leave
    out what only a backward pass would take. Returns the function to call the operation by.
    """
    op = register(schema, checked, fake)
    LIBRARY.impl(op.name(), _with_autograd(op, function, tensors - 1), "Autograd")
    torch.library.register_vmap(op.name(), _vmapped(op, tensors), lib=LIBRARY)
    return _directly(op, kernel, alone, function, tensors)


_forward = _register(
    "sparse_attention(Tensor query, Tensor key, Tensor value, Tensor? text_lengths, int[] mask, float scale, "
    "bool exact_lse, str impl) -> (Tensor, Tensor)",
    _checked_forward,
    _forward_kernel,
    _forward_alone,
    _forward_fake,
    _Attention,
    tensors=4,
)
_backward = _register(
    "sparse_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
    "Tensor out, Tensor lse, Tensor? text_lengths, int[] mask, float scale, str impl) -> (Tensor, Tensor, Tensor)",
    _checked_backward,
    _backward_kernel,
    _backward_kernel,
    _backward_fake,
    _AttentionBackward,
    tensors=8,
)
