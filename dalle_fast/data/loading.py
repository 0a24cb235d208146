"""Batches of a source: a stream that is a pure function of (source, seed, batch number), so that it resumes anywhere.

All randomness comes from Philox counters made of (seed, epoch, index), never from a worker's or a global state.

B batch, S pixels of a side, N pictures of the source.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from dalle_fast.data.crops import caption_crop, centre_crop, random_crop
from dalle_fast.data.source import DataError, can_crop, check_count, check_example, generator

_SHUFFLE, _CROP = 3, 4  # uses of randomness


class Batch(NamedTuple):
    """images: (B, 3, S, S) uint8. captions: "" where there is none. indices: of the source."""

    images: torch.Tensor
    captions: list[str]
    indices: list[int]


def batches(
    source,
    batch_size: int,
    *,
    image_size: int,
    seed: int,
    start: int = 0,
    train: bool = True,
    crop: Callable[[np.ndarray, int, np.random.Generator], np.ndarray] = random_crop,
    flip: bool = False,
    num_workers: int = 0,
    part: Callable[[list], list] = list,
    keys: np.ndarray | None = None,
) -> Iterator[Batch]:
    """A stream of batches.

    In training it has no end: every epoch shows all pictures in an order of its own, a batch may reach into the next
    epoch, and of each picture a random square crop is taken. Otherwise it is one pass in order with centre crops, whose
    last batch may be smaller. Pictures of a source with `crop` False are taken whole.

    Args:
        source: a `Source`.
        batch_size: B.
        image_size: S.
        seed: of order, crops and flips.
        start: the number of the first batch; batch n of a stream from `start` is batch n of the stream from 0.
        crop: which crops training takes (Ramesh et al. 2021): `random_crop` for stage 1, `caption_crop` for stage 2. With
            the latter the first picture longer than 2 to 1 that comes is warned of.
        flip: mirror half of the pictures, in training. Captions stay as they are, so this is for stage 1.
        num_workers: processes that load; the stream does not depend on it.
        keys: (N, 2) integers, epoch and index of each picture to give, in this order, in one pass. None for all, in the
            order that training or its absence says.
        part: of a batch's pictures those that this process loads and gives, where several share every batch.

    Raises:
        DataError: too many bad pictures; see `open_source`.
        TypeError: the source gives something else than `Example`s: (height, width, 3) uint8 arrays with their captions.
        ValueError: an argument out of range; a picture smaller than the crop, or, where `crop` is False, of another
            size.
    """
    batch_size = check_count("batch_size", batch_size, minimum=1)
    image_size = check_count("image_size", image_size, minimum=1)
    seed, start = check_count("seed", seed, minimum=0), check_count("start", start, minimum=0)
    if len(source) == 0:
        raise ValueError(f"source {source.name} must have pictures, got none")
    if keys is not None:
        order = _cut(keys, batch_size, start)
    else:
        order = shuffled(len(source), batch_size, seed, start) if train else _in_order(len(source), batch_size, start)
    loader = torch.utils.data.DataLoader(
        _Loading(source, image_size, seed, train, crop, flip),
        batch_sampler=map(part, order),
        num_workers=num_workers,
        collate_fn=_collate,
        generator=torch.Generator(),  # which it draws its workers' seeds from: not from the global one
    )
    return _stream(source, loader)


def _stream(source, loader) -> Iterator[Batch]:
    note = getattr(source, "note", None)
    warned = False
    for batch, looked, long in loader:
        for entries in looked if note else ():
            note(entries)  # in this process: what a worker's copy of the source has seen is lost
        if long and not warned:
            warned = True
            warnings.warn(f"{source.name}: {long}", stacklevel=2)
        if isinstance(batch, DataError):
            raise batch
        yield batch


class _Loading(torch.utils.data.Dataset):
    """(epoch, index) -> (image (3, S, S), caption, index, which pictures were looked at for it, a warning or None).

    Instead of an image, None where too many pictures are bad, or the DataError of the source: what a worker raises comes
    out of its loader as text with the worker's traceback.
    """

    def __init__(self, source, image_size, seed, train, crop, flip):
        self.source, self.image_size, self.seed, self.train = source, image_size, seed, train
        self.crop, self.flip = crop, flip

    def __getitem__(self, key):
        epoch, index = key
        load = getattr(self.source, "load", None)  # without the bookkeeping of __getitem__
        try:
            example, looked = load(index) if load else (self.source[index], [])
        except DataError as error:
            return error, "", index, [], None
        if example is None:
            return None, "", index, looked, None
        image, caption = check_example(example, index)
        long = self._too_long(*image.shape[:2], looked[-1][0] if looked else index)
        image = self._crop(image, epoch, index)
        return np.ascontiguousarray(image.transpose(2, 0, 1)), caption, index, looked, long

    def _too_long(self, height, width, number):
        """A warning, where stage 2 takes its crop from a picture that the paper would discard."""
        ratio = max(height, width) / min(height, width)
        if not (self.train and self.crop is caption_crop and can_crop(self.source)) or ratio <= 2:
            return None
        names = getattr(self.source, "names", None)
        return (
            f"one side of {names[number] if names else f'picture {number}'} is {ratio:.3g} times the other: above 2 more "
            "than half is cropped away, and maybe what the caption names (the paper leaves such pictures out)"
        )

    def _crop(self, image, epoch, index):
        rng = generator(self.seed, _CROP, epoch, index)
        if can_crop(self.source):
            image = self.crop(image, self.image_size, rng) if self.train else centre_crop(image, self.image_size)
        elif image.shape[:2] != (self.image_size, self.image_size):
            height, width = image.shape[:2]
            has = f"a picture of {height} x {width}, where none is cropped"
            raise ValueError(
                f"image_size must be that of the source {self.source.name}, got {self.image_size} and {has}"
            )
        if self.train and self.flip and rng.random() < 0.5:
            image = image[:, ::-1]
        return image


def _collate(examples):
    images, captions, indices, looked, long = zip(*examples)
    long = next(filter(None, long), None)
    if none := [image for image in images if not isinstance(image, np.ndarray)]:
        return none[0], looked, long
    return Batch(torch.from_numpy(np.stack(images)), list(captions), list(indices)), looked, long


def shuffled(size: int, batch_size: int, seed: int, start: int) -> Iterator[list[tuple[int, int]]]:
    """(epoch, index) of every batch from `start` on, without end: the epochs' orders, one behind the other, cut into batches."""
    epoch, order = -1, None
    position = start * batch_size
    while True:
        batch = []
        for position in range(position, position + batch_size):  # noqa: B020
            if position // size != epoch:
                epoch = position // size
                order = epoch_order(size, seed, epoch)
            batch.append((epoch, int(order[position % size])))
        position += 1
        yield batch


def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch shows `size` pictures."""
    return generator(seed, _SHUFFLE, epoch).permutation(size)


def _cut(keys: np.ndarray, batch_size: int, start: int) -> Iterator[list[tuple[int, int]]]:
    for first in range(start * batch_size, len(keys), batch_size):
        yield [(epoch, index) for epoch, index in keys[first : first + batch_size].tolist()]


def _in_order(size: int, batch_size: int, start: int) -> Iterator[list[tuple[int, int]]]:
    for first in range(start * batch_size, size, batch_size):
        yield [(0, index) for index in range(first, min(first + batch_size, size))]
