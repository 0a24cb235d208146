"""The tiles that the Triton attention kernels visit: all that the mask needs, each pair once, and little besides.

No kernel runs here. `configs.tile_plan` lists the tile pairs from the functions that the kernels themselves call.

S sequence, T text, N image tokens.
"""

import itertools

import numpy as np
import pytest
import torch

from dalle_fast.masks import AttentionMask, column_mask, conv_mask, row_mask

pytest.importorskip("triton", reason="the package triton is not installed")

from dalle_fast.ops.attention.triton import configs, primitives
from dalle_fast.testing import every_mask

CONV = [(1, 1), (3, 1), (5, 1), (9, 1), (11, 1), (3, 2), (5, 3)]  # (kernel size, dilation)


# -- how much ----------------------------------------------------------------------------------------------------------

# Pairs per batch and head that a kernel may compute, text 256: the design's table, to the digits that it has. But for
# conv at grid 64: there the design has patches, 2,565,000, and on an H200 the more pairs of raster order took less time
# (forward 0.78 of it, dQ 0.82, dK/dV 0.99).
MOST_PAIRS = {
    "32 row": (row_mask(256, 32), 399_360),
    "32 column": (column_mask(256, 32), 368_640),
    "32 conv": (conv_mask(256, 32, 11), 540_672),
    "64 row": (row_mask(256, 64), 1_615_000),
    "64 conv": (conv_mask(256, 64, 11), 2_840_000),
    "128 row": (row_mask(256, 128), 7_450_000),
    "128 conv": (conv_mask(256, 128, 11), 10_350_000),
}


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
@pytest.mark.parametrize("name", MOST_PAIRS)
def test_computes_no_more_pairs_than_designed(name, capability, head_size):
    mask, most = MOST_PAIRS[name]
    for kernel in ("forward", "grad_query", "grad_key_value"):
        tiles, numbers = configs.tiles_for(kernel, mask, capability, head_size, size=2)
        pairs = configs.cover(kernel, mask.seq_len, tiles, numbers)
        print(f"{name:10} {kernel:14} {pairs:>10,} pairs computed, {mask.num_pairs:>9,} needed")
        assert mask.num_pairs <= pairs <= most


# -- all of it, once ---------------------------------------------------------------------------------------------------


def walks_of(mask):
    if mask.rule == "column":
        return ("column",)
    return ("raster", "patch") if mask.rule in ("conv_flat", "conv_clip", "conv_corner") else ("raster",)


def visits(kernel, seq_len, tiles, numbers):
    """(S, S) how often `kernel` computes each (query, key) pair."""
    count = np.zeros((seq_len, seq_len), dtype=np.int8)
    _, rows, length = primitives.image_count.fn(seq_len, numbers)

    def tokens(kind, start, width):
        positions = start + np.arange(width)
        if kind == "image":
            positions, valid = primitives.walk_tokens.fn(positions, seq_len, rows, length, numbers)
        else:
            valid = positions < (min(seq_len, numbers.T) if kind == "text" else seq_len)
        return positions[np.asarray(valid, dtype=bool)]

    for kind, own_start, other_kind, other_start, width in configs.tile_plan(kernel, seq_len, tiles, numbers):
        own, other = tokens(kind, own_start, tiles.own), tokens(other_kind, other_start, width)
        q, k = (other, own) if kernel == "grad_key_value" else (own, other)
        count[np.ix_(q, k)] += 1
    return count


def check_visits(mask: AttentionMask, seq_len: int, own: int, text: int, image: int) -> int:
    """Every kernel and walk visits every allowed pair exactly once; returns how many (kernel, walk) were checked."""
    allowed = mask.to_dense(seq_len=seq_len).numpy()
    checked = 0
    for walk in walks_of(mask):
        numbers = configs.mask_numbers(mask, walk, own)
        if numbers is None or (walk == "patch" and image != own):
            continue
        tiles = configs.Tiles(own, text, image, warps=4, stages=1)
        for kernel in ("forward", "grad_query", "grad_key_value"):
            count = visits(kernel, seq_len, tiles, numbers)
            where = f"{kernel} {walk} {mask!r} seq_len {seq_len} {tiles}"
            wrong = allowed & (count != 1)
            if wrong.any():
                q, k = np.argwhere(wrong)[0]
                pytest.fail(
                    f"{where}: visits pair ({q}, {k}) {count[q, k]} times, and {wrong.sum() - 1} more are wrong"
                )
            checked += 1
    return checked


def some_prefixes(mask):
    T, S, W = mask.text_len, mask.seq_len, mask.grid[1]
    return sorted({S, S - 1, T, T // 2, T + 1, T + W + 1, T + (S - T) // 2} & set(range(S + 1)))


@pytest.mark.parametrize("rule", every_mask(0, 1))
def test_visits_every_allowed_pair_once(rule):
    checked = 0
    for T, grid in itertools.product((0, 13, 70), ((1, 9), (9, 1), (5, 7), (3, 11), (8, 8))):
        for K, d in CONV if rule.startswith("conv") else [(1, 1)]:
            mask = every_mask(T, grid, K, d)[rule]
            for seq_len in some_prefixes(mask):
                for cut in ((16, 16, 16), (16, 32, 16), (64, 64, 32)):
                    checked += check_visits(mask, seq_len, *cut)
    print(f"{rule}: {checked} covers")
    assert checked > 700


@pytest.mark.parametrize("rule", ["conv_flat", "conv_clip", "conv_corner"])
def test_patches_visit_every_allowed_pair_once(rule):
    """Grids on which windows leave a row at both ends, wrap by more than one patch, or end in half a patch row."""
    checked = 0
    for grid, own in (((16, 24), 64), ((11, 40), 64), ((9, 8), 64), ((6, 16), 64), ((9, 8), 16), ((6, 16), 16)):
        for K, d in CONV:
            mask = every_mask(5, grid, K, d)[rule]
            if configs.mask_numbers(mask, "patch", own) is not None:
                for seq_len in some_prefixes(mask)[-2:]:
                    checked += check_visits(mask, seq_len, own, own, own)
    print(f"{rule}: {checked} covers")
    assert checked >= 384


def test_large_grids_take_patches_and_small_ones_do_not():
    def walk(mask):
        return configs.tiles_for("forward", mask, (9, 0), 64, size=2)[1].WALK

    assert walk(conv_mask(256, 32, 11)) == configs.WALKS.index("raster")
    assert walk(conv_mask(256, 64, 11)) == configs.WALKS.index("raster")
    assert walk(conv_mask(256, 128, 11)) == configs.WALKS.index("patch")
    assert walk(row_mask(256, 128)) == configs.WALKS.index("raster")


def test_column_walk_is_the_masks_token_order():
    for mask in (column_mask(3, (5, 7)), column_mask(0, (8, 3))):
        numbers = configs.mask_numbers(mask, "column", 16)
        N = mask.image_len
        _, rows, length = primitives.image_count.fn(mask.seq_len, numbers)
        positions, valid = primitives.walk_tokens.fn(np.arange(N), mask.seq_len, rows, length, numbers)
        assert (rows, length) == (mask.grid[0], N) and np.all(valid)
        assert torch.equal(torch.from_numpy(positions), mask.token_order[mask.text_len :])
