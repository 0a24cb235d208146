"""Sparse attention, forward: one program per tile of queries, text keys first, then a short window of image keys.

B batch, H heads, S sequence, D head size, T text; q queries, k keys; walk and windows as in primitives.py.
"""

import torch
import triton
import triton.language as tl

from dalle_fast.ops.attention.triton import launch
from dalle_fast.ops.attention.triton.primitives import (
    LN2,
    LOG2E,
    head_base,
    image_count,
    in_elements,
    load_tile,
    query_tile,
    store_tile,
    text_allows,
    text_keys,
    tile_start,
    visible_text,
    walk_tokens,
    window,
    window_allows,
)
from dalle_fast.ops.calls import current_device
from dalle_fast.ops.launches_triton import Launches

__all__ = ["attention_forward"]


@triton.jit
def _online_softmax(acc, row_max, row_sum, q, k, v, seen, scale_log2, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Add one tile of keys to a tile of queries' running softmax; row_max is in units of log2, scaled."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    base = new_max
    if MASKED:
        base = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row that has seen no key yet
    p = tl.exp2(scores * scale_log2 - base[:, None])  # one fused multiply-add each
    rescale = tl.exp2(row_max - base)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum


@triton.jit(do_not_specialize=["num_heads", "seq_len"])
def _attention_fwd_kernel(
    q_ptr,
    q_strides,
    k_ptr,
    k_strides,
    v_ptr,
    v_strides,
    out_ptr,
    lse_ptr,
    text_lengths_ptr,
    num_heads,
    seq_len,
    scale_log2,
    MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_TEXT: tl.constexpr,
    BLOCK_IMAGE: tl.constexpr,
    SIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = softmax(scale * q k^T) v over the visible keys, lse = ln sum exp(scale * q k^T).

    SIGN, -1, 0 or 1, is that of the scale, and scale_log2 = abs(scale) * LOG2E, or 1 where that is 0, is positive: so
    the maximum of the scores is also that of the scaled ones, and -inf stays what it is when scaled.
    Strides are (batch, head, position, head size), in units of UNIT: see `in_elements`.
    """
    q_strides = in_elements(q_strides, UNIT, WIDE)
    k_strides = in_elements(k_strides, UNIT, WIDE)
    v_strides = in_elements(v_strides, UNIT, WIDE)
    head, is_image, t0, first, q_pos, q_valid = query_tile(tl.program_id(0), seq_len, MASK, BLOCK_Q)
    batch = head // num_heads
    k_base = head_base(k_ptr, k_strides, batch, head % num_heads)
    v_base = head_base(v_ptr, v_strides, batch, head % num_heads)
    q_base = head_base(q_ptr, q_strides, batch, head % num_heads)
    q = load_tile(q_base, q_strides, q_pos, q_valid, True, HEAD_DIM, BLOCK_D, WIDE)
    if SIGN != 1:
        q = (q * SIGN).to(q.dtype)

    acc = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_Q], dtype=tl.float32)

    text_len = visible_text(text_lengths_ptr, batch, seq_len, MASK)
    full, end = text_keys(first, text_len, BLOCK_Q, BLOCK_TEXT)
    offsets = tl.arange(0, BLOCK_TEXT)
    for start in range(0, full, BLOCK_TEXT):
        k = load_tile(k_base, k_strides, start + offsets, None, False, HEAD_DIM, BLOCK_D, WIDE)
        v = load_tile(v_base, v_strides, start + offsets, None, False, HEAD_DIM, BLOCK_D, WIDE)
        acc, row_max, row_sum = _online_softmax(acc, row_max, row_sum, q, k, v, None, scale_log2, False, PRECISION)
    if full < end:  # a branch, so that programs without this loop do not run its prologue
        for start in range(full, end, BLOCK_TEXT):
            k_pos = start + offsets
            k_valid = k_pos < text_len
            k = load_tile(k_base, k_strides, k_pos, k_valid, True, HEAD_DIM, BLOCK_D, WIDE)
            v = load_tile(v_base, v_strides, k_pos, k_valid, True, HEAD_DIM, BLOCK_D, WIDE)
            seen = text_allows(q_pos, k_pos, text_len)
            acc, row_max, row_sum = _online_softmax(acc, row_max, row_sum, q, k, v, seen, scale_log2, True, PRECISION)

    _, rows, length = image_count(seq_len, MASK)
    w_start, count, column, columns = window(t0, rows, length, MASK, BLOCK_Q, BLOCK_IMAGE, False)
    image_offsets = tl.arange(0, BLOCK_IMAGE)
    for n in range(tl.where(is_image, count, 0)):
        k_first = tile_start(n, w_start, column, columns, MASK, BLOCK_IMAGE)
        k_pos, k_valid = walk_tokens(k_first + image_offsets, seq_len, rows, length, MASK)
        k = load_tile(k_base, k_strides, k_pos, k_valid, True, HEAD_DIM, BLOCK_D, WIDE)
        v = load_tile(v_base, v_strides, k_pos, k_valid, True, HEAD_DIM, BLOCK_D, WIDE)
        seen = window_allows(q_pos, k_pos, k_valid, MASK)
        acc, row_max, row_sum = _online_softmax(acc, row_max, row_sum, q, k, v, seen, scale_log2, True, PRECISION)

    nothing = row_sum == 0.0
    row_sum = tl.where(nothing, 1.0, row_sum)
    out = acc / row_sum[:, None]
    # Two products, because their sum is one fused multiply-add: the backward pass lives on the last bits of lse.
    lse = tl.where(nothing, float("-inf"), row_max * LN2 + tl.log2(row_sum) * LN2)
    first_row = head.to(tl.int64) * seq_len
    store_tile(out_ptr + first_row * HEAD_DIM, q_pos, q_valid, out, HEAD_DIM, BLOCK_D, WIDE)
    tl.store(lse_ptr + first_row + q_pos, lse, mask=q_valid)


_launch = Launches(_attention_fwd_kernel)


def attention_forward(query, key, value, text_lengths, mask, scale, *, tiles=None):
    """See `forward` in `__init__.py`; `tiles` = (Tiles, MaskNumbers) replaces the table's choice (tests)."""
    B, H, S, D = query.shape
    out = torch.empty((B, H, S, D), dtype=query.dtype, device=query.device)
    lse = torch.empty((B, H, S), dtype=torch.float32, device=query.device)
    if B * H * S == 0:
        return out, lse
    cut, numbers = tiles or launch.chosen_tiles("forward", query, mask)
    strides = query.stride(), key.stride(), value.stride()
    unit, *unit_strides = launch.in_units(*strides)
    with current_device(query):
        _launch(
            launch.query_grid(B * H, S, numbers, cut),
            query,
            unit_strides[0],
            key,
            unit_strides[1],
            value,
            unit_strides[2],
            out,
            lse,
            text_lengths,
            H,
            S,
            abs(scale) * LOG2E.value or 1.0,
            numbers,
            D,
            launch.padded_head_size(D),
            launch.wide(S, D, *strides),
            unit,
            cut.own,
            cut.text,
            cut.image,
            (scale > 0) - (scale < 0),
            launch.input_precision(query.dtype),
            **launch.options(cut),
        )
    return out, lse
