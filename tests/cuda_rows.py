"""The CUDA row kernels of the codebook operation by themselves, as the chunks of `ops/codebook/cuda.py` use them.

R rows, K codes.
"""

import torch

from dalle_fast import _extension
from dalle_fast.ops.codebook.cuda import _stream
from dalle_fast.ops.dtypes import DTYPES, address


def results(floats, dtype):
    """What a kernel left in the memory of floats (R, K): each row at the start of a row's memory."""
    return floats.view(dtype)[:, : floats.shape[1]]


def gumbel_forward(logits, bias, seed, first_row, tau, dtype, want_weights, stats, kl, codes, *, seed_per_row):
    """Fills stats (R, 4), kl (R,), codes (R,) and `results` of logits: weights (R, K), not normalised."""
    _extension.native().cuda_gumbel_forward(
        _logits(logits, bias), (seed.data_ptr(), seed_per_row, first_row), tau.data_ptr(),
        logits.data_ptr() if want_weights else 0, DTYPES[dtype], stats.data_ptr(), kl.data_ptr(), codes.data_ptr(),
        _stream(),
    )  # fmt: skip


def gumbel_backward(logits, bias, seed, first_row, tau, stats, kl, grad_kl, grad_weights, *, seed_per_row):
    """Fills `results` of logits with their gradient, and replaces grad_weights by the weights, normalised."""
    _extension.native().cuda_gumbel_backward(
        _logits(logits, bias), (seed.data_ptr(), seed_per_row, first_row), tau.data_ptr(), stats.data_ptr(),
        kl.data_ptr(), address(grad_kl), grad_weights.data_ptr(), grad_weights.data_ptr(), logits.data_ptr(),
        DTYPES[grad_weights.dtype], _stream(),
    )  # fmt: skip


def sample_rows(logits, bias, seed, first_row, temperature, codes, *, seed_per_row):
    """codes (R,) = argmax of logits + bias + temperature * noise, without noise where temperature is None."""
    _extension.native().cuda_sample(
        _logits(logits, bias), (address(seed), seed_per_row, first_row), address(temperature), codes.data_ptr(),
        _stream(),
    )  # fmt: skip


def cross_entropy_rows(logits, bias, target, ignore_index, row_weight, dtype, loss):
    """Fills loss (R,), and with row_weight `results` of logits with the gradient of sum(row_weight * loss)."""
    _extension.native().cuda_cross_entropy(
        _logits(logits, bias), target.data_ptr(), ignore_index, loss.data_ptr(), address(row_weight),
        row_weight is not None and len(row_weight) > 1, 0 if row_weight is None else logits.data_ptr(), DTYPES[dtype],
        _stream(),
    )  # fmt: skip


def add_columns(totals, a, begun):
    """The sums of the columns of a (R, K), some `results`, into totals (count, K), or added to them if `begun`."""
    _extension.native().cuda_add_columns(
        *a.shape, a.data_ptr(), DTYPES[a.dtype], totals.shape[0], totals.data_ptr(), begun, _stream()
    )


def sum_totals(totals, dtype):
    """The sum of totals (count, K), in dtype."""
    out = torch.empty(totals.shape[1], dtype=dtype, device=totals.device)
    _extension.native().cuda_sum_totals(*totals.shape, totals.data_ptr(), out.data_ptr(), DTYPES[dtype], _stream())
    return out


def _logits(logits, bias):
    return (*logits.shape, logits.data_ptr(), address(bias))
