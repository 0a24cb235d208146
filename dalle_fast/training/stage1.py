"""Stage 1: the objective of the discrete VAE (Ramesh et al. 2021, appendix A), its schedules and its measures.

B batch, S pixels of a side, h x w codes, K codes.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from dalle_fast.checkpoint import config_to_json
from dalle_fast.data import batches
from dalle_fast.nn import functional as F
from dalle_fast.nn.dvae import DiscreteVAE, DVAEConfig
from dalle_fast.training import random_state
from dalle_fast.training.pictures import picture_grid
from dalle_fast.training.recipes import DVAERecipe

SHOWN = 12  # pictures in a grid
EVALUATED = 1000  # at most, of the validation pictures


class DVAEObjective:
    """What the loop needs to train a `DiscreteVAE` on `source`; see `dalle_fast.training.Objective`.

    Args:
        config: of the model, whose weights are drawn from `seed`.
        recipe: see `DVAERecipe`.
        source, validation: of pictures, see `dalle_fast.data.open_source`; others of the same split are not looked at.
        seed: of weights, noise and the order of pictures, from 0 to 2^20 - 1.
        flip: mirror half of the pictures. workers: processes that load them. device: of the model.
    """

    def __init__(
        self, config: DVAEConfig, recipe: DVAERecipe, source, validation, *, seed=0, flip=False, workers=0, device="cpu"
    ):
        if config.channels != 3:
            raise ValueError(f"config.channels must be 3, as pictures have, got {config.channels}")
        F.noise_seed(seed, step=recipe.steps - 1)  # refuses what is out of range now, not in the last step
        self.config, self.recipe, self.source, self.validation = config, recipe, source, validation
        self.seed, self.flip, self.workers = seed, flip, workers
        random_state.seed(seed)
        self.model = DiscreteVAE(config).to(device, memory_format=torch.channels_last)
        self.device = torch.device(device)
        self.examples_per_step = recipe.batch_size
        self.adamw = {"betas": (0.9, 0.999), "eps": 1e-8}
        self.settings = {
            "stage": 1,
            **{f"model.{name}": value for name, value in config_to_json(config).items()},
            **dataclasses.asdict(recipe),
            "seed": seed,
            "flip": flip,
            "data": source.name,
            "examples": len(source),
        }

    def parameter_groups(self):
        return [{"params": list(self.model.parameters()), "weight_decay": self.recipe.weight_decay}]

    def learning_rate(self, step):
        return self.recipe.learning_rate_at(step)

    def batches(self, start):
        return batches(
            self.source,
            self.recipe.batch_size,
            image_size=self.config.image_size,
            seed=self.seed,
            start=start,
            flip=self.flip,
            num_workers=self.workers,
        )

    def loss(self, batch, step):
        tau, beta = self.recipe.tau_at(step), self.recipe.beta_at(step)
        out = self.model(self._pixels(batch), tau=tau, beta=beta, seed=F.noise_seed(self.seed, step=step))
        perplexity, used = usage(torch.bincount(out.codes.flatten(), minlength=self.config.num_codes))
        return out.loss, {
            "reconstruction": out.reconstruction_loss,
            "kl": out.kl,
            "tau": tau,
            "beta": beta,
            "perplexity": perplexity,
            "codes_used": used,
        }

    @torch.no_grad()
    def evaluate(self, model):
        """On validation pictures: see `evaluate`; and on "heldout" ones, where the source has them."""
        return evaluate(model, self._validation_batches(), getattr(self.validation, "check", None))

    @torch.no_grad()
    def pictures(self, model):
        """The first validation pictures above what becomes of them."""
        images = self._pixels(next(self._validation_batches(SHOWN)))
        return {"reconstructions": picture_grid([to_uint8(images), to_uint8(model.reconstruct(images))])}

    def _pixels(self, batch):
        images = batch.images.to(self.device, non_blocking=True)
        return images.to(memory_format=torch.channels_last).float() / 255

    def _validation_batches(self, size=100):
        stream = batches(self.validation, size, image_size=self.config.image_size, seed=self.seed, train=False)
        for count, batch in enumerate(stream, 1):
            yield batch
            if count * size >= EVALUATED:
                return


def usage(counts):
    """The perplexity of codes, exp of their entropy, and the share of the codebook in use.

    Args:
        counts: (K,), how often each code came.

    Returns:
        Two tensors without dimensions: from 1 to K, and from 0 to 1.
    """
    p = counts.double() / counts.sum()
    return torch.exp(-torch.xlogy(p, p).sum()), (counts > 0).double().mean()


def to_uint8(images) -> np.ndarray:
    """(B, 3, H, W) float pixels from 0 to 1 as (B, H, W, 3) uint8."""
    return (images * 255).round().clamp(0, 255).byte().movedim(1, -1).cpu().numpy()


def evaluate(model, stream, check=None) -> dict[str, float]:
    """How well `model` reconstructs the pictures of `stream`, in a single pass.

    Args:
        model: a `DiscreteVAE`. stream: of `Batch`. check: reads a caption from a picture, or None.

    Returns:
        images: how many. psnr: in dB, of the pixels' mean squared error over all pictures. psnr_mean: the mean of the
        pictures' own. perplexity, codes_used: see `usage`. captions_read and captions_read_from_originals: the share of
        reconstructions, and of pictures, from which `check` reads the caption.
    """
    device = next(model.parameters()).device
    errors, counts, read, read_originals = [], 0, [], []
    for batch in stream:
        images = batch.images.to(device).float() / 255
        codes = model.encode(images)
        reconstructions = to_uint8(model.decode(codes))
        originals = batch.images.movedim(1, -1).cpu().numpy()
        errors.append(np.square((reconstructions.astype(np.float64) - originals) / 255).mean((1, 2, 3)))
        counts = counts + torch.bincount(codes.flatten(), minlength=model.config.num_codes).cpu()
        if check is not None:
            read += [check(image) == caption for image, caption in zip(reconstructions, batch.captions, strict=True)]
            read_originals += [check(image) == caption for image, caption in zip(originals, batch.captions, strict=True)]
    errors = np.concatenate(errors)
    perplexity, used = usage(counts)
    result = {
        "images": len(errors),
        "psnr": float(-10 * np.log10(max(errors.mean(), 1e-12))),
        "psnr_mean": float(-10 * np.log10(np.maximum(errors, 1e-12)).mean()),
        "perplexity": perplexity.item(),
        "codes_used": used.item(),
    }
    if check is not None:
        result["captions_read"] = float(np.mean(read))
        result["captions_read_from_originals"] = float(np.mean(read_originals))
    return result
