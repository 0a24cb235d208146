"""An exponential moving average of a model's weights: what is evaluated and shared."""

from __future__ import annotations

import copy

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA:
    """A copy of `model` whose weights follow it: average += (1 - decay) * (weight - average), every `every` updates
    and at the last.

    Early on the decay is smaller, (1 + n) / (10 + n) at the n-th time, or a short run would keep its random start.

    Args:
        model: averaged; buffers are copied.
        decay: from 0 (no averaging) to below 1; 0.999 in the paper's stage 1, 0.99 and every=25 in its stage 2. Both are
            checked by `LoopSettings`.

    Attributes:
        model: the average, in evaluation mode, without gradients.
    """

    def __init__(self, model, *, decay: float, every: int = 1):
        self.decay, self.every = decay, every
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model, updates: int, *, last: bool = False) -> None:
        """After the `updates`-th update of `model`, counted from 1. The last one counts, whatever its number."""
        if updates % self.every and not last:
            return
        n = -(-updates // self.every)
        decay = min(self.decay, (1 + n) / (10 + n))
        average = get_ema_multi_avg_fn(decay)
        average(list(self.model.parameters()), [p.detach() for p in model.parameters()], None)
        for averaged, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            averaged.copy_(buffer)
