"""Functions: sparse attention, and torch's `scaled_dot_product_attention` that also takes an `AttentionMask`.

B batch, H heads, S sequence, D head size, T text.
"""

from __future__ import annotations

import torch

from dalle_fast.masks import AttentionMask
from dalle_fast.ops import attention

__all__ = ["scaled_dot_product_attention", "sparse_attention"]


def sparse_attention(query, key, value, mask, *, scale=None, text_lengths=None, return_lse=False, impl="auto"):
    """softmax(scale * query @ key^T where `mask` allows it) @ value, computing little more than the allowed pairs.

    The keys of a query are text and image keys together in one softmax (Ramesh et al. 2021, appendix B). Differentiable
    in query, key and value, `lse` included, and bit-repeatable; a second derivative goes through the dense reference.
    Under autocast the inputs are cast to autocast's dtype.

    Args:
        query, key, value: (B, H, S, D) each, of one dtype on one device; float32, float16 or bfloat16 (float64 on the
            reference). Any strides, so views of a packed projection are read in place. S may be shorter than the
            mask's sequence and means its first S positions; D is from 1 to 128. B, H and S may be 0.
        mask: an `AttentionMask`.
        scale: factor of the logits, D ** -0.5 if None.
        text_lengths: (B,) integers from 0 to T on the inputs' device, or None: text positions >= text_lengths[b] are
            hidden as keys from every query of sample b (a caption's padding). Off the CPU, where a look would wait for
            the device, the range is not checked and values are clamped to it.
        return_lse: also return the log-sum-exp of each query's logits.
        impl: "auto" takes the fastest implementation that serves the call and warns once when that is the dense
            reference; "reference", "cpu", "triton" or "cuda" take that one or raise.

    Returns:
        out (B, H, S, D), contiguous, in the inputs' dtype; with `return_lse` the pair (out, lse), lse (B, H, S) in
        float32 (float64 for float64 inputs), natural logarithm. A query that sees no key (possible with text_lengths)
        has zeros in out, -inf in lse and no gradient.

    Raises:
        TypeError: an argument is not of the right kind or dtype.
        ValueError: an argument has the wrong shape, device or value, or `impl` cannot serve it (with every reason).
    """
    return attention.sparse_attention(
        query, key, value, mask, scale=scale, text_lengths=text_lengths, return_lse=return_lse, impl=impl
    )


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """`torch.nn.functional.scaled_dot_product_attention`, where `attn_mask` may also be an `AttentionMask`.

    Without an `AttentionMask` the call goes to torch unchanged. With one it is `sparse_attention`.

    Args:
        query: (..., S, D): the dimension before S counts heads, those before it are batch; none is needed.
        key, value: (..., S, D) like query, or with fewer heads and `enable_gqa`.
        attn_mask: None, a tensor as torch takes it, or an `AttentionMask`.
        dropout_p: must be 0 with an `AttentionMask`.
        is_causal: must be False with an `AttentionMask`, which is causal already.
        scale: factor of the logits, D ** -0.5 if None.
        enable_gqa: with an `AttentionMask`, query head h attends to key and value head h // (query heads / key heads).
            Key and value are never repeated in memory; tensors whose batch and heads do not merge into one dimension
            as a view (a packed projection with B > 1) are copied once.

    Returns:
        (..., S, D) like query.

    Raises:
        TypeError, ValueError: as `sparse_attention`, and for what an `AttentionMask` does not go with.
    """
    if not isinstance(attn_mask, AttentionMask):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if dropout_p != 0:
        raise ValueError(f"dropout_p must be 0 with an AttentionMask, got {dropout_p}")
    if is_causal:
        raise ValueError("is_causal must be False with an AttentionMask, which is causal already, got True")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() < 2:
            raise ValueError(f"{name} must have at least 2 dimensions (..., S, D), got shape {tuple(tensor.shape)}")
    if enable_gqa:
        query, key, value = _group(query, key, value)
    leading = _broadcast(query, key, value)
    out = attention.sparse_attention(*(_to_4d(x, leading) for x in (query, key, value)), attn_mask, scale=scale)
    out = out.view(*leading, *out.shape[2:])
    return out.flatten(-4, -3) if enable_gqa else out


def _group(query, key, value):
    """Query heads that share a key head become the heads of one sample, for which the key head has stride 0."""
    if query.dim() < 3 or not query.dim() == key.dim() == value.dim():
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(f"query, key and value must have the same 3 or more dimensions with enable_gqa, got {shapes}")
    heads, groups = query.shape[-3], key.shape[-3]
    if value.shape[-3] != groups or groups == 0 or heads % groups:
        raise ValueError(
            "query's number of heads must be a multiple of the one of key and value with enable_gqa, got "
            f"{heads}, {groups} and {value.shape[-3]}"
        )
    query = query.unflatten(-3, (groups, heads // groups))
    return query, key.unsqueeze(-3), value.unsqueeze(-3)


def _broadcast(query, key, value):
    """The leading dimensions that the three have together."""
    leading = [x.shape[:-2] for x in (query, key, value)]
    if leading[0] == leading[1] == leading[2]:
        return leading[0]
    try:
        return torch.broadcast_shapes(*leading)
    except RuntimeError:
        shapes = ", ".join(str(tuple(x)) for x in leading)
        raise ValueError(f"the leading dimensions of query, key and value must broadcast, got {shapes}") from None


def _to_4d(x, leading):
    """(B, H, S, D) with x expanded to `leading`: a view where strides allow one, else a copy made before H is expanded."""
    *batch, heads = leading or (1,)
    x = x[(None,) * max(0, 3 - x.dim())]
    x = x.expand(*batch, *x.shape[-3:])
    x = x.flatten(0, -4) if batch else x[None]
    return x.expand(-1, heads, -1, -1)
