"""Gradients of the reference implementations against finite differences, in float64."""

from __future__ import annotations

import torch

from dalle_fast.nn import functional as F
from dalle_fast.verify.random_calls import Draw


def case(number: int, device: str) -> None:
    draw = Draw(number, device)
    function, leaves = (_attention if number % 2 else _codebook)(draw)
    torch.autograd.gradcheck(function, leaves)


def _leaf(draw, *shape):
    return torch.randn(shape, generator=draw.generator, dtype=torch.float64, device=draw.device).requires_grad_()


def _attention(draw):
    mask = draw.mask(text=3, rows=3, columns=3)
    B, S, D = draw.choose.randint(1, 2), draw.choose.randint(1, min(8, mask.seq_len)), draw.choose.randint(1, 3)
    lengths = [draw.choose.randint(0, mask.text_len) for _ in range(B)]
    options = {"text_lengths": torch.tensor(lengths)} if draw.choose.random() < 0.5 else {}

    def attend(*qkv):
        out, lse = F.sparse_attention(*qkv, mask, return_lse=True, impl="reference", **options)
        return out, lse.masked_fill(lse.isinf(), 0)

    return attend, [_leaf(draw, B, 1, S, D) for _ in range(3)]


def _codebook(draw):
    N, K, I, D = (draw.choose.randint(1, 4) for _ in range(4))
    leaves = [_leaf(draw, *shape) for shape in ((N, I), (K, I), (K,), (K, D))]
    which, tau = draw.choose.choice(("gumbel", "gumbel", "loss", "softmax")), draw.choose.choice((1.0, 0.4))
    if which == "loss":
        target = torch.tensor([draw.choose.choice((-100, draw.choose.randrange(K))) for _ in range(N)])
        reduction = draw.choose.choice(("none", "sum"))
        options = {"target": target, "reduction": reduction, "impl": "reference"}
        return lambda *x: F.codebook_cross_entropy(*x, **options), leaves[:3]
    if which == "softmax":
        dim = draw.choose.randrange(2)
        return lambda x: F.gumbel_softmax(x, tau, seed=7, dim=dim, impl="reference"), leaves[:1]
    return lambda *x: F.gumbel_codebook(*x, tau, seed=7, impl="reference")[:2], leaves
