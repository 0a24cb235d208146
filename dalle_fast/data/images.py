"""Pictures from files: decoding within limits, and sources that replace the pictures that cannot be decoded."""

from __future__ import annotations

import hashlib
import io
import os
import re
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import features

from dalle_fast.data.source import DataError, Example, check_index
from dalle_fast.progress import tell

# Endings that are taken for pictures, and the decoders that may be used whatever the ending: no others, as some of
# Pillow's start other programs. (That of AVIF, which not every Pillow has, does not.)
AVIF = "avif" in features.get_supported_modules()
ENDINGS = (".png", ".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
if AVIF:
    ENDINGS, FORMATS = (*ENDINGS, ".avif"), (*FORMATS, "AVIF")
# Endings of pictures that are not taken; that there were some is told.
OTHERS = (
    ".apng", ".arw", ".avif", ".cr2", ".cr3", ".dng", ".eps", ".exr", ".heic", ".heif", ".hif", ".ico", ".j2k", ".jp2",
    ".jpx", ".jxl", ".nef", ".orf", ".pbm", ".pcx", ".pgm", ".pnm", ".ppm", ".psd", ".qoi", ".raf", ".rw2", ".svg",
    ".svgz", ".tga", ".xcf",
)  # fmt: skip
MAX_PIXELS = 2**26
MAX_BYTES = 2**28
STRIP_PIXELS = 2**20  # of a picture that are converted at once
VALIDATION_SHARE, MOST_WITHHELD = 0.05, 2000  # see `in_split`
# When bad pictures are too many: of these pictures, and what chance may add; see `Pictures._too_many`.
FEW, MANY, SIGMAS = 20, 400, 4


def is_picture(name: str, passed_over: dict[str, int]) -> bool:
    """Whether a file's ending is one of ENDINGS; one of OTHERS alone is counted in `passed_over`, by ending."""
    ending = os.path.splitext(name)[1].lower()
    if ending not in ENDINGS and ending in OTHERS:
        passed_over[ending] = passed_over.get(ending, 0) + 1
    return ending in ENDINGS


class BadImage(Exception):
    """One picture that cannot be used; its message is the reason."""


def decode(data: bytes, *, draft: int | None = None) -> np.ndarray:
    """The picture in a file, as its EXIF orientation says, on white where it is transparent.

    Colour profiles are not applied, as by the loaders of torchvision and of Hugging Face's datasets.

    Args:
        data: the file.
        draft: a picture of at least so many pixels a side is enough: large JPEGs are decoded at a fraction.

    Returns:
        (height, width, 3) uint8, RGB.

    Raises:
        BadImage: not a picture, truncated, of more than MAX_PIXELS pixels even as `draft` has it, or a TIFF of 32 bits a
            sample.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, on sizes and tags: what matters is raised here
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if draft is not None:
                    image.draft(image.mode, (draft, draft))
                # A progressive JPEG is in memory whole, in 2 bytes a sample, before any fraction is made of it.
                held = (width, height) if image.info.get("progressive") else image.size
                if held[0] * held[1] > MAX_PIXELS:
                    raise BadImage(f"{width} x {height} pixels, more than {MAX_PIXELS}")
                if image.format == "TIFF" and image.mode in ("I", "F"):
                    raise BadImage("32 bits of gray, of which it is not known what is white")
                image.load()
                ImageOps.exif_transpose(image, in_place=True)  # else a picture that is not turned is copied
                return _rgb(image)
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BadImage(f"not a picture of {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:  # of sizes far above ours
        raise BadImage(f"more than {MAX_PIXELS} pixels: {error}") from error
    except Exception as error:  # a broken file makes decoders raise whatever they happen to
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _rgb(image) -> np.ndarray:
    """In strips: of what lies between the decoded picture and the result there is never a whole picture."""
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = -(-STRIP_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        pixels[top:bottom] = _strip_to_rgb(image.crop((0, top, width, bottom)))
    return pixels


def _strip_to_rgb(image) -> np.ndarray:
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits of gray, which Pillow would clip to 8
        gray, transparent = np.asarray(image), image.info.get("transparency")
        image = Image.fromarray((gray >> 8).clip(0, 255).astype(np.uint8))
        if isinstance(transparent, int):
            image.paste(255, mask=Image.fromarray(gray == transparent))
    if image.has_transparency_data:
        image = on_white(image)
    return np.asarray(image.convert("RGB"))


def on_white(image):
    """A Pillow image with transparency, in RGB on white."""
    from PIL import Image

    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def fit(image: np.ndarray, size: int) -> np.ndarray:
    """A whole picture scaled to a square of `size` pixels a side, with white beside what is not square."""
    from PIL import Image, ImageOps

    whole = ImageOps.pad(Image.fromarray(image), (size, size), Image.Resampling.LANCZOS, color="white")
    return np.asarray(whole)


def read_file(path) -> bytes:
    """The bytes of a file.

    Raises:
        BadImage: it cannot be read, or has more than MAX_BYTES.
    """
    if not os.path.isfile(path):  # a pipe would be waited for
        raise BadImage("not a file")
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise BadImage(error.strerror or str(error)) from error
    if len(data) > MAX_BYTES:
        raise BadImage(f"more than {MAX_BYTES} bytes")
    return data


def read_caption_text(data: bytes) -> str:
    """A caption file's text: its lines but for empty ones, the white space in them made single spaces.

    Raises:
        BadImage: it is not UTF-8.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadImage(f"its caption is not UTF-8: {error}") from error
    lines = (" ".join(line.split()) for line in re.split(r"[\r\n]+", text))
    return "\n".join(line for line in lines if line)


def _one_line(caption: str) -> str:
    return " ".join(caption.splitlines())


def in_split(names: Sequence[str], split: str, source: str, *, grows: bool = True) -> np.ndarray:
    """Which of the pictures belong to a split, in a shuffled order: that of the hashes of their names.

    For validation are those whose hash is below a threshold, one of twenty. So where a picture belongs does not depend
    on the others, but for two things: each split has a picture, where there are two; and for so many pictures that more
    than MOST_WITHHELD would be withheld the threshold is halved, or halved again. As pictures are added some of
    validation are trained on then; never is one that was trained on withheld. (But for the smallest sets: of one
    picture, or of such that all lie below the threshold.)

    Args:
        grows: whether pictures may be added. Where not, the first twentieth is for validation, by number.

    Raises:
        DataError: no pictures, or only one where a second is needed.
    """
    digests = b"".join(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in names)
    digests = np.frombuffer(digests, "S32")
    order = np.argsort(digests, kind="stable")
    count = round(VALIDATION_SHARE * len(names))
    if grows:
        share = VALIDATION_SHARE
        while share * len(names) > MOST_WITHHELD:
            share /= 2
        threshold = int(share * 2**64).to_bytes(8, "big")
        count = int((digests < threshold).sum())
    count = min(max(1, count), len(names) - 1)
    chosen = order[:count] if split == "validation" else order[count:]
    if not len(chosen):
        raise DataError(f"{source}: has no pictures for the split {split!r}, of {len(names)} in all")
    return chosen


class Look(NamedTuple):
    """What was seen of picture `number`: why it is bad, or None; how many lines its caption had."""

    number: int
    bad: str | None
    lines: int = 0


class Pictures:
    """Base of the sources whose pictures may be bad. A subclass has `names` and `read(number) -> Example`.

    A bad picture is replaced by the next one that is good, so every index has a picture and always the same one. Bad
    ones are counted, once each; when they are more than the allowed share of all pictures, or more than chance explains
    of that share among those looked at, that is an error.

    Args:
        name: of the source.
        names: of its pictures, for messages and for the split.
        split, max_bad_share: as of `open_source`.
        passed_over: ending -> how many files of pictures in other formats lie among them, and of captions (".txt")
            those that belong to no picture, where captions are required.
        without_caption: the numbers of those that lack a caption which is required: they are in no split. Which split
            the others are in does not depend on them.

    Attributes:
        bad: number -> reason, of the bad pictures that were met.
        replaced: how many these are.
        several_lines: number -> how many lines make its caption, of the captions of several that were met. (Other
            packages take each line for a caption of its own.)
        passed_over, without_caption: as above.
        total: how many pictures there are, of all splits.
    """

    crop = True
    grows = True  # see `in_split`

    def __init__(
        self,
        name: str,
        names: Sequence[str],
        *,
        split: str,
        max_bad_share: float,
        passed_over: dict[str, int] | None = None,
        without_caption: frozenset[int] = frozenset(),
    ):
        self.name, self.names, self.max_bad_share = name, names, max_bad_share
        self.passed_over, self.without_caption = passed_over or {}, without_caption
        self.total = len(names) - len(without_caption)
        self._numbers = np.asarray(in_split(names, split, name, grows=self.grows))
        if without_caption:
            self._numbers = self._numbers[~np.isin(self._numbers, np.fromiter(without_caption, np.int64))]
        if not len(self._numbers):
            captioned = f"{self.total} of {len(names)} pictures have one"
            raise DataError(f"{name}: no picture of the split {split!r} has a caption; {captioned}")
        self._looked, self._seen = np.zeros(len(names), bool), 0
        self.bad: dict[int, str] = {}
        self.several_lines: dict[int, int] = {}

    def read(self, number: int) -> Example:
        """Picture `number` of all splits, with its caption as `read_caption_text` has it.

        Raises:
            BadImage: it cannot be used.
        """
        raise NotImplementedError

    def read_caption(self, number: int) -> str:
        """The caption of picture `number` of all splits, without the picture.

        Raises:
            BadImage: it makes the picture a bad one.
        """
        raise NotImplementedError

    def named_caption(self, index: int) -> tuple[str, str]:
        """A picture's name and caption, "" where that makes it a bad one. The picture is not looked at: it may be one."""
        number = int(self._numbers[check_index(index, len(self))])
        try:
            return self.names[number], _one_line(self.read_caption(number))
        except BadImage:
            return self.names[number], ""

    @property
    def places(self) -> np.ndarray:
        """See `Source`: names come in the order in which files lie, and indices in that of their hashes."""
        return self._numbers

    @property
    def replaced(self) -> int:
        return len(self.bad)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Example:
        example, looked = self.load(index)
        self.note(looked)
        return example

    def load(self, index: int) -> tuple[Example | None, list[Look]]:
        """The picture, and what was looked at for it. Changes nothing.

        None where too many in a row are bad: `note` then raises, as it knows of all that were looked at.
        """
        index = check_index(index, len(self))
        looked = []
        for step in range(len(self)):
            number = int(self._numbers[(index + step) % len(self)])
            try:
                example = self.read(number)
            except BadImage as error:
                looked.append(Look(number, str(error)))
                if self._too_many(len(looked), len(looked)):
                    break
                continue
            lines = len(example.caption.splitlines())
            return example._replace(caption=_one_line(example.caption)), [*looked, Look(number, None, lines)]
        return None, looked

    def note(self, looked: list[Look]) -> None:
        """Count what `load` looked at for one picture.

        Raises:
            DataError: now there are more bad pictures than allowed, or none of these is good.
        """
        for number, reason, lines in looked:
            self._seen += not self._looked[number]  # a sum over a million takes 3 ms
            self._looked[number] = True
            if reason is not None:
                self.bad[number] = reason
            if lines > 1:
                self.several_lines[number] = lines
        bad = len(self.bad)
        if self._too_many(bad, self._seen):
            self._complain(f"{bad} of {self._seen} pictures looked at", *next(iter(self.bad.items())))
        if looked and looked[-1].bad is not None:
            count = len(looked)
            row = f"all {count} pictures of the split" if count == len(self) else f"{count} pictures in a row"
            self._complain(row, looked[0].number, looked[0].bad)

    def _too_many(self, bad, seen):
        """Whether the share is exceeded for certain, whatever the others are, or by more than chance.

        Asked after every picture, so that without SIGMAS a share just below the allowed one would be refused some time.
        """
        expected = self.max_bad_share * max(seen, MANY)
        likely = expected + SIGMAS * expected**0.5
        return bad > min(self.max_bad_share * max(self.total, FEW), likely)

    def _complain(self, what, number, reason):
        raise DataError(
            f"{self.name}: {what} are bad, of {self.total} in all, and max_bad_share is {self.max_bad_share}; "
            f"the first is {self.names[number]}: {reason}"
        )


def left_out(source) -> list[str]:
    """What of a source's files, of all its splits, is not among its pictures: a line for each reason."""
    lines = []
    if counts := getattr(source, "passed_over", None):
        lines.append(f"{source.name}: {count_passed_over(counts)}")
    if without := len(getattr(source, "without_caption", ())):
        lines.append(f"{source.name}: {without} of {len(source.names)} pictures have no caption and are left out")
    return lines


def count_passed_over(counts: dict[str, int]) -> str:
    by_ending = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    counted = (f"{count} {ending}{' without a picture' * (ending == '.txt')}" for ending, count in by_ending)
    return f"files that are not taken: {', '.join(counted)}"


def tell_of_bad(*sources) -> None:
    """A line on stderr, where bad pictures were replaced: how many of these splits of a source, and the first one; and
    one where captions had several lines."""
    if bad := _of_all(sources, "bad"):
        source, number, reason = bad[0]
        count = f"{len(bad)} of {source.total} pictures are bad, and others were taken instead"
        first = f"the first is {source.names[number]}: {reason}"
        tell(f"{source.name}: {count}; {first}")
    if several := _of_all(sources, "several_lines"):
        source, number, lines = several[0]
        count = f"captions of several lines, each taken for one caption: {len(several)}"
        first = (
            f"the first is that of {source.names[number]}, {lines} lines; if each is a caption, keep one in the file"
        )
        tell(f"{source.name}: {count}; {first}")


def _of_all(sources, name):
    return [(source, *item) for source in sources for item in getattr(source, name, {}).items()]
