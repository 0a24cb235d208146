"""Grids of pictures, to look at."""

from __future__ import annotations

import numpy as np

GAP, SMALLEST = 2, 96  # pixels between pictures; smaller pictures are enlarged to about this


def picture_grid(rows) -> np.ndarray:
    """Rows of pictures below each other, on white; small pictures are enlarged by whole factors.

    Args:
        rows: arrays (n, S, S, 3) uint8 of one S.

    Returns:
        (height, width, 3) uint8.
    """
    rows = [np.asarray(row) for row in rows]
    factor = max(1, SMALLEST // rows[0].shape[1])
    rows = [row.repeat(factor, 1).repeat(factor, 2) for row in rows]
    size, columns = rows[0].shape[1], max(len(row) for row in rows)
    cell = size + GAP
    grid = np.full((len(rows) * cell + GAP, columns * cell + GAP, 3), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            top, left = GAP + y * cell, GAP + x * cell
            grid[top : top + size, left : left + size] = picture
    return grid
