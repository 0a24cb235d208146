"""The codebook operation written down plainly: dense, (N, K) in memory, any float dtype, any device.

With z = hidden @ weight^T + bias and standard Gumbel noise g (see `noise`), over the last dimension

    p = softmax(z)                          kl = sum(p * (log p + log K))
    y = softmax((z + g) / tau)              codes = argmax(z + g)
    embedding = y @ codebook                with `hard`: codebook[codes], and the gradient of the soft one

and the same differentiated by hand, with dy = grad_embedding @ codebook^T:

    dz = y * (dy - sum(y * dy)) / tau + grad_kl * p * (log p + log K - kl)
    grad_hidden = dz @ weight     grad_weight = dz^T @ hidden     grad_bias = sum of dz over rows
    grad_codebook = y^T @ grad_embedding    with `hard`: one_hot(codes)^T @ grad_embedding

float16 and bfloat16 are computed in float32.

N rows, K codes, I size of hidden, D size of an embedding.
"""

from __future__ import annotations

import math

import torch

from dalle_fast.ops.codebook import noise
from dalle_fast.ops.codebook.truncation import truncated  # noqa: F401 (part of the interface)


def why_not(tensors) -> list[str]:
    """Every reason why this implementation cannot serve these tensors; it always can."""
    return []


def gumbel_codebook(hidden, weight, bias, codebook, tau, seed, seed_per_row, hard):
    """Returns embedding (N, D) in hidden's dtype, kl (N,), codes (N,) int64, and stats (N, 4).

    stats: the largest logit, the sum of exp(logit - largest), and the same two of (logit + noise) / tau, where the
    largest is taken before the division. float32, or float64 for float64 inputs; kl too.
    """
    z = _logits(hidden, weight, bias)
    noisy = z + _noise(z, seed, seed_per_row)
    codes = noisy.argmax(-1)
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    kl = (p * (_finite(log_p) + math.log(z.shape[-1]))).sum(-1)  # near uniform, each term is near 0
    largest, largest_noisy = z.amax(-1, keepdim=True), noisy.amax(-1, keepdim=True)
    exponentials = ((noisy - largest_noisy) / tau).exp()
    sum_noisy = exponentials.sum(-1, keepdim=True)
    table = _wide(codebook)
    embedding = table[codes] if hard else exponentials / sum_noisy @ table
    sums = (z - largest).exp().sum(-1, keepdim=True)
    stats = torch.cat([largest, sums, largest_noisy, sum_noisy], -1)
    return embedding.to(hidden.dtype), kl, codes, stats


def gumbel_codebook_backward(
    grad_embedding, grad_kl, hidden, weight, bias, codebook, tau, seed, kl, codes, stats, seed_per_row, hard, needs
):
    """Returns the gradients of hidden, weight, bias and codebook in their dtype, None where `needs` has False."""
    z = _logits(hidden, weight, bias)
    noisy = z + _noise(z, seed, seed_per_row)
    y = torch.softmax((noisy - noisy.amax(-1, keepdim=True)) / tau, -1)
    grad_embedding = _wide(grad_embedding)
    dy = grad_embedding @ _wide(codebook).T
    dz = y * (dy - (y * dy).sum(-1, keepdim=True)) / tau
    if grad_kl is not None:
        log_p = torch.log_softmax(z, -1)
        dz = dz + (grad_kl * log_p.exp().T * (_finite(log_p).T + math.log(z.shape[-1]) - kl)).T
    if hard:
        y = torch.nn.functional.one_hot(codes, z.shape[-1]).to(z.dtype)
    grad_codebook = (y.T @ grad_embedding).to(codebook.dtype) if needs[3] else None
    return *_product_gradients(dz, hidden, weight, bias, needs), grad_codebook


def sample(hidden, weight, bias, temperature, seed, seed_per_row):
    """Returns codes (N,) int64, argmax(z + temperature * noise); argmax(z) where temperature is None."""
    z = _logits(hidden, weight, bias)
    if temperature is not None:
        z = z + temperature * _noise(z, seed, seed_per_row)
    return z.argmax(-1)


def logits(hidden, weight):
    """Returns z (N, K), without a bias."""
    return _logits(hidden, weight, None)


def sample_of_logits(z, seed):
    """Returns codes (N,) int64, argmax(z + noise), with a seed for every row."""
    return (z + _noise(z, seed, True)).argmax(-1)


def cross_entropy(hidden, weight, bias, target, ignore_index, row_weight, needs):
    """Returns loss (N,) and the gradients of sum(row_weight * loss), None where `needs` has False.

    loss = -log softmax(z)[target], 0 where the target is ignore_index. row_weight: (1,), (N,), or None for no gradient.
    """
    z = _logits(hidden, weight, bias)
    counted = target != ignore_index
    index = target.where(counted, 0)
    log_p = torch.log_softmax(z, -1)
    loss = -log_p.gather(-1, index[:, None])[:, 0].where(counted, 0)
    if row_weight is None:
        return loss, None, None, None
    dz = log_p.exp() - torch.nn.functional.one_hot(index, z.shape[-1])
    dz = (dz.T * row_weight.where(counted, 0)).T  # where all are ignored, the mean's weight is infinite
    return loss, *_product_gradients(dz, hidden, weight, bias, needs)


def gumbel_softmax(logits, tau, seed):
    """Returns y (N, K) in logits' dtype and codes (N,) int64."""
    noisy = _wide(logits) + _noise(_wide(logits), seed, False)
    return torch.softmax((noisy - noisy.amax(-1, keepdim=True)) / tau, -1).to(logits.dtype), noisy.argmax(-1)


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


def _finite(log_p):
    """log p where it is multiplied with p: 0 * -inf would be NaN."""
    return log_p.clamp(min=torch.finfo(log_p.dtype).min)


def _logits(hidden, weight, bias):
    z = _wide(hidden) @ _wide(weight).T
    return z if bias is None else z + _wide(bias)


def _noise(z, seed, seed_per_row):
    return noise.gumbel_noise(*noise.rows_of(seed, seed_per_row, 0, z.shape[0]), z.shape[1], z.dtype)


def _product_gradients(dz, hidden, weight, bias, needs):
    """The gradients of hidden, weight and bias from that of hidden @ weight.T + bias."""
    return (
        (dz @ _wide(weight)).to(hidden.dtype) if needs[0] else None,
        (dz.T @ _wide(hidden)).to(weight.dtype) if needs[1] else None,
        dz.sum(0).to(bias.dtype) if needs[2] else None,
    )
