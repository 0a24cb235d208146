"""What a source of captioned pictures is, and `open_source`, which opens one by its name or path."""

from __future__ import annotations

import hashlib
import operator
import os
import re
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from dalle_fast.integers import as_integer

SPLITS = ("train", "validation")
SOURCES = ("shapes", "emoji", "stamps")  # the built-in ones; every other spec is a path
MAX_BAD_SHARE = 0.05


class DataError(ValueError):
    """Data that cannot be used; the message names the file."""


class Example(NamedTuple):
    """One picture.

    image: (height, width, 3) uint8, RGB.
    caption: "" where there is none.
    """

    image: np.ndarray
    caption: str


@runtime_checkable
class Source(Protocol):
    """Pictures by index: `source[index]` is the same in every process and at every time; sources can be pickled.

    name: of the source, for messages.
    crop: whether crops of a picture are as good as the whole. False where the whole is drawn at `image_size` and its
        caption, or its meaning, would be lost; True where a source does not say.

    It may have `named_caption(index)`: a picture's name and caption, told without reading or drawing the picture. And
    `places`, an array of a number for each index: in the order of these files are read from front to back.
    """

    name: str
    crop: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def check_example(example, index: int) -> Example:
    """What `source[index]` gave, else TypeError."""
    if not (isinstance(example, tuple) and len(example) == 2):
        got = type(example).__name__
        raise TypeError(f"source must give (image, caption), as dalle_fast.data.Example, got {got} for number {index}")
    image, caption = example
    if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3):
        got = f"{image.dtype} of shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(f"source must give pictures as (height, width, 3) uint8 arrays, got {got} for number {index}")
    if not isinstance(caption, str):
        raise TypeError(f'source must give captions as text, "" for none, got {caption!r} for number {index}')
    return Example(image, caption)


def can_crop(source) -> bool:
    """Whether crops of its pictures are as good as the whole; see `Source`."""
    return getattr(source, "crop", True)


PROBED = 16  # pictures at least, where there are more


def identity(source) -> str:
    """What tells this data from other data, wherever it lies: its name without folders, how many pictures, and a hash.

    Of "." and ".." the name is the folder's.

    The hash is of 16 to 31 pictures, evenly spread, with their captions: of files the bytes, whoever decodes them, and
    else the pixels. Of files it is of all names and sizes too, in all splits. Other changes are not noticed.
    """
    digest = hashlib.sha256()
    probed = range(0, len(source), max(1, len(source) // PROBED))
    if of_files := getattr(source, "evidence", None):
        for part in of_files(probed):
            digest.update(part)
    else:
        for index in probed:
            image, caption = check_example(source[index], index)
            digest.update(f"{image.shape} {caption}".encode())
            digest.update(image.tobytes())
    name = os.path.basename(os.path.normpath(source.name))
    if name in (".", "..") and source.name:
        name = os.path.basename(os.path.abspath(source.name))
    return f"{name}, {len(source)} pictures, {'files ' * bool(of_files)}{digest.hexdigest()[:16]}"


def open_source(
    spec: str | os.PathLike,
    *,
    image_size: int,
    split: str = "train",
    seed: int = 0,
    captions: bool = True,
    require_captions: bool = False,
    max_bad_share: float = MAX_BAD_SHARE,
) -> Source:
    """Open a source of pictures.

    Args:
        spec: "shapes" (drawn scenes whose caption can be read back), "emoji", "stamps", an image folder with optional
            captions (of a.jpg in a.txt or a.jpg.txt, one a file, whatever its lines), a .tar file or several
            ("x-{000..003}.tar"), or a folder of them, which must have no pictures. A folder that is called like a
            built-in source is reached as "./shapes".
        image_size: pixels of a side that it will be used at. Drawn pictures have it; files must not be smaller.
        split: "train" or "validation", which share no picture, by the picture's name and so the same for every seed;
            "shapes" has "heldout" too, combinations of attributes that the other two never show.
        seed: of what is drawn at random.
        captions: whether those of files are read. Where not, they are "", as for stage 1, which needs none.
        require_captions: leave out a picture without a caption, and count one whose caption cannot be read (empty or
            not UTF-8) as a bad one. Where they are not required, the caption of either is "".
        max_bad_share: the share of bad pictures (broken, too large, too small), which are replaced by others, above
            which they are an error; `dalle_fast.data.images.Pictures` says of how many.

    Raises:
        DataError: nothing there, or nothing that can be read; the message names the file.
        ImportError: a library for this source is not installed.
        ValueError: an argument out of range.
    """
    spec = os.fspath(spec)
    image_size = check_count("image_size", image_size, minimum=1)
    seed = check_count("seed", seed, minimum=0)
    splits = (*SPLITS, "heldout") if spec == "shapes" else SPLITS
    if split not in splits:
        raise ValueError(f"split of {spec!r} must be one of {', '.join(splits)}, got {split!r}")
    if require_captions and not captions:
        raise ValueError("captions must be True where require_captions is, got False")
    if not 0 <= max_bad_share <= 1:
        raise ValueError(f"max_bad_share must be from 0 to 1, got {max_bad_share}")
    if spec == "shapes":
        from dalle_fast.data.shapes import Shapes

        return Shapes(image_size, split=split, seed=seed)
    if spec == "emoji":
        from dalle_fast.data.emoji import Emoji

        return Emoji(image_size, split=split)
    if spec == "stamps":
        from dalle_fast.data.stamps import Stamps

        return Stamps(image_size, split=split, max_bad_share=max_bad_share)
    if re.search(r"[*?]", spec) and not os.path.exists(spec):
        raise DataError(
            f"{spec}: * and ? have no meaning here: name the folder, or count with braces: x-{{000..010}}.tar"
        )
    if _is_tar(spec):
        from dalle_fast.data.tar import Tar as Files
    elif os.path.isdir(spec):
        from dalle_fast.data.folder import Folder as Files
    else:
        raise DataError(
            f"{spec}: no such folder or tar file, nor one of the sources {', '.join(SOURCES)}"
            if not os.path.exists(spec)
            else f"{spec}: neither a folder nor a .tar file"
        )
    options = {"captions": captions, "require_captions": require_captions, "max_bad_share": max_bad_share}
    return Files(spec, image_size, split=split, **options)


def _is_tar(spec: str) -> bool:
    """Whether it names tar files, also compressed ones, which are refused later, or a folder of them.

    Raises:
        DataError: a folder cannot be read, or has pictures beside its tar files: which of them are meant?
    """
    if os.path.isdir(spec):
        from dalle_fast.data.folder import list_pictures
        from dalle_fast.data.tar import shards_in

        shards = shards_in(spec)
        if shards and (pictures := list_pictures(spec)[0]):
            raise DataError(
                f"{spec}: has {len(shards)} tar files (the first is {os.path.basename(shards[0])}) and {len(pictures)} "
                f"pictures (the first is {pictures[0]}): name the tar files themselves, or move them or the pictures away"
            )
        return bool(shards)
    return ".tar" in os.path.basename(spec) or spec.endswith(".tgz")


def generator(seed: int, use: int, *counters: int) -> np.random.Generator:
    """Random numbers that are a pure function of the arguments: up to two counters under a seed.

    Args:
        use: a number for each use of randomness, so that no two share their numbers.
    """
    counter = [0, *counters, *[0] * (2 - len(counters)), use]  # the first word counts what is drawn
    words = np.array(counter, np.uint64)
    return np.random.Generator(np.random.Philox(counter=words, key=np.array([seed, 0], np.uint64)))


def check_count(name: str, value, *, minimum: int) -> int:
    """`value` as an integer of at least `minimum` and below 2^64, else TypeError or ValueError naming `name`."""
    value = as_integer(name, value, least=minimum)
    if value >= 2**64:
        raise ValueError(f"{name} must be below 2^64, got {value}")
    return value


def check_index(index, size: int) -> int:
    """`index` as a non-negative integer below `size`, counted from the end if negative; else IndexError."""
    index = operator.index(index)
    if not -size <= index < size:
        raise IndexError(f"index must be below {size}, the number of pictures, got {index}")
    return index % size
