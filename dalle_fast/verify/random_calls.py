"""Calls that nobody planned: each a function of its number alone, with any mask, prefix, size, dtype and strides.

B batch, H heads, S sequence, D head size, T text. Of codebooks: N rows, K codes, I size of hidden, D of an embedding.
"""

from __future__ import annotations

import contextlib
import math
import random
from typing import NamedTuple

import torch

from dalle_fast.masks import RULES, AttentionMask, column_mask

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
IMPLEMENTATIONS = {"attention": {"cpu": "cpu", "cuda": "triton"}, "codebook": {"cpu": "cpu", "cuda": "cuda"}}


class AttentionCall(NamedTuple):
    """query, key and value (B, H, S, D), what comes back through the gradients, and the call's options."""

    qkv: list[torch.Tensor]
    mask: AttentionMask
    grad_out: torch.Tensor
    grad_lse: torch.Tensor | None
    options: dict


class CodebookCall(NamedTuple):
    """hidden (N, I), weight (K, I), bias (K,) or None, codebook (K, D); temperature; cotangents, one of them not None."""

    tensors: list[torch.Tensor | None]
    tau: float
    seed: int
    hard: bool
    grad_embedding: torch.Tensor | None
    grad_kl: torch.Tensor | None


@contextlib.contextmanager
def threads(count: int):
    """CPU threads within it; the worker has one, as several figures run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Draw:
    """Random choices and tensors for one case."""

    def __init__(self, number: int, device: str):
        self.choose = random.Random(number)
        self.generator = torch.Generator().manual_seed(number)
        self.device = device

    def mask(self, *, text=40, rows=12, columns=20) -> AttentionMask:
        rule, pick = self.choose.choice(RULES), self.choose
        T, grid = pick.randint(0, text), (pick.randint(1, rows), pick.randint(1, columns))
        window = (pick.choice((1, 3, 5, 7)), pick.randint(1, 3)) if rule.startswith("conv") else (1, 1)
        return AttentionMask(rule, T, grid, *window)

    def tensor(self, shape, dtype, *, scale=1.0) -> torch.Tensor:
        """Normal numbers in any order of the dimensions in memory, with gaps, an offset, or one dimension repeated."""
        pick = self.choose
        order = pick.sample(range(len(shape)), len(shape)) if pick.random() < 0.6 else list(range(len(shape)))
        memory = [shape[n] for n in order]
        repeated = pick.randrange(len(shape)) if pick.random() < 0.1 else None
        if repeated is not None:
            memory[order.index(repeated)] = min(1, shape[repeated])
        step, offset = pick.choice((1, 1, 1, 2)), pick.choice((0, 0, 1, 3))
        memory[-1] = memory[-1] * step + offset
        made = (torch.randn(memory, generator=self.generator) * scale).to(dtype).to(self.device)
        made = made[..., offset:][..., ::step]
        return made.permute([order.index(n) for n in range(len(shape))]).expand(shape)


def attention_call(number: int, device: str, *, large=False, sharp=False) -> AttentionCall:
    """large: one to three heads so long that several threads share each. sharp: scores of hundreds."""
    draw = Draw(number, device)
    pick, mask = draw.choose, draw.mask(text=160, rows=8, columns=40) if large else draw.mask()
    if sharp:  # so long a column that the first queries of the next, which see none of its keys, wait for all of them
        mask = column_mask(0, (pick.randint(100, 240), pick.randint(2, 4))) if pick.random() < 0.5 else mask
    B, H = 1 if large or sharp else pick.randint(1, 3), pick.randint(1, 3)
    S = mask.seq_len if large or sharp or pick.random() < 0.5 else pick.randint(0, mask.seq_len)
    D = pick.choice((16, 32, 64, pick.randint(16 if device == "cuda" else 1, 128)))
    dtype, shape = torch.bfloat16 if sharp and pick.random() < 0.5 else pick.choice(DTYPES), (B, H, S, D)
    options = {"scale": pick.choice((None, None, pick.uniform(-2, 2))), "text_lengths": None}
    if pick.random() < 0.4:
        lengths = [pick.randint(0, mask.text_len) for _ in range(B)]
        options["text_lengths"] = torch.tensor(lengths, dtype=pick.choice((torch.int32, torch.int64)), device=device)
    qkv = [draw.tensor(shape, dtype) for _ in range(3)]
    if sharp:  # all scores moved by as much, which changes no probability
        first, size = torch.arange(D, device=device) == 0, pick.choice((-1, -1, 1)) * 2 ** pick.randint(9, 12)
        qkv[:2] = [x.masked_fill(first, value) for x, value in zip(qkv, (size, 1), strict=False)]
    grad_lse = draw.tensor(shape[:3], torch.float32) if pick.random() < 0.5 else None
    return AttentionCall(qkv, mask, draw.tensor(shape, dtype), grad_lse, options)


def codebook_call(number: int, device: str) -> CodebookCall:
    draw = Draw(number, device)
    pick = draw.choose
    N, K = pick.choice((0, 1, pick.randint(2, 70))), pick.choice((1, 2, 63, 64, 65, pick.randint(3, 1200)))
    I, D = pick.choice((1, pick.randint(2, 160))), pick.choice((1, pick.randint(2, 140)))
    dtype, spread = pick.choice(DTYPES), pick.choice((0.3, 1.0, 4.0))
    tensors = [
        draw.tensor((N, I), dtype),
        draw.tensor((K, I), dtype, scale=spread * math.sqrt(3 / I)),
        draw.tensor((K,), dtype, scale=spread) if pick.random() < 0.7 else None,
        draw.tensor((K, D), dtype),
    ]
    grad_embedding, grad_kl = draw.tensor((N, D), dtype), draw.tensor((N,), torch.float32)
    which = pick.choice(("both", "both", "embedding", "kl"))
    return CodebookCall(
        tensors,
        tau=pick.choice((4.0, 1.0, 0.5, 1 / 16)),
        seed=pick.randrange(1 << 63),
        hard=pick.random() < 0.3,
        grad_embedding=None if which == "kl" else grad_embedding,
        grad_kl=None if which == "embedding" else grad_kl,
    )
