"""The codebook operation's gradients on NVIDIA GPUs in Triton: those of logits a tile at a time, and their products.

The rows go by in chunks. One kernel makes the logits of a tile again and leaves their gradient, in 16 bits: no logits
are in memory. It reads a row once: the sum that a softmax's gradient needs, that of y dy over all codes, is
grad_embedding times the embedding, which the forward pass has kept in float32. Products of the chunk follow; those that
sum over all rows are added up in float32, in the order of the chunks, so that every run has the same result.

N rows, K codes, I size of hidden, D size of an embedding, R rows of a chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dalle_fast.ops.codebook.gumbel_triton import LEAST, STATS, inverse_of
from dalle_fast.ops.codebook.noise_triton import NOISE_BLOCK, halves, noise_keys, plus_noise
from dalle_fast.ops.codebook.products import as_float32, float32_product
from dalle_fast.ops.codebook.tiles_triton import (
    LN2,
    LOG2E,
    Tiles,
    constants,
    described,
    operands,
    options,
    part_of_program,
    product,
    range_tiles,
    splits_of,
    tile_logits,
)
from dalle_fast.ops.launches_triton import Launches
from dalle_fast.ops.on_triton import capability_of

CHUNK_BYTES = 21 << 20  # of what has R rows and K columns: the 40 MB that are promised, less the sums in float32
CHUNK_ROWS = 128  # R is a multiple, so that no tile of rows is in two chunks
DOT_ROWS, DOT_STEP = 64, 64
ALIGNMENT = 64  # of the first number of a row of gradients, in numbers


@triton.jit(do_not_specialize=["N"])
def _dot_kernel(
    grad_embedding_ptr,
    stats_ptr,
    dot_ptr,
    N,
    D: tl.constexpr,
    STATS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """dot (N): every row's grad_embedding (N, D) times its embedding, in stats (N, STATS + D).

    As products of tensor cores, of which the diagonal counts, the embedding in two parts: so a row that is sure of a code,
    whose embedding is the codebook's, has in `dot` the very number that its gradient kernel makes for that code. They
    cancel, where a rounding would be divided by tau.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    of_high = tl.zeros([ROWS, ROWS], tl.float32)
    of_low = tl.zeros([ROWS, ROWS], tl.float32)
    grad_embedding_ptr += row.to(tl.int64)[:, None] * D
    stats_ptr += row.to(tl.int64)[:, None] * (STATS + D) + STATS
    for first in tl.range(0, D, STEP):
        column = first + tl.arange(0, STEP)[None, :]
        inside = (row < N)[:, None] & (column < D)
        grad = tl.load(grad_embedding_ptr + column, mask=inside, other=0.0)
        embedding = tl.load(stats_ptr + column, mask=inside, other=0.0)
        high = embedding.to(grad.dtype)
        low = (embedding - high.to(tl.float32)).to(grad.dtype)
        of_high = tl.dot(grad, high.T, of_high)
        of_low = tl.dot(grad, low.T, of_low)
    own = tl.arange(0, ROWS)[:, None] == tl.arange(0, ROWS)[None, :]
    tl.store(dot_ptr + row, tl.sum(tl.where(own, of_high + of_low, 0.0), 1), mask=row < N)


# -- gradients of logits ----------------------------------------------------------------------------------------------


@triton.jit
def _store_gradients(z, of_weights, first, K, inside, of_rows, keys, places, scale, inverse_tau, grad_ptr, weights_ptr):
    """Of a tile's logits z and the gradients of their weights; the first code is `first`.

    By NOISE_BLOCK codes, so that what is needed in between has registers.
    """
    if z.shape[1] > NOISE_BLOCK:
        z, right = halves(z)
        of_weights, of_right = halves(of_weights)
        rest = inside, of_rows, keys, places, scale, inverse_tau, grad_ptr, weights_ptr
        _store_gradients(z, of_weights, first, K, *rest)
        _store_gradients(right, of_right, first + z.shape[1], K, *rest)
    else:
        largest_noisy, inverse_noisy, dot, largest, offset, of_kl = of_rows
        code = first + tl.arange(0, z.shape[1])[None, :]
        wanted = inside[:, None] & (code < K)
        y = tl.exp2((plus_noise(z, first // NOISE_BLOCK, keys) - largest_noisy) * scale) * inverse_noisy
        if weights_ptr is not None:
            tl.store(weights_ptr + places + code, y.to(weights_ptr.dtype.element_ty), mask=wanted)
        grad = y * (of_weights - dot) * inverse_tau
        if of_kl is not None:
            delta = z - largest
            grad += of_kl * tl.exp2(delta * LOG2E) * (tl.maximum(delta, LEAST) + offset)
        tl.store(grad_ptr + places + code, grad.to(grad_ptr.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["first_chunk_row", "end_row", "K", "range_tiles"])
def _gumbel_gradient_kernel(
    hidden,
    weight,
    grad_embedding,
    codebook,
    bias_ptr,
    seed_ptr,
    tau_ptr,
    stats_ptr,
    kl_ptr,
    dot_ptr,
    grad_kl_ptr,
    grad_ptr,
    weights_ptr,
    first_chunk_row,
    end_row,
    K,
    stride,
    range_tiles,
    I: tl.constexpr,
    D: tl.constexpr,
    KEPT: tl.constexpr,
    PER_ROW: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    STEP: tl.constexpr,
    FLAT: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """Program (row tile, range of codes): the gradient of its logits in grad (R, stride), y in weights if it is given.

    dot (N): the sum of y dy over a row's codes. stats (N, KEPT). Rows are numbered from the first of all.
    """
    first_row, row, first_tile, end_tile = part_of_program(first_chunk_row, K, range_tiles, ROWS, CODES)
    inside = row < end_row
    keys = noise_keys(seed_ptr, row, end_row, PER_ROW)
    inverse_tau = inverse_of(tl.load(tau_ptr))
    scale = inverse_tau * LOG2E

    stats_ptr += row.to(tl.int64) * KEPT
    largest_noisy = tl.load(stats_ptr + 2, mask=inside, other=0.0)[:, None]
    inverse_noisy = (1.0 / tl.load(stats_ptr + 3, mask=inside, other=1.0))[:, None]
    dot = tl.load(dot_ptr + row, mask=inside, other=0.0)[:, None]
    largest = None
    offset = None
    of_kl = None
    if grad_kl_ptr is not None:
        largest = tl.load(stats_ptr, mask=inside, other=0.0)[:, None]
        total = tl.load(stats_ptr + 1, mask=inside, other=1.0)
        # ln p + ln K - kl = z - largest + offset
        offset = (-tl.log2(total / K) * LN2 - tl.load(kl_ptr + row, mask=inside, other=0.0))[:, None]
        of_kl = (tl.load(grad_kl_ptr + row, mask=inside, other=0.0) / total)[:, None]

    of_rows = largest_noisy, inverse_noisy, dot, largest, offset, of_kl
    grad_ptr += (tl.program_id(0) * ROWS).to(tl.int64) * stride
    if weights_ptr is not None:
        weights_ptr += (tl.program_id(0) * ROWS).to(tl.int64) * stride
    places = tl.arange(0, ROWS)[:, None] * stride
    for tile in tl.range(first_tile, end_tile, flatten=FLAT):
        first = tile * CODES
        of_weights = product(grad_embedding, codebook, first_row, end_row, first, K, D, ROWS, CODES, STEP, DESCRIBED)
        z = tile_logits(hidden, weight, bias_ptr, first_row, end_row, first, K, I, PADDED, ROWS, CODES, STEP, DESCRIBED)
        _store_gradients(
            z, of_weights, first, K, inside, of_rows, keys, places, scale, inverse_tau, grad_ptr, weights_ptr
        )


@triton.jit(do_not_specialize=["first_chunk_row", "end_row", "N", "K", "ignore_index", "range_tiles"])
def _loss_gradient_kernel(
    hidden,
    weight,
    bias_ptr,
    target_ptr,
    row_weight_ptr,
    stats_ptr,
    grad_ptr,
    first_chunk_row,
    end_row,
    N,
    K,
    stride,
    ignore_index,
    range_tiles,
    I: tl.constexpr,
    WEIGHT_PER_ROW: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    STEP: tl.constexpr,
    FLAT: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """As the kernel above, of sum(row_weight * loss); stats (2, N) as `cross_entropy_streaming` leaves them."""
    first_row, row, first_tile, end_tile = part_of_program(first_chunk_row, K, range_tiles, ROWS, CODES)
    inside = row < end_row

    target = tl.load(target_ptr + row, mask=inside, other=0)
    ignored = (target == ignore_index)[:, None]
    largest = tl.load(stats_ptr + row, mask=inside, other=0.0)[:, None]
    total = tl.load(stats_ptr + N + row, mask=inside, other=1.0)
    row_weight = tl.load(row_weight_ptr + (row if WEIGHT_PER_ROW else row * 0), mask=inside, other=0.0)
    is_code = (target >= 0) & (target < K)
    row_weight = tl.where(is_code, row_weight, float("nan"))
    of_exponential, row_weight = (row_weight / total)[:, None], row_weight[:, None]
    target = target.to(tl.int32)[:, None]  # of what is no code all is NaN already

    grad_ptr += (tl.program_id(0) * ROWS).to(tl.int64) * stride
    places = tl.arange(0, ROWS)[:, None] * stride
    for tile in tl.range(first_tile, end_tile, flatten=FLAT):
        first = tile * CODES
        z = tile_logits(hidden, weight, bias_ptr, first_row, end_row, first, K, I, PADDED, ROWS, CODES, STEP, DESCRIBED)
        code = first + tl.arange(0, CODES)[None, :]
        grad = of_exponential * tl.exp2((z - largest) * LOG2E)
        grad = tl.where(code == target, grad - row_weight, grad)
        grad = tl.where(ignored, 0.0, grad)
        tl.store(grad_ptr + places + code, grad.to(grad_ptr.dtype.element_ty), mask=inside[:, None] & (code < K))


# -- products ---------------------------------------------------------------------------------------------------------


@triton.jit
def _load_rows(x, row, R, column, stride, STEP: tl.constexpr, WIDTH: tl.constexpr, DESCRIBED: tl.constexpr):
    """Rows and columns from (row, column) on of x (R, stride): zeros where there is nothing."""
    if DESCRIBED:
        tile = x.load([row, column])
    else:
        rows, places = row + tl.arange(0, STEP)[:, None], column + tl.arange(0, WIDTH)[None, :]
        tile = tl.load(x + rows.to(tl.int64) * stride + places, mask=(rows < R) & (places < stride), other=0.0)
    return tile


@triton.jit(do_not_specialize=["R", "K"])
def _add_product_kernel(
    a,
    b,
    total_ptr,
    R,
    K,
    stride,
    COLUMNS: tl.constexpr,
    BEGUN: tl.constexpr,
    CODES: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """total (K, COLUMNS) += a.T @ b, or = where it has not begun, for b (R, COLUMNS) and a (R, stride).

    Nobody looks at what is in a right of column K, nor at the rows that it makes.
    """
    first, column = tl.program_id(0) * CODES, tl.program_id(1) * WIDTH
    sums = tl.zeros([CODES, WIDTH], tl.float32)
    for row in tl.range(0, R, STEP):
        x = _load_rows(a, row, R, first, stride, STEP, CODES, DESCRIBED)
        y = _load_rows(b, row, R, column, COLUMNS, STEP, WIDTH, DESCRIBED)
        sums = tl.dot(x.T, y, sums)
    code, column = first + tl.arange(0, CODES)[:, None], column + tl.arange(0, WIDTH)[None, :]
    total_ptr += code.to(tl.int64) * COLUMNS + column
    wanted = (code < K) & (column < COLUMNS)
    if BEGUN:
        sums += tl.load(total_ptr, mask=wanted, other=0.0)
    tl.store(total_ptr, sums, mask=wanted)


# -- calls ------------------------------------------------------------------------------------------------------------

_launch_dot = Launches(_dot_kernel)
_launch_gumbel = Launches(_gumbel_gradient_kernel)
_launch_loss = Launches(_loss_gradient_kernel)
_launch_add_product = Launches(_add_product_kernel)


def gumbel_gradients(
    grad_embedding, grad_kl, hidden, weight, bias, codebook, tau, seed, kl, stats, *, seed_per_row, needs
):
    """Gradients of hidden, weight, bias and, from the softmax's weights, codebook, as `reference` has them.

    stats (N, 4 + D) as `gumbel_forward` leaves them. needs: which of the four; None for the others.
    """
    K, D = codebook.shape
    dot = hidden.new_empty(len(hidden), dtype=torch.float32)
    if len(hidden):
        _launch_dot(
            (-(-len(hidden) // DOT_ROWS),), grad_embedding, stats, dot, len(hidden), D, STATS, DOT_ROWS, DOT_STEP
        )
    tiles = _tiles(hidden, noisy=True)
    chunks = _Chunks(hidden, weight, bias, needs[:3], matrices=1 + needs[3])
    weights = chunks.matrix() if needs[3] else None
    of_codebook = _total(codebook, len(hidden)) if needs[3] else None
    factors = *operands(tiles, hidden, weight), *operands(tiles, grad_embedding, codebook)
    for rows in chunks:
        S = splits_of(tiles, rows.stop - rows.start, K, hidden)
        _launch_gumbel(
            _grid(tiles, rows, S),
            *factors,
            chunks.bias,
            seed,
            tau,
            stats,
            kl,
            dot,
            grad_kl,
            chunks.grad,
            weights,
            rows.start,
            rows.stop,
            K,
            chunks.grad.stride(0),
            range_tiles(tiles, K, S),
            hidden.shape[1],
            D,
            stats.shape[1],
            bool(seed_per_row),
            *constants(tiles, K),
            **options(tiles),
        )
        if needs[3]:
            count = rows.stop - rows.start
            add_product(of_codebook, weights[:count], grad_embedding[rows], begun=rows.start > 0)
        chunks.add(rows)
    del weights
    return *chunks.results(), None if of_codebook is None else of_codebook.to(codebook.dtype)


def loss_gradients(hidden, weight, bias, target, ignore_index, row_weight, stats, *, needs):
    """Gradients of hidden, weight and bias, of sum(row_weight * loss), as `reference` has them.

    stats (2, N) as `cross_entropy_streaming` leaves them. needs: which of the three; None for the others.
    """
    N, K = hidden.shape[0], weight.shape[0]
    tiles = _tiles(hidden, noisy=False)
    chunks = _Chunks(hidden, weight, bias, needs, matrices=1)
    factors = operands(tiles, hidden, weight)
    for rows in chunks:
        S = splits_of(tiles, rows.stop - rows.start, K, hidden)
        _launch_loss(
            _grid(tiles, rows, S),
            *factors,
            chunks.bias,
            target,
            row_weight,
            stats,
            chunks.grad,
            rows.start,
            rows.stop,
            N,
            K,
            chunks.grad.stride(0),
            ignore_index,
            range_tiles(tiles, K, S),
            hidden.shape[1],
            len(row_weight) > 1,
            *constants(tiles, K),
            **options(tiles),
        )
        chunks.add(rows)
    return chunks.results()


class _Chunks:
    """Slices of rows, whose logits' gradients are in `grad` (R, K) when `add` is called, and what becomes of these."""

    def __init__(self, hidden, weight, bias, needs, *, matrices):
        self._hidden, self._weight, self._bias = hidden, weight, bias
        self.bias = as_float32(bias)  # as the kernels take it
        K = weight.shape[0]
        self._step = chunk_rows(matrices * K * hidden.element_size())
        self.grad = self.matrix()
        self._of_hidden = torch.empty_like(hidden) if needs[0] else None
        self._of_weight = _total(weight, len(hidden)) if needs[1] else None
        self._of_bias = hidden.new_zeros(K, dtype=torch.float32) if needs[2] else None

    def matrix(self):
        """Room for a chunk's R rows of K numbers."""
        K = self._weight.shape[0]
        stride = -(-K // ALIGNMENT) * ALIGNMENT
        return self._hidden.new_empty(min(self._step, len(self._hidden)), stride)[:, :K]

    def __iter__(self):
        N = len(self._hidden)
        return (slice(first, min(first + self._step, N)) for first in range(0, N, self._step))

    def add(self, rows):
        grad = self.grad[: rows.stop - rows.start]
        if self._of_hidden is not None:
            self._of_hidden[rows] = float32_product(grad, self._weight)
        if self._of_weight is not None:
            add_product(self._of_weight, grad, self._hidden[rows], begun=rows.start > 0)
        if self._of_bias is not None:
            self._of_bias += grad.sum(0, dtype=torch.float32)

    def results(self):
        """The gradients in the dtype of what they belong to; the chunk's memory is free, as results take as much."""
        del self.grad
        of_weight = None if self._of_weight is None else self._of_weight.to(self._weight.dtype)
        return self._of_hidden, of_weight, None if self._of_bias is None else self._of_bias.to(self._bias.dtype)


def chunk_rows(row_bytes):
    """R for so many bytes a row."""
    return max(1, CHUNK_BYTES // (CHUNK_ROWS * row_bytes)) * CHUNK_ROWS


def add_product(total, a, b, *, begun):
    """total (K, C) += a.T @ b, or = where it has not begun, in float32, for a (R, K), a `_Chunks.matrix`, and b (R, C)."""
    (R, K), columns, stride = a.shape, b.shape[1], a.stride(0)
    tiles = _product_tiles(total)
    if tiles.described:
        rows = a.as_strided((R, stride), (stride, 1))
        factors = described(rows, tiles.step, tiles.rows), described(b, tiles.step, tiles.codes)
    else:
        factors = a, b
    _launch_add_product(
        (-(-K // tiles.rows), -(-columns // tiles.codes)),
        *factors,
        total,
        R,
        K,
        stride,
        columns,
        begun,
        tiles.rows,
        tiles.codes,
        tiles.step,
        tiles.described,
        **options(tiles),
    )


def _total(like, N):
    """Memory of a sum over N rows: the first chunk need not find zeros there, but without rows there is none."""
    return (torch.empty if N else torch.zeros)(like.shape, dtype=torch.float32, device=like.device)


def _grid(tiles, rows, S):
    return -(-(rows.stop - rows.start) // tiles.rows), S


def _tiles(hidden, *, noisy):
    """By arithmetic, not measured yet. Two products and noise want registers: of 128 x 128, which would read a third less,
    sm_90 spills nothing with one seed and 640 bytes with a seed for every row.
    """
    capability = capability_of(hidden)
    if noisy and capability[0] != 9:
        return Tiles(64, 64, 64, 8, 3, flat=False, described=capability >= (9, 0))
    if capability < (9, 0):
        return Tiles(128, 64, 32, 8, 3, flat=False, described=False)
    return Tiles(128, 64 if noisy else 128, 64, 8, 3, flat=not noisy, described=True)


def _product_tiles(total):
    """Rows and codes are those of the result, codes and columns; `step` counts rows of both factors."""
    if capability_of(total) < (9, 0):
        return Tiles(128, 128, 32, 8, 3, flat=False, described=False)
    return Tiles(128, 128, 64, 8, 4, flat=False, described=True)
