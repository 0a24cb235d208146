"""Tile choices of the Triton attention kernels, and the pairs that they make the kernels compute.

For 16 bits at head sizes up to 64 on compute capability 9, TILES was chosen from times of bfloat16 at head size 64 on an
H200 (2026-11-26, Triton 3.6: benchmarks/results/attention_kernels_h200.json, whose script is gone; retune with
benchmarks/tune_attention.py): what matters most are registers per thread, as few as fit without a spill,
so that four programs share a multiprocessor. With 96 (five programs) the forward
kernel took 5% less, and dK/dV with 32 text queries a step 7%, but both spill 8 bytes for some masks. Everything else has
NOT been tuned on a GPU: it was chosen from compiled code (shared memory, tensor-core instructions, no spills, see
tests/test_triton_compile.py) and from the cover of each mask. No kernel times itself at run time.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from dalle_fast.masks import AttentionMask
from dalle_fast.ops.attention.triton import primitives

__all__ = [
    "MaskNumbers",
    "Tiles",
    "cover",
    "mask_numbers",
    "padded_head_size",
    "tiles_for",
]

WALKS = ("raster", "column", "patch")  # the order is that of the numbers in primitives.py


class Tiles(NamedTuple):
    """How one kernel cuts its work.

    own: tokens of a program's own tile (queries, or keys in dK/dV).
    text, image: tokens of the tiles it meets in the text loop and in the image window.
    registers: most of them per thread. A multiprocessor has 65,536: 240 are two programs of four warps or one of eight,
        168 three of four, 128 four of four or two of eight. Left to itself ptxas aims at more programs and spills a few
        to get there; allowed all 255, it plans for so many and misses.
    """

    own: int
    text: int
    image: int
    warps: int
    stages: int
    registers: int = 240


class MaskNumbers(NamedTuple):
    """A mask and its walk as the kernels receive them, compile-time constants all.

    REACH is kv_reach - 1, the largest i - j. PATCH is the side of a patch; UP, LEFT and RIGHT say how many patches
    around its own a query patch looks at (0 outside the patch walk).
    """

    RULE: int
    T: int
    H: int
    W: int
    K: int
    DILATION: int
    REACH: int
    WALK: int
    PATCH: int
    UP: int
    LEFT: int
    RIGHT: int


# (architecture, bytes per element, wide) -> tiles of (forward, dQ, dK/dV). An architecture is the major compute
# capability: 10 is data-center Blackwell, and 8 stands for all that is neither 9 nor 10. Wide is a padded head size of
# 128. `image` is the largest that is tried: see `tiles_for`.
# Before compute capability 9, products of 64 rows keep only 4 warps busy, and their operands live in registers: the
# steps are shorter there. float32 products run on the ordinary cores and need short steps everywhere.
# At head sizes over 64, dQ in float32, which holds two tiles of its own, has 16 queries where the other kernels have
# 32. Compiled for head size 128 by Triton 3.6 and 3.8, 32 queries spilled 240 to 344 bytes at 240 registers on every
# architecture (row, conv), and 128 to 160 with 16 warps of 128 registers. Compiled by 3.6 for sm_80, 32 queries spilled
# 200 at 255 registers, 16 with 4 warps 240 at 255 registers, and 16 with steps of 32 text keys 256 at 240. These tiles
# took 180 to 194 and spilled none. TF32 has the same entry and did not need it: with 32 queries 165 registers at most.
# All that was with one pass over the keys. With two, see bwd.py, these tiles take 196 to 206 in float32 and 171 to 209
# in TF32, and at head sizes up to 64 182 to 200 and 150 to 170, again without spills (torus, column, row, clip).
# Before compute capability 9 the forward kernel in 16 bits spilled 8 bytes at 240 registers (axial, text_lengths,
# Triton 3.6). At 255 it spills none, and a multiprocessor still holds two programs of four warps. No GPU timed either.
_FLOAT32 = (Tiles(32, 16, 16, 4, 1), Tiles(32, 16, 16, 8, 1), Tiles(32, 16, 16, 4, 1))
_WIDE_FLOAT32 = (Tiles(32, 16, 16, 8, 1), Tiles(16, 16, 16, 8, 1), Tiles(32, 16, 16, 8, 1))
TILES = {
    (8, 2, False): (Tiles(64, 32, 32, 4, 2), Tiles(64, 32, 32, 4, 2), Tiles(64, 16, 16, 4, 1)),
    (8, 2, True): (Tiles(64, 32, 32, 4, 2, 255), Tiles(64, 32, 32, 4, 2), Tiles(64, 32, 32, 8, 1)),
    (9, 2, False): (Tiles(64, 32, 32, 4, 3, 128), Tiles(64, 32, 32, 4, 3, 128), Tiles(64, 16, 16, 4, 3, 168)),
    (9, 2, True): (Tiles(64, 32, 32, 4, 2), Tiles(64, 32, 32, 4, 2), Tiles(64, 16, 16, 8, 2)),
    (10, 2, False): (Tiles(64, 64, 32, 4, 2), Tiles(64, 64, 32, 4, 2), Tiles(64, 32, 32, 4, 1)),
    (10, 2, True): (Tiles(64, 32, 32, 4, 2), Tiles(64, 32, 32, 4, 2), Tiles(64, 32, 32, 8, 1)),
    **{(architecture, 4, False): _FLOAT32 for architecture in (8, 9, 10)},
    **{(architecture, 4, True): _WIDE_FLOAT32 for architecture in (8, 9, 10)},
}
KERNELS = ("forward", "grad_query", "grad_key_value")
# What a pair costs in the patch walk, whose positions take more arithmetic, over one in raster order. On an H200, conv 11
# at grids 64 and 128 in bfloat16: 1.38 and 1.42 forward, 1.29 and 1.35 in dQ, 1.12 and 1.18 in dK/dV.
PATCH_COST = 1.35


def padded_head_size(head_size: int) -> int:
    """The power of two, at least 16, that the kernels' head-size axis has."""
    return max(16, 1 << (head_size - 1).bit_length())


@functools.lru_cache(maxsize=1024)
def tiles_for(kernel: str, mask: AttentionMask, capability: tuple, head_size: int, size: int):
    """The tiles of one kernel for one mask, and the walk.

    Of the walks the mask allows and of image tiles of 32 tokens up to the table's, the pair that makes the kernel
    compute the fewest pairs, those of the patch walk counted for more; of equals the simpler walk and the larger tile.

    Args:
        kernel: one of KERNELS.
        capability: (major, minor) of the device.
        head_size: D.
        size: bytes per element.

    Returns:
        (Tiles, MaskNumbers).
    """
    architecture = capability[0] if capability[0] in (9, 10) else 8  # 12 has mma.sync and 99 KiB, like 8.6
    tiles = TILES[architecture, size, padded_head_size(head_size) == 128][KERNELS.index(kernel)]
    if (
        mask.text_len <= tiles.text
    ):  # a loop of one turn at most: pipelined, it makes ptxas of Triton 3.6 crash on sm_90
        tiles = tiles._replace(stages=1)
    steps = sorted({tiles.image, min(32, tiles.image)}, reverse=True)
    choices = []
    for walk in _walks(mask):
        for step in steps:
            cut = tiles._replace(image=step)
            numbers = mask_numbers(mask, walk, tiles.own)
            if numbers is not None:
                choices.append((cut, numbers))

    def cost(choice):
        each = PATCH_COST if choice[1].PATCH else 1.0
        return each * cover(kernel, mask.seq_len, *choice)

    return min(choices, key=cost)


def _walks(mask: AttentionMask):
    if mask.rule == "column":
        return ("column",)
    return ("raster", "patch") if mask.rule in ("conv_flat", "conv_clip", "conv_corner") else ("raster",)


def mask_numbers(mask: AttentionMask, walk: str, block: int) -> MaskNumbers | None:
    """What the kernels receive of a mask, or None where `walk` in tiles of `block` does not fit it."""
    patch = up = left = right = 0
    if walk == "patch":
        patch = math.isqrt(block)
        if patch**2 != block:
            return None
        width = mask.grid[1]
        reach = mask.kernel_size // 2 * mask.dilation
        if mask.rule == "conv_corner":
            reach = (mask.kernel_size - 1) * mask.dilation
        if width % patch or reach > width:
            return None
        # A conv_flat window that leaves its row on the left goes on in the row above: one row more.
        up = -(-(reach + (mask.rule == "conv_flat")) // patch)
        left = min(-(-reach // patch), width // patch)
        right = 0 if mask.rule == "conv_corner" else left
    return MaskNumbers(*mask.encode(), mask.kv_reach - 1, WALKS.index(walk), patch, up, left, right)


def cover(kernel: str, seq_len: int, tiles: Tiles, numbers: MaskNumbers) -> int:
    """Number of (query, key) pairs that `kernel` computes per batch and head, masked waste included.

    The bounds are those of the kernels: the Python bodies of the functions in primitives.py that they call.
    """
    return sum(tiles.own * width * len(turns) for _, _, _, width, turns, _ in _loops(kernel, seq_len, tiles, numbers))


def tile_plan(kernel: str, seq_len: int, tiles: Tiles, numbers: MaskNumbers):
    """Yield every tile pair that `kernel` visits: ("text" | "image", own start, other kind, other start, width).

    Starts are sequence positions for "text" (and, in dK/dV, for the "sequence" of queries of a text-key tile), walk
    positions for "image". Without text_lengths.
    """
    for kind, own, other, width, turns, start in _loops(kernel, seq_len, tiles, numbers):
        for turn in turns:
            yield kind, own, other, start(turn), width


def _loops(kernel: str, seq_len: int, tiles: Tiles, numbers: MaskNumbers):
    """Yield the loops of every program: (kind, own start, other kind, width, range of turns, start of a turn's tile)."""
    p = primitives
    reverse = kernel == "grad_key_value"
    text_len = min(seq_len, numbers.T)
    _, rows, length = p.image_count.fn(seq_len, numbers)
    text_tiles, image_tiles = p.tile_counts.fn(seq_len, length, numbers, tiles.own)

    def text_loops(kind, own, first):
        if reverse:
            start, full, end = p.text_queries.fn(first, text_len, seq_len, tiles.own, tiles.text)
        else:
            start, (full, end) = 0, p.text_keys.fn(first, text_len, tiles.own, tiles.text)
        for turns in (range(start, full, tiles.text), range(full, end, tiles.text)):
            yield kind, own, "sequence" if reverse else "text", tiles.text, turns, int

    for own in range(0, text_tiles * tiles.own, tiles.own):
        yield from text_loops("text", own, own)
    for own in range(0, image_tiles * tiles.own, tiles.own):
        if not reverse:
            yield from text_loops("image", own, numbers.T)
        *where, count, column, columns = p.window.fn(own, rows, length, numbers, tiles.own, tiles.image, reverse)
        place = functools.partial(_image_start, *where, column, columns, numbers, tiles.image)
        yield "image", own, "image", tiles.image, range(count), place


def _image_start(start, column, columns, numbers, step, turn):
    return primitives.tile_start.fn(turn, start, column, columns, numbers, step)
