"""From captions to pictures: tokenizer, `DALLE`, `DiscreteVAE`, and the best of many by any score.

P captions, N images of each, C channels, H x W pixels, h x w grid of codes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from dalle_fast import checkpoint
from dalle_fast.data.text import Tokenizer
from dalle_fast.errors import UserError
from dalle_fast.nn import generation
from dalle_fast.nn.checks import check_size
from dalle_fast.nn.memory import free_memory, is_out_of_memory
from dalle_fast.pictures import Layout, save_picture, sheet, to_uint8

__all__ = ["DoesNotFit", "Drawn", "best_of", "check_fit", "draw", "draw_each", "load", "save_grid"]

DVAE, TOKENIZER = "dvae", "tokenizer.json"  # in the folder of a run of stage 2


def load(folder, *, dvae=None, device="cpu", precision="float32"):
    """What draws: the `DALLE`, the `DiscreteVAE` and the `Tokenizer` of a run of stage 2, finished or not.

    Args:
        folder: of a run of `dalle-fast train-dalle`, or of `dalle_fast.training.train` with a `DALLEObjective`.
        dvae: folder of another VAE than the run's own.
        precision: "float32" or "bfloat16", of the transformer; the VAE draws its pixels in float32.

    Raises:
        UserError: one of them is not there, or they do not fit each other.
    """
    folder = Path(folder)
    dalle = checkpoint.load_model(folder, kind="DALLE", device=device)
    own = dvae is None
    if own and not (folder / DVAE).is_dir():
        raise UserError(f"{folder} has no folder {DVAE!r} with a discrete VAE: name one (dvae=, --dvae)")
    dvae = checkpoint.load_model(folder / DVAE if own else dvae, kind="DiscreteVAE", device=device)
    if not (folder / TOKENIZER).exists():
        raise UserError(f"{folder} has no {TOKENIZER}, the tokenizer of its captions")
    try:
        tokenizer = Tokenizer.load(folder / TOKENIZER)
        check_fit(dalle, dvae, tokenizer)
    except (ValueError, OSError) as error:
        raise UserError(f"{folder}: {error}") from error
    return dalle.to(getattr(torch, precision)), dvae, tokenizer


def draw(dalle, dvae, tokenizer, captions, *, num_images=1, keep=None, **options):
    """Pictures of captions.

    The images of one caption are made together as far as `batch_size` allows, as they share what is kept of the caption.
    An image depends on the seed, its caption and its number among the caption's, not on the batches (see
    `DALLE.generate`): equal captions get equal images.

    Scoring with CLIP (`pip install open_clip_torch`; the best 4 of 64):

        clip, _, _ = open_clip.create_model_and_transforms("ViT-B-32", pretrained="laion2b_s34b_b79k")
        words = open_clip.get_tokenizer("ViT-B-32")
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))

        def score(images, caption):
            images = torch.nn.functional.interpolate(images, (224, 224), mode="bicubic")
            pictures = clip.encode_image((images - mean) / std, normalize=True)
            return (pictures @ clip.encode_text(words([caption]), normalize=True).T)[:, 0]

        draw(dalle, dvae, tokenizer, ["a red circle"], num_images=64, score=score, keep=4)

    Args:
        all: as of `draw_each`, which takes a caption's pictures away from the next caption's.

    Returns:
        (P, keep, C, H, W) float32, pixels from 0 to 1, on the model's device.

    Raises:
        as `draw_each`, also where the pictures of all captions do not fit.
    """
    captions = _checked_captions(captions)
    check_size("num_images", num_images)
    kept = _checked_keep(keep, num_images)
    shape, device = (len(captions), kept, *_image_shape(dvae.config)), dalle.head.weight.device
    _check_room(dvae.config, num_images, keep, device, all_of=len(captions))
    drawn = draw_each(dalle, dvae, tokenizer, captions, num_images=num_images, keep=keep, **options)
    pictures = torch.empty(shape, dtype=torch.float32, device=device)
    for of_caption in pictures:
        of_caption.copy_(next(drawn).images)  # under no name, that none are kept while the next ones are made
    return pictures


class Drawn(NamedTuple):
    """The pictures of a caption: images (keep, C, H, W) float32, their numbers among those that were drawn, and their
    scores, None where there was nothing to score them."""

    images: torch.Tensor
    numbers: list[int]
    scores: list[float] | None


class DoesNotFit(torch.OutOfMemoryError):
    """Memory: what was too much, and the argument with which it would fit, in the message and as attributes.

    Attributes:
        argument: "batch_size", "num_images", or None where neither helps.
        fits: the most that it may be; known: whether it is known to fit, or worth a try.
    """

    def __init__(self, what, argument, fits, *, known=True, otherwise="not even one fits", reason=""):
        self.what, self.argument, self.fits, self.known = what, argument if fits > 0 else None, fits, known
        self.otherwise, self.reason = otherwise, str(reason)
        super().__init__(self.worded(f"{argument}={fits}"))

    def __reduce__(self):  # an exception's own would call the class with the message alone
        options = {"known": self.known, "otherwise": self.otherwise, "reason": self.reason}
        return functools.partial(type(self), **options), (self.what, self.argument, self.fits)

    def worded(self, choice):
        """The message, with the argument as the caller spells it."""
        advice = f"{choice} would fit" if self.known else f"try {choice}"
        reason = f" ({self.reason})" if self.reason else ""
        return f"{self.what}: {advice if self.argument else self.otherwise}{reason}"


def draw_each(
    dalle,
    dvae,
    tokenizer,
    captions,
    *,
    num_images=1,
    score=None,
    keep=None,
    batch_size=64,
    truncate=False,
    seed=None,
    codes=None,
    known=None,
    progress=False,
    **options,
):
    """The pictures of one caption after another, as `draw` makes them: to keep each at once, or more than can be held.

    Args:
        dalle, dvae, tokenizer: a `DALLE`, the `DiscreteVAE` whose codes it was trained on, and its `Tokenizer`.
        captions: a sequence of P strings.
        num_images: N to draw for each caption.
        score: a callable of images (N, C, H, W), pixels from 0 to 1, and their caption, that returns N numbers; None
            keeps the images in the order in which they were drawn.
        keep: how many of the N are returned, those with the highest scores first; None keeps all.
        batch_size: the most images that are drawn, or decoded, at once. All images of a caption are held until they
            are scored.
        truncate: cut captions that are too long, instead of refusing them.
        seed, codes, known, options: as of `generate`; codes and known of P images to complete.
        progress: show a bar for each batch.

    Returns:
        An iterator of `Drawn`, P in all. What is wrong is told by this call, before anything is drawn.

    Raises:
        TypeError, ValueError: the parts do not fit each other; a caption that is too long; what `generate` raises.
        DoesNotFit: the pictures of a caption do not fit, or a batch does not, and what would.
    """
    check_fit(dalle, dvae, tokenizer)
    captions = _checked_captions(captions)
    check_size("num_images", num_images)
    check_size("batch_size", batch_size)
    kept = _checked_keep(keep, num_images)
    if score is not None and not callable(score):
        raise TypeError(f"score must be a callable of images and their caption, or None, got {type(score).__name__}")
    device = dalle.head.weight.device
    completed = {"codes": codes, "known": known}  # of each caption, or what generate takes or refuses as it is
    of_each = [name for name, given in completed.items() if _dim(given) > (0 if name == "codes" else 2)]
    for name in of_each:
        if len(completed[name]) != len(captions):
            sizes = f"{len(completed[name])} and {len(captions)}"
            raise ValueError(f"{name} must be of as many images as there are captions, got {sizes}")
    text, lengths = tokenizer.encode(captions, dalle.config.text_len, truncate=truncate)
    options |= {"seed": generation.random_seed() if seed is None else seed, "progress": progress}
    _check_room(dvae.config, num_images, keep, device)
    # Refused now, not with a later batch: completions, all of them; options, also those that batches have of their own.
    generation.completion(dalle, codes, known, text.to(device))
    dalle.generate(text[:0].to(device), num_images=num_images, text_lengths=None, first_image=0, **options)

    @torch.no_grad()
    def draw_all():
        together = max(1, batch_size // num_images)  # captions
        for first in range(0, len(captions), together):
            part = slice(first, first + together)
            drawn = _draw_codes(
                dalle,
                text[part].to(device),
                num_images,
                batch_size,
                text_lengths=lengths[part].to(device),
                **options,
                **completed | {name: completed[name][part] for name in of_each},
            )
            for caption, of_caption in zip(captions[part], drawn, strict=True):
                yield _kept(_decoded(dvae, of_caption, batch_size), caption, score, kept)

    return draw_all()


def _kept(images, caption, score, keep):
    if score is None:
        return Drawn(images[:keep], list(range(keep)), None)
    # Of a copy, as it may work in place: of a caption's images there are two anyway while they are decoded.
    best, scores = _best(images, lambda x: score(x.clone(), caption), keep)
    return Drawn(images[best], best.tolist(), scores.tolist())


def _draw_codes(dalle, text, num_images, batch_size, **options):
    """Codes (P, N, h, w), at most batch_size of a caption at once."""
    parts = []
    for first in range(0, num_images, batch_size):
        count = min(batch_size, num_images - first)
        try:
            part = dalle.generate(text, num_images=count, first_image=first, **options)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise _batch_does_not_fit(error, len(text), count, text.device) from error
        parts.append(part.unflatten(0, (len(text), -1)))
    return torch.cat(parts, 1)


def _batch_does_not_fit(error, num_captions, num_images, device):
    """What `generate` says, by the argument that its caller has: captions are drawn together as `batch_size` allows."""
    at_once, fits = num_captions * num_images, getattr(error, "fits", None)  # images of each caption
    what = f"drawing {at_once} images at once ran out of memory"
    if fits is None:
        return DoesNotFit(what, "batch_size", at_once // 2, known=False, reason=error)
    if (free := free_memory(device)) is not None:
        what += f", {free / 1e9:.3g} GB are free on {device}"
    if fits > 0:
        return DoesNotFit(what, "batch_size", fits * num_captions)
    return DoesNotFit(what, "batch_size", num_captions // 2, known=False)  # fewer captions at once may


def _decoded(dvae, codes, batch_size):
    """Images (N, C, H, W) of codes (N, h, w), at most batch_size at once."""
    try:
        images = [dvae.decode(some) for some in codes.split(batch_size)]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        at_once = min(batch_size, len(codes))
        what = f"decoding {at_once} images at once ran out of memory"
        raise DoesNotFit(what, "batch_size", at_once // 2, known=False, reason=error) from error
    return torch.cat(images)


def _image_shape(config):
    return config.channels, config.image_size, config.image_size


def _check_room(config, num_images, keep, device, *, all_of=None):
    """Raise where the images of a caption, with those kept of each of `all_of` captions, are not to be held.

    A CPU would begin to swap, or end the process, hours later.

    Those of a caption are there twice while what `decode` returns in parts becomes one tensor.

    Args:
        keep: None where all are kept, also if fewer are drawn.
    """
    image, free, held = 4 * math.prod(_image_shape(config)), free_memory(device), all_of or 0
    needed = (held * (keep or num_images) + 2 * num_images) * image
    if free is None or needed <= free:
        return
    what = f"{num_images} images of " + ("a caption" if all_of is None else f"each of {all_of} captions")
    what += "" if keep is None else f", {keep} of them kept,"
    what += f" take {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free on {device}"
    if keep is None:
        fits, otherwise = free // (image * (held + 2)), "not even one fits"
    else:
        fits, otherwise = (free // image - held * keep) // 2, f"not even {keep} fit"
    if all_of is not None:
        otherwise = "pass fewer captions" + ("" if keep is None else ", or keep fewer")
    raise DoesNotFit(what, "num_images", fits if fits >= (keep or 1) else 0, otherwise=otherwise)


def best_of(images, score, keep=1):
    """The `keep` images with the highest scores, best first; of equal ones those that come first.

    Args:
        images: (N, ...). score: a callable of them, which it may not change, that returns N numbers.

    Raises:
        ValueError: keep is not from 1 to N, or the scores are not N numbers. TypeError: they are no numbers at all.
    """
    return images[_best(images, score, keep)[0]]


def _best(images, score, keep):
    """Where the best of the images are, on their device, and the scores of those."""
    keep = _checked_keep(keep, len(images))
    scores = score(images)
    try:
        scores = torch.as_tensor(scores).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"score must return {len(images)} numbers, got {type(scores).__name__}: {error}") from error
    if scores.is_complex() or scores.layout != torch.strided:
        got = f"{scores.dtype} in layout {scores.layout}"
        raise TypeError(f"score must return {len(images)} real numbers, not sparse, got {got}")
    if scores.shape != (len(images),):
        raise ValueError(f"score must return {len(images)} numbers, one for each image, got {tuple(scores.shape)}")
    if scores.isnan().any():
        raise ValueError(f"score must return numbers, got NaN for image {int(scores.isnan().nonzero()[0])}")
    best = scores.argsort(descending=True, stable=True)[:keep]
    return best.to(images.device), scores[best]


def check_fit(dalle, dvae, tokenizer=None):
    """Raise ValueError where the parts were not made for each other, with what each of them has."""
    grid, devices = (dvae.config.grid, dvae.config.grid), [next(part.parameters()).device for part in (dvae, dalle)]
    if devices[0] != devices[1]:
        raise ValueError("the dVAE is on {}, the transformer on {}: both must be on one device".format(*devices))
    if dvae.config.num_codes != dalle.config.num_codes:
        raise ValueError(f"the dVAE has {dvae.config.num_codes} codes, the transformer takes {dalle.config.num_codes}")
    if grid != dalle.config.grid:
        sides = "the dVAE makes a grid of {} x {} codes, the transformer takes {} x {}"
        raise ValueError(sides.format(*grid, *dalle.config.grid))
    if tokenizer is not None and tokenizer.vocab_size > dalle.config.vocab_size:
        sizes = f"{tokenizer.vocab_size} tokens, the transformer takes {dalle.config.vocab_size}"
        raise ValueError(f"the tokenizer has {sizes}")


def save_grid(images, path, columns=None):
    """Save images as one picture, in a format that Pillow knows from the path.

    Args:
        images: (N, C, H, W), or (P, N, C, H, W) for a row of each caption; C is 1 or 3, pixels from 0 to 1.
        columns: images in a row; None means N of a caption, and about a square where there are no captions.
    """
    if columns is not None:
        check_size("columns", columns)
    if _dim(images) == 5:
        columns = images.shape[1] if columns is None else columns
        images = images.flatten(0, 1)
    if _dim(images) != 4 or len(images) == 0 or images.shape[1] not in (1, 3):
        got = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(f"images must have shape (N, C, H, W) with N > 0 and C 1 or 3, got {got}")
    N, _, H, W = images.shape
    columns = min(N, columns or int((N - 1) ** 0.5) + 1)
    pixels = to_uint8(images.float())
    rows = [pixels[first : first + columns] for first in range(0, N, columns)]
    save_picture(sheet(rows, Layout(len(rows), columns, H, W, gap=0), background=0), path)


def _checked_keep(keep, available):
    keep = available if keep is None else keep
    check_size("keep", keep)
    if keep > available:
        raise ValueError(f"keep must be from 1 to {available}, the images that are drawn, got {keep}")
    return keep


def _checked_captions(captions):
    if isinstance(captions, str):
        raise TypeError(f"captions must be a sequence of strings, got the string {captions!r}")
    captions = list(captions) if isinstance(captions, Iterable) else [captions]
    for caption in captions:
        if not isinstance(caption, str):
            raise TypeError(f"captions must be a sequence of strings, got {caption!r}")
    return captions


def _dim(given):
    return given.dim() if isinstance(given, torch.Tensor) else -1
