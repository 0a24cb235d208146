"""The codebook operation in Triton: NVIDIA GPUs from compute capability 8.0, without a CUDA toolkit that compiled
anything, and Triton's interpreter on CPU tensors. 16-bit numbers only.

The kernels are those of `*_triton.py`; they load at the first call, so that importing this package needs no Triton.

N rows, K codes, I size of hidden, D size of an embedding.
"""

from __future__ import annotations

import importlib

import torch

from dalle_fast.ops import on_triton
from dalle_fast.ops.codebook.products import as_float32, sum_by_code

MAX_DIN, MAX_D = 4096, 256
MAX_ROWS = 1 << 30  # rows are numbered with 32 bits, a tile that is not full included,
MAX_CODES = 1 << 23  # and so are the numbers of a tile of 128 rows of gradients


def why_not(tensors) -> list[str]:
    """Every reason why this implementation cannot serve these tensors (by name, None allowed); empty if it can."""
    hidden, weight, codebook = tensors["hidden"], tensors["weight"], tensors.get("codebook")
    reasons = on_triton.why_not(hidden, "hidden")
    if hidden.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"it computes in float16 or bfloat16, got hidden of {hidden.dtype}")
    for name, what, x, limit in (("hidden", "Din", hidden, MAX_DIN), ("codebook", "D", codebook, MAX_D)):
        if x is not None and (not 0 < x.shape[1] <= limit or x.shape[1] % 16):
            reasons.append(f"its {what} is a multiple of 16 up to {limit}, got {name} of shape {tuple(x.shape)}")
    for name, what, x, limit in (("hidden", "rows", hidden, MAX_ROWS), ("weight", "codes", weight, MAX_CODES)):
        if x.shape[0] > limit:
            reasons.append(f"it has at most {limit} {what}, got {name} of shape {tuple(x.shape)}")
    for name, x in (("hidden", hidden), ("weight", weight), ("codebook", codebook)):
        if x is not None and not _is_plain(x):
            reasons.append(f"{name} must be contiguous and begin at a multiple of 16 bytes")
    return reasons


def gumbel_codebook(hidden, weight, bias, codebook, tau, seed, seed_per_row, hard):
    """As `reference` has it, and so has what follows, but that stats (N, 4 + D) ends with the soft embedding."""
    embedding, kl, codes, stats = _kernels("gumbel").gumbel_forward(
        hidden, weight, as_float32(bias), codebook, tau, seed, seed_per_row=seed_per_row
    )
    if hard:
        torch.index_select(codebook, 0, codes, out=embedding)
    return embedding, kl, codes, stats


def gumbel_codebook_backward(
    grad_embedding, grad_kl, hidden, weight, bias, codebook, tau, seed, kl, codes, stats, seed_per_row, hard, needs
):
    grad_embedding = grad_embedding.contiguous()
    if not _is_plain(grad_embedding):
        grad_embedding = grad_embedding.clone()
    *gradients, of_codebook = _kernels("gradients").gumbel_gradients(
        grad_embedding, as_float32(grad_kl), hidden, weight, bias, codebook, tau, seed, kl, stats,
        seed_per_row=seed_per_row, needs=(*needs[:3], needs[3] and not hard),
    )  # fmt: skip
    if hard and needs[3]:
        of_codebook = sum_by_code(codebook, codes, grad_embedding)
    return *gradients, of_codebook


def sample(hidden, weight, bias, temperature, seed, seed_per_row):
    streaming = _kernels("streaming")
    return streaming.sample_streaming(hidden, weight, as_float32(bias), seed, temperature, seed_per_row=seed_per_row)


def cross_entropy(hidden, weight, bias, target, ignore_index, row_weight, needs):
    """A target that is neither a code nor ignore_index gives NaN in its row, as in `cuda`."""
    stats = None if row_weight is None else hidden.new_empty(2, len(hidden), dtype=torch.float32)
    operands = hidden, weight, as_float32(bias), target, ignore_index
    loss = _kernels("streaming").cross_entropy_streaming(*operands, stats=stats)
    if row_weight is None:
        return loss, None, None, None
    gradients = _kernels("gradients").loss_gradients(
        hidden, weight, bias, target, ignore_index, as_float32(row_weight), stats, needs=needs
    )
    return loss, *gradients


def _kernels(name):
    return importlib.import_module(f"dalle_fast.ops.codebook.{name}_triton")


def _is_plain(x):
    # Of one row, any distance of rows is contiguous, and no descriptor takes any.
    return x.stride() == (x.shape[1], 1) and x.data_ptr() % 16 == 0
