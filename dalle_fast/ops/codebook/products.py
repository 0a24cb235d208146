"""What several implementations leave to torch, in float32: copies, products and sums."""

from __future__ import annotations

import torch


def as_float32(x):
    """x in float32, its numbers side by side; None stays."""
    return None if x is None else x.float().contiguous()


def float32_product(a, b):
    """a @ b in float32. Of 16-bit matrices torch has that product on a GPU alone."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def sum_by_code(codebook, codes, grad_embedding):
    """The gradient (K, D) of a codebook whose rows `codes` (N,) were taken, in float32.

    Not by index_add_, whose order of additions, and so the last bits, differs from run to run on a GPU.
    """
    total = torch.zeros(codebook.shape, dtype=torch.float32, device=codebook.device)
    return total.index_put_((codes,), grad_embedding.float(), accumulate=True)
