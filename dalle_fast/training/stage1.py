"""Stage 1: the objective of the discrete VAE (Ramesh et al. 2021, appendix A), its schedules and its measures.

B batch, S pixels of a side, h x w codes, K codes.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import torch

from dalle_fast.checkpoint import config_to_json
from dalle_fast.data import batches
from dalle_fast.data.source import identity
from dalle_fast.nn import functional as F
from dalle_fast.nn.dvae import DiscreteVAE, DVAEConfig
from dalle_fast.pictures import picture_grid, to_uint8
from dalle_fast.training import processes, random_state
from dalle_fast.training.initial import begin_with
from dalle_fast.training.recipes import DVAERecipe

LEAST_PIXELS = (
    1 << 18
)  # that go through the model at once where no gradients are kept: small pictures one by one are slow
SHOWN = 12  # pictures in a grid
EVALUATED, MEASURED = 1000, 32  # at most, of the validation pictures; the latter for each line of the log


class DVAEObjective:
    """What the loop needs to train a `DiscreteVAE` on `source`; see `dalle_fast.training.Objective`.

    Args:
        config: of the model, whose weights are drawn from `seed`.
        initial: None, or a `DiscreteVAE` with the weights to begin with instead; see `begin_with`, which takes it.
        recipe: see `DVAERecipe`.
        source, validation: of pictures, see `dalle_fast.data.open_source`.
        heldout: None, or a source to evaluate on beside validation.
        seed: of weights, noise and the order of pictures, from 0 to 2^20 - 1. Each part of a batch has noise of its own.
        flip: mirror half of the pictures. workers: processes that load them. device: of the model.
    """

    def __init__(
        self,
        config: DVAEConfig,
        recipe: DVAERecipe,
        source,
        validation,
        *,
        initial=None,
        heldout=None,
        seed=0,
        flip=False,
        workers=0,
        device="cpu",
    ):
        if config.channels != 3:
            raise ValueError(f"config.channels must be 3, as pictures have, got {config.channels}")
        F.noise_seed(seed)  # refuses what is out of range
        try:
            F.noise_seed(seed, step=recipe.steps - 1)  # now, not in the last step
        except ValueError as error:
            raise ValueError(f"steps must be fewer, got {recipe.steps}; of the last one: {error}") from error
        self.config, self.recipe = config, recipe
        self.source, self.validation, self.heldout = source, validation, heldout
        self.seed, self.flip, self.workers = seed, flip, workers
        self._measured = None  # the pictures of `measures`
        with random_state.untouched():
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
            "data": identity(source),
            **begin_with(self.model, initial),
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
            part=processes.current().part,
        )

    def loss(self, batch, step, part):
        tau, beta = self.recipe.tau_at(step), self.recipe.beta_at(step)
        seed = F.noise_seed(self.seed, step=step, rank=part)
        out = self.model(self._pixels(batch.images), tau=tau, beta=beta, seed=seed)
        perplexity, used = usage(count_codes(out.codes, self.config.num_codes))
        return out.loss, {
            "reconstruction": out.reconstruction_loss,
            "kl": out.kl,
            "tau": tau,
            "beta": beta,
            "sampled_perplexity": perplexity,  # of codes with noise, which hides how few are ever the likeliest
            "sampled_codes_used": used,
        }

    @torch.no_grad()
    def measures(self, model, at_once):
        """How many codes the first validation pictures have: the likeliest ones, which stage 2 gets."""
        if self._measured is None:
            self._measured = next(self._in_order(self.validation, MEASURED))
        counts = 0
        for images in self._measured.images.split(self._together(at_once)):
            codes = model.encode(self._pixels(images))
            counts = counts + count_codes(codes, self.config.num_codes)
        perplexity, used = usage(counts)
        return {"perplexity": perplexity.item(), "codes_used": used.item()}

    @torch.no_grad()
    def evaluate(self, model, at_once):
        """See `evaluate`: on validation pictures, and, named heldout_..., on held-out ones."""
        at_once = self._together(at_once)
        result = evaluate(model, self.validation, self._in_order(self.validation), at_once)
        if self.heldout is not None:
            of_heldout = evaluate(model, self.heldout, self._in_order(self.heldout), at_once)
            result |= {f"heldout_{name}": value for name, value in of_heldout.items()}
        return result

    @torch.no_grad()
    def pictures(self, model, at_once):
        """The first validation pictures above what becomes of them."""
        images = next(self._in_order(self.validation, SHOWN)).images
        drawn = [to_uint8(model.reconstruct(self._pixels(some))) for some in images.split(self._together(at_once))]
        return {"reconstructions": picture_grid([images.movedim(1, -1).numpy(), np.concatenate(drawn)])}

    def _together(self, at_once):
        return max(at_once, LEAST_PIXELS // self.config.image_size**2)

    def _pixels(self, images):
        images = images.to(self.device, non_blocking=True)
        return images.to(memory_format=torch.channels_last).float() / 255

    def _in_order(self, source, size=100):
        stream = batches(source, size, image_size=self.config.image_size, seed=self.seed, train=False)
        return itertools.islice(stream, -(-EVALUATED // size))


def count_codes(codes, num_codes):
    """How often each code comes, (K,) int64: as torch.bincount, which waits for a GPU."""
    codes = codes.flatten()
    return torch.zeros(num_codes, dtype=torch.int64, device=codes.device).scatter_add_(0, codes, torch.ones_like(codes))


def usage(counts):
    """The perplexity of codes, exp of their entropy, and the share of the codebook in use.

    Args:
        counts: (K,), how often each code came.

    Returns:
        Two tensors without dimensions: from 1 to K, and from 0 to 1.
    """
    p = counts.double() / counts.sum()
    return torch.exp(-torch.xlogy(p, p).sum()), (counts > 0).double().mean()


def evaluate(model, source, stream, at_once=EVALUATED) -> dict[str, float]:
    """How well `model` reconstructs pictures.

    Args:
        model: a `DiscreteVAE`. source: of the pictures; where it has `check_all`, which reads captions from pictures,
            reconstructions are judged by it. stream: of `Batch`, a single pass. at_once: pictures that go through the
            model at once.

    Returns:
        images: how many. psnr: in dB, of the pixels' mean squared error over all pictures. psnr_mean: the mean of the
        pictures' own. perplexity, codes_used: see `usage`. captions_read and captions_read_from_originals: the share of
        reconstructions, and of pictures, from which the right caption is read.
    """
    read = getattr(source, "check_all", None)
    device = next(model.parameters()).device
    errors, counts, right, right_originals = [], 0, [], []
    for batch in stream:
        drawn = []
        for images in batch.images.split(at_once):
            codes = model.encode(images.to(device).float() / 255)
            drawn.append(to_uint8(model.decode(codes)))
            counts = counts + count_codes(codes, model.config.num_codes)
        reconstructions = np.concatenate(drawn)
        originals = batch.images.movedim(1, -1).numpy()
        errors.append(np.square((reconstructions.astype(np.float64) - originals) / 255).mean((1, 2, 3)))
        if read is not None:
            right += [a == b for a, b in zip(read(reconstructions), batch.captions, strict=True)]
            right_originals += [a == b for a, b in zip(read(originals), batch.captions, strict=True)]
    errors = np.concatenate(errors)
    perplexity, used = usage(counts)
    result = {
        "images": len(errors),
        "psnr": float(-10 * np.log10(max(errors.mean(), 1e-12))),
        "psnr_mean": float(-10 * np.log10(np.maximum(errors, 1e-12)).mean()),
        "perplexity": perplexity.item(),
        "codes_used": used.item(),
    }
    if read is not None:
        result["captions_read"] = float(np.mean(right))
        result["captions_read_from_originals"] = float(np.mean(right_originals))
    return result
