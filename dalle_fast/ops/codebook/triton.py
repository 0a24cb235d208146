"""Codes, and losses without gradients, in Triton: NVIDIA GPUs from compute capability 8.0, and Triton's interpreter on CPU
tensors. The kernels are `streaming_triton`'s; they load at the first call, so that importing this package needs no Triton.

N rows, K codes, I size of hidden.
"""

from __future__ import annotations

import torch

from dalle_fast.ops import on_triton

MAX_DIN = 4096
MAX_SIZE = 1 << 30  # of N and K: rows and codes are numbered with 32 bits, tiles that are not full included


def why_not(tensors) -> list[str]:
    """Every reason why this implementation cannot serve these tensors (by name, None allowed); empty if it can."""
    hidden, weight = tensors["hidden"], tensors["weight"]
    reasons = on_triton.why_not(hidden, "hidden")
    if tensors.get("row_weight") is not None:
        reasons.append("it computes no gradients")
    if hidden.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"it computes in float16 or bfloat16, got hidden of {hidden.dtype}")
    if not 0 < hidden.shape[1] <= MAX_DIN or hidden.shape[1] % 16:
        reasons.append(f"its Din is a multiple of 16 up to {MAX_DIN}, got hidden of shape {tuple(hidden.shape)}")
    for name, x in (("hidden", hidden), ("weight", weight)):
        if x.shape[0] > MAX_SIZE:
            reasons.append(f"it has at most 2^30 rows and codes, got {name} of shape {tuple(x.shape)}")
        if not x.is_contiguous() or x.data_ptr() % 16:
            reasons.append(f"{name} must be contiguous and begin at a multiple of 16 bytes")
    return reasons


def sample(hidden, weight, bias, temperature, seed, seed_per_row):
    """As `reference` has it, and so has what follows."""
    return _kernels().sample_streaming(hidden, weight, _float32(bias), seed, temperature, seed_per_row=seed_per_row)


def cross_entropy(hidden, weight, bias, target, ignore_index, row_weight, needs):
    """A target that is neither a code nor ignore_index gives NaN in its row, as in `cuda`."""
    return _kernels().cross_entropy_streaming(hidden, weight, _float32(bias), target, ignore_index), None, None, None


def _kernels():
    from dalle_fast.ops.codebook import streaming_triton

    return streaming_triton


def _float32(x):
    return None if x is None else x.float().contiguous()
