"""Codes and losses on NVIDIA GPUs without logits in memory, in Triton: 16-bit inputs, tensor cores, one pass.

A program has a tile of rows and a range of the codes, of which it multiplies a tile at a time. What becomes of a tile's
logits happens in the product's registers and needs no other thread: of a sample the largest is kept for each of 16
classes of codes, which are compared once at the end; of a loss a row's largest logit and sum. A second kernel merges
the ranges. `triton.py` beside this file says what it takes, and loads it when a call gets here.

N rows, K codes, I size of hidden, S ranges of codes.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dalle_fast.ops.on_triton import capability_of

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NOISE_BLOCK = tl.constexpr(64)  # as in noise.py: the codes that 16 counters of 4 words serve
CLASSES = tl.constexpr(16)  # a code's class is its number modulo these; NOISE_LANES, so that a counter has one class
NO_CODE = tl.constexpr(0x7FFFFFFF)
MERGED_ROWS = 128  # of a program of the second kernel


class Tiles(NamedTuple):
    """How a call is cut: rows and codes of a tile, of which `step` columns are multiplied at a time."""

    rows: int
    codes: int  # at least 64
    step: int
    warps: int
    stages: int
    flat: bool  # the loops over tiles and columns are one: a tile's loads are under way while the one before is read
    described: bool  # loads by tensor descriptors (TMA), or by addresses
    splits: int | None = None  # S; None: by arithmetic


# -- noise: the ports of noise.py, csrc/philox.h and csrc/gumbel.h ----------------------------------------------------


@triton.jit
def philox(counter, row_low, row_high, key_low, key_high):
    """The 4 words of every counter; uint32 blocks that broadcast."""
    a = counter
    b = row_low
    c = row_high
    d = tl.zeros_like(counter)
    for _ in tl.static_range(10):
        # Both halves of a product are one instruction.
        p = a.to(tl.uint64) * 0xD2511F53
        q = c.to(tl.uint64) * 0xCD9E8D57
        a = (q >> 32).to(tl.uint32) ^ b ^ key_low
        b = q.to(tl.uint32)
        c = (p >> 32).to(tl.uint32) ^ d ^ key_high
        d = p.to(tl.uint32)
        key_low = tl.add(key_low, 0x9E3779B9, sanitize_overflow=False)
        key_high = tl.add(key_high, 0xBB67AE85, sanitize_overflow=False)
    return a, b, c, d


@triton.jit
def _split(x):
    """(exponent * 2^23, fraction) of positive normal numbers, 1 + fraction from sqrt(1/2) to sqrt(2)."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) & -0x800000
    return exponent, (bits - exponent).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def _log_of(exponent, f):
    p = f * 7.0376836292e-2 - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    e = exponent.to(tl.float32)
    larger: tl.constexpr = 0.693359375 / 8388608
    smaller: tl.constexpr = -2.12194440e-4 / 8388608
    return e * larger + (f + (e * smaller + (p * f - 0.5) * (f * f)))


@triton.jit
def gumbel(word):
    """Standard Gumbel noise of uint32 words."""
    u = tl.minimum(word.to(tl.float32) * (1.0 / 4294967296) + (0.5 / 4294967296), 1.0 - 1.0 / 16777216)
    exponent, fraction = _split(1.0 - u)
    exponent, fraction = _split(-_log_of(exponent, tl.where(exponent == 0, -u, fraction)))
    return -_log_of(exponent, fraction)


@triton.jit
def _low_high(x):
    return x.to(tl.uint32), (x >> 32).to(tl.uint32)


@triton.jit
def noise_keys(seed_ptr, row, N, PER_ROW: tl.constexpr):
    """(row low, row high, key low, key high), each (rows, 1): a row that has a seed of its own is number 0."""
    if PER_ROW:
        seed = tl.load(seed_ptr + row, mask=row < N, other=0)
        row_low = tl.zeros_like(row).to(tl.uint32)
    else:
        seed = tl.load(seed_ptr) + tl.zeros_like(row)
        row_low = row.to(tl.uint32)
    key_low, key_high = _low_high(seed)
    return row_low[:, None], tl.zeros_like(row_low)[:, None], key_low[:, None], key_high[:, None]


# -- what becomes of logits -------------------------------------------------------------------------------------------


@triton.jit
def _halves(x):
    """The left and the right half of the columns; both are in a thread's registers already."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def _take(z, group, best, best_group):
    """Keep the largest of each class, the first of equals. NaN is never larger."""
    larger = z > best
    return tl.where(larger, z, best), tl.where(larger, group, best_group)


@triton.jit
def _take_codes(z, group, best, best_group, temperature, keys, NOISY: tl.constexpr):
    """`_take` of a tile's logits z, whose first code is CLASSES * group."""
    if z.shape[1] > NOISE_BLOCK:
        left, right = _halves(z)
        best, best_group = _take_codes(left, group, best, best_group, temperature, keys, NOISY)
        group += z.shape[1] // 2 // CLASSES
        best, best_group = _take_codes(right, group, best, best_group, temperature, keys, NOISY)
    else:
        left, right = _halves(z)
        z0, z1 = _halves(left)
        z2, z3 = _halves(right)
        if NOISY:
            counter = group * (CLASSES * CLASSES // NOISE_BLOCK) + tl.arange(0, CLASSES)
            row_low, row_high, key_low, key_high = keys
            counter = counter.to(tl.uint32)[None, :] + tl.zeros_like(row_low)
            w0, w1, w2, w3 = philox(counter, row_low, row_high, key_low, key_high)
            z0 += temperature * gumbel(w0)
            z1 += temperature * gumbel(w1)
            z2 += temperature * gumbel(w2)
            z3 += temperature * gumbel(w3)
        best, best_group = _take(z0, group, best, best_group)
        best, best_group = _take(z1, group + 1, best, best_group)
        best, best_group = _take(z2, group + 2, best, best_group)
        best, best_group = _take(z3, group + 3, best, best_group)
    return best, best_group


@triton.jit
def _take_sum(z, largest, total):
    """A row's running maximum and sum of exp(z - maximum)."""
    new = tl.maximum(largest, tl.max(z, 1))
    base = tl.where(new == float("-inf"), 0.0, new)  # of codes that are all forbidden
    return new, total * tl.exp2((largest - base) * LOG2E) + tl.sum(tl.exp2((z - base[:, None]) * LOG2E), 1)


@triton.jit
def _take_targets(z, group, near_target, target_group):
    """Keep the CLASSES logits around a row's target once they come by: a comparison for all of them, not for each."""
    if z.shape[1] > CLASSES:
        left, right = _halves(z)
        near_target = _take_targets(left, group, near_target, target_group)
        near_target = _take_targets(right, group + z.shape[1] // 2 // CLASSES, near_target, target_group)
    else:
        near_target = tl.where(target_group == group, z, near_target)
    return near_target


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _load(x, row, rows, column, I: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, DESCRIBED: tl.constexpr):
    """Rows and columns from (row, column) on of x (rows, I): zeros right of it, whatever is finite below it."""
    if DESCRIBED:
        tile = x.load([row, column])
    else:
        # The last row is read again instead of rows that are not there: a comparison less than with a mask.
        offsets = tl.minimum(tl.arange(0, ROWS), rows - 1 - row)[:, None] * I + tl.arange(0, STEP)[None, :]
        x += row.to(tl.int64) * I + column
        if I % STEP == 0:
            tile = tl.load(x + offsets)
        else:
            tile = tl.load(x + offsets, mask=(column + tl.arange(0, STEP) < I)[None, :], other=0.0)
    return tile


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
    first_row = tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS)
    split = tl.program_id(1)
    first_tile = split * range_tiles
    end_tile = min(first_tile + range_tiles, (K + CODES - 1) // CODES)

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
        z = tl.zeros([ROWS, CODES], tl.float32)
        for column in tl.range(0, I, STEP):
            h = _load(hidden, first_row, N, column, I, ROWS, STEP, DESCRIBED)
            w = _load(weight, first, K, column, I, CODES, STEP, DESCRIBED)
            z = tl.dot(h, w.T, z)
        # What follows the last code is as if it were forbidden.
        code = first + tl.arange(0, CODES)
        if bias_ptr is not None:
            z += tl.load(bias_ptr + code, mask=code < K, other=float("-inf"))[None, :]
        elif PADDED:
            z += tl.where(code < K, 0.0, float("-inf"))[None, :]
        if LOSS:
            near_target = _take_targets(z, first // CLASSES, near_target, target_group)
            largest, total = _take_sum(z, largest, total)
        else:
            best, best_group = _take_codes(z, first // CLASSES, best, best_group, temperature, keys, NOISY)

    place = split.to(tl.int64) * N + row
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
        best, found = _take(
            tl.load(partial_ptr + place, mask=row < N, other=0.0),
            tl.load(code_ptr + place, mask=row < N, other=0),
            best,
            found,
        )
        place += N
    tl.store(out_ptr + row, found.to(tl.int64), mask=row < N)


@triton.jit(do_not_specialize=["N", "K", "S", "ignore_index"])
def _merge_losses_kernel(partial_ptr, target_ptr, out_ptr, N, K, S, ignore_index, ROWS: tl.constexpr):
    """log of the sum of all ranges - the target's logit; 0 if ignored, NaN for what is no code."""
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
        new = tl.maximum(largest, largest_here)
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2((largest - base) * LOG2E) + total_here * tl.exp2((largest_here - base) * LOG2E)
        largest = new
        logit += logit_here
        place += N
    target = tl.load(target_ptr + row, mask=row < N, other=0)
    loss = tl.log2(total) * LN2 - (logit - largest)
    loss = tl.where((target >= 0) & (target < K), loss, float("nan"))
    tl.store(out_ptr + row, tl.where(target == ignore_index, 0.0, loss), mask=row < N)


# -- calls ------------------------------------------------------------------------------------------------------------


def sample_streaming(hidden, weight, bias, seed, temperature, *, seed_per_row, tiles=None):
    """Returns codes (N,) as `cuda.sample` does, of hidden (N, I) and weight (K, I); `tiles` replaces the choice."""
    N = hidden.shape[0]
    out = hidden.new_empty(N, dtype=torch.int64)
    if N:  # there are no descriptors of nothing
        S = _splits(tiles := tiles or _tiles(hidden, noisy=temperature is not None), hidden, weight)
        partial, code = hidden.new_empty(S, N, dtype=torch.float32), hidden.new_empty(S, N, dtype=torch.int32)
        _launch(tiles, S, hidden, weight, bias, seed, temperature, None, partial, code, seed_per_row)
        _merge_codes_kernel[_merging_grid(N)](partial, code, out, N, S, MERGED_ROWS)
    return out


def cross_entropy_streaming(hidden, weight, bias, target, ignore_index, *, tiles=None):
    """Returns loss (N,) as `cuda.cross_entropy` does, of hidden (N, I) and weight (K, I)."""
    N, K = hidden.shape[0], weight.shape[0]
    out = hidden.new_empty(N, dtype=torch.float32)
    if N:
        S = _splits(tiles := tiles or _tiles(hidden, noisy=False), hidden, weight)
        partial = hidden.new_empty(3, S, N, dtype=torch.float32)
        _launch(tiles, S, hidden, weight, bias, None, None, target, partial, None, False)
        _merge_losses_kernel[_merging_grid(N)](partial, target, out, N, K, S, ignore_index, MERGED_ROWS)
    return out


def _launch(tiles, S, hidden, weight, bias, seed, temperature, target, partial, code, seed_per_row):
    (N, I), K = hidden.shape, weight.shape[0]
    operands = hidden, weight
    if tiles.described:
        operands = _described(hidden, tiles.rows, tiles.step), _described(weight, tiles.codes, tiles.step)
    _streaming_kernel[-(-N // tiles.rows), S](
        *operands,
        bias,
        seed if temperature is not None else None,
        temperature,
        target,
        partial,
        code,
        N,
        K,
        -(-_code_tiles(tiles, K) // S),
        I,
        target is not None,
        bool(seed_per_row),
        K % tiles.codes != 0,
        tiles.rows,
        tiles.codes,
        tiles.step,
        tiles.flat,
        tiles.described,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        enable_fp_fusion=True,  # named because its default flips in Triton 3.10
    )


def _described(x, rows, columns):
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, [rows, columns])


def _merging_grid(N):
    return (-(-N // MERGED_ROWS),)


def _tiles(hidden, *, noisy):
    """By arithmetic, not measured yet: 128 x 256 has the least traffic of tiles whose products fit the registers.

    Noise needs as many again; so does the loss on sm_100, whose products are read from a memory of their own.
    """
    capability = capability_of(hidden)
    if capability < (9, 0):
        return Tiles(128, 128, 32, 8, 3, flat=False, described=False)
    if noisy or capability >= (10, 0):
        return Tiles(128, 128, 64, 8, 3, flat=True, described=True)
    return Tiles(128, 256, 64, 8, 4, flat=True, described=True)


def _splits(tiles, hidden, weight):
    count = _code_tiles(tiles, weight.shape[0])
    if tiles.splits is not None:
        return -(-count // -(-count // tiles.splits))  # none is empty
    return best_splits(-(-hidden.shape[0] // tiles.rows), count, processors_of(hidden))


@functools.lru_cache(maxsize=1024)
def best_splits(row_tiles, code_tiles, processors):
    """S, none of them empty, for the least time: waves of programs, one on a processor, times the tiles of each."""
    longest = {-(-code_tiles // S) for S in range(1, min(code_tiles, processors) + 1)}
    # A program costs a tile's time besides: its first loads wait for memory, and its results are merged.
    splits = {-(-code_tiles // tiles): tiles for tiles in longest}
    return min(splits, key=lambda S: (-(-row_tiles * S // processors) * (splits[S] + 1), S))


def _code_tiles(tiles, K):
    return -(-K // tiles.codes)


def processors_of(tensor):
    """How many of its programs run at once."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 4
