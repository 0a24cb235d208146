"""Square crops of pictures: at random for either stage of training, and in the middle (Ramesh et al. 2021, appendix A).

A full square is a square as large as the picture allows; it is made smaller by averaging areas, never larger.

S pixels of a side of a crop.
"""

from __future__ import annotations

import numpy as np

SHORTEST, LONGEST = 9 / 8, 12 / 8  # sides of resized squares, in units of the crop's


def random_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """For stage 1 (Listing 1 of the paper): any full square, resized to between 9/8 and 12/8 of S a side; a crop in it.

    A square with less than that keeps its size.

    Args:
        image: (height, width, 3) uint8. size: S.

    Returns:
        (S, S, 3) uint8.

    Raises:
        ValueError: the image is smaller than the crop.
    """
    side = _side(image, size)
    corner = [int(rng.integers(0, length - side + 1)) for length in image.shape[:2]]
    least, most = (min(side, round(share * size)) for share in (SHORTEST, LONGEST))
    resized = int(rng.integers(least, most + 1))
    return _resized(image, corner, resized, _place(resized, size, rng), size)


def caption_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """For stage 2 (Listing 2), so that what the caption names stays in it: a full square near the middle, resized to
    between S and 9/8 of S a side; a crop in it. Arguments and result as of `random_crop`.

    The square lies within the middle quarter of the places that it could have. Of a picture longer than 2 to 1 more
    than half is lost all the same.
    """
    side = _side(image, size)
    starts = [(3 * (length - side) // 8, 5 * (length - side) // 8) for length in image.shape[:2]]
    corner = [int(rng.integers(first, max(first + 1, end))) for first, end in starts]
    resized = int(rng.integers(size, min(side, round(SHORTEST * size)) + 1))
    return _resized(image, corner, resized, _place(resized, size, rng), size)


def centre_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The full square in the middle, resized to S a side. Arguments and result as of `random_crop`."""
    side = _side(image, size)
    return _resized(image, [(length - side) // 2 for length in image.shape[:2]], size, (0, 0), size)


def _side(image, size):
    """The side of a full square."""
    height, width = image.shape[:2]
    if min(height, width) < size:
        raise ValueError(f"image must be at least {size} pixels a side for a crop of {size}, got {width} x {height}")
    return min(height, width)


def _place(resized, size, rng):
    return rng.integers(0, resized - size + 1, 2).tolist()


def _resized(image, corner, resized, place, size):
    """The crop at `place` of the full square at `corner` after that is made `resized` a side: (size, size, 3) uint8.

    A pixel is the mean of the area that it comes from, rounded to the nearest, halves to even. (Pillow's BOX takes a
    pixel wholly or not at all, by where its centre lies: between 1 and 2 to 1 it mostly copies one.)
    """
    side = min(image.shape[:2])
    if resized == side:
        top, left = corner[0] + place[0], corner[1] + place[1]
        return image[top : top + size, left : left + size]
    # Edges of the crop's pixels, in 1/resized of a pixel of the square. All in whole numbers, so that means are exact;
    # where sums are too large for them, what they lose their differences do not.
    edges = [range(first * side, (first + size) * side + 1, side) for first in place]
    rows, columns = (slice(at + x[0] // resized, at + -(-x[-1] // resized)) for at, x in zip(corner, edges))
    kind = np.uint32 if 255 * side**2 < 2**32 else np.uint64
    sums = image[rows, columns]
    for of_axis in edges:
        sums = np.ascontiguousarray(_integrals(sums, of_axis, resized, kind).swapaxes(0, 1))
    return np.rint(sums / side**2).astype(np.uint8)


def _integrals(rows, edges, unit, kind):
    """What lies between neighbouring edges: (E - 1, ...), a whole row counting `unit` times.

    Args:
        rows: (N, ...), from the one with the first edge on. edges: E of them, ascending, in 1/unit of a row.
        kind: dtype of the result.
    """
    below = np.empty((len(edges), *rows.shape[1:]), kind)
    running, done = np.zeros(rows.shape[1:], kind), 0
    for edge, sums in zip(edges, below):
        whole, part = divmod(edge - edges[0] // unit * unit, unit)
        for row in rows[done:whole]:
            running += row
        done = whole
        np.multiply(running, unit, out=sums)
        if part:
            sums += rows[whole] * kind(part)
    return np.diff(below, axis=0)
