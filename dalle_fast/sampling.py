"""From captions to pictures: tokenizer, `DALLE`, `DiscreteVAE`, and the best of many by any score.

P captions, N images of each, C channels, H x W pixels, h x w grid of codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from dalle_fast.nn import generation
from dalle_fast.nn.checks import check_size
from dalle_fast.nn.memory import free_memory, is_out_of_memory
from dalle_fast.outputs import written_whole

__all__ = ["best_of", "check_fit", "draw", "save_grid"]


@torch.no_grad()
def draw(
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
    """Pictures of captions.

    The images of one caption are made together as far as `batch_size` allows, as they share what is kept of the caption.
    An image depends on the seed, its caption and its number among the caption's, not on the batches (see
    `dalle_fast.nn.generation.generate`): equal captions get equal images.

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
        (P, keep, C, H, W) float32, pixels from 0 to 1, on the model's device.

    Raises:
        TypeError, ValueError: the parts do not fit each other; a caption that is too long; what `generate` raises.
        torch.OutOfMemoryError: the pictures do not fit, or a batch of them does not, and what would.
    """
    check_fit(dalle, dvae, tokenizer)
    captions = _checked_captions(captions)
    check_size("num_images", num_images)
    check_size("batch_size", batch_size)
    keep = _checked_keep(keep, num_images)
    device = dalle.head.weight.device
    completed = {"codes": codes, "known": known}  # of each caption, or what generate takes or refuses as it is
    of_each = [name for name, given in completed.items() if _dim(given) > (0 if name == "codes" else 2)]
    for name in of_each:
        if len(completed[name]) != len(captions):
            sizes = f"{len(completed[name])} and {len(captions)}"
            raise ValueError(f"{name} must be of as many images as there are captions, got {sizes}")
    text, lengths = tokenizer.encode(captions, dalle.config.text_len, truncate=truncate)
    options |= {"seed": generation.random_seed() if seed is None else seed, "progress": progress}
    pictures = _room(dvae.config, len(captions), num_images, keep, device)
    # Of no captions: refuses now what it would refuse of a later batch.
    dalle.generate(text[:0].to(device), num_images=num_images, **options, **({} if captions else completed))
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
        for kept, caption, of_caption in zip(pictures[part], captions[part], drawn, strict=True):
            images = _decoded(dvae, of_caption, batch_size)
            kept.copy_(images[:keep] if score is None else best_of(images, lambda x, of=caption: score(x, of), keep))
    return pictures


def _draw_codes(dalle, text, num_images, batch_size, **options):
    """Codes (P, N, h, w), at most batch_size of a caption at once."""
    parts = [
        dalle.generate(text, num_images=min(batch_size, num_images - first), first_image=first, **options)
        for first in range(0, num_images, batch_size)
    ]
    return torch.cat([part.unflatten(0, (len(text), -1)) for part in parts], 1)


def _decoded(dvae, codes, batch_size):
    """Images (N, C, H, W) of codes (N, h, w), at most batch_size at once."""
    try:
        images = [dvae.decode(some) for some in codes.split(batch_size)]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        at_once = min(batch_size, len(codes))
        advice = f"try batch_size={at_once // 2}" if at_once > 1 else "not even one fits"
        raise torch.OutOfMemoryError(
            f"decoding {at_once} images at once ran out of memory: {advice} ({error})"
        ) from error
    return torch.cat(images)


def _room(config, num_captions, num_images, keep, device):
    """Pictures (P, keep, C, H, W) to fill; or OutOfMemoryError where they, with the N of a caption, are not to be held.

    These are there twice while what `decode` returns in parts becomes one tensor.
    """
    shape = (config.channels, config.image_size, config.image_size)
    image, free = 4 * math.prod(shape), free_memory(device)
    needed = (num_captions * keep + 2 * num_images) * image
    if free is not None and needed > free:  # a CPU would begin to swap, or end the process, hours later
        fits = free // (image * (num_captions + 2))
        advice = f"num_images={fits} would fit" if fits else "pass fewer captions"
        what = f"{num_images} images of each of {num_captions} captions take {needed / 1e9:.3g} GB"
        raise torch.OutOfMemoryError(f"{what}, {free / 1e9:.3g} GB are free on {device}: {advice}")
    return torch.empty(num_captions, keep, *shape, dtype=torch.float32, device=device)


def best_of(images, score, keep=1):
    """The `keep` images with the highest scores, best first; of equal ones those that come first.

    Args:
        images: (N, ...), not changed. score: a callable of them that returns N numbers.

    Raises:
        ValueError: keep is not from 1 to N, or the scores are not N numbers. TypeError: they are no numbers at all.
    """
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
    return images[scores.argsort(descending=True, stable=True)[:keep].to(images.device)]


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
    from PIL import Image

    if columns is not None:
        check_size("columns", columns)
    if _dim(images) == 5:
        columns = images.shape[1] if columns is None else columns
        images = images.flatten(0, 1)
    if _dim(images) != 4 or len(images) == 0 or images.shape[1] not in (1, 3):
        got = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(f"images must have shape (N, C, H, W) with N > 0 and C 1 or 3, got {got}")
    N, C, H, W = images.shape
    columns = min(N, columns or int((N - 1) ** 0.5) + 1)
    rows = -(-N // columns)
    sheet = images.new_zeros(rows * columns, C, H, W)
    sheet[:N] = images
    sheet = sheet.view(rows, columns, C, H, W).permute(0, 3, 1, 4, 2).reshape(rows * H, columns * W, C)
    pixels = (sheet.float().clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, -1, 3)
    with written_whole(path) as unfinished:
        Image.fromarray(pixels.cpu().numpy()).save(unfinished)


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
