"""Decoding: text keys once for 16 samples of a prompt as a matrix product, image keys for each sample on its own.

Two launches. In the first, a program takes one part of the keys: TEXT_PART text keys for up to 16 samples of a prompt, or
the image keys of one sample; it leaves the softmax over its part, and its log-sum-exp. The second weighs the parts.
How the keys are cut depends on the mask alone, and 16 rows are the least that a matrix product takes, so a sample's
result depends neither on the other samples nor on their number. The position is read on the device.

B samples, P prompts, N = B / P, H heads, D head size, T text; V image keys that a query sees at most.
"""

import torch
import triton
import triton.language as tl

from dalle_fast.ops.attention.triton import launch
from dalle_fast.ops.attention.triton.primitives import LOG2E, head_base, load_tile

__all__ = ["attention_decode"]

SAMPLES = tl.constexpr(16)
# Chosen from compiled code (no spills), not tuned on a GPU.
TEXT_PART = 128  # text keys of one program
STEP_BYTES = 8192  # of text keys, and of values, that it takes at once
IMAGE_ELEMENTS = 4096  # the same of image keys, which are float32 there
# In float32, per thread at most. Left to itself ptxas aims at 96 and spilled 16 bytes on sm_90 (Triton 3.6, head size 64,
# column and axial masks); limited to 128 or 168 it spilled more often; this way it takes up to 206 and spills none.
FLOAT32_REGISTERS = 240


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
    """Running softmax of queries (16, BLOCK_D) over the text keys [start, end): (acc, maximum, sum), unscaled."""
    acc = tl.zeros([SAMPLES, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([SAMPLES], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([SAMPLES], dtype=tl.float32)
    for first in range(start, end, STEP):  # no step is without a key, so every maximum is a score
        k_pos = first + tl.arange(0, STEP)
        k = load_tile(k_base, k_strides, k_pos, k_pos < end, True, HEAD_DIM, BLOCK_D, WIDE)
        v = load_tile(v_base, v_strides, k_pos, k_pos < end, True, HEAD_DIM, BLOCK_D, WIDE)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        scores = tl.where((k_pos < end)[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        p = tl.exp2(scores - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def _image_part(
    q,
    k_base,
    k_strides,
    v_base,
    v_strides,
    slots_ptr,
    count,
    scale_log2,
    BLOCK_V: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The same of one query (1, BLOCK_D) over the slots of its cache that are listed at slots_ptr."""
    acc = tl.zeros([1, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([1], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([1], dtype=tl.float32)
    for first in range(0, count, BLOCK_V):
        offsets = first + tl.arange(0, BLOCK_V)
        seen = offsets < count
        slots = tl.load(slots_ptr + offsets, mask=seen, other=0)
        k = load_tile(k_base, k_strides, slots, seen, True, HEAD_DIM, BLOCK_D, WIDE).to(tl.float32)
        v = load_tile(v_base, v_strides, slots, seen, True, HEAD_DIM, BLOCK_D, WIDE).to(tl.float32)
        scores = tl.sum(k * q.to(tl.float32), 1) * scale_log2
        scores = tl.where(seen, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 0))
        p = tl.exp2(scores - new_max)
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(p, 0)
        acc = acc * rescale[:, None] + tl.sum(p[:, None] * v, 0)[None, :]
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def _store_part(out_ptr, lse_ptr, rows, valid, acc, row_max, row_sum, BLOCK_D: tl.constexpr):
    """One part of the keys, for each of `rows`: its softmax's output, 0 without keys, and its lse in units of log2."""
    d = tl.arange(0, BLOCK_D)
    nothing = row_sum == 0.0
    row_sum = tl.where(nothing, 1.0, row_sum)
    out = acc / row_sum[:, None]
    lse = tl.where(nothing, float("-inf"), row_max + tl.log2(row_sum))
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * BLOCK_D + d[None, :], out, mask=valid[:, None])
    tl.store(lse_ptr + rows, lse, mask=valid)


@triton.jit(do_not_specialize=["num_rows", "num_samples", "num_heads", "text_programs"])
def _attention_decode_kernel(
    q_ptr,
    q_strides,
    text_k_ptr,
    text_k_strides,
    text_v_ptr,
    text_v_strides,
    image_k_ptr,
    image_k_strides,
    image_v_ptr,
    image_v_strides,
    out_ptr,
    lse_ptr,
    text_lengths_ptr,
    position_ptr,
    slots_ptr,
    counts_ptr,
    slots_stride,
    num_rows,
    num_samples,
    num_heads,
    text_programs,
    scale_log2,
    T: tl.constexpr,
    IMAGE_LEN: tl.constexpr,
    TEXT_PARTS: tl.constexpr,
    PART: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Parts of the keys -> out (TEXT_PARTS + 1, B, H, BLOCK_D) float32 and lse (TEXT_PARTS + 1, B, H), the image last.

    Programs: text_programs = P * H * TEXT_PARTS * cdiv(N, 16), then B * H. num_rows is B * H, num_samples N.
    """
    program = tl.program_id(0)
    if program < text_programs:
        groups = (num_samples + SAMPLES - 1) // SAMPLES
        part = program // groups % TEXT_PARTS
        head = program // (groups * TEXT_PARTS) % num_heads
        prompt = program // (groups * TEXT_PARTS * num_heads)
        within = program % groups * SAMPLES + tl.arange(0, SAMPLES)
        samples = prompt * num_samples + within
        valid = within < num_samples
        end = min(T, (part + 1) * PART)
        if text_lengths_ptr is not None:
            end = min(end, tl.load(text_lengths_ptr + prompt))
        q = _load_queries(q_ptr, q_strides, samples, head, valid, HEAD_DIM, BLOCK_D)
        k_base = head_base(text_k_ptr, text_k_strides, prompt, head)
        v_base = head_base(text_v_ptr, text_v_strides, prompt, head)
        acc, row_max, row_sum = _text_part(
            q,
            k_base,
            text_k_strides,
            v_base,
            text_v_strides,
            part * PART,
            end,
            scale_log2,
            STEP,
            HEAD_DIM,
            BLOCK_D,
            WIDE,
            PRECISION,
        )
        rows = part * num_rows + samples * num_heads + head
        _store_part(out_ptr, lse_ptr, rows, valid, acc, row_max, row_sum, BLOCK_D)
    else:
        row = program - text_programs
        sample = row // num_heads
        head = row % num_heads
        position = tl.minimum(tl.maximum(tl.load(position_ptr), 0), IMAGE_LEN - 1)
        count = tl.load(counts_ptr + position)
        first = tl.arange(0, 1)
        query = _load_queries(q_ptr, q_strides, sample + first, head, first == 0, HEAD_DIM, BLOCK_D)
        k_base = head_base(image_k_ptr, image_k_strides, sample, head)
        v_base = head_base(image_v_ptr, image_v_strides, sample, head)
        slots = slots_ptr + position * slots_stride
        total, top, weight = _image_part(
            query,
            k_base,
            image_k_strides,
            v_base,
            image_v_strides,
            slots,
            count,
            scale_log2,
            BLOCK_V,
            HEAD_DIM,
            BLOCK_D,
            WIDE,
        )
        _store_part(out_ptr, lse_ptr, TEXT_PARTS * num_rows + row + first, first == 0, total, top, weight, BLOCK_D)


@triton.jit(do_not_specialize=["rows"])
def _attention_decode_merge_kernel(
    parts_ptr, lse_ptr, out_ptr, rows, PARTS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """out (B * H, HEAD_DIM) = sum over parts of exp2(lse) * out, divided by the sum of exp2(lse)."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    top = tl.load(lse_ptr + row)
    for part in tl.static_range(1, PARTS):
        top = tl.maximum(top, tl.load(lse_ptr + part * rows + row))
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    weight = 0.0
    for part in tl.static_range(PARTS):
        w = tl.exp2(tl.load(lse_ptr + part * rows + row) - top)
        weight += w
        total += w * tl.load(parts_ptr + (part * rows + row) * BLOCK_D + d)
    tl.store(out_ptr + row * HEAD_DIM + d, (total / weight).to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)


def attention_decode(query, text_key, text_value, image_key, image_value, position, text_lengths, mask, scale):
    """The contract's decode."""
    B, H, D = query.shape
    out = torch.empty((B, H, D), dtype=query.dtype, device=query.device)
    if B * H == 0:
        return out
    P = len(text_key)
    T = mask.text_len
    BLOCK_D = launch.padded_head_size(D)
    slots, counts = mask.visible_slots(query.device)
    text_parts = max(1, triton.cdiv(T, TEXT_PART))
    text_programs = P * H * text_parts * triton.cdiv(B // P, SAMPLES.value)
    parts = torch.empty((text_parts + 1, B, H, BLOCK_D), dtype=torch.float32, device=query.device)
    lse = torch.empty((text_parts + 1, B, H), dtype=torch.float32, device=query.device)
    with launch.device_guard(query):
        _attention_decode_kernel[(text_programs + B * H,)](
            query,
            query.stride(),
            text_key,
            text_key.stride(),
            text_value,
            text_value.stride(),
            image_key,
            image_key.stride(),
            image_value,
            image_value.stride(),
            parts,
            lse,
            text_lengths,
            position,
            slots,
            counts,
            slots.stride(0),
            B * H,
            B // P,
            H,
            text_programs,
            scale * LOG2E.value,
            T,
            mask.image_len,
            text_parts,
            TEXT_PART,
            min(32, STEP_BYTES // (BLOCK_D * query.element_size())),
            min(max(16, triton.next_power_of_2(slots.shape[1])), IMAGE_ELEMENTS // BLOCK_D),
            D,
            BLOCK_D,
            launch.wide(text_key, text_value, image_key, image_value),
            launch.input_precision(query.dtype),
            num_warps=4,
            num_stages=2,
            maxnreg=FLOAT32_REGISTERS if query.dtype == torch.float32 else None,
            enable_fp_fusion=True,
        )
        _attention_decode_merge_kernel[(B * H,)](
            parts, lse, out, B * H, text_parts + 1, D, BLOCK_D, num_warps=1, enable_fp_fusion=True
        )
    return out
