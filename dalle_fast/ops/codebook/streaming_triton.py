"""Codes and losses on NVIDIA GPUs without logits in memory, in Triton: 16-bit inputs, tensor cores, one pass.

A program has a tile of rows and a range of the codes, of which it multiplies a tile at a time. What becomes of a tile's
logits happens in the product's registers and needs no other thread: of a sample the largest is kept for each of 16
classes of codes, which are compared once at the end; of a loss a row's largest logit and sum. A second kernel merges
the ranges. `triton.py` beside this file says what it takes, and loads it when a call gets here.

N rows, K codes, I size of hidden, S ranges of codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dalle_fast.ops.codebook.noise_triton import NOISE_BLOCK, halves, noise_keys, noise_of_block
from dalle_fast.ops.codebook.tiles_triton import (
    LN2,
    LOG2E,
    Tiles,
    constants,
    operands,
    options,
    part_of_program,
    range_tiles,
    splits_of,
    tile_logits,
)
from dalle_fast.ops.launches_triton import Launches
from dalle_fast.ops.on_triton import capability_of

CLASSES = tl.constexpr(16)  # a code's class is its number modulo these: the noise's LANES, so that a counter has one
NO_CODE = tl.constexpr(0x7FFFFFFF)
MERGED_ROWS = 128  # of a program of the second kernel


# -- what becomes of logits -------------------------------------------------------------------------------------------


@triton.jit
def take(z, group, best, best_group):
    """Keep the largest of each class, the first of equals. NaN is never larger."""
    larger = z > best
    return tl.where(larger, z, best), tl.where(larger, group, best_group)


@triton.jit
def take_codes(z, group, best, best_group, temperature, keys, NOISY: tl.constexpr):
    """`take` of a tile's logits z, whose first code is CLASSES * group."""
    if z.shape[1] > NOISE_BLOCK:
        left, right = halves(z)
        best, best_group = take_codes(left, group, best, best_group, temperature, keys, NOISY)
        group += z.shape[1] // 2 // CLASSES
        best, best_group = take_codes(right, group, best, best_group, temperature, keys, NOISY)
    else:
        left, right = halves(z)
        z0, z1 = halves(left)
        z2, z3 = halves(right)
        if NOISY:
            g0, g1, g2, g3 = noise_of_block(group // (NOISE_BLOCK // CLASSES), keys)
            z0 += temperature * g0
            z1 += temperature * g1
            z2 += temperature * g2
            z3 += temperature * g3
        best, best_group = take(z0, group, best, best_group)
        best, best_group = take(z1, group + 1, best, best_group)
        best, best_group = take(z2, group + 2, best, best_group)
        best, best_group = take(z3, group + 3, best, best_group)
    return best, best_group


@triton.jit
def rebase(largest, more, scale):
    """A row's largest logit so far and one of more logits: the larger, what to subtract, and the factor of sums so far.

    The sums are of exp2(scale * (logit - largest)).
    """
    new = tl.maximum(largest, more)
    base = tl.where(new == float("-inf"), 0.0, new)  # of codes that are all forbidden
    return new, base, tl.exp2((largest - base) * scale)


@triton.jit
def _take_targets(z, group, near_target, target_group):
    """Keep the CLASSES logits around a row's target once they come by: a comparison for all of them, not for each."""
    if z.shape[1] > CLASSES:
        left, right = halves(z)
        near_target = _take_targets(left, group, near_target, target_group)
        near_target = _take_targets(right, group + z.shape[1] // 2 // CLASSES, near_target, target_group)
    else:
        near_target = tl.where(target_group == group, z, near_target)
    return near_target


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N", "K", "range_tiles"])
def _streaming_kernel(
    hidden,
    weight,
    bias_ptr,
    seed_ptr,
    temperature_ptr,
    target_ptr,
    partial_ptr,
    code_ptr,
    N,
    K,
    range_tiles,
    I: tl.constexpr,
    LOSS: tl.constexpr,
    PER_ROW: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    STEP: tl.constexpr,
    FLAT: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """What program (row tile, range of range_tiles tiles of codes) leaves of its rows, in row `range` of

    partial (S, N), the largest value, and code (S, N), its code or NO_CODE; with LOSS instead partial (3, S, N), the
    largest logit, the sum, and the target's logit or 0. hidden and weight are descriptors or addresses.
    """
    NOISY: tl.constexpr = temperature_ptr is not None
    first_row, row, first_tile, end_tile = part_of_program(0, K, range_tiles, ROWS, CODES)

    temperature = 0.0
    keys = 0
    if NOISY:
        temperature = tl.load(temperature_ptr)
        keys = noise_keys(seed_ptr, row, N, PER_ROW)
    if LOSS:
        # What is no code may become one here: its row is NaN in the end.
        target = tl.load(target_ptr + row, mask=row < N, other=-1).to(tl.int32)
        largest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        near_target = tl.zeros([ROWS, CLASSES], tl.float32)
        target_group = (target >> 4)[:, None] + tl.zeros([ROWS, CLASSES], tl.int32)
    else:
        best = tl.full([ROWS, CLASSES], float("-inf"), tl.float32)
        best_group = tl.full([ROWS, CLASSES], NO_CODE // CLASSES, tl.int32)

    for tile in tl.range(first_tile, end_tile, flatten=FLAT):
        first = tile * CODES
        z = tile_logits(hidden, weight, bias_ptr, first_row, N, first, K, I, PADDED, ROWS, CODES, STEP, DESCRIBED)
        if LOSS:
            near_target = _take_targets(z, first // CLASSES, near_target, target_group)
            largest, base, rescale = rebase(largest, tl.max(z, 1), LOG2E)
            total = total * rescale + tl.sum(tl.exp2((z - base[:, None]) * LOG2E), 1)
        else:
            best, best_group = take_codes(z, first // CLASSES, best, best_group, temperature, keys, NOISY)

    place = tl.program_id(1).to(tl.int64) * N + row
    if LOSS:
        at_target = (target & (CLASSES - 1))[:, None] == tl.arange(0, CLASSES)[None, :]
        logit = tl.sum(tl.where(at_target, near_target, 0.0), 1)
        plane = tl.num_programs(1).to(tl.int64) * N
        tl.store(partial_ptr + place, largest, mask=row < N)
        tl.store(partial_ptr + plane + place, total, mask=row < N)
        tl.store(partial_ptr + 2 * plane + place, logit, mask=row < N)
    else:
        value = tl.max(best, 1)
        code = best_group * CLASSES + tl.arange(0, CLASSES)[None, :]
        tl.store(partial_ptr + place, value, mask=row < N)
        tl.store(code_ptr + place, tl.min(tl.where(best == value[:, None], code, NO_CODE), 1), mask=row < N)


@triton.jit(do_not_specialize=["N", "S"])
def _merge_codes_kernel(partial_ptr, code_ptr, out_ptr, N, S, ROWS: tl.constexpr):
    """The code of the largest value, of the first range that has it; 0 where no value is above -inf."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    found = tl.zeros([ROWS], tl.int32)
    place = row.to(tl.int64)
    for _ in range(S):
        best, found = take(
            tl.load(partial_ptr + place, mask=row < N, other=0.0),
            tl.load(code_ptr + place, mask=row < N, other=0),
            best,
            found,
        )
        place += N
    tl.store(out_ptr + row, found.to(tl.int64), mask=row < N)


@triton.jit(do_not_specialize=["N", "K", "S", "ignore_index"])
def _merge_losses_kernel(partial_ptr, target_ptr, out_ptr, stats_ptr, N, K, S, ignore_index, ROWS: tl.constexpr):
    """log of the sum of all ranges - the target's logit; 0 if ignored, NaN for what is no code.

    stats (2, N), where it is wanted: the largest logit, and the sum.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    logit = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    place = row.to(tl.int64)
    plane = S.to(tl.int64) * N
    for _ in range(S):
        largest_here = tl.load(partial_ptr + place, mask=row < N, other=0.0)
        total_here = tl.load(partial_ptr + plane + place, mask=row < N, other=1.0)
        logit_here = tl.load(partial_ptr + 2 * plane + place, mask=row < N, other=0.0)
        largest, base, rescale = rebase(largest, largest_here, LOG2E)
        total = total * rescale + total_here * tl.exp2((largest_here - base) * LOG2E)
        logit += logit_here
        place += N
    target = tl.load(target_ptr + row, mask=row < N, other=0)
    loss = tl.log2(total) * LN2 - (logit - largest)
    loss = tl.where((target >= 0) & (target < K), loss, float("nan"))
    tl.store(out_ptr + row, tl.where(target == ignore_index, 0.0, loss), mask=row < N)
    if stats_ptr is not None:
        tl.store(stats_ptr + row, largest, mask=row < N)
        tl.store(stats_ptr + N + row, total, mask=row < N)


# -- calls ------------------------------------------------------------------------------------------------------------

_launch_streaming = Launches(_streaming_kernel)
_launch_merge_codes = Launches(_merge_codes_kernel)
_launch_merge_losses = Launches(_merge_losses_kernel)


def sample_streaming(hidden, weight, bias, seed, temperature, *, seed_per_row, tiles=None):
    """Returns codes (N,) as `cuda.sample` does, of hidden (N, I) and weight (K, I); `tiles` replaces the choice."""
    N = hidden.shape[0]
    out = hidden.new_empty(N, dtype=torch.int64)
    if N:  # there are no descriptors of nothing
        tiles = tiles or tiles_for(hidden, noisy=temperature is not None)
        S = splits_of(tiles, N, weight.shape[0], hidden)
        partial, code = hidden.new_empty(S, N, dtype=torch.float32), hidden.new_empty(S, N, dtype=torch.int32)
        _launch(tiles, S, hidden, weight, bias, seed, temperature, None, partial, code, seed_per_row)
        _launch_merge_codes(_merging_grid(N), partial, code, out, N, S, MERGED_ROWS)
    return out


def cross_entropy_streaming(hidden, weight, bias, target, ignore_index, *, stats=None, tiles=None):
    """Returns loss (N,) as `cuda.cross_entropy` does, of hidden (N, I) and weight (K, I).

    stats (2, N), where it is given, becomes the largest logit of every row and the sum of exp(logit - largest).
    """
    N, K = hidden.shape[0], weight.shape[0]
    out = hidden.new_empty(N, dtype=torch.float32)
    if N:
        tiles = tiles or tiles_for(hidden, noisy=False)
        S = splits_of(tiles, N, K, hidden)
        partial = hidden.new_empty(3, S, N, dtype=torch.float32)
        _launch(tiles, S, hidden, weight, bias, None, None, target, partial, None, False)
        _launch_merge_losses(_merging_grid(N), partial, target, out, stats, N, K, S, ignore_index, MERGED_ROWS)
    return out


def _launch(tiles, S, hidden, weight, bias, seed, temperature, target, partial, code, seed_per_row):
    (N, I), K = hidden.shape, weight.shape[0]
    _launch_streaming(
        (-(-N // tiles.rows), S),
        *operands(tiles, hidden, weight),
        bias,
        seed if temperature is not None else None,
        temperature,
        target,
        partial,
        code,
        N,
        K,
        range_tiles(tiles, K, S),
        I,
        target is not None,
        bool(seed_per_row),
        *constants(tiles, K),
        **options(tiles),
    )


def _merging_grid(N):
    return (-(-N // MERGED_ROWS),)


def tiles_for(hidden, *, noisy):
    """By arithmetic, not measured yet: 128 x 256 has the least traffic of tiles whose products fit the registers.

    Noise needs as many again; so does the loss on sm_100, whose products are read from a memory of their own.
    """
    capability = capability_of(hidden)
    if capability < (9, 0):
        return Tiles(128, 128, 32, 8, 3, flat=False, described=False)
    if noisy or capability >= (10, 0):
        return Tiles(128, 128, 64, 8, 3, flat=True, described=True)
    return Tiles(128, 256, 64, 8, 4, flat=True, described=True)
