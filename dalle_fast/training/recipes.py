"""How the presets of the models are trained. Without torch, so that --help can show the numbers."""

from __future__ import annotations

import dataclasses
import math

from dalle_fast.training.schedules import cosine, warmup


def _field(default, help):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class DVAERecipe:
    """How a `DiscreteVAE` is trained: `help` of each field says what it is; see `dalle-fast train-dvae --help`.

    A share is that of `steps`, after which a cosine schedule has reached its end. beta weighs the sum of the divergence
    over an image's codes, divided by its pixels and channels: the fewer pixels stand behind a code, the smaller it
    should be. The defaults are the paper's.
    """

    steps: int = _field(3_000_000, "updates in all; the schedules scale with them")
    batch_size: int = _field(512, "pictures in one update")
    learning_rate: float = _field(1e-4, "AdamW's, at the start of its cosine")
    final_learning_rate: float = _field(1.25e-6, "at its end")
    learning_rate_share: float = _field(0.4, "share of the steps after which it is reached")
    warmup_share: float = _field(0.0, "share of the steps in which the learning rate rises first")
    beta: float = _field(6.6, "weight of the divergence at the end of its schedule, which begins at 0")
    beta_share: float = _field(1 / 600, "share of the steps after which it is reached")
    tau: float = _field(1 / 16, "temperature at the end of its schedule, which begins at 1")
    tau_share: float = _field(1 / 20, "share of the steps after which it is reached")
    weight_decay: float = _field(1e-4, "of all parameters")
    clip: float = _field(1.0, "largest norm of the gradient, 0 for any")

    def __post_init__(self):
        for name in ("steps", "batch_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)!r}")
        for name in ("learning_rate", "tau"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)!r}")
        for name in ("final_learning_rate", "beta", "weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number from 0, got {getattr(self, name)!r}")
        for name in ("learning_rate_share", "warmup_share", "beta_share", "tau_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)!r}")

    def learning_rate_at(self, step: int) -> float:
        steps = self.learning_rate_share * self.steps
        rate = cosine(step, start=self.learning_rate, end=self.final_learning_rate, steps=steps)
        return rate * warmup(step, steps=self.warmup_share * self.steps)

    def beta_at(self, step: int) -> float:
        return cosine(step, start=0.0, end=self.beta, steps=self.beta_share * self.steps)

    def tau_at(self, step: int) -> float:
        return cosine(step, start=1.0, end=self.tau, steps=self.tau_share * self.steps)


# Of the presets of `DiscreteVAE`. "openai" is the paper's; the others train in fewer steps, at larger rates.
RECIPES = {
    "openai": DVAERecipe(),
    "medium": DVAERecipe(steps=200_000, batch_size=128, learning_rate=3e-4, beta_share=0.05, tau_share=0.3),
    "small": DVAERecipe(steps=50_000, batch_size=64, learning_rate=5e-4, beta_share=0.1, tau_share=0.5),
    "tiny": DVAERecipe(
        steps=1500,
        batch_size=64,
        learning_rate=3e-3,
        final_learning_rate=1e-4,
        learning_rate_share=1.0,
        warmup_share=0.03,
        beta=1.0,
        beta_share=0.5,
        tau_share=0.7,
    ),
}
