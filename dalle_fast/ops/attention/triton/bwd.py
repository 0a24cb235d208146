"""Sparse attention, backward: a kernel for dQ, then one for dK and dV, no atomics, so that every call gives the same bits.

B batch, H heads, S sequence, D head size, T text; q queries, k keys; walk and windows as in primitives.py.

With P = exp(scale * Q K^T - lse), dP = dO V^T and delta = rowsum(O * dO) - dlse:
dS = P * (dP - delta), dQ = scale * dS K, dK = scale * dS^T Q, dV = P^T dO. The first kernel leaves delta to the second.

P is computed again from lse, one float32 per row. The rounding of lse, up to eps / 2 * abs(lse), and the error of the
GPU's logarithm, are a relative error of a whole row of P: 1e-6 at the paper's sizes, which 16-bit tensors do not show.
In float32 (EXACT) the first kernel adds up the rows of P, whose exact sums are 1, and both divide by these sums. And a
tile's product is summed on its own before it is added: on ordinary cores a product is one addition after another, and a
chain of 1,280 of them erred four times as much as this sum of sums (emulated in numpy; on an H200 the chain made
gradients err up to 4.7 times as much as eager torch's).

rowsum(O * dO) is rounded in other places than dP, so dP - delta errs by some eps of dP also in rows with few keys, where
P is large. In a row with one key dS is 0, and eager torch, whose delta is rowsum(P * dP) of the same dP, makes it 0. So
with EXACT the first kernel passes over its keys twice. The first pass adds up the rows of dS with that delta; without
dlse their exact sums are 0. What it finds, over the row's sum of P, goes to delta, which so becomes rowsum(P * dP) over
rowsum(P). Found as a difference it makes dP - delta exactly 0 for one key, whatever the division's last bits are.
Emulated (128 causal tokens, head size 64, 40 draws, sums over tokens exact), the largest error of dQ fell from 1.35
times eager torch's on average, 2.6 in the worst draw, to 1.0 and 1.6, and that of dK alike. Adding up P * dP itself was
as good, but left one key a dS of an eps of dP in a draw of twelve. No GPU has measured either.
`gradient_terms` in tests/test_triton_interpreter.py derives the whole bound.
"""

import itertools

import torch
import triton
import triton.language as tl

from dalle_fast.ops.attention.triton import launch
from dalle_fast.ops.attention.triton.primitives import (
    LOG2E,
    head_base,
    image_allows,
    image_count,
    in_elements,
    load_tile,
    query_tile,
    store_tile,
    text_allows,
    text_keys,
    text_queries,
    tile_counts,
    tile_start,
    visible_text,
    walk_tokens,
    window,
    window_allows,
)
from dalle_fast.ops.calls import current_device
from dalle_fast.ops.launches_triton import Launches

__all__ = ["attention_backward"]


@triton.jit
def _plus_product(total, a, b, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """total + a @ b. With EXACT the product is summed on its own first: see the module's text."""
    if EXACT:
        # max_num_imprecise_acc means nothing for float32, but keeps the compiler from making one chain of both sums.
        total += tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=1)
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def _grad_query_step(
    acc,
    row_sum,
    surplus,
    q,
    k,
    v,
    grad_out,
    lse2,
    delta,
    seen,
    scale_log2,
    MASKED: tl.constexpr,
    SUMS: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one tile of keys to dQ / scale, or with SUMS to the sums of the rows of P and dS."""
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 - lse2[:, None])
    if SUMS:
        if MASKED:
            p = tl.where(seen, p, 0.0)
        row_sum += tl.sum(p, 1)
    grad_p = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
    grad_s = p * (grad_p - delta[:, None])
    if MASKED:
        # With SUMS that p is not 0 says what `seen` said, which need not be kept until here: that spilled 40 bytes at
        # 240 registers (column, head size 128, TF32, sm_90, Triton 3.8), and this takes 177.
        grad_s = tl.where(p != 0.0 if SUMS else seen, grad_s, 0.0)
    if SUMS:
        surplus += tl.sum(grad_s, 1)
    else:
        acc = _plus_product(acc, grad_s.to(k.dtype), k, EXACT, PRECISION)
    return acc, row_sum, surplus


@triton.jit
def _grad_query_pass(
    q,
    grad_out,
    lse2,
    delta,
    k_base,
    k_strides,
    v_base,
    v_strides,
    text_lengths_ptr,
    batch,
    is_image,
    t0,
    first,
    q_pos,
    seq_len,
    scale_log2,
    MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_TEXT: tl.constexpr,
    BLOCK_IMAGE: tl.constexpr,
    SUMS: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Over all keys of a tile of queries: (dQ / scale, -, -), or with SUMS (-, row sums of P, row sums of dS)."""
    acc = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_Q], dtype=tl.float32)
    surplus = tl.zeros([BLOCK_Q], dtype=tl.float32)

    text_len = visible_text(text_lengths_ptr, batch, seq_len, MASK)
    full, end = text_keys(first, text_len, BLOCK_Q, BLOCK_TEXT)
    offsets = tl.arange(0, BLOCK_TEXT)
    for start in range(0, full, BLOCK_TEXT):
        k = load_tile(k_base, k_strides, start + offsets, None, False, HEAD_DIM, BLOCK_D, WIDE)
        v = load_tile(v_base, v_strides, start + offsets, None, False, HEAD_DIM, BLOCK_D, WIDE)
        acc, row_sum, surplus = _grad_query_step(
            acc, row_sum, surplus, q, k, v, grad_out, lse2, delta, None, scale_log2, False, SUMS, EXACT, PRECISION
        )
    if full < end:  # a branch, so that programs without this loop do not run its prologue
        for start in range(full, end, BLOCK_TEXT):
            k_pos = start + offsets
            k_valid = k_pos < text_len
            k = load_tile(k_base, k_strides, k_pos, k_valid, True, HEAD_DIM, BLOCK_D, WIDE)
            v = load_tile(v_base, v_strides, k_pos, k_valid, True, HEAD_DIM, BLOCK_D, WIDE)
            seen = text_allows(q_pos, k_pos, text_len)
            acc, row_sum, surplus = _grad_query_step(
                acc, row_sum, surplus, q, k, v, grad_out, lse2, delta, seen, scale_log2, True, SUMS, EXACT, PRECISION
            )

    _, rows, length = image_count(seq_len, MASK)
    w_start, count, column, columns = window(t0, rows, length, MASK, BLOCK_Q, BLOCK_IMAGE, False)
    image_offsets = tl.arange(0, BLOCK_IMAGE)
    for n in range(tl.where(is_image, count, 0)):
        k_first = tile_start(n, w_start, column, columns, MASK, BLOCK_IMAGE)
        k_pos, k_valid = walk_tokens(k_first + image_offsets, seq_len, rows, length, MASK)
        k = load_tile(k_base, k_strides, k_pos, k_valid, True, HEAD_DIM, BLOCK_D, WIDE)
        v = load_tile(v_base, v_strides, k_pos, k_valid, True, HEAD_DIM, BLOCK_D, WIDE)
        seen = window_allows(q_pos, k_pos, k_valid, MASK)
        acc, row_sum, surplus = _grad_query_step(
            acc, row_sum, surplus, q, k, v, grad_out, lse2, delta, seen, scale_log2, True, SUMS, EXACT, PRECISION
        )
    return acc, row_sum, surplus


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
    out_ptr,
    lse_ptr,
    grad_lse_ptr,
    lse2_ptr,
    delta_ptr,
    correction_ptr,
    grad_q_ptr,
    text_lengths_ptr,
    num_heads,
    seq_len,
    scale,
    scale_log2,
    MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_TEXT: tl.constexpr,
    BLOCK_IMAGE: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ, over the same tiles as the forward kernel, and of each query what dK and dV need of it: lse2 and delta.

    lse2 is lse in units of log2. With EXACT also the correction, and delta is corrected, see above: two passes.
    `out` is contiguous. Strides as in the forward kernel.
    """
    q_strides = in_elements(q_strides, UNIT, WIDE)
    k_strides = in_elements(k_strides, UNIT, WIDE)
    v_strides = in_elements(v_strides, UNIT, WIDE)
    grad_out_strides = in_elements(grad_out_strides, UNIT, WIDE)
    head, is_image, t0, first, q_pos, q_valid = query_tile(tl.program_id(0), seq_len, MASK, BLOCK_Q)
    batch = head // num_heads
    first_row = head.to(tl.int64) * seq_len
    q_base = head_base(q_ptr, q_strides, batch, head % num_heads)
    k_base = head_base(k_ptr, k_strides, batch, head % num_heads)
    v_base = head_base(v_ptr, v_strides, batch, head % num_heads)
    grad_out_base = head_base(grad_out_ptr, grad_out_strides, batch, head % num_heads)
    q = load_tile(q_base, q_strides, q_pos, q_valid, True, HEAD_DIM, BLOCK_D, WIDE)
    grad_out = load_tile(grad_out_base, grad_out_strides, q_pos, q_valid, True, HEAD_DIM, BLOCK_D, WIDE)
    # P of a row past the sequence is exp2(-inf) = 0.
    lse2 = tl.load(lse_ptr + first_row + q_pos, mask=q_valid, other=float("inf")) * LOG2E
    out_base = out_ptr + first_row * HEAD_DIM
    out = load_tile(out_base, (0, 0, HEAD_DIM, 1), q_pos, q_valid, True, HEAD_DIM, BLOCK_D, WIDE)
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    if EXACT:
        _, row_sum, surplus = _grad_query_pass(
            q, grad_out, lse2, delta, k_base, k_strides, v_base, v_strides, text_lengths_ptr, batch,
            is_image, t0, first, q_pos, seq_len, scale_log2,
            MASK, HEAD_DIM, BLOCK_D, WIDE, BLOCK_Q, BLOCK_TEXT, BLOCK_IMAGE, True, EXACT, PRECISION,
        )  # fmt: skip
        correction = tl.where(row_sum == 0.0, 1.0, 1.0 / row_sum)  # 0: a row that sees no key
        tl.store(correction_ptr + first_row + q_pos, correction, mask=q_valid)
        delta += surplus * correction
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + first_row + q_pos, mask=q_valid, other=0.0)
    tl.store(lse2_ptr + first_row + q_pos, lse2, mask=q_valid)
    tl.store(delta_ptr + first_row + q_pos, delta, mask=q_valid)
    acc, _, _ = _grad_query_pass(
        q, grad_out, lse2, delta, k_base, k_strides, v_base, v_strides, text_lengths_ptr, batch,
        is_image, t0, first, q_pos, seq_len, scale_log2,
        MASK, HEAD_DIM, BLOCK_D, WIDE, BLOCK_Q, BLOCK_TEXT, BLOCK_IMAGE, False, EXACT, PRECISION,
    )  # fmt: skip
    if EXACT:
        acc *= correction[:, None]
    store_tile(grad_q_ptr + first_row * HEAD_DIM, q_pos, q_valid, acc * scale, HEAD_DIM, BLOCK_D, WIDE)


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
    lse2_base,
    delta_base,
    correction_base,
    q_pos,
    q_valid,
    seen,
    scale_log2,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one tile of queries to dK / scale and dV. P and dS are transposed: keys are rows."""
    q = load_tile(q_base, q_strides, q_pos, q_valid, True, HEAD_DIM, BLOCK_D, WIDE)
    # P of a row past the sequence is exp2(-inf) = 0.
    lse2 = tl.load(lse2_base + q_pos, mask=q_valid, other=float("inf"))
    exponents = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 - lse2[None, :]
    if MASKED:
        exponents = tl.where(seen, exponents, float("-inf"))
    p = tl.exp2(exponents)
    if EXACT:
        corrected = p * tl.load(correction_base + q_pos, mask=q_valid, other=0.0)[None, :]
        p = tl.where(p == 0.0, 0.0, corrected) if MASKED else corrected  # not 0 * NaN, as below
    grad_out = load_tile(grad_out_base, grad_out_strides, q_pos, q_valid, True, HEAD_DIM, BLOCK_D, WIDE)
    grad_v = _plus_product(grad_v, p.to(grad_out.dtype), grad_out, EXACT, PRECISION)
    delta = tl.load(delta_base + q_pos, mask=q_valid, other=0.0)
    grad_p = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
    difference = grad_p - delta[None, :]
    if MASKED:
        # Not 0 * NaN, from a query that does not see this key. That p is 0 says what `seen` said, which need not be kept
        # until here in registers that are few.
        difference = tl.where(p == 0.0, 0.0, difference)
    grad_s = p * difference
    grad_k = _plus_product(grad_k, grad_s.to(q.dtype), q, EXACT, PRECISION)
    return grad_k, grad_v


# seq_len is specialized: where it is a multiple of 16, lse2 and delta are loaded two at a time.
@triton.jit(do_not_specialize=["num_heads", "num_programs_text"])
def _attention_grad_key_value_kernel(
    q_ptr,
    q_strides,
    k_ptr,
    k_strides,
    v_ptr,
    v_strides,
    grad_out_ptr,
    grad_out_strides,
    lse2_ptr,
    delta_ptr,
    correction_ptr,
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
    WIDE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_TEXT: tl.constexpr,
    BLOCK_IMAGE: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK and dV. Programs below num_programs_text own text keys: they are the long ones, so all of them start first.

    BLOCK_TEXT and BLOCK_IMAGE are tiles of queries here. Strides as in the forward kernel.
    """
    q_strides = in_elements(q_strides, UNIT, WIDE)
    k_strides = in_elements(k_strides, UNIT, WIDE)
    v_strides = in_elements(v_strides, UNIT, WIDE)
    grad_out_strides = in_elements(grad_out_strides, UNIT, WIDE)
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
    lse2_base = lse2_ptr + first_row
    delta_base = delta_ptr + first_row
    correction_base = correction_ptr + first_row
    k = load_tile(k_base, k_strides, k_pos, k_visible, True, HEAD_DIM, BLOCK_D, WIDE)
    v = load_tile(v_base, v_strides, k_pos, k_visible, True, HEAD_DIM, BLOCK_D, WIDE)
    grad_k = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    grad_v = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)

    begin, full, end = text_queries(first, tl.where(is_image, 0, text_len), seq_len, BLOCK_K, BLOCK_TEXT)
    q_offsets = tl.arange(0, BLOCK_TEXT)
    if EXACT:
        full = (
            end  # one loop, with masks, from the last queries to the first, whose P is largest: small terms come first
        )
    last = begin + tl.maximum(full - begin - 1, 0) // BLOCK_TEXT * BLOCK_TEXT
    for turn in range(begin, full, BLOCK_TEXT):
        q_pos = (begin + last - turn if EXACT else turn) + q_offsets
        seen = k_pos[:, None] <= q_pos[None, :]  # the rule between text keys and any query
        grad_k, grad_v = _grad_key_value_step(
            grad_k, grad_v, k, v, q_base, q_strides, grad_out_base, grad_out_strides,
            lse2_base, delta_base, correction_base,
            q_pos, q_pos < seq_len, seen, scale_log2, True, HEAD_DIM, BLOCK_D, WIDE, EXACT, PRECISION,
        )  # fmt: skip
    for start in range(full, end, BLOCK_TEXT):
        q_pos = start + q_offsets
        grad_k, grad_v = _grad_key_value_step(
            grad_k, grad_v, k, v, q_base, q_strides, grad_out_base, grad_out_strides,
            lse2_base, delta_base, correction_base,
            q_pos, q_pos < seq_len, None, scale_log2, False, HEAD_DIM, BLOCK_D, WIDE, EXACT, PRECISION,
        )  # fmt: skip

    w_start, count, column, columns = window(first, rows, length, MASK, BLOCK_K, BLOCK_IMAGE, True)
    image_offsets = tl.arange(0, BLOCK_IMAGE)
    for n in range(tl.where(is_image, count, 0)):
        q_first = tile_start(n, w_start, column, columns, MASK, BLOCK_IMAGE)
        q_pos, q_valid = walk_tokens(q_first + image_offsets, seq_len, rows, length, MASK)
        seen = image_allows(q_pos[None, :], k_pos[:, None], MASK)
        grad_k, grad_v = _grad_key_value_step(
            grad_k, grad_v, k, v, q_base, q_strides, grad_out_base, grad_out_strides,
            lse2_base, delta_base, correction_base,
            q_pos, q_valid, seen, scale_log2, True, HEAD_DIM, BLOCK_D, WIDE, EXACT, PRECISION,
        )  # fmt: skip

    grad_k = tl.where(k_visible[:, None], grad_k * scale, 0.0)
    grad_v = tl.where(k_visible[:, None], grad_v, 0.0)
    store_tile(grad_k_ptr + first_row * HEAD_DIM, k_pos, k_valid, grad_k, HEAD_DIM, BLOCK_D, WIDE)
    store_tile(grad_v_ptr + first_row * HEAD_DIM, k_pos, k_valid, grad_v, HEAD_DIM, BLOCK_D, WIDE)


_launch_query = Launches(_attention_grad_query_kernel)
_launch_key_value = Launches(_attention_grad_key_value_kernel)


def attention_backward(
    grad_out, grad_lse, query, key, value, out, lse, text_lengths, mask, scale, *, query_tiles=None, key_tiles=None
):
    """See `backward` in `__init__.py`; `query_tiles` and `key_tiles` = (Tiles, MaskNumbers) replace the table's (tests)."""
    B, H, S, D = query.shape
    grads = [torch.empty((B, H, S, D), dtype=x.dtype, device=x.device) for x in (query, key, value)]
    if B * H * S == 0:
        return tuple(grads)
    grad_query, grad_key, grad_value = grads
    out, lse = out.contiguous(), lse.contiguous()  # the kernels take no strides of theirs
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    exact = query.dtype == torch.float32
    correction = torch.empty_like(lse) if exact else lse2  # not looked at
    tensors = query, key, value, grad_out
    strides = [x.stride() for x in tensors]
    unit, *unit_strides = launch.in_units(*strides)
    sizes = D, launch.padded_head_size(D), launch.wide(S, D, *strides), unit
    precision = launch.input_precision(query.dtype)
    # Rounded to float32 once, as the forward kernel had it: lse belongs to those scores, to the last bit of the factor.
    scale_log2 = scale * LOG2E.value
    inputs = tuple(itertools.chain(*zip(tensors, unit_strides)))
    with current_device(query):
        cut, numbers = query_tiles or launch.chosen_tiles("grad_query", query, mask)
        _launch_query(
            launch.query_grid(B * H, S, numbers, cut),
            *inputs,
            out,
            lse,
            None if grad_lse is None else grad_lse.contiguous(),
            lse2,
            delta,
            correction,
            grad_query,
            text_lengths,
            H,
            S,
            scale,
            scale_log2,
            numbers,
            *sizes,
            cut.own,
            cut.text,
            cut.image,
            exact,
            precision,
            **launch.options(cut),
        )
        cut, numbers = key_tiles or launch.chosen_tiles("grad_key_value", query, mask)
        text_programs, image_programs = launch.key_programs(B * H, S, numbers, cut)
        _launch_key_value(
            (text_programs + image_programs,),
            *inputs,
            lse2,
            delta,
            correction,
            grad_key,
            grad_value,
            text_lengths,
            H,
            text_programs,
            S,
            scale,
            scale_log2,
            numbers,
            *sizes,
            cut.own,
            cut.text,
            cut.image,
            exact,
            precision,
            **launch.options(cut),
        )
    return grad_query, grad_key, grad_value
