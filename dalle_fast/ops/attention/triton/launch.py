"""What every launcher of the Triton attention kernels needs: tiles, grids, options, the device."""

import functools
import math

import torch

from dalle_fast.ops.attention.triton import configs
from dalle_fast.ops.attention.triton.configs import padded_head_size
from dalle_fast.ops.attention.triton.primitives import image_count, tile_counts
from dalle_fast.ops.on_triton import capability_of

__all__ = [
    "chosen_tiles",
    "in_units",
    "input_precision",
    "key_programs",
    "options",
    "padded_head_size",
    "query_grid",
    "wide",
]


def chosen_tiles(kernel: str, query, mask):
    """(Tiles, MaskNumbers) of the committed table for these tensors."""
    return configs.tiles_for(kernel, mask, capability_of(query), query.shape[-1], query.element_size())


def options(cut) -> dict:
    # enable_fp_fusion is named because its default flips in Triton 3.10.
    return {
        "num_warps": cut.warps,
        "num_stages": cut.stages,
        "maxnreg": cut.registers,
        "enable_fp_fusion": True,
    }


def wide(S, D, *strides) -> bool:
    """Do some tensors (.., S, D) of these strides have elements of one head that lie 2**31 elements apart or more?"""
    return any((S - 1) * of_rows + (D - 1) * of_columns >= 1 << 31 for *_, of_rows, of_columns in strides)


@functools.lru_cache(maxsize=1024)
def in_units(*strides) -> tuple:
    """(UNIT, *strides): of every tensor's strides all but the last divided by UNIT, 2, 4 or 8 where they are multiples.

    Of an integer Triton knows whether 16 divides it, nothing else, and without that it loads heads of 40 or 72, whose
    strides are multiples of 8, number by number. A kernel that multiplies by UNIT (`primitives.in_elements`) tells it.
    """
    divisor = math.gcd(*(stride for *outer, _ in strides for stride in outer))
    UNIT = divisor & -divisor  # the power of two in it
    if UNIT not in (2, 4, 8):
        return 1, *strides
    return UNIT, *((*(stride // UNIT for stride in outer), last) for *outer, last in strides)


def query_grid(heads: int, seq_len: int, numbers, cut) -> tuple[int]:
    """One program per head and tile of `cut.own` queries."""
    return (sum(key_programs(heads, seq_len, numbers, cut)),)


def key_programs(heads: int, seq_len: int, numbers, cut) -> tuple[int, int]:
    """(text, image) programs: one per head and tile of `cut.own` positions."""
    text, image = _tiles(seq_len, numbers, cut.own)
    return heads * text, heads * image


@functools.lru_cache(maxsize=1024)  # the kernels' own functions, in Python, take longer than a launch
def _tiles(seq_len: int, numbers, size: int) -> tuple[int, int]:
    _, _, length = image_count.fn(seq_len, numbers)
    return tile_counts.fn(seq_len, length, numbers, size)


def input_precision(dtype) -> str:
    """How matrix products read float32: exactly, unless torch's own setting allows TF32."""
    # Where this was set by its own name, torch.get_float32_matmul_precision() raises; this follows the older settings too.
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"
