"""Pictures in a folder and the folders below it, each with a caption beside it, if any: a.txt or a.jpg.txt of a.jpg.

The lines of a caption file make one caption. Where captions are not required one that cannot be read is "".
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from dalle_fast.data.images import (
    ENDINGS,
    BadImage,
    Pictures,
    count_passed_over,
    decode,
    is_picture,
    read_caption_text,
    read_file,
)
from dalle_fast.data.source import DataError, Example


class Files(Pictures):
    """Base of the sources of files. A subclass has `files(number)`, of a picture and of its caption, if any, and `size`
    and `data` of such a file.

    Args:
        image_size, require_captions: as of `open_source`. captioned: whether each picture has a caption.
        passed_over, others: as of `Pictures`.
    """

    def __init__(
        self,
        name: str,
        names: Sequence[str],
        image_size: int,
        *,
        captioned: Iterable[bool],
        require_captions: bool,
        passed_over: dict[str, int],
        **others,
    ):
        self.image_size, self.require_captions = image_size, require_captions
        without = frozenset(number for number, has_one in enumerate(captioned) if require_captions and not has_one)
        if not require_captions:
            passed_over = {ending: count for ending, count in passed_over.items() if ending != ".txt"}
        super().__init__(name, names, passed_over=passed_over, without_caption=without, **others)

    def read(self, number: int) -> Example:
        caption = self.read_caption(number)
        return usable(self.data(self.files(number)[0]), caption, self.image_size, self.require_captions)

    def read_caption(self, number: int) -> str:
        _, *captions = self.files(number)
        try:
            return self.caption(captions[0]) if captions else ""
        except BadImage:
            if self.require_captions:
                raise
            return ""

    def caption(self, file) -> str:
        """The text of a caption's file; see `read_caption_text`."""
        return read_caption_text(self.data(file))

    def evidence(self, indices) -> Iterator[bytes]:
        """For `identity`: a hash of names and sizes of all files in splits; the bytes of those of `indices`."""
        yield self._names_and_sizes
        for index in indices:
            for file in self.files(self._numbers[index]):
                yield _or_none(self.data, file) or b""

    @functools.cached_property  # asked for several times, and of many files it takes minutes
    def _names_and_sizes(self) -> bytes:
        digest = hashlib.sha256()
        for number, name in enumerate(self.names):
            if number not in self.without_caption:
                files = [(file, _or_none(self.size, file)) for file in self.files(number)]
                digest.update(f"{name!r} {files}\n".encode())
        return digest.digest()


def _or_none(look, file):
    try:
        return look(file)
    except (OSError, BadImage):
        return None


class Folder(Files):
    """The source of a folder path. See `open_source`; pictures with less than `image_size` pixels a side are bad ones.

    Raises:
        DataError: the folder cannot be read or has no pictures, or no captions where they are required.
    """

    def __init__(
        self, path: str, image_size: int, *, split: str, captions: bool, require_captions: bool, max_bad_share: float
    ):
        self.path = path
        names, captioned, passed_over = list_pictures(path)
        if not names:
            others = f"; {count_passed_over(passed_over)}" if passed_over else ""
            raise DataError(f"{path}: no pictures in it; looked for {', '.join(ENDINGS)}{others}{_about_tars(path)}")
        if require_captions and not captioned:
            raise DataError(
                f"{path}: none of its {len(names)} pictures has a caption: of a.jpg it is a.txt or a.jpg.txt"
            )
        self._captioned = captioned if captions else {}
        options = {"split": split, "require_captions": require_captions, "max_bad_share": max_bad_share}
        has_one = (name in captioned for name in names)
        super().__init__(path, names, image_size, captioned=has_one, passed_over=passed_over, **options)

    def files(self, number: int) -> list[str]:
        name = self.names[number]
        return [name, self._captioned[name]] if name in self._captioned else [name]

    def size(self, file: str) -> int:
        return os.stat(os.path.join(self.path, file)).st_size

    def data(self, file: str) -> bytes:
        return read_file(os.path.join(self.path, file))


def _about_tars(path: str) -> str:
    """How the tar files below a folder would have to lie, if there are any."""
    tars = (
        os.path.relpath(os.path.join(folder, name), path)
        for folder, _, names in os.walk(path)
        for name in sorted(names)
        if re.search(r"\.tar(\.\w+)?$|\.tgz$", name) and not name.startswith(".")
    )
    first = next(tars, None)
    return f"; {first} is not read: .tar files must lie directly in the folder, uncompressed" if first else ""


def usable(data: bytes, caption: str, image_size: int, require_captions: bool) -> Example:
    """The example of an image file, if it is good enough.

    Raises:
        BadImage: it cannot be decoded, is smaller than `image_size`, or lacks a required caption.
    """
    if require_captions and not caption:
        raise BadImage("it has no caption")
    image = decode(data, draft=3 * image_size)
    height, width = image.shape[:2]
    if min(height, width) < image_size:
        raise BadImage(f"{width} x {height} pixels, smaller than the crop of {image_size}")
    return Example(image, caption)


class Listing(NamedTuple):
    """names: of the pictures, sorted. captions: of those with one the caption's file. passed_over: see `Pictures`."""

    names: list[str]
    captions: dict[str, str]
    passed_over: dict[str, int]


def list_pictures(path: str) -> Listing:
    """The pictures below a folder, whose names are relative to it.

    What is hidden is not looked at; see `is_hidden`. Links to folders are followed, into each folder once.

    Raises:
        DataError: a folder cannot be read; a picture has two caption files.
    """
    pictures, texts, passed_over, seen = [], {}, {}, {os.path.realpath(path)}
    for folder, folders, files in os.walk(path, onerror=_refuse, followlinks=True):
        folders[:] = [name for name in sorted(folders) if not is_hidden(name) and _is_new(folder, name, seen)]
        for file in files:
            if is_hidden(file):
                continue
            name = os.path.relpath(os.path.join(folder, file), path)
            stem, ending = os.path.splitext(name)
            if is_picture(name, passed_over):
                pictures.append(name)
            elif ending.lower() == ".txt" and texts.setdefault(stem, name) != name:
                one, other = sorted((texts[stem], name))
                raise DataError(f"{path}: which is the caption of {stem}, {one} or {other}?")
    captions, alone = {}, {*texts.values()}
    for name in sorted(pictures):
        found = [texts[stem] for stem in (os.path.splitext(name)[0], name) if stem in texts]
        if len(found) > 1:
            raise DataError(f"{path}: which is the caption of {name}, {found[0]} or {found[1]}?")
        if found:
            captions[name] = found[0]
            alone.discard(found[0])
    if alone:
        passed_over[".txt"] = len(alone)
    return Listing(sorted(pictures), captions, passed_over)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is not looked at: it begins with a dot, or holds the previews that a Synology makes."""
    return name == "@eaDir" or (name.startswith(".") and name not in (os.curdir, os.pardir))


def reads_below(path: str, folder: str) -> bool:
    """Whether pictures that come into `folder`, there or not, are among those below `path`; see `list_pictures`."""
    for place in (os.path.abspath, os.path.realpath):  # a link is followed, and what it leads to may be named itself
        below = os.path.relpath(place(folder), place(path))
        names = below.split(os.sep) if below != os.curdir else []
        if not any(is_hidden(name) or name == os.pardir for name in names):  # or outside
            return True
    return False


def _is_new(folder, name, seen):
    place = os.path.realpath(os.path.join(folder, name))
    if place in seen:
        return False
    seen.add(place)
    return True


def _refuse(error: OSError):
    raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error
