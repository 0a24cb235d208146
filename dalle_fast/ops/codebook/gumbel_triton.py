"""The Gumbel-softmax codebook's forward pass on NVIDIA GPUs without logits in memory, in Triton.

As in `streaming_triton.py` a program has a tile of rows and a range of the codes, and a second kernel merges the ranges.
Here the rows' weights multiply the codebook at once, as in attention: sums so far are rescaled where a larger logit
comes.

N rows, K codes, I size of hidden, D size of an embedding, S ranges of codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dalle_fast.ops.codebook.noise_triton import NOISE_BLOCK, noise_keys, plus_noise
from dalle_fast.ops.codebook.streaming_triton import CLASSES, NO_CODE, rebase, take, take_codes
from dalle_fast.ops.codebook.tiles_triton import (
    LN2,
    LOG2E,
    Tiles,
    constants,
    described,
    load,
    operands,
    options,
    part_of_program,
    range_tiles,
    splits_of,
    tile_logits,
)
from dalle_fast.ops.launches_triton import Launches
from dalle_fast.ops.on_triton import capability_of

LEAST = tl.constexpr(-3.4028234663852886e38)  # times 0, -inf would be NaN
MOST = tl.constexpr(2e38)  # as finite when it is multiplied by LOG2E
STATS = 4  # numbers of a row, before its embedding
MERGED_ROWS = 16  # of a program of the second kernel


@triton.jit
def inverse_of(tau):
    """1 / tau, and finite: 0 times it is 0. NaN stays."""
    inverse = 1.0 / tau
    return tl.where(inverse > MOST, MOST, inverse)


@triton.jit(do_not_specialize=["N", "K", "range_tiles"])
def _gumbel_kernel(
    hidden,
    weight,
    codebook,
    bias_ptr,
    seed_ptr,
    tau_ptr,
    partial_ptr,
    code_ptr,
    sums_ptr,
    N,
    K,
    range_tiles,
    I: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PER_ROW: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    STEP: tl.constexpr,
    FLAT: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """What program (row tile, range of range_tiles tiles of codes) leaves of its rows, in row `range` of

    partial (5, S, N): the largest logit z, the sum of e = exp(z - largest), that of e (z - largest), and the first two
    of (z + noise) / tau, where the largest is taken before the division; code (S, N), that of the largest z + noise; sums
    (S, N, D), the weights times codebook (K, D), of WIDTH columns, a power of two.
    """
    first_row, row, first_tile, end_tile = part_of_program(0, K, range_tiles, ROWS, CODES)
    keys = noise_keys(seed_ptr, row, N, PER_ROW)
    scale = inverse_of(tl.load(tau_ptr)) * LOG2E

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    dot = tl.zeros([ROWS], tl.float32)
    largest_noisy = tl.full([ROWS], float("-inf"), tl.float32)
    total_noisy = tl.zeros([ROWS], tl.float32)
    best = tl.full([ROWS, CLASSES], float("-inf"), tl.float32)
    best_group = tl.full([ROWS, CLASSES], NO_CODE // CLASSES, tl.int32)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for tile in tl.range(first_tile, end_tile, flatten=FLAT):
        first = tile * CODES
        z = tile_logits(hidden, weight, bias_ptr, first_row, N, first, K, I, PADDED, ROWS, CODES, STEP, DESCRIBED)
        # Of the logits.
        before = largest
        largest, base, rescale = rebase(before, tl.max(z, 1), LOG2E)
        delta = z - base[:, None]
        e = tl.exp2(delta * LOG2E)
        dot = (dot + total * tl.maximum(before - base, LEAST)) * rescale + tl.sum(e * tl.maximum(delta, LEAST), 1)
        total = total * rescale + tl.sum(e, 1)
        # Of those with noise.
        z = plus_noise(z, first // NOISE_BLOCK, keys)
        best, best_group = take_codes(z, first // CLASSES, best, best_group, 0.0, 0, False)
        largest_noisy, base, rescale = rebase(largest_noisy, tl.max(z, 1), scale)
        weights = tl.exp2((z - base[:, None]) * scale)
        total_noisy = total_noisy * rescale + tl.sum(weights, 1)
        table = load(codebook, first, K, 0, D, CODES, WIDTH, DESCRIBED)
        sums = tl.dot(weights.to(table.dtype), table, sums * rescale[:, None])

    place = tl.program_id(1).to(tl.int64) * N + row
    plane = tl.num_programs(1).to(tl.int64) * N
    inside = row < N
    tl.store(partial_ptr + place, largest, mask=inside)
    tl.store(partial_ptr + plane + place, total, mask=inside)
    tl.store(partial_ptr + 2 * plane + place, dot, mask=inside)
    tl.store(partial_ptr + 3 * plane + place, largest_noisy, mask=inside)
    tl.store(partial_ptr + 4 * plane + place, total_noisy, mask=inside)
    value = tl.max(best, 1)
    code = best_group * CLASSES + tl.arange(0, CLASSES)[None, :]
    tl.store(code_ptr + place, tl.min(tl.where(best == value[:, None], code, NO_CODE), 1), mask=inside)
    column = tl.arange(0, WIDTH)
    tl.store(sums_ptr + place[:, None] * D + column[None, :], sums, mask=inside[:, None] & (column < D)[None, :])


@triton.jit(do_not_specialize=["N", "K", "S"])
def _merge_gumbel_kernel(
    partial_ptr,
    code_ptr,
    sums_ptr,
    tau_ptr,
    embedding_ptr,
    kl_ptr,
    codes_ptr,
    stats_ptr,
    N,
    K,
    S,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    STATS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The ranges together: embedding (N, D), kl (N), codes (N), stats (N, STATS + D)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    column = tl.arange(0, WIDTH)
    scale = inverse_of(tl.load(tau_ptr)) * LOG2E
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    dot = tl.zeros([ROWS], tl.float32)
    largest_noisy = tl.full([ROWS], float("-inf"), tl.float32)
    total_noisy = tl.zeros([ROWS], tl.float32)
    found = tl.zeros([ROWS], tl.int32)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    place = row.to(tl.int64)
    plane = S.to(tl.int64) * N
    for _ in range(S):
        before = largest
        here = tl.load(partial_ptr + place, mask=inside, other=0.0)
        total_here = tl.load(partial_ptr + plane + place, mask=inside, other=1.0)
        dot_here = tl.load(partial_ptr + 2 * plane + place, mask=inside, other=0.0)
        largest, base, rescale = rebase(before, here, LOG2E)
        rescale_here = tl.exp2((here - base) * LOG2E)
        dot = (dot + total * tl.maximum(before - base, LEAST)) * rescale
        dot += (dot_here + total_here * tl.maximum(here - base, LEAST)) * rescale_here
        total = total * rescale + total_here * rescale_here

        here = tl.load(partial_ptr + 3 * plane + place, mask=inside, other=0.0)
        total_here = tl.load(partial_ptr + 4 * plane + place, mask=inside, other=1.0)
        code_here = tl.load(code_ptr + place, mask=inside, other=0)
        sums_here = tl.load(
            sums_ptr + place[:, None] * D + column[None, :], mask=inside[:, None] & (column < D)[None, :], other=0.0
        )
        _, found = take(here, code_here, largest_noisy, found)
        largest_noisy, base, rescale = rebase(largest_noisy, here, scale)
        rescale_here = tl.exp2((here - base) * scale)
        total_noisy = total_noisy * rescale + total_here * rescale_here
        sums = sums * rescale[:, None] + sums_here * rescale_here[:, None]
        place += N

    # Not ln K - ln(total), which would cancel.
    tl.store(kl_ptr + row, dot / total - tl.log2(total / K) * LN2, mask=inside)
    tl.store(codes_ptr + row, found.to(tl.int64), mask=inside)
    sums = sums / total_noisy[:, None]
    stats_ptr += row.to(tl.int64) * (STATS + D)
    tl.store(stats_ptr, largest, mask=inside)
    tl.store(stats_ptr + 1, total, mask=inside)
    tl.store(stats_ptr + 2, largest_noisy, mask=inside)
    tl.store(stats_ptr + 3, total_noisy, mask=inside)
    wanted = inside[:, None] & (column < D)[None, :]
    tl.store(stats_ptr[:, None] + STATS + column[None, :], sums, mask=wanted)
    embedding_ptr += row.to(tl.int64) * D
    tl.store(embedding_ptr[:, None] + column[None, :], sums.to(embedding_ptr.dtype.element_ty), mask=wanted)


_launch = Launches(_gumbel_kernel)
_launch_merge = Launches(_merge_gumbel_kernel)


def gumbel_forward(hidden, weight, bias, codebook, tau, seed, *, seed_per_row):
    """Returns embedding (N, D), kl (N,), codes (N,) and stats (N, 4 + D) of hidden (N, I), weight (K, I), codebook (K, D).

    stats: `reference`'s four numbers and the embedding in float32, which is the soft one.
    """
    (N, I), (K, D) = hidden.shape, codebook.shape
    embedding, codes = hidden.new_empty(N, D), hidden.new_empty(N, dtype=torch.int64)
    kl = hidden.new_empty(N, dtype=torch.float32)
    stats = hidden.new_empty(N, STATS + D, dtype=torch.float32)
    if not N:  # there are no descriptors of nothing
        return embedding, kl, codes, stats
    tiles, width = _tiles(hidden, D), triton.next_power_of_2(D)
    S = splits_of(tiles, N, K, hidden)
    partial, code = stats.new_empty(5, S, N), stats.new_empty(S, N, dtype=torch.int32)
    sums = stats.new_empty(S, N, D)
    _launch(
        (-(-N // tiles.rows), S),
        *operands(tiles, hidden, weight),
        described(codebook, tiles.codes, width) if tiles.described else codebook,
        bias,
        seed,
        tau,
        partial,
        code,
        sums,
        N,
        K,
        range_tiles(tiles, K, S),
        I,
        D,
        width,
        bool(seed_per_row),
        *constants(tiles, K),
        **options(tiles),
    )
    _launch_merge(
        (-(-N // MERGED_ROWS),),
        partial,
        code,
        sums,
        tau,
        embedding,
        kl,
        codes,
        stats,
        N,
        K,
        S,
        D,
        width,
        STATS,
        MERGED_ROWS,
    )
    return embedding, kl, codes, stats


def _tiles(hidden, D):
    """By arithmetic, not measured yet: a row's sums of D columns stay in registers, beside its logits and their noise."""
    capability = capability_of(hidden)
    if capability[0] == 9 and D <= 128:
        return Tiles(128, 64, 64, 8, 3, flat=True, described=True)
    return Tiles(64, 64, 64, 8, 3, flat=False, described=capability >= (9, 0))
