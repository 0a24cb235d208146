"""One step of decoding as one torch operation: a query of each sample against its caption's text and its own cache.

`dalle_fast::sparse_attention_decode` is registered as in op.py. It has no gradient. The position travels as a tensor,
so that a CUDA graph replays with the position that the tensor then holds, and a compiled graph serves every position.

B samples, P prompts, H heads, D head size, T text, G image tokens, C slots of an image cache.
"""

from __future__ import annotations

import torch

from dalle_fast.integers import is_integer
from dalle_fast.masks import AttentionMask
from dalle_fast.ops.attention.op import (
    AUTO,
    IMPLS,
    MAX_HEAD_DIM,
    canonical_lengths,
    check_scale,
    check_text_lengths,
    implementation,
)
from dalle_fast.ops.calls import current_device, device_type, has_tangent, is_plain, needs_grad
from dalle_fast.ops.choice import check_impl, choose
from dalle_fast.ops.dtypes import check_tensor
from dalle_fast.ops.registry import register

_NAME_AND_COST = ("sparse_attention_decode", "copies the keys and values that it looks at")


def sparse_attention_decode(
    query,
    text_key,
    text_value,
    image_key,
    image_value,
    mask,
    position,
    *,
    text_lengths=None,
    scale=None,
    impl="auto",
):
    """See `dalle_fast.nn.functional.sparse_attention_decode`, the public name of this function."""
    tensors = (query, text_key, text_value, image_key, image_value)
    scale = _check(*tensors, mask, text_lengths, scale, impl)
    position = _as_tensor(position, mask, query.device)
    # torch would take an operation that has no forward-mode derivative for one whose derivative is 0.
    if needs_grad(tensors) or has_tangent(tensors):
        raise RuntimeError(
            "sparse_attention_decode has no gradient: call it under torch.no_grad(), or sparse_attention to train"
        )
    given = tensors if text_lengths is None else (*tensors, text_lengths)
    if is_plain(given):  # past the dispatcher, which with cold caches takes longer than the kernel
        return _decode(*tensors, position, text_lengths, mask, scale, impl)
    return _decode_op(*tensors, position, text_lengths, mask.encode(), scale, impl)


# -- checks ------------------------------------------------------------------------------------------------------------


def _check(query, text_key, text_value, image_key, image_value, mask, text_lengths, scale, impl) -> float:
    """Raise TypeError or ValueError for what no implementation takes; returns the scale."""
    if not isinstance(mask, AttentionMask):
        raise TypeError(f"mask must be an AttentionMask (see dalle_fast.masks), got {type(mask).__name__}")
    check_impl(impl, IMPLS)
    check_tensor("query", query)
    if query.dim() != 3:
        raise ValueError(f"query must have 3 dimensions (batch, heads, head size), got {tuple(query.shape)}")
    B, H, D = query.shape
    if not 1 <= D <= MAX_HEAD_DIM:
        raise ValueError(f"query must have a head size from 1 to {MAX_HEAD_DIM}, got {D}")
    check_tensor("text_key", text_key)
    P = text_key.shape[0] if text_key.dim() else 1
    text_shape, image_shape = (P, H, mask.text_len, D), (B, H, mask.cache_slots, D)
    for name, tensor, shape, what in (
        ("text_key", text_key, text_shape, "prompts, heads, the mask's text_len, head size"),
        ("text_value", text_value, text_shape, "prompts, heads, the mask's text_len, head size"),
        ("image_key", image_key, image_shape, "batch, heads, the mask's cache_slots, head size"),
        ("image_value", image_value, image_shape, "batch, heads, the mask's cache_slots, head size"),
    ):
        check_tensor(name, tensor)
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape} ({what}), got {tuple(tensor.shape)}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must have query's dtype {query.dtype}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on query's device {query.device}, got {tensor.device}")
    if B if P == 0 else B % P:
        raise ValueError(f"query must have a batch that is a multiple of the prompts, got {B} and {P} (of text_key)")
    if text_lengths is not None:
        check_text_lengths(text_lengths, P, query.device)
    return check_scale(scale, D)


def _as_tensor(position, mask, device):
    """The position as an int64 tensor without dimensions; its range is checked here where it is a number."""
    if isinstance(position, torch.Tensor):
        if position.dtype != torch.int64 or position.dim() != 0:
            raise TypeError(
                "position must be an integer or an int64 tensor without dimensions, got a tensor of "
                f"{position.dtype} and shape {tuple(position.shape)}"
            )
        if position.device != device:
            raise ValueError(f"position must be on query's device {device}, got {position.device}")
        return position
    if not is_integer(position):
        raise TypeError(f"position must be an integer or an int64 tensor, got {position!r}")
    check_position(position, mask)
    return torch.full((), position, dtype=torch.int64, device=device)


def check_position(position, mask):
    """Raise ValueError where there is no image token of this number."""
    if not 0 <= position < mask.image_len:
        raise ValueError(f"position must be from 0 to {mask.image_len - 1}, an image token of {mask!r}, got {position}")


# -- the operation -----------------------------------------------------------------------------------------------------


def _decode_kernel(query, text_key, text_value, image_key, image_value, position, text_lengths, mask, scale, impl):
    mask = AttentionMask.decode(mask)
    _check(query, text_key, text_value, image_key, image_value, mask, text_lengths, scale, impl)  # see _checked_forward
    return _decode(query, text_key, text_value, image_key, image_value, position, text_lengths, mask, scale, impl)


def _decode(query, text_key, text_value, image_key, image_value, position, text_lengths, mask, scale, impl):
    text_lengths = canonical_lengths(text_lengths, mask.text_len)
    if position.is_cpu:
        check_position(int(position), mask)
    serving = _serving(impl, query, text_key, text_value, mask)
    with current_device(query):
        return serving.decode(query, text_key, text_value, image_key, image_value, position, text_lengths, mask, scale)


def _serving(impl, query, text_key, text_value, mask):
    return choose(_NAME_AND_COST, impl, device_type(query), implementation, AUTO, query, text_key, text_value, mask)


def waits_for_device(impl, text_key, text_value, mask) -> bool:
    """Whether a step against these, off the CPU, waits to see the position: then no CUDA graph can hold it."""
    # A query has the keys' dtype, device and head size, which is all that a choice asks of one.
    return _serving(impl, text_key, text_key, text_value, mask) is implementation("reference")


def _decode_fake(query, text_key, text_value, image_key, image_value, position, text_lengths, mask, scale, impl):
    return query.new_empty(query.shape)


_decode_op = register(
    "sparse_attention_decode(Tensor query, Tensor text_key, Tensor text_value, Tensor image_key, Tensor image_value, "
    "Tensor position, Tensor? text_lengths, int[] mask, float scale, str impl) -> Tensor",
    _decode_kernel,
    _decode_fake,
)
