"""How the presets of the models are trained. Without torch, so that --help can show the numbers."""

from __future__ import annotations

import dataclasses

from dalle_fast.integers import as_integer
from dalle_fast.training.schedules import cosine, warmup

LARGEST = 1e38  # what float32 holds, about


def _field(default, help):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class DVAERecipe:
    """How a `DiscreteVAE` is trained: `help` of each field says what it is; see `dalle-fast train-dvae --help`.

    A share is that of `steps`, after which a cosine schedule has reached its end. beta weighs the sum of the divergence
    over an image's codes, divided by its pixels and channels: the fewer pixels stand behind a code, the smaller it
    should be. The defaults are the paper's, but for `clip`: the paper names none for this stage, and without one a
    steep batch, as flat pictures make them, can undo a run. And the paper mirrors half of the pictures: that is no part
    of a recipe but `DVAEObjective`'s `flip`, off by default, as stage 2 shows none mirrored, and letters are other ones.
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
        check(self, positive_integers=("steps", "batch_size"), positive=("learning_rate", "tau"))
        check(self, not_negative=("final_learning_rate", "beta", "weight_decay", "clip"))
        check(self, shares=("learning_rate_share", "warmup_share", "beta_share", "tau_share"))

    def learning_rate_at(self, step: int) -> float:
        steps = self.learning_rate_share * self.steps
        rate = cosine(step, start=self.learning_rate, end=self.final_learning_rate, steps=steps)
        return rate * warmup(step, steps=self.warmup_share * self.steps)

    def beta_at(self, step: int) -> float:
        return cosine(step, start=0.0, end=self.beta, steps=self.beta_share * self.steps)

    def tau_at(self, step: int) -> float:
        return cosine(step, start=1.0, end=self.tau, steps=self.tau_share * self.steps)


@dataclasses.dataclass(frozen=True)
class DALLERecipe:
    """How a `DALLE` is trained: `help` of each field says what it is; see `dalle-fast train-dalle --help`.

    A share is that of `steps`. The defaults are the paper's, but for the learning rate: there it is halved whenever the
    loss stands still, here it falls in a cosine, so that it is a function of the step alone.
    """

    steps: int = _field(430_000, "updates in all; the schedule scales with them")
    batch_size: int = _field(1024, "pictures with their captions in one update")
    learning_rate: float = _field(4.5e-4, "AdamW's, after the warm-up")
    final_learning_rate: float = _field(4.5e-5, "at the end of its cosine, which is the end of training")
    warmup_share: float = _field(5_000 / 430_000, "share of the steps in which the learning rate rises first")
    weight_decay: float = _field(4.5e-2, "of matrices; gains, biases and embeddings do not decay")
    clip: float = _field(4.0, "largest norm of the gradient, 0 for any")
    ema_decay: float = _field(0.99, "of the averaged weights")
    ema_every: int = _field(25, "updates between two of the average")
    bpe_dropout: float = _field(0.1, "share of the tokenizer's merges that are left out, another one each time")
    caption_dropout: float = _field(0.0, "share of the captions that are hidden, for classifier-free guidance")

    def __post_init__(self):
        check(self, positive_integers=("steps", "batch_size", "ema_every"), positive=("learning_rate",))
        check(self, not_negative=("final_learning_rate", "weight_decay", "clip"))
        check(self, shares=("warmup_share", "ema_decay", "bpe_dropout", "caption_dropout"))

    def learning_rate_at(self, step: int) -> float:
        rate = cosine(step, start=self.learning_rate, end=self.final_learning_rate, steps=self.steps)
        return rate * warmup(step, steps=self.warmup_share * self.steps)


def check(recipe, *, positive_integers=(), integers=(), positive=(), not_negative=(), shares=()) -> None:
    """Raise TypeError or ValueError where one of a recipe's (or other settings') fields is not what its list says;
    `integers` may be 0. NumPy's become Python's, as JSON can hold them."""
    for name in (*positive_integers, *integers):
        least = 1 if name in positive_integers else 0
        object.__setattr__(recipe, name, as_integer(name, getattr(recipe, name), least=least))
    for name in positive:
        if not 0 < getattr(recipe, name) < LARGEST:
            raise ValueError(f"{name} must be a positive number below {LARGEST:g}, got {getattr(recipe, name)!r}")
    for name in not_negative:
        if not 0 <= getattr(recipe, name) < LARGEST:
            raise ValueError(f"{name} must be a number from 0 to below {LARGEST:g}, got {getattr(recipe, name)!r}")
    for name in shares:
        if not 0 <= getattr(recipe, name) <= 1:
            raise ValueError(f"{name} must be from 0 to 1, got {getattr(recipe, name)!r}")


# Of the presets of `DiscreteVAE`. "openai" is the paper's; the others train in fewer steps, at larger rates.
RECIPES = {
    "openai": DVAERecipe(),
    "medium": DVAERecipe(steps=200_000, batch_size=128, learning_rate=3e-4, beta_share=0.05, tau_share=0.3),
    "small": DVAERecipe(steps=50_000, batch_size=64, learning_rate=5e-4, beta_share=0.1, tau_share=0.5),
    "tiny": DVAERecipe(
        steps=5500,
        batch_size=32,
        learning_rate=2e-3,
        final_learning_rate=1e-4,
        learning_rate_share=1.0,
        warmup_share=0.03,
        beta=0.5,
        beta_share=0.04,
        tau_share=0.6,
    ),
}

# Of the presets of `DALLE`. "12b" is the paper's; the others train in fewer steps, at larger rates.
DALLE_RECIPES = {
    "12b": DALLERecipe(),
    "1b": DALLERecipe(steps=300_000, batch_size=512, caption_dropout=0.1),
    "medium": DALLERecipe(steps=200_000, batch_size=256, caption_dropout=0.1),
    "small": DALLERecipe(steps=100_000, batch_size=128, learning_rate=6e-4, caption_dropout=0.1),
    "tiny": DALLERecipe(
        steps=3000,
        batch_size=64,
        learning_rate=2e-3,
        final_learning_rate=2e-5,
        warmup_share=0.03,
        ema_every=1,
        caption_dropout=0.1,
    ),
}
