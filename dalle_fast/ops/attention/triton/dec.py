"""Decoding: text keys once for 16 samples of a prompt as a matrix product, image keys for each sample on its own.

Two launches. In the first, a program takes TEXT_PART text keys for up to 16 samples of a prompt and leaves the softmax over
its part, its maximum and its sum. In the second, a program takes one head of one sample: its image keys, and then the
parts of the text as if each were a key of several. Scores are compared with their maximum as the product left them, and
scaled afterwards: rounded differences of large scores are not the differences of rounded ones. How the keys are cut
depends on the mask alone, and 16 rows are the least that a matrix product takes, so a sample's result depends neither on
the other samples nor on their number. The position is read on the device.

B samples, P prompts, N = B / P, H heads, D head size, T text; V image keys that a query sees at most.
"""

import torch
import triton
import triton.language as tl

from dalle_fast.ops.attention.triton import launch
from dalle_fast.ops.attention.triton.primitives import (
    LOG2E,
    clamped_length,
    head_base,
    in_elements,
    load_tile,
    tile_pointers,
)
from dalle_fast.ops.calls import current_device
from dalle_fast.ops.launches_triton import Launches

__all__ = ["attention_decode"]

SAMPLES = tl.constexpr(16)
# Tuned on an H200 (2026-11-27, Triton 3.6; bfloat16, text 256, grid 32, 32 heads of 64). Not reproducible, as the
# script is gone: whoever changes them measures these as well. Microseconds of both launches for row masks, for 8 samples
# and for 64: with these 7.7 and 14.0, with 128 text keys in steps of 32 10.8 and 15.7, with 256 15.2 and 18.8. Of image
# keys alone, for 64 samples of row and conv 11: with 1 warp 6.9 and 11.1, with 2 8.0 and 12.1, with 4 14.5 and 14.4.
TEXT_PART = 64  # text keys of one program
TEXT_STEP = 64  # of them at once, at most
TEXT_BYTES = 8192  # that these keys, and as many values, take at most
TEXT_WARPS = 4
# In float32, per thread at most. Left to itself ptxas aims at a rounder number and spilled 16 bytes on sm_80 (Triton 3.8,
# head size 128); this way it takes what it needs.
FLOAT32_REGISTERS = 240
IMAGE_BYTES = 8192  # of image keys of one program at once, which are all that there are of most masks
IMAGE_WARPS = 1
LOOP_WARPS = 4  # of a program that does not take all keys at once; with 2, ptxas spilled on sm_90 (head size 48)
MERGE_PARTS = 16  # of the text that a program weighs at once, at most


@triton.jit
def _load_queries(q_ptr, q_strides, samples, head, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """(len(samples), BLOCK_D) queries of one head; zero where not `valid` and past HEAD_DIM."""
    d = tl.arange(0, BLOCK_D)
    rows = samples.to(tl.int64)[:, None] * q_strides[0] + head.to(tl.int64) * q_strides[1]
    return tl.load(q_ptr + rows + d[None, :] * q_strides[2], mask=valid[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _text_part(
    q,
    k_base,
    k_strides,
    v_base,
    v_strides,
    start,
    end,
    scale_log2,
    STEP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Softmax of queries (16, BLOCK_D) over the text keys [start, end): (acc, maximum, sum), not divided by it."""
    acc = tl.zeros([SAMPLES, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([SAMPLES], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([SAMPLES], dtype=tl.float32)
    for first in range(start, end, STEP):  # no step is without a key, so every maximum is a score
        k_pos = first + tl.arange(0, STEP)
        k = load_tile(k_base, k_strides, k_pos, k_pos < end, True, HEAD_DIM, BLOCK_D, WIDE)
        v = load_tile(v_base, v_strides, k_pos, k_pos < end, True, HEAD_DIM, BLOCK_D, WIDE)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = tl.where((k_pos < end)[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        p = tl.exp2((scores - new_max[:, None]) * scale_log2)
        rescale = tl.exp2((row_max - new_max) * scale_log2)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def _absorb(scores, weights, values, scale_log2, acc, row_max, row_sum):
    """The running softmax of one query, (acc (BLOCK_D,), maximum, sum), after more scores (n,), how often each counts, and
    values (n, BLOCK_D).

    A hidden key has the score -inf; the first call must bring one that is seen.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 0))
    p = tl.exp2((scores - new_max) * scale_log2) * weights
    rescale = tl.exp2((row_max - new_max) * scale_log2)
    acc = acc * rescale + tl.sum(p[:, None] * values.to(tl.float32), 0)
    return acc, new_max, row_sum * rescale + tl.sum(p, 0)


@triton.jit
def _load_parts(out_ptr, stats_ptr, row, first, PARTS: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr):
    """(maxima (STEP,), sums (STEP,), out (STEP, BLOCK_D)) of the text's parts from `first` on; -inf, 0 and 0 past the last."""
    part = first + tl.arange(0, STEP)
    rows = row * PARTS + part
    maxima = tl.load(stats_ptr + 2 * rows, mask=part < PARTS, other=float("-inf"))
    sums = tl.load(stats_ptr + 2 * rows + 1, mask=part < PARTS, other=0.0)
    pointers = out_ptr + rows[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    return maxima, sums, tl.load(pointers, mask=(part < PARTS)[:, None], other=0.0)


@triton.jit(do_not_specialize=["num_samples", "num_heads"])
def _attention_decode_text_kernel(
    q_ptr,
    q_strides,
    k_ptr,
    k_strides,
    v_ptr,
    v_strides,
    out_ptr,
    stats_ptr,
    text_lengths_ptr,
    num_samples,
    num_heads,
    scale_log2,
    T: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    STEP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    UNIT: tl.constexpr,
    SIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Parts of the text -> out (B, H, PARTS, BLOCK_D) float32, 0 without keys, and stats (B, H, PARTS, 2): the largest score,
    times SIGN and not scaled, and the sum of exponentials below it.

    Programs: P * H * PARTS * cdiv(N, 16). num_samples is N. SIGN, scale_log2 and strides: see `_attention_fwd_kernel`.
    """
    q_strides = in_elements(q_strides, UNIT, WIDE)
    k_strides = in_elements(k_strides, UNIT, WIDE)
    v_strides = in_elements(v_strides, UNIT, WIDE)
    program = tl.program_id(0)
    groups = (num_samples + SAMPLES - 1) // SAMPLES
    part = program // groups % PARTS
    head = program // (groups * PARTS) % num_heads
    prompt = program // (groups * PARTS * num_heads)
    within = program % groups * SAMPLES + tl.arange(0, SAMPLES)
    samples = prompt * num_samples + within
    valid = within < num_samples
    end = min(T, (part + 1) * PART)
    if text_lengths_ptr is not None:
        end = clamped_length(text_lengths_ptr, prompt, end)
    q = _load_queries(q_ptr, q_strides, samples, head, valid, HEAD_DIM, BLOCK_D)
    if SIGN != 1:
        q = (q * SIGN).to(q.dtype)
    acc, row_max, row_sum = _text_part(
        q,
        head_base(k_ptr, k_strides, prompt, head),
        k_strides,
        head_base(v_ptr, v_strides, prompt, head),
        v_strides,
        part * PART,
        end,
        scale_log2,
        STEP,
        HEAD_DIM,
        BLOCK_D,
        WIDE,
        PRECISION,
    )
    divisor = tl.where(row_sum == 0.0, 1.0, row_sum)
    rows = (samples.to(tl.int64) * num_heads + head) * PARTS + part
    d = tl.arange(0, BLOCK_D)
    tl.store(out_ptr + rows[:, None] * BLOCK_D + d[None, :], acc / divisor[:, None], mask=valid[:, None])
    tl.store(stats_ptr + 2 * rows, row_max, mask=valid)
    tl.store(stats_ptr + 2 * rows + 1, row_sum, mask=valid)


@triton.jit
def _load_keys(
    keys,
    first,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    """(seen, k, v) of BLOCK of the listed image keys from `first` on, in their own dtype; 0 where not seen."""
    k_base, k_strides, v_base, v_strides, slots_ptr, most, count = keys
    offsets = first + tl.arange(0, BLOCK)
    slots = tl.load(slots_ptr + offsets, mask=offsets < most, other=0)  # does not wait for the count
    seen = offsets < count
    d = tl.arange(0, BLOCK_D)
    inside = seen[:, None] & (d < HEAD_DIM)[None, :]
    k = tl.load(tile_pointers(k_base, k_strides, slots, d, WIDE), mask=inside, other=0.0)
    v = tl.load(tile_pointers(v_base, v_strides, slots, d, WIDE), mask=inside, other=0.0)
    return seen, k, v


@triton.jit
def _scores(q, k, seen):
    return tl.where(seen, tl.sum(k.to(tl.float32) * q[None, :], 1), float("-inf"))


@triton.jit(do_not_specialize=["num_heads", "most"])
def _attention_decode_kernel(
    q_ptr,
    q_strides,
    k_ptr,
    k_strides,
    v_ptr,
    v_strides,
    parts_ptr,
    stats_ptr,
    out_ptr,
    position_ptr,
    slots_ptr,
    counts_ptr,
    slots_stride,
    most,
    num_heads,
    scale_log2,
    IMAGE_LEN: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_STEP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    REST: tl.constexpr,
    LOOP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    UNIT: tl.constexpr,
    SIGN: tl.constexpr,
):
    """The image keys in a sample's own cache and the text's parts -> out (B, H, HEAD_DIM). Programs: B * H.

    Of the image BLOCK_V keys are taken at a time where LOOP, else BLOCK_V + REST, which is V or more, at once: then the
    loads that wait for others are three deep, the position; the count and the slots; keys and values. most is V.
    """
    row = tl.program_id(0).to(tl.int64)
    sample = row // num_heads
    head = row % num_heads
    d = tl.arange(0, BLOCK_D)
    position = tl.minimum(tl.maximum(tl.load(position_ptr), 0), IMAGE_LEN - 1)
    # Strides in elements not before they are used: at the top they made other machine code than what was measured.
    q_strides = in_elements(q_strides, UNIT, WIDE)
    q_base = q_ptr + sample * q_strides[0] + head * q_strides[1]
    q = tl.load(q_base + d * q_strides[2], mask=d < HEAD_DIM, other=0.0)
    if PARTS > 0:
        maxima, sums, values = _load_parts(parts_ptr, stats_ptr, row, 0, PARTS, PARTS_STEP, BLOCK_D)
    count = tl.load(counts_ptr + position)
    q = q.to(tl.float32)
    if SIGN != 1:
        q *= SIGN
    k_strides = in_elements(k_strides, UNIT, WIDE)
    v_strides = in_elements(v_strides, UNIT, WIDE)
    k_base = head_base(k_ptr, k_strides, sample, head)
    v_base = head_base(v_ptr, v_strides, sample, head)
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    row_max = float("-inf")
    row_sum = 0.0
    slots_ptr += position * slots_stride
    keys = (k_base, k_strides, v_base, v_strides, slots_ptr, most, count)
    if LOOP:
        for first in range(0, count, BLOCK_V):
            seen, k, v = _load_keys(keys, first, BLOCK_V, HEAD_DIM, BLOCK_D, WIDE)
            acc, row_max, row_sum = _absorb(_scores(q, k, seen), 1.0, v, scale_log2, acc, row_max, row_sum)
    else:
        seen, k, v = _load_keys(keys, 0, BLOCK_V, HEAD_DIM, BLOCK_D, WIDE)
        if REST > 0:
            rest_seen, rest_k, rest_v = _load_keys(keys, BLOCK_V, REST, HEAD_DIM, BLOCK_D, WIDE)
        acc, row_max, row_sum = _absorb(_scores(q, k, seen), 1.0, v, scale_log2, acc, row_max, row_sum)
        if REST > 0:
            acc, row_max, row_sum = _absorb(
                _scores(q, rest_k, rest_seen), 1.0, rest_v, scale_log2, acc, row_max, row_sum
            )
    if PARTS > 0:
        acc, row_max, row_sum = _absorb(maxima, sums, values, scale_log2, acc, row_max, row_sum)
        for first in range(PARTS_STEP, PARTS, PARTS_STEP):
            maxima, sums, values = _load_parts(parts_ptr, stats_ptr, row, first, PARTS, PARTS_STEP, BLOCK_D)
            acc, row_max, row_sum = _absorb(maxima, sums, values, scale_log2, acc, row_max, row_sum)
    tl.store(out_ptr + row * HEAD_DIM + d, (acc / row_sum).to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)


_launch_text = Launches(_attention_decode_text_kernel)
_launch_image = Launches(_attention_decode_kernel)


def image_blocks(most, limit):
    """(BLOCK_V, REST, LOOP) for V = most keys: at once, if BLOCK_V is at most `limit`.

    33 keys of a row are 32 and 1: a block of 64 would take twice the registers.
    """
    block = triton.next_power_of_2(most)
    rest = 0
    if most <= block // 4 * 3 and block > 1:
        block //= 2
        rest = triton.next_power_of_2(most - block)
    return (limit, 0, True) if block > limit else (block, rest, False)


def attention_decode(query, text_key, text_value, image_key, image_value, position, text_lengths, mask, scale):
    """See `decode` in `__init__.py`."""
    B, H, D = query.shape
    out = torch.empty((B, H, D), dtype=query.dtype, device=query.device)
    if B * H == 0:
        return out
    P, T = len(text_key), mask.text_len
    BLOCK_D = launch.padded_head_size(D)
    row_bytes = BLOCK_D * query.element_size()
    text_strides = text_key.stride(), text_value.stride()
    image_strides = image_key.stride(), image_value.stride()
    text_unit, *text_unit_strides = launch.in_units(query.stride(), *text_strides)
    image_unit, *image_unit_strides = launch.in_units(query.stride(), *image_strides)
    slots, counts = mask.visible_slots(query.device)
    most = slots.shape[1]
    block, rest, loop = image_blocks(most, IMAGE_BYTES // row_bytes)
    text_parts = triton.cdiv(T, TEXT_PART)
    parts = torch.empty((B, H, text_parts, BLOCK_D), dtype=torch.float32, device=query.device)
    stats = torch.empty((B, H, text_parts, 2), dtype=torch.float32, device=query.device)
    scale_log2, sign = abs(scale) * LOG2E.value or 1.0, (scale > 0) - (scale < 0)
    with current_device(query):
        if T:
            _launch_text(
                (P * H * text_parts * triton.cdiv(B // P, SAMPLES.value),),
                query,
                text_unit_strides[0],
                text_key,
                text_unit_strides[1],
                text_value,
                text_unit_strides[2],
                parts,
                stats,
                text_lengths,
                B // P,
                H,
                scale_log2,
                T,
                text_parts,
                TEXT_PART,
                min(TEXT_STEP, TEXT_BYTES // row_bytes),
                D,
                BLOCK_D,
                launch.wide(T, D, *text_strides),
                text_unit,
                sign,
                launch.input_precision(query.dtype),
                num_warps=TEXT_WARPS,
                num_stages=2,
                maxnreg=FLOAT32_REGISTERS if query.dtype == torch.float32 else None,
                enable_fp_fusion=True,
            )
        _launch_image(
            (B * H,),
            query,
            image_unit_strides[0],
            image_key,
            image_unit_strides[1],
            image_value,
            image_unit_strides[2],
            parts,
            stats,
            out,
            position,
            slots,
            counts,
            slots.stride(0),
            most,
            H,
            scale_log2,
            mask.image_len,
            text_parts,
            min(triton.next_power_of_2(max(1, text_parts)), MERGE_PARTS),
            block,
            rest,
            loop,
            D,
            BLOCK_D,
            launch.wide(image_key.shape[2], D, *image_strides),
            image_unit,
            sign,
            num_warps=LOOP_WARPS if loop else IMAGE_WARPS,
            num_stages=1,
            enable_fp_fusion=True,
        )
    return out
