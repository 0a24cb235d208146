"""Offsets of 2^32 elements. What lies between two samples, heads or rows is never touched, so it costs nothing.

An offset that is cut off to 32 bits, signed or not, becomes 0: the second is read where the first is, and differs.
"""

from __future__ import annotations

import torch

from dalle_fast.masks import column_mask, row_mask
from dalle_fast.nn import functional as F
from dalle_fast.testing import attention_gradients, codebook_gradients
from dalle_fast.verify.figures import NotRun
from dalle_fast.verify.random_calls import IMPLEMENTATIONS

FARS = 2**32, 2**31  # elements apart, as far as virtual memory goes; at 2^31 only signed offsets show
MASKS = {"row": row_mask(5, (3, 4)), "column": column_mask(5, (3, 4))}
CASES = [(mask, front) for mask in MASKS for front in ((2, 1), (1, 2))] + [("codebook", 0), ("codebook", 1)]


def case(number: int, device: str) -> None:
    what, where = CASES[number]
    if what == "codebook":
        _codebook(where, device)
    else:
        _attention(MASKS[what], where, device)


def far_apart(near, dim):
    """A copy of `near`, contiguous but for `dim`, along which two neighbours lie 2^32 elements apart."""
    rest = near.select(dim, 0).contiguous()
    for far in FARS:
        try:
            storage = torch.empty(far * (near.shape[dim] - 1) + rest.numel(), dtype=near.dtype, device=near.device)
            break
        except RuntimeError as error:
            reason = f"{far * near.element_size() / 1e9:.1f} GB of virtual memory cannot be had: {str(error)[:100]}"
    else:
        raise NotRun(reason)
    strides = list(rest.stride())
    strides.insert(dim, far)
    return storage.as_strided(near.shape, strides).copy_(near)


def _assert_equal(near, far) -> None:
    for n, (a, b) in enumerate(zip(near, far, strict=True)):
        if not torch.equal(a, b):
            raise AssertionError(f"result {n} differs by {float((a.double() - b.double()).abs().max()):.3g}")


def _attention(mask, front, device) -> None:
    generator = torch.Generator().manual_seed(0)
    near, grad_out = torch.randn(2, *front, mask.seq_len, 16, generator=generator).bfloat16().to(device)
    results = []
    for x in (near, far_apart(near, front.index(2))):

        def attend(*qkv):
            return F.sparse_attention(*qkv, mask, return_lse=True, impl=IMPLEMENTATIONS["attention"][device])

        results.append([*(y.detach() for y in attend(x, x, x)), *attention_gradients(attend, [x, x, x], grad_out)])
    _assert_equal(*results)


def _codebook(which, device) -> None:
    """Rows of hidden, or of the weight, far apart."""
    generator, sizes = torch.Generator().manual_seed(0), ((2, 8), (2, 8), (2,), (2, 4))
    near = [torch.randn(size, generator=generator).bfloat16().to(device) for size in sizes]
    far = [far_apart(x, 0) if n == which else x for n, x in enumerate(near)]
    grad = torch.randn(2, 4, generator=generator).to(device)
    impl = IMPLEMENTATIONS["codebook"][device]
    results = []
    for tensors in (near, far):

        def gumbel(*tensors):
            return F.gumbel_codebook(*tensors, 0.5, seed=1, impl=impl)

        codes = F.codebook_sample(*tensors[:3], seed=1, impl=impl)
        results.append([gumbel(*tensors).embedding, codes, *codebook_gradients(gumbel, tensors, grad)])
    _assert_equal(*results)
