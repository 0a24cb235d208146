"""The codebook operation by chunks of rows on the CPU; on a GPU the loop is not Python's, see `cuda`.

Of N rows only as many are worked on at a time as memory is meant for: a matrix product makes the logits of a chunk, one
kernel does to them all there is to do, and further products take the result. Nothing of size (N, K) exists. `rows` is
the module `cpu`: it knows how many rows a chunk has, who multiplies, and which operations it can do without a chunk's
logits in memory (`streams`).

N rows, R rows of a chunk, K codes, I size of hidden, D size of an embedding.
"""

from __future__ import annotations

import itertools

import torch


class Chunked:
    """The implementation interface of `reference`, by the row kernels of `rows`."""

    def __init__(self, rows):
        self.rows = rows
        self.why_not = rows.why_not

    def gumbel_codebook(self, hidden, weight, bias, codebook, tau, seed, seed_per_row, hard):
        N, D = hidden.shape[0], codebook.shape[1]
        embedding = hidden.new_empty(N, D)
        kl, codes = _row_results(hidden, (), torch.float32), _row_results(hidden, (), torch.int64)
        stats = _row_results(hidden, (4,), torch.float32)
        product, bias, table = self.rows.product, _float32(bias), codebook.T

        def chunk(first_row, logits, hidden, seed, stats, kl, codes, embedding):
            product(hidden, weight, out=logits.floats)
            self.rows.gumbel_forward(
                logits.floats, bias, seed, first_row, tau, logits.dtype, not hard, stats, kl, codes,
                seed_per_row=seed_per_row,
            )  # fmt: skip
            if not hard:
                torch.div(product(logits.results, table), stats[:, 3:], out=embedding)

        self._each_chunk(chunk, weight, hidden, seed, stats, kl, codes, embedding)
        if hard:
            torch.index_select(codebook, 0, codes, out=embedding)
        return embedding, kl, codes, stats

    def gumbel_codebook_backward(
        self, grad_embedding, grad_kl, hidden, weight, bias, codebook, tau, seed, kl, codes, stats, seed_per_row, hard,
        needs,
    ):  # fmt: skip
        sums = _Gradients(self.rows, hidden, weight, bias, needs)
        of_codebook = self.rows.Sum(codebook, hidden.shape[0]) if needs[3] and not hard else None
        product, bias = self.rows.product, _float32(bias)

        def part(first_row, grad_weights, logits, seed, stats, kl, grad_kl, grad_embedding):
            grad_embedding = grad_embedding.contiguous()
            product(grad_embedding, codebook, out=grad_weights.floats)
            self.rows.gumbel_backward(
                logits, bias, seed, first_row, tau, stats, kl, grad_kl, grad_weights.floats, grad_weights.dtype,
                of_codebook is not None, seed_per_row=seed_per_row,
            )  # fmt: skip
            if of_codebook is not None:
                of_codebook.add(grad_weights.results, grad_embedding)

        def chunk(first_row, logits, small, hidden, grad_hidden, *tensors):
            product(hidden, weight, out=logits.floats)
            for start, *rows in _parts(small.count, logits.floats, *tensors):
                part(first_row + start, small.rows(rows[0].shape[0]), *rows)
            sums.add(logits.results, hidden, weight, grad_hidden)

        tensors = (hidden, sums.of_hidden, seed, stats, kl, _float32(grad_kl), grad_embedding)
        self._each_chunk(chunk, weight, *tensors, gradients=True, small_parts=self.rows.SMALL_PARTS)
        if not needs[3]:
            return *sums.result(), None
        return *sums.result(), _sum_by_code(codebook, codes, grad_embedding) if hard else of_codebook.result()

    def sample(self, hidden, weight, bias, temperature, seed, seed_per_row):
        bias = _float32(bias)
        if self.rows.streams("sample", hidden, weight):
            return self.rows.sample_streaming(hidden, weight, bias, seed, temperature, seed_per_row=seed_per_row)

        def chunk(first_row, logits, hidden, seed, codes):
            self.rows.product(hidden, weight, out=logits.floats)
            self.rows.sample(logits.floats, bias, seed, first_row, temperature, codes, seed_per_row=seed_per_row)

        codes = _row_results(hidden, (), torch.int64)
        self._each_chunk(chunk, weight, hidden, seed, codes)
        return codes

    def logits(self, hidden, weight):
        return self.rows.logits(hidden, weight)

    def truncated(self, logits, temperature, top_k, top_p):
        return self.rows.truncated(logits.contiguous(), temperature, top_k, top_p)

    def sample_of_logits(self, logits, seed):
        codes = _row_results(logits, (), torch.int64)
        self.rows.sample(logits, None, seed, 0, logits.new_ones(()), codes, seed_per_row=True)
        return codes

    def cross_entropy(self, hidden, weight, bias, target, ignore_index, row_weight, needs):
        sums = _Gradients(self.rows, hidden, weight, bias, needs)
        bias, row_weight = _float32(bias), _float32(row_weight)
        if row_weight is None and self.rows.streams("cross_entropy", hidden, weight):
            return self.rows.cross_entropy_streaming(hidden, weight, bias, target, ignore_index), None, None, None

        def chunk(_, logits, hidden, grad_hidden, target, row_weight, loss):
            self.rows.product(hidden, weight, out=logits.floats)
            self.rows.cross_entropy(logits.floats, bias, target, ignore_index, row_weight, logits.dtype, loss)
            if row_weight is not None:
                sums.add(logits.results, hidden, weight, grad_hidden)

        loss = _row_results(hidden, (), torch.float32)
        tensors = (hidden, sums.of_hidden, target, row_weight, loss)
        self._each_chunk(chunk, weight, *tensors, gradients=row_weight is not None)
        return loss, *sums.result()

    def gumbel_softmax(self, logits, tau, seed):
        return self.rows.gumbel_softmax(logits.contiguous(), seed, tau, True)

    def _each_chunk(self, chunk, weight, hidden, *tensors, gradients=False, small_parts=0):
        """Call chunk(number of the first row, memory..., rows of hidden, of the other tensors...) for all chunks.

        The memory is a `_Matrix` (R, K), and with small_parts one of (R / small_parts, K) too. It is free once this
        returns: sums of gradients, which are given their dtype then, take as much.
        """
        N, K = hidden.shape[0], weight.shape[0]
        step = min(N, self.rows.chunk_rows(K))
        small_rows = -(-step // small_parts) if small_parts else 0
        floats = self.rows.scratch((step + small_rows) * K, hidden.device).view(-1, K)
        dtype = self.rows.result_dtype(hidden.dtype, gradients=gradients)
        logits = _Matrix(self.rows, floats[:step], dtype)
        small = [_Matrix(self.rows, floats[step:], dtype)] if small_parts else []
        for first_row, *rows in _parts(step, hidden, *tensors):
            chunk(first_row, logits.rows(rows[0].shape[0]), *small, *rows)


class _Matrix:
    """Memory of floats (R, K), and what a kernel leaves in it in `dtype`."""

    def __init__(self, device, floats, dtype):
        self.device, self.floats, self.dtype, self.count = device, floats, dtype, floats.shape[0]
        self.results = device.results(floats, dtype)

    def rows(self, count):
        """The first ones."""
        return self if count == self.count else _Matrix(self.device, self.floats[:count], self.dtype)


class _Gradients:
    """Adds up the gradients of hidden, weight and bias over chunks, in float32."""

    def __init__(self, rows, hidden, weight, bias, needs):
        self.rows, self.bias, self.needs = rows, bias, needs
        self.of_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
        self.of_weight = rows.Sum(weight, hidden.shape[0]) if needs[1] else None
        self.of_bias = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device) if needs[2] else None

    def add(self, grad_logits, hidden, weight, grad_hidden):
        """What a chunk contributes; grad_hidden, its rows of of_hidden, is written."""
        if self.needs[0]:
            self.rows.rounded_product(grad_logits, weight.T, grad_hidden)
        if self.needs[1]:
            self.of_weight.add(grad_logits, hidden)
        if self.needs[2]:
            self.rows.add_columns(self.of_bias, grad_logits)

    def result(self):
        """In the dtype of the tensors they belong to; None for those that are not needed."""
        return (
            self.of_hidden,
            self.of_weight.result() if self.needs[1] else None,
            self.of_bias.to(self.bias.dtype) if self.needs[2] else None,
        )


def _sum_by_code(codebook, codes, grad_embedding):
    total = torch.zeros(codebook.shape, dtype=torch.float32, device=codebook.device)
    return total.index_add_(0, codes, grad_embedding.float()).to(codebook.dtype)


def _parts(step, *tensors):
    """Yield the first row's number and the rows of all tensors, `step` at a time and a last time what is left.

    The first tensor has all rows. Others may be None, or have one row for all.
    """
    N = tensors[0].shape[0]
    if N <= step:
        if N:
            yield 0, *tensors
        return
    split = [itertools.repeat(x) if x is None or len(x) != N else x.split(step) for x in tensors]
    yield from zip(range(0, N, step), *split, strict=False)


def _row_results(hidden, shape, dtype):
    return torch.empty((hidden.shape[0], *shape), dtype=dtype, device=hidden.device)


def _float32(x):
    return None if x is None else x.float().contiguous()
