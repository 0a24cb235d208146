"""Stage 2: the objective of the transformer over captions and image codes (Ramesh et al. 2021, appendix B).

The discrete VAE is frozen: of every picture only its codes are seen, computed once (see `dalle_fast.training.codes`).

B batch, N examples, T text positions, G image positions.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import NamedTuple

import torch

from dalle_fast import checkpoint, sampling
from dalle_fast.data.loading import shuffled
from dalle_fast.data.source import generator
from dalle_fast.nn import functional as F
from dalle_fast.nn.dalle import DALLE, DALLEConfig
from dalle_fast.pictures import picture_grid, to_uint8
from dalle_fast.training import processes, random_state
from dalle_fast.training.codes import Encoded
from dalle_fast.training.initial import begin_with
from dalle_fast.training.recipes import DALLERecipe

EVALUATED = 64  # examples at once, at most
# That go through the model at once where no gradients are kept: short examples one by one are slow.
LEAST_POSITIONS = 1 << 12
SHOWN, SHOWN_OF_EACH = 6, 6  # captions, and pictures of each
CAPTIONS = "captions.txt"  # in the folder of a run: those that are drawn on the way
_BPE, _HIDE = 16, 17  # uses of randomness; those below are of the data


class TokenBatch(NamedTuple):
    """text (B, T), text_lengths (B,) and codes (B, G), all int64."""

    text: torch.Tensor
    text_lengths: torch.Tensor
    codes: torch.Tensor


def known_settings(config: DALLEConfig, recipe: DALLERecipe, key: dict, *, seed, truncate) -> dict:
    """Those of an objective's settings that can be told before pictures become codes.

    Args:
        key: of the codes; see `dalle_fast.training.codes.key_of`.
    """
    return {
        "stage": 2,
        **{f"model.{name}": value for name, value in checkpoint.config_to_json(config).items()},
        **dataclasses.asdict(recipe),
        "seed": seed,
        "truncate": truncate,
        **{f"codes.{name}": value for name, value in key.items()},
    }


class DALLEObjective:
    """What the loop needs to train a `DALLE`; see `dalle_fast.training.Objective`.

    Args:
        config: of the model, whose weights are drawn from `seed`.
        initial: None, or a `DALLE` with the weights to begin with instead; see `begin_with`, which takes it.
        recipe: see `DALLERecipe`.
        dvae, tokenizer: what made the codes, and what cuts the captions.
        train, validation: what `encode_source` returns of sources. Of validation captions the first few are drawn while training.
        seed: of weights, order and dropout, from 0 to 2^20 - 1.
        truncate: cut captions longer than T instead of refusing them.
        device: of the model. activation_checkpointing: as of `DALLE`.

    Raises:
        TypeError: train or validation is no `Encoded`.
        ValueError: dVAE or tokenizer do not fit the model; a caption that is too long; a wrong seed.
    """

    def __init__(
        self,
        config: DALLEConfig,
        recipe: DALLERecipe,
        dvae,
        tokenizer,
        train: Encoded,
        validation: Encoded,
        *,
        initial=None,
        seed=0,
        truncate=False,
        device="cpu",
        activation_checkpointing=False,
    ):
        F.noise_seed(seed)  # refuses what is out of range
        for name, part in (("train", train), ("validation", validation)):
            if not isinstance(part, Encoded):
                got = type(part).__name__
                raise TypeError(
                    f"{name} must be codes and captions, as encode_source makes them of a source, got {got}"
                )
        self.config, self.recipe, self.dvae, self.tokenizer = config, recipe, dvae, tokenizer
        self.train, self.validation, self.seed, self.truncate = train, validation, seed, truncate
        self.device = torch.device(device)
        if processes.current().leads:  # of millions it takes minutes, and the others' are the same
            for part in (train, validation):  # refused now, not when the turn of one that is wrong comes
                tokenizer.check_lengths(part.captions, None if truncate else config.text_len)
        with random_state.untouched():
            random_state.seed(seed)
            self.model = DALLE(config, activation_checkpointing=activation_checkpointing).to(device)
        sampling.check_fit(self.model, dvae, tokenizer)
        if initial is None or recipe.caption_dropout:  # of what it began with it may know captions that are hidden
            self.model.trained_with = {"caption_dropout": recipe.caption_dropout}
        self.validation_text = self._encode(validation.captions)
        self.shown = list(dict.fromkeys(validation.captions))[:SHOWN]
        self.examples_per_step = recipe.batch_size
        self.adamw = {"betas": (0.9, 0.96), "eps": 1e-8}
        self.settings = {
            **known_settings(config, recipe, train.key, seed=seed, truncate=truncate),
            "tokenizer": hashlib.sha256(self.validation_text[0].numpy().tobytes()).hexdigest(),
            **begin_with(self.model, initial),
        }

    def leave(self, out):
        """Put what drawing needs beside the model into the run's folder `out`, see `sampling.load`, and the captions that
        are drawn on the way."""
        out = Path(out)
        (out / sampling.DVAE).mkdir(parents=True, exist_ok=True)
        checkpoint.export(out / sampling.DVAE / checkpoint.MODEL, self.dvae)
        self.tokenizer.save(out / sampling.TOKENIZER)
        (out / CAPTIONS).write_text("".join(f"{caption}\n" for caption in self.shown), encoding="utf-8")

    def parameter_groups(self):
        return self.model.decay_groups(self.recipe.weight_decay)

    def learning_rate(self, step):
        return self.recipe.learning_rate_at(step)

    def batches(self, start):
        part = processes.current().part
        for step, keys in enumerate(shuffled(len(self.train.codes), self.recipe.batch_size, self.seed, start), start):
            indices = [index for _, index in keys]
            # Drawn for the whole batch, so that it is the same however many processes share it.
            hidden = generator(self.seed, _HIDE, step).random(len(indices)) < self.recipe.caption_dropout
            indices = part(indices)
            text, lengths = self._with_dropout([self.train.captions[index] for index in indices], step)
            lengths = lengths.masked_fill(torch.tensor(part(hidden.tolist())), 0)
            yield self._batch(text, lengths, self.train.codes[indices])

    def loss(self, batch, step, part):
        """Of several parts of a batch the gradient is of the mean of their losses: of text, where captions differ in
        length, not quite the mean over all tokens."""
        out = self.model(batch.text, batch.codes, text_lengths=batch.text_lengths)
        return out.loss, {"text_loss": out.text_loss, "image_loss": out.image_loss}

    def measures(self, model, at_once):
        return {}

    @torch.no_grad()
    def evaluate(self, model, at_once):
        """Losses of the validation examples, in nats per token of text and of image."""
        (text, lengths), codes = self.validation_text, self.validation.codes
        text_total = image_total = 0.0
        at_once = min(EVALUATED, self._together(at_once))
        for first in range(0, len(codes), at_once):
            part = slice(first, first + at_once)
            batch = self._batch(text[part], lengths[part], codes[part])
            out = model(batch.text, batch.codes, text_lengths=batch.text_lengths)
            text_total += out.text_loss.item() * int(lengths[part].sum())
            image_total += out.image_loss.item() * len(batch.codes)
        return {
            "examples": len(codes),
            "text_loss": text_total / max(1, int(lengths.sum())),
            "image_loss": image_total / len(codes),
        }

    @torch.no_grad()
    def pictures(self, model, at_once):
        """A row of pictures for each of the first validation captions, always with the same noise."""
        drawn = sampling.draw(
            model,
            self.dvae,
            self.tokenizer,
            self.shown,
            num_images=SHOWN_OF_EACH,
            batch_size=self._together(at_once),
            truncate=self.truncate,
            seed=self.seed,
        )
        return {"samples": picture_grid([to_uint8(row) for row in drawn])}

    def _together(self, at_once):
        return max(at_once, LEAST_POSITIONS // (self.config.text_len + self.train.codes.shape[1]))

    def _with_dropout(self, captions, step):
        """Captions as training sees them. A caption's tokens depend on nothing but it, the step and the run's seed.

        What BPE dropout makes of a caption never has more than T tokens: see `Tokenizer.encode`.
        """
        seed = int(generator(self.seed, _BPE, step).integers(1 << 63))
        return self._encode(captions, dropout=self.recipe.bpe_dropout, seed=seed)

    def _encode(self, captions, **dropout):
        return self.tokenizer.encode(captions, self.config.text_len, truncate=self.truncate, **dropout)

    def _batch(self, text, lengths, codes):
        return TokenBatch(*(x.to(self.device, torch.int64, non_blocking=True) for x in (text, lengths, codes)))
