"""Tiles of logits in Triton: how a call is cut into them, and the product that makes one.

N rows, K codes, I size of hidden, S ranges of codes.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


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


@triton.jit
def part_of_program(first_row, K, range_tiles, ROWS: tl.constexpr, CODES: tl.constexpr):
    """What program (row tile, range of range_tiles tiles of codes) has of the rows from first_row on: its first row, its
    rows, its first tile and the one behind its last.
    """
    first_row += tl.program_id(0) * ROWS
    first_tile = tl.program_id(1) * range_tiles
    end_tile = min(first_tile + range_tiles, (K + CODES - 1) // CODES)
    return first_row, first_row + tl.arange(0, ROWS), first_tile, end_tile


@triton.jit
def load(x, row, rows, column, I: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, DESCRIBED: tl.constexpr):
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


@triton.jit
def product(
    a,
    b,
    first_row,
    N,
    first,
    K,
    I: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    STEP: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """a @ b.T for ROWS rows of a (N, I) from first_row on and CODES of b (K, I) from `first` on."""
    z = tl.zeros([ROWS, CODES], tl.float32)
    for column in tl.range(0, I, STEP):
        x = load(a, first_row, N, column, I, ROWS, STEP, DESCRIBED)
        y = load(b, first, K, column, I, CODES, STEP, DESCRIBED)
        z = tl.dot(x, y.T, z)
    return z


@triton.jit
def tile_logits(
    hidden,
    weight,
    bias_ptr,
    first_row,
    N,
    first,
    K,
    I: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    STEP: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """hidden @ weight.T + bias as `product` has it; what follows the last code is as if it were forbidden."""
    z = product(hidden, weight, first_row, N, first, K, I, ROWS, CODES, STEP, DESCRIBED)
    code = first + tl.arange(0, CODES)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + code, mask=code < K, other=float("-inf"))[None, :]
    elif PADDED:
        z += tl.where(code < K, 0.0, float("-inf"))[None, :]
    return z


def described(x, rows, columns):
    """x, of which a kernel loads so many rows and columns at a time by a descriptor."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, [rows, columns])


def operands(tiles, hidden, weight):
    """A product's rows and codes as the kernels load them; there are no descriptors of nothing."""
    if not tiles.described or not len(hidden):
        return hidden, weight
    return described(hidden, tiles.rows, tiles.step), described(weight, tiles.codes, tiles.step)


def constants(tiles, codes):
    """The last arguments of a kernel that multiplies tiles, from PADDED on."""
    return codes % tiles.codes != 0, tiles.rows, tiles.codes, tiles.step, tiles.flat, tiles.described


def options(tiles):
    """How a kernel is compiled; fusion is named because its default flips in Triton 3.10."""
    return {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True}


def splits_of(tiles, rows, codes, like):
    """S for so many rows and codes, on the device of `like`."""
    count = -(-codes // tiles.codes)
    if tiles.splits is not None:
        return -(-count // -(-count // tiles.splits))  # none is empty
    return best_splits(-(-rows // tiles.rows), count, processors_of(like))


def range_tiles(tiles, codes, S):
    """How many tiles of codes a range has, the last one aside."""
    return -(--(-codes // tiles.codes) // S)


@functools.lru_cache(maxsize=1024)
def best_splits(row_tiles, code_tiles, processors):
    """S, none of them empty, for the least time: waves of programs, one on a processor, times the tiles of each."""
    longest = {-(-code_tiles // S) for S in range(1, min(code_tiles, processors) + 1)}
    # A program costs a tile's time besides: its first loads wait for memory, and its results are merged.
    splits = {-(-code_tiles // tiles): tiles for tiles in longest}
    return min(splits, key=lambda S: (-(-row_tiles * S // processors) * (splits[S] + 1), S))


def processors_of(tensor):
    """How many of its programs run at once."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 4
