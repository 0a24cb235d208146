"""Emoji as captioned pictures: the single-character glyphs of Noto Color Emoji, named by Unicode.

Every Linux distribution has the font. Which characters have a name depends on the Unicode version of Python
(`unicodedata.unidata_version`), so that a newer Python may know a few more.
"""

from __future__ import annotations

import functools
import os
import unicodedata

import numpy as np

from dalle_fast.data.images import fit, in_split
from dalle_fast.data.source import DataError, Example, check_index

FONTS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",  # Debian, Ubuntu
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",  # Fedora
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",  # older Fedora
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",  # Arch
    "/usr/share/fonts/truetype/NotoColorEmoji.ttf",  # openSUSE
    "~/.local/share/fonts/NotoColorEmoji.ttf",
    "~/.fonts/NotoColorEmoji.ttf",
)
FONT_SIZE = 109  # the only one that the font's bitmaps have; they are GLYPH (width, height) pixels large
GLYPH = (136, 128)
_RANGES = (range(0xA0, 0x3300), range(0x1F000, 0x1FC00))
_CATEGORIES = ("So", "Sm", "Po")  # symbols and punctuation: no digits, modifiers or parts of other emoji


class Emoji:
    """The source "emoji": whole glyphs on white, at `image_size`. See `open_source`.

    Raises:
        DataError: the font is not installed or is another one, or `image_size` is larger than its pictures.
        ImportError: Pillow is not installed.
    """

    name = "emoji"
    crop = False
    replaced = 0

    def __init__(self, image_size: int, *, split: str = "train"):
        if image_size > GLYPH[1]:
            raise DataError(f"emoji: image_size must be at most {GLYPH[1]}, the size of the glyphs, got {image_size}")
        self.image_size, self.font = image_size, find_font()
        characters = list_emoji(self.font)
        self.characters = [characters[x] for x in in_split(characters, split, self.name, grows=False)]

    def __len__(self) -> int:
        return len(self.characters)

    def __getitem__(self, index: int) -> Example:
        character = self.characters[check_index(index, len(self))]
        return Example(fit(draw_emoji(self.font, character), self.image_size), self.named_caption(index)[1])

    def named_caption(self, index: int) -> tuple[str, str]:
        character = self.characters[check_index(index, len(self))]
        return character, unicodedata.name(character).lower()


def find_font() -> str:
    """The path of the font: the environment variable DALLE_FAST_EMOJI_FONT, else where distributions install it.

    Raises:
        DataError: there is none.
    """
    chosen = os.environ.get("DALLE_FAST_EMOJI_FONT")
    for path in [chosen] if chosen else map(os.path.expanduser, FONTS):
        if os.path.isfile(path):
            return path
    where = f"at DALLE_FAST_EMOJI_FONT={chosen}" if chosen else "in the usual places"
    raise DataError(
        f"emoji: the font NotoColorEmoji.ttf is not {where}: install it (Debian, Ubuntu: fonts-noto-color-emoji; "
        "Fedora: google-noto-color-emoji-fonts; Arch: noto-fonts-emoji) or set DALLE_FAST_EMOJI_FONT to its path"
    )


@functools.cache
def list_emoji(path: str) -> tuple[str, ...]:
    """The characters that the font draws and Unicode names.

    Raises:
        DataError: it is no font, none of coloured bitmaps, or draws none of them.
    """
    font = _font(path)
    found = []
    for code in (code for codes in _RANGES for code in codes):
        character = chr(code)
        if unicodedata.category(character) not in _CATEGORIES:
            continue
        if unicodedata.name(character).startswith("REGIONAL INDICATOR"):  # letters, halves of flags
            continue
        _, top, _, bottom = font.getbbox(character)
        if bottom > top:  # what it lacks is empty
            found.append(character)
    if not found:
        raise DataError(f"{path}: draws no emoji")
    return tuple(found)


def draw_emoji(path: str, character: str) -> np.ndarray:
    """A character in colours on white, (128, 136, 3) uint8."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", GLYPH, "white")
    ImageDraw.Draw(image).text((0, 0), character, font=_font(path), embedded_color=True)
    return np.asarray(image)


@functools.cache
def _font(path: str):
    from PIL import ImageFont

    try:
        return ImageFont.truetype(path, FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise DataError(f"{path}: not a font with bitmaps of {FONT_SIZE} pixels: {error}") from error
