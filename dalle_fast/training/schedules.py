"""Schedules: pure functions of the step, so that a resumed run needs nothing but its step. Ends are exact."""

from __future__ import annotations

import math


def cosine(step: int, *, start: float, end: float, steps: float) -> float:
    """Half a cosine from `start`, at step 0 and before, to `end`, at `steps` and after: exactly these values.

    Ramesh et al. 2021 anneal beta, tau and the learning rate of stage 1 this way.
    """
    if step >= steps:
        return end
    if step <= 0:
        return start
    return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


def warmup(step: int, *, steps: float) -> float:
    """A factor that rises in a line from 1 / steps in the first step to exactly 1, at the last of `steps` and after."""
    return min(1.0, (step + 1) / steps) if steps > 0 else 1.0
