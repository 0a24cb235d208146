"""Sparse attention in Triton: NVIDIA GPUs from compute capability 8.0, and Triton's interpreter on CPU tensors.

B batch, H heads, S sequence, D head size, T text. The kernels load at the first call, so that importing this package
needs neither Triton nor a GPU. Their modules are named fwd, bwd, dec and app because importing a submodule `forward` would
put the module in the place of this package's function `forward`.
"""

from __future__ import annotations

from dalle_fast.ops import on_triton
from dalle_fast.ops.dtypes import DTYPES

__all__ = ["append", "backward", "decode", "forward", "why_not"]

_MAX_HEAD_SIZE = 128
_MAX_POSITIONS = 1 << 30  # a window's bounds are sums of two positions in 32 bits


def why_not(query, key, value, mask) -> list[str]:
    """Every reason why this implementation cannot serve these tensors on this machine; empty if it can."""
    reasons = on_triton.why_not(
        query, "query"
    )  # the operation has checked that key and value have its device and dtype
    if query.dtype not in DTYPES:
        reasons.append(f"dtype must be float32, float16 or bfloat16, query is {query.dtype}")
    head_size = query.shape[-1]
    if not 1 <= head_size <= _MAX_HEAD_SIZE:
        reasons.append(f"head size must be 1 to {_MAX_HEAD_SIZE}, got {head_size}")
    if mask.seq_len > _MAX_POSITIONS:
        reasons.append(f"the mask must have at most 2**30 positions, got {mask.seq_len}")
    return reasons


def forward(query, key, value, text_lengths, mask, scale, *, lse="exact"):
    """Attention and its log-sum-exp.

    Args:
        query, key, value: (B, H, S, D), one dtype and device, any strides, S <= mask.seq_len.
        text_lengths: None, or int32 or int64 (B,), contiguous: text keys at or past it are hidden from every query. Any
            below 0 is taken for 0, any above T for T.
        mask: AttentionMask.
        scale: float, multiplies the scores.
        lse: changes nothing; it is made, and exact, whoever will see it.

    Returns:
        out: (B, H, S, D), contiguous, query's dtype; zeros where a query sees no key.
        lse: (B, H, S) float32, ln sum exp(scale * q k^T) over the visible keys; -inf where there is none.
    """
    from dalle_fast.ops.attention.triton.fwd import attention_forward

    return attention_forward(query, key, value, text_lengths, mask, scale)


def backward(grad_out, grad_lse, query, key, value, out, lse, text_lengths, mask, scale):
    """Gradients of `forward`, the same bits at every call.

    Args:
        grad_out: (B, H, S, D), any strides. grad_lse: None or (B, H, S) float32.
        query, key, value, text_lengths, mask, scale: what `forward` was given; out, lse: what it returned.

    Returns:
        (grad_query, grad_key, grad_value), each (B, H, S, D), contiguous, in the inputs' dtype.
    """
    from dalle_fast.ops.attention.triton.bwd import attention_backward

    return attention_backward(grad_out, grad_lse, query, key, value, out, lse, text_lengths, mask, scale)


def decode(query, text_key, text_value, image_key, image_value, position, text_lengths, mask, scale):
    """One query per sample against its prompt's text and its own image cache.

    Args:
        query: (B, H, D). text_key, text_value: (P, H, T, D). image_key, image_value: (B, H, mask.cache_slots, D). One
            dtype and device, any strides; B a multiple of P.
        position: int64 tensor without dimensions on query's device, of the query in the image; read there.
        text_lengths: None or (P,), as in `forward`.
        mask: AttentionMask.
        scale: float, multiplies the scores.

    Returns:
        (B, H, D), contiguous, query's dtype.
    """
    from dalle_fast.ops.attention.triton.dec import attention_decode

    return attention_decode(query, text_key, text_value, image_key, image_value, position, text_lengths, mask, scale)


def append(image_key, image_value, key, value, position, mask):
    """Write the keys and values of one image token into the caches.

    Args:
        image_key, image_value: (B, H, mask.cache_slots, D). key, value: (B, H, D). One dtype and device, any strides.
        position: int64 tensor without dimensions on their device, of the token in the image; read there.
        mask: AttentionMask.
    """
    from dalle_fast.ops.attention.triton.app import attention_append

    attention_append(image_key, image_value, key, value, position, mask)
