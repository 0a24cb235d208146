"""Pictures side by side on a sheet, and pictures as files."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dalle_fast.outputs import written_whole

GAP, SMALLEST = 2, 96  # pixels between pictures; smaller pictures are enlarged to about this


class Layout(NamedTuple):
    """Where pictures of one size lie on a sheet: in rows and columns, with `gap` pixels between and around them."""

    rows: int
    columns: int
    height: int
    width: int
    gap: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the sheet."""
        return self.corner(self.rows, self.columns)

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """Top and left of a picture."""
        return self.gap + row * (self.height + self.gap), self.gap + column * (self.width + self.gap)


def grid_layout(rows: int, columns: int, size: int) -> Layout:
    """That of `picture_grid`, of pictures of `size` pixels a side."""
    size *= max(1, SMALLEST // size)
    return Layout(rows, columns, size, size, GAP)


def picture_grid(rows) -> np.ndarray:
    """Rows of pictures below each other, on white; small pictures are enlarged by whole factors.

    Args:
        rows: arrays (n, S, S, 3) uint8 of one S.

    Returns:
        (height, width, 3) uint8.
    """
    rows = [np.asarray(row) for row in rows]
    layout = grid_layout(len(rows), max(len(row) for row in rows), rows[0].shape[1])
    factor = layout.width // rows[0].shape[1]
    return sheet([row.repeat(factor, 1).repeat(factor, 2) for row in rows], layout, background=255)


def to_uint8(images) -> np.ndarray:
    """(B, C, H, W) float pixels from 0 to 1 as (B, H, W, 3) uint8; C is 3, or 1 of shades of grey."""
    return (images * 255).round().clamp(0, 255).byte().expand(-1, 3, -1, -1).movedim(1, -1).cpu().numpy()


def sheet(rows, layout: Layout, *, background: int) -> np.ndarray:
    """Rows of pictures (n, H, W, 3) uint8 at their places; what is left is a shade of grey."""
    pixels = np.full((*layout.size, 3), background, np.uint8)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            top, left = layout.corner(y, x)
            pixels[top : top + layout.height, left : left + layout.width] = picture
    return pixels


def save_picture(picture: np.ndarray, path, about: dict[str, str] | None = None) -> None:
    """Write (H, W, 3) uint8 to a file, whole or not at all, in a format that Pillow knows from the path.

    Args:
        about: keyword -> text, kept in a PNG file; others have no place for them.

    Raises:
        OSError, ValueError: it cannot be written.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for keyword, text in (about or {}).items():
        info.add_text(keyword, text)
    with written_whole(path) as unfinished:
        Image.fromarray(picture).save(unfinished, pnginfo=info)
