"""Sparse attention, backward: one kernel for dQ, one for dK and dV, no atomics, so that every call gives the same bits.

B batch, H heads, S sequence, D head size, T text; q queries, k keys; walk and windows as in primitives.py.

With P = exp(scale * Q K^T - lse), dP = dO V^T and delta = rowsum(O * dO) - dlse:
dS = P * (dP - delta), dQ = scale * dS K, dK = scale * dS^T Q, dV = P^T dO.

P is computed again from lse, one float32 per row. The rounding of lse, up to eps / 2 * abs(lse), is a relative error
of a whole row of P that no order of the operations here removes: 2e-6 where lse is 40. `gradient_terms` in
tests/test_triton_interpreter.py derives the whole bound.
"""

import torch
import triton
import triton.language as tl

from dalle_fast.ops.attention.triton import launch
from dalle_fast.ops.attention.triton.primitives import (
    LOG2E,
    allows,
    head_base,
    image_count,
    load_tile,
    query_tile,
    store_tile,
    text_keys,
    text_queries,
    tile_counts,
    tile_start,
    visible_text,
    walk_tokens,
    window,
)

__all__ = ["attention_backward"]

_DELTA_ROWS = 32  # rows per program of the delta kernel, which is bound by memory


@triton.jit(do_not_specialize=["num_heads", "seq_len"])
def _attention_delta_kernel(
    out_ptr,
    grad_out_ptr,
    grad_out_strides,
    grad_lse_ptr,
    delta_ptr,
    num_heads,
    seq_len,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """delta = rowsum(out * grad_out) - grad_lse, float32; `out` is contiguous."""
    tiles = (seq_len + BLOCK - 1) // BLOCK
    head = tl.program_id(0) // tiles
    rows = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    valid = rows < seq_len
    columns = tl.arange(0, BLOCK_D)
    flat_rows = head.to(tl.int64) * seq_len + rows
    out_pointers = out_ptr + flat_rows[:, None] * HEAD_DIM + columns[None, :]
    out = tl.load(out_pointers, mask=valid[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
    grad_base = head_base(grad_out_ptr, grad_out_strides, head // num_heads, head % num_heads)
    grad_out = load_tile(grad_base, grad_out_strides, rows, valid, True, HEAD_DIM, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + flat_rows, mask=valid, other=0.0)
    tl.store(delta_ptr + flat_rows, delta, mask=valid)


@triton.jit
def _grad_query_step(
    acc, q, k, v, grad_out, lse, delta, seen, scale_log2, MASKED: tl.constexpr, PRECISION: tl.constexpr
):
    """Add one tile of keys to dQ / scale; `lse` is in units of log2."""
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 - lse[:, None])
    grad_p = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
    grad_s = p * (grad_p - delta[:, None])
    if MASKED:
        grad_s = tl.where(seen, grad_s, 0.0)
    return tl.dot(grad_s.to(k.dtype), k, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_heads", "seq_len"])
def _attention_grad_query_kernel(
    q_ptr,
    q_strides,
    k_ptr,
    k_strides,
    v_ptr,
    v_strides,
    grad_out_ptr,
    grad_out_strides,
    lse_ptr,
    delta_ptr,
    grad_q_ptr,
    text_lengths_ptr,
    num_heads,
    seq_len,
    scale,
    scale_log2,
    MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_TEXT: tl.constexpr,
    BLOCK_IMAGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ, over the same tiles as the forward kernel."""
    head, is_image, t0, first, q_pos, q_valid = query_tile(tl.program_id(0), seq_len, MASK, BLOCK_Q)
    batch = head // num_heads
    first_row = head.to(tl.int64) * seq_len
    q_base = head_base(q_ptr, q_strides, batch, head % num_heads)
    k_base = head_base(k_ptr, k_strides, batch, head % num_heads)
    v_base = head_base(v_ptr, v_strides, batch, head % num_heads)
    grad_out_base = head_base(grad_out_ptr, grad_out_strides, batch, head % num_heads)
    q = load_tile(q_base, q_strides, q_pos, q_valid, True, HEAD_DIM, BLOCK_D)
    grad_out = load_tile(grad_out_base, grad_out_strides, q_pos, q_valid, True, HEAD_DIM, BLOCK_D)
    # P of a row past the sequence is exp2(-inf) = 0.
    lse = tl.load(lse_ptr + first_row + q_pos, mask=q_valid, other=float("inf")) * LOG2E
    delta = tl.load(delta_ptr + first_row + q_pos, mask=q_valid, other=0.0)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)

    text_len = visible_text(text_lengths_ptr, batch, seq_len, MASK)
    full, end = text_keys(first, text_len, BLOCK_Q, BLOCK_TEXT)
    offsets = tl.arange(0, BLOCK_TEXT)
    for start in range(0, full, BLOCK_TEXT):
        k = load_tile(k_base, k_strides, start + offsets, None, False, HEAD_DIM, BLOCK_D)
        v = load_tile(v_base, v_strides, start + offsets, None, False, HEAD_DIM, BLOCK_D)
        acc = _grad_query_step(acc, q, k, v, grad_out, lse, delta, None, scale_log2, False, PRECISION)
    for start in range(full, end, BLOCK_TEXT):
        k_pos = start + offsets
        k_valid = k_pos < text_len
        k = load_tile(k_base, k_strides, k_pos, k_valid, True, HEAD_DIM, BLOCK_D)
        v = load_tile(v_base, v_strides, k_pos, k_valid, True, HEAD_DIM, BLOCK_D)
        seen = k_valid[None, :] & (k_pos[None, :] <= q_pos[:, None])  # the rule between text keys and any query
        acc = _grad_query_step(acc, q, k, v, grad_out, lse, delta, seen, scale_log2, True, PRECISION)

    _, rows, length = image_count(seq_len, MASK)
    w_start, count, column, columns = window(t0, rows, length, MASK, BLOCK_Q, BLOCK_IMAGE, False)
    image_offsets = tl.arange(0, BLOCK_IMAGE)
    for n in range(tl.where(is_image, count, 0)):
        k_first = tile_start(n, w_start, column, columns, MASK, BLOCK_IMAGE)
        k_pos, k_valid = walk_tokens(k_first + image_offsets, seq_len, rows, length, MASK)
        k = load_tile(k_base, k_strides, k_pos, k_valid, True, HEAD_DIM, BLOCK_D)
        v = load_tile(v_base, v_strides, k_pos, k_valid, True, HEAD_DIM, BLOCK_D)
        seen = k_valid[None, :] & allows(q_pos[:, None], k_pos[None, :], MASK)
        acc = _grad_query_step(acc, q, k, v, grad_out, lse, delta, seen, scale_log2, True, PRECISION)

    store_tile(grad_q_ptr, first_row, q_pos, q_valid, acc * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def _grad_key_value_step(
    grad_k,
    grad_v,
    k,
    v,
    q_base,
    q_strides,
    grad_out_base,
    grad_out_strides,
    lse_base,
    delta_base,
    q_pos,
    q_valid,
    seen,
    scale_log2,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one tile of queries to dK / scale and dV. P and dS are transposed: keys are rows."""
    q = load_tile(q_base, q_strides, q_pos, q_valid, True, HEAD_DIM, BLOCK_D)
    # P of a row past the sequence is exp2(-inf) = 0.
    lse = tl.load(lse_base + q_pos, mask=q_valid, other=float("inf")) * LOG2E
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 - lse[None, :])
    if MASKED:
        p = tl.where(seen, p, 0.0)
    grad_out = load_tile(grad_out_base, grad_out_strides, q_pos, q_valid, True, HEAD_DIM, BLOCK_D)
    grad_v = tl.dot(p.to(grad_out.dtype), grad_out, grad_v, input_precision=PRECISION)
    delta = tl.load(delta_base + q_pos, mask=q_valid, other=0.0)
    grad_p = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
    grad_s = p * (grad_p - delta[None, :])
    if MASKED:
        grad_s = tl.where(seen, grad_s, 0.0)  # again: 0 * NaN, from a delta that belongs to no visible key
    grad_k = tl.dot(grad_s.to(q.dtype), q, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit(do_not_specialize=["num_heads", "seq_len", "num_programs_text"])
def _attention_grad_key_value_kernel(
    q_ptr,
    q_strides,
    k_ptr,
    k_strides,
    v_ptr,
    v_strides,
    grad_out_ptr,
    grad_out_strides,
    lse_ptr,
    delta_ptr,
    grad_k_ptr,
    grad_v_ptr,
    text_lengths_ptr,
    num_heads,
    num_programs_text,
    seq_len,
    scale,
    scale_log2,
    MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_TEXT: tl.constexpr,
    BLOCK_IMAGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK and dV. Programs below num_programs_text own text keys: they are the long ones, so all of them start first.

    BLOCK_TEXT and BLOCK_IMAGE are tiles of queries here.
    """
    program = tl.program_id(0)
    _, rows, length = image_count(seq_len, MASK)
    text_tiles, image_tiles = tile_counts(seq_len, length, MASK, BLOCK_K)
    is_image = program >= num_programs_text
    tiles = tl.where(is_image, image_tiles, text_tiles)
    program = tl.where(is_image, program - num_programs_text, program)
    head = program // tiles
    first = program % tiles * BLOCK_K  # sequence position of text keys, walk position of image keys
    batch = head // num_heads
    offsets = tl.arange(0, BLOCK_K)
    image_pos, image_valid = walk_tokens(first + offsets, seq_len, rows, length, MASK)
    k_pos = tl.where(is_image, image_pos, first + offsets)
    k_valid = tl.where(is_image, image_valid, first + offsets < min(seq_len, MASK.T))
    # Keys that text_lengths hides are not loaded, and their gradients are stored as zeros.
    text_len = visible_text(text_lengths_ptr, batch, seq_len, MASK)
    k_visible = tl.where(is_image, image_valid, k_pos < text_len)

    first_row = head.to(tl.int64) * seq_len
    q_base = head_base(q_ptr, q_strides, batch, head % num_heads)
    k_base = head_base(k_ptr, k_strides, batch, head % num_heads)
    v_base = head_base(v_ptr, v_strides, batch, head % num_heads)
    grad_out_base = head_base(grad_out_ptr, grad_out_strides, batch, head % num_heads)
    lse_base = lse_ptr + first_row
    delta_base = delta_ptr + first_row
    k = load_tile(k_base, k_strides, k_pos, k_visible, True, HEAD_DIM, BLOCK_D)
    v = load_tile(v_base, v_strides, k_pos, k_visible, True, HEAD_DIM, BLOCK_D)
    grad_k = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    grad_v = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)

    begin, full, end = text_queries(first, tl.where(is_image, 0, text_len), seq_len, BLOCK_K, BLOCK_TEXT)
    q_offsets = tl.arange(0, BLOCK_TEXT)
    for start in range(begin, full, BLOCK_TEXT):
        q_pos = start + q_offsets
        seen = k_pos[:, None] <= q_pos[None, :]  # the rule between text keys and any query
        grad_k, grad_v = _grad_key_value_step(
            grad_k, grad_v, k, v, q_base, q_strides, grad_out_base, grad_out_strides, lse_base, delta_base,
            q_pos, q_pos < seq_len, seen, scale_log2, True, HEAD_DIM, BLOCK_D, PRECISION,
        )  # fmt: skip
    for start in range(full, end, BLOCK_TEXT):
        q_pos = start + q_offsets
        grad_k, grad_v = _grad_key_value_step(
            grad_k, grad_v, k, v, q_base, q_strides, grad_out_base, grad_out_strides, lse_base, delta_base,
            q_pos, q_pos < seq_len, None, scale_log2, False, HEAD_DIM, BLOCK_D, PRECISION,
        )  # fmt: skip

    w_start, count, column, columns = window(first, rows, length, MASK, BLOCK_K, BLOCK_IMAGE, True)
    image_offsets = tl.arange(0, BLOCK_IMAGE)
    for n in range(tl.where(is_image, count, 0)):
        q_first = tile_start(n, w_start, column, columns, MASK, BLOCK_IMAGE)
        q_pos, q_valid = walk_tokens(q_first + image_offsets, seq_len, rows, length, MASK)
        seen = allows(q_pos[None, :], k_pos[:, None], MASK)
        grad_k, grad_v = _grad_key_value_step(
            grad_k, grad_v, k, v, q_base, q_strides, grad_out_base, grad_out_strides, lse_base, delta_base,
            q_pos, q_valid, seen, scale_log2, True, HEAD_DIM, BLOCK_D, PRECISION,
        )  # fmt: skip

    grad_k = tl.where(k_visible[:, None], grad_k * scale, 0.0)
    grad_v = tl.where(k_visible[:, None], grad_v, 0.0)
    store_tile(grad_k_ptr, first_row, k_pos, k_valid, grad_k, HEAD_DIM, BLOCK_D)
    store_tile(grad_v_ptr, first_row, k_pos, k_valid, grad_v, HEAD_DIM, BLOCK_D)


def attention_backward(
    grad_out, grad_lse, query, key, value, out, lse, text_lengths, mask, scale, *, query_tiles=None, key_tiles=None
):
    """The contract's backward; `query_tiles` and `key_tiles` = (Tiles, MaskNumbers) replace the table's (tests)."""
    B, H, S, D = query.shape
    grads = [torch.empty((B, H, S, D), dtype=x.dtype, device=x.device) for x in (query, key, value)]
    if B * H * S == 0:
        return tuple(grads)
    grad_query, grad_key, grad_value = grads
    delta = torch.empty_like(lse)
    block_d = launch.padded_head_size(D)
    precision = launch.input_precision(query.dtype)
    # Rounded to float32 once, as the forward kernel had it: lse belongs to those scores, to the last bit of the factor.
    scale_log2 = scale * LOG2E.value
    inputs = (query, query.stride(), key, key.stride(), value, value.stride(), grad_out, grad_out.stride(), lse, delta)
    with launch.device_guard(query):
        _attention_delta_kernel[(B * H * triton.cdiv(S, _DELTA_ROWS),)](
            out.contiguous(),
            grad_out,
            grad_out.stride(),
            None if grad_lse is None else grad_lse.contiguous(),
            delta,
            H,
            S,
            D,
            block_d,
            _DELTA_ROWS,
            num_warps=4,
            enable_fp_fusion=True,
        )
        cut, numbers = query_tiles or launch.chosen_tiles("grad_query", query, mask)
        _attention_grad_query_kernel[launch.query_grid(B * H, S, numbers, cut)](
            *inputs,
            grad_query,
            text_lengths,
            H,
            S,
            scale,
            scale_log2,
            numbers,
            D,
            block_d,
            cut.own,
            cut.text,
            cut.image,
            precision,
            **launch.options(cut),
        )
        cut, numbers = key_tiles or launch.chosen_tiles("grad_key_value", query, mask)
        text_programs, image_programs = launch.key_programs(B * H, S, numbers, cut)
        _attention_grad_key_value_kernel[(text_programs + image_programs,)](
            *inputs,
            grad_key,
            grad_value,
            text_lengths,
            H,
            text_programs,
            S,
            scale,
            scale_log2,
            numbers,
            D,
            block_d,
            cut.own,
            cut.text,
            cut.image,
            precision,
            **launch.options(cut),
        )
    return grad_query, grad_key, grad_value
