"""The codebook operation by chunks of rows, for CPU and CUDA alike.

Of N rows only as many are worked on at a time as keep their float32 logits in cache: a matrix product makes the logits
of a chunk, one kernel does to them all there is to do, and further products take the result. Nothing of size (N, K)
exists. What differs by device is in `rows`, a module: `cpu` or `cuda`. It knows who multiplies, and which operations
it can do without a chunk's logits in memory (`streams`).

N rows, R rows of a chunk, K codes, I size of hidden, D size of an embedding.
"""

from __future__ import annotations

import torch

# Bytes of the float32 logits (R, K) of a chunk. Less makes the products slower, which read and pack `weight` once for
# every chunk; more gains nothing (forward + backward at N = 1,024, K = 8,192, Din = 512 on a CPU: 6 MiB 142 ms, 12 MiB
# 125, 24 MiB 125). 16-bit tensors get half: beside them there are float32 sums of their gradients.
# Forward and backward passes have the same R, as the vendor rounds the product of other R otherwise.
CHUNK_BYTES = 12 << 20
MIN_ROWS = 16
# The backward pass also has the gradient of the softmax's weights, whose product is cheap: of this part of a chunk at once.
SMALL_PARTS = 4


def chunk_rows(num_codes, dtype):
    """R for K codes: at least MIN_ROWS and a multiple of it."""
    size = CHUNK_BYTES // (1 if dtype == torch.float32 else 2)
    return max(MIN_ROWS, size // (4 * num_codes) // MIN_ROWS * MIN_ROWS)


class Chunked:
    """The implementation interface of `reference`, by the row kernels of one device."""

    def __init__(self, rows):
        self.rows = rows
        self.why_not = rows.why_not

    def gumbel_codebook(self, hidden, weight, bias, codebook, tau, seed, seed_per_row, hard):
        N, D = hidden.shape[0], codebook.shape[1]
        embedding = hidden.new_empty(N, D)
        kl, codes = _row_results(hidden, (), torch.float32), _row_results(hidden, (), torch.int64)
        stats = _row_results(hidden, (4,), torch.float32)
        product = self.rows.product
        bias = _float32(bias)
        for chunk, logits, _ in self._chunks(hidden, weight):
            product(hidden[chunk], weight, out=logits)
            weights, stats[chunk], kl[chunk], codes[chunk] = self.rows.gumbel_forward(
                logits, bias, _seeds(seed, seed_per_row, chunk), chunk.start, tau, hidden.dtype, not hard,
                seed_per_row=seed_per_row,
            )  # fmt: skip
            if not hard:
                embedding[chunk] = product(weights, codebook.T) / stats[chunk, 3:]
        if hard:
            torch.index_select(codebook, 0, codes, out=embedding)
        return embedding, kl, codes, stats

    def gumbel_codebook_backward(
        self, grad_embedding, grad_kl, hidden, weight, bias, codebook, tau, seed, kl, codes, stats, seed_per_row, hard,
        needs,
    ):  # fmt: skip
        sums = _Gradients(self.rows, hidden, weight, bias, needs)
        of_codebook = self.rows.Sum(codebook) if needs[3] and not hard else None
        bias, grad_kl = _float32(bias), _float32(grad_kl)
        product = self.rows.product
        for chunk, logits, small in self._chunks(hidden, weight, small=True):
            product(hidden[chunk], weight, out=logits)
            grad_logits = []
            for part in _slices(chunk.start, chunk.stop, -(-len(logits) // SMALL_PARTS)):
                of_embedding = grad_embedding[part].contiguous()
                here = logits[part.start - chunk.start : part.stop - chunk.start]
                grad_weights = product(of_embedding, codebook, out=small[: len(here)])
                of_logits, weights = self.rows.gumbel_backward(
                    here, bias, _seeds(seed, seed_per_row, part), part.start, tau, stats[part], kl[part],
                    None if grad_kl is None else grad_kl[part], grad_weights, hidden.dtype, of_codebook is not None,
                    seed_per_row=seed_per_row,
                )  # fmt: skip
                grad_logits.append(of_logits)
                if of_codebook is not None:
                    of_codebook.add(weights, of_embedding)
            # Where they were written in place, they lie together already.
            sums.add(chunk, logits if grad_logits[0].dtype == logits.dtype else torch.cat(grad_logits), weight)
        if not needs[3]:
            return *sums.result(), None
        return *sums.result(), _sum_by_code(codebook, codes, grad_embedding) if hard else of_codebook.result()

    def sample(self, hidden, weight, bias, temperature, seed, seed_per_row):
        bias = _float32(bias)
        if self.rows.streams("sample", hidden, weight):
            return self.rows.sample_streaming(hidden, weight, bias, seed, temperature, seed_per_row=seed_per_row)
        codes = _row_results(hidden, (), torch.int64)
        for chunk, logits, _ in self._chunks(hidden, weight):
            seeds = _seeds(seed, seed_per_row, chunk)
            self.rows.product(hidden[chunk], weight, out=logits)
            codes[chunk] = self.rows.sample(logits, bias, seeds, chunk.start, temperature, seed_per_row=seed_per_row)
        return codes

    def cross_entropy(self, hidden, weight, bias, target, ignore_index, row_weight, needs):
        sums = _Gradients(self.rows, hidden, weight, bias, needs)
        bias, row_weight = _float32(bias), _float32(row_weight)
        if row_weight is None and self.rows.streams("cross_entropy", hidden, weight):
            return self.rows.cross_entropy_streaming(hidden, weight, bias, target, ignore_index), None, None, None
        loss = _row_results(hidden, (), torch.float32)
        for chunk, logits, _ in self._chunks(hidden, weight):
            of_rows = row_weight if row_weight is None or len(row_weight) == 1 else row_weight[chunk]
            self.rows.product(hidden[chunk], weight, out=logits)
            loss[chunk], grad_logits = self.rows.cross_entropy(
                logits, bias, target[chunk], ignore_index, of_rows, hidden.dtype
            )
            if grad_logits is not None:
                sums.add(chunk, grad_logits, weight)
        return loss, *sums.result()

    def gumbel_softmax(self, logits, tau, seed):
        return self.rows.gumbel_softmax(logits.contiguous(), seed, tau, True)

    def _chunks(self, hidden, weight, small=False):
        """Yield slices of the rows, each with float32 memory: (R, K), and with `small` (R / SMALL_PARTS, K) or None."""
        N, K = hidden.shape[0], weight.shape[0]
        step = min(N, chunk_rows(K, hidden.dtype))
        small_rows = -(-step // SMALL_PARTS) if small else 0
        memory = self.rows.scratch((step + small_rows) * K, hidden.device).view(-1, K)
        for chunk in _slices(0, N, step):
            yield chunk, memory[: chunk.stop - chunk.start], memory[step:] if small else None


class _Gradients:
    """Adds up the gradients of hidden, weight and bias over chunks, in float32."""

    def __init__(self, rows, hidden, weight, bias, needs):
        self.rows, self.hidden, self.bias, self.needs = rows, hidden, bias, needs
        self.of_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
        self.of_weight = rows.Sum(weight) if needs[1] else None
        self.of_bias = torch.zeros(bias.shape, device=bias.device) if needs[2] else None

    def add(self, chunk, grad_logits, weight):
        if self.needs[0]:
            out = self.of_hidden[chunk]
            if out.dtype == torch.float32:
                self.rows.product(grad_logits, weight.T, out=out)
            else:
                out.copy_(self.rows.product(grad_logits, weight.T))
        if self.needs[1]:
            self.of_weight.add(grad_logits, self.hidden[chunk])
        if self.needs[2]:
            self.of_bias += grad_logits.sum(0, dtype=torch.float32)

    def result(self):
        """In the dtype of the tensors they belong to; None for those that are not needed."""
        return (
            self.of_hidden,
            self.of_weight.result() if self.needs[1] else None,
            self.of_bias.to(self.bias.dtype) if self.needs[2] else None,
        )


def _sum_by_code(codebook, codes, grad_embedding):
    total = torch.zeros(codebook.shape, device=codebook.device)
    return total.index_add_(0, codes, grad_embedding.float()).to(codebook.dtype)


def _slices(start, stop, step):
    """Slices of `step` rows and a last one of what is left, from start to stop."""
    return [slice(x, min(stop, x + step)) for x in range(start, stop, max(1, step))]


def _seeds(seed, seed_per_row, chunk):
    return seed[chunk] if seed_per_row else seed


def _row_results(hidden, shape, dtype):
    return torch.empty((hidden.shape[0], *shape), dtype=dtype, device=hidden.device)


def _float32(x):
    return None if x is None else x.float().contiguous()
