"""A new image token's keys and values into their slots of a layer's caches, in one launch.

The position is read on the device. B samples, H heads, D head size, C slots.
"""

import itertools

import triton
import triton.language as tl

from dalle_fast.ops.attention.triton import launch
from dalle_fast.ops.attention.triton.primitives import in_elements
from dalle_fast.ops.calls import current_device
from dalle_fast.ops.launches_triton import Launches

__all__ = ["attention_append"]

# Not tuned on a GPU: of 16 bits and heads of 64 each thread moves 16 bytes of a key and of a value.
HEADS = 16  # heads, of any sample, of one program
WARPS = 4


@triton.jit
def _vectors(ptr, stride_b, stride_h, stride_d, samples, heads, BLOCK_D: tl.constexpr):
    """Addresses of one vector (BLOCK_D,) of each of these heads. 64-bit: a stride times an index may pass 2**31."""
    rows = samples.to(tl.int64) * stride_b + heads.to(tl.int64) * stride_h
    return ptr + rows[:, None] + tl.arange(0, BLOCK_D)[None, :] * stride_d


@triton.jit(do_not_specialize=["num_rows", "num_heads"])
def _attention_append_kernel(
    key_ptr,
    key_strides,
    value_ptr,
    value_strides,
    image_k_ptr,
    image_k_strides,
    image_v_ptr,
    image_v_strides,
    position_ptr,
    num_rows,
    num_heads,
    IMAGE_LEN: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMN_LEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """The port of AttentionMask.cache_slot: a ring of SLOTS, or columns of COLUMN_LEN where that is not None.

    Programs: cdiv(num_rows, BLOCK_ROWS), num_rows is B * H. Strides are in units of UNIT: see `in_elements`.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    samples = rows // num_heads
    heads = rows % num_heads
    inside = (rows < num_rows)[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    b, h, d = in_elements(key_strides, UNIT, True)
    key = tl.load(_vectors(key_ptr, b, h, d, samples, heads, BLOCK_D), mask=inside)
    b, h, d = in_elements(value_strides, UNIT, True)
    value = tl.load(_vectors(value_ptr, b, h, d, samples, heads, BLOCK_D), mask=inside)
    position = tl.minimum(tl.maximum(tl.load(position_ptr), 0), IMAGE_LEN - 1)
    if COLUMN_LEN is None:
        slot = position % SLOTS
    else:
        slot = position % (SLOTS // COLUMN_LEN) * COLUMN_LEN + position // (SLOTS // COLUMN_LEN)
    b, h, c, d = in_elements(image_k_strides, UNIT, True)
    tl.store(_vectors(image_k_ptr + slot * c, b, h, d, samples, heads, BLOCK_D), key, mask=inside)
    b, h, c, d = in_elements(image_v_strides, UNIT, True)
    tl.store(_vectors(image_v_ptr + slot * c, b, h, d, samples, heads, BLOCK_D), value, mask=inside)


_launch = Launches(_attention_append_kernel)


def attention_append(image_key, image_value, key, value, position, mask):
    """See `append` in `__init__.py`."""
    B, H, D = key.shape
    if B * H == 0:
        return
    tensors = key, value, image_key, image_value
    unit, *strides = launch.in_units(*(x.stride() for x in tensors))
    with current_device(key):
        _launch(
            (triton.cdiv(B * H, HEADS),),
            *itertools.chain(*zip(tensors, strides)),
            position,
            B * H,
            H,
            mask.image_len,
            mask.cache_slots,
            mask.grid[0] if mask.rule == "column" else None,
            D,
            launch.padded_head_size(D),
            unit,
            HEADS,
            num_warps=WARPS,
        )
