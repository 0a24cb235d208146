"""Crops: where they lie and how large they are is as in the paper, and each pixel is the mean of its area."""

import numpy as np
import pytest
from PIL import Image

from dalle_fast.data.crops import _resized, caption_crop, centre_crop, random_crop


def rng(seed=0):
    return np.random.default_rng(seed)


def noise(height, width, least=0):
    return rng().integers(least, 256, (height, width, 3), np.uint8)


def counted(height, width):
    """A picture whose red is its column and whose green is its row, in pixels."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(width), np.arange(height)[:, None]
    return image


# -- areas -------------------------------------------------------------------------------------------------------------


def mean_of_areas(image, corner, resized, place, size):
    """The definition, in float64: every pixel by its overlaps with all pixels of the full square."""
    side = min(image.shape[:2])
    square = image[corner[0] : corner[0] + side, corner[1] : corner[1] + side].astype(float)
    shares = []
    for first in place:
        low = (first + np.arange(size)[:, None]) * side / resized
        high = low + side / resized
        pixel = np.arange(side)
        shares.append(np.clip(np.minimum(high, pixel + 1) - np.maximum(low, pixel), 0, None) / (high - low))
    rows = np.tensordot(shares[0], square, 1)
    return np.moveaxis(np.tensordot(shares[1], rows, (1, 1)), 0, 1)


@pytest.mark.parametrize(
    ("shape", "resized", "size"),
    [
        ((33, 47), 31, 29),
        ((47, 33), 32, 32),
        ((37, 37), 19, 17),
        ((7, 11), 1, 1),
        ((7, 11), 5, 1),
        ((72, 72), 64, 64),
        ((80, 101), 64, 64),
        ((128, 130), 64, 64),
        ((480, 640), 271, 256),
        ((4_201, 4_203), 37, 31),  # whose areas hold sums of more than 32 bits
    ],
)
def test_a_pixel_is_the_mean_of_its_area(shape, resized, size):
    side = min(shape)
    corner = [length - side for length in shape]
    for image in (noise(*shape), noise(*shape, least=255)):
        for place in ((resized - size, 0), ((resized - size) // 2, resized - size)):
            exact = mean_of_areas(image, corner, resized, place, size)
            ours = _resized(image, corner, resized, place, size)
            assert ours.dtype == np.uint8 and ours.shape == (size, size, 3)
            assert abs(ours - exact).max() < 0.5 + 1e-9  # rounded to the nearest


def test_halves_are_rounded_to_even():
    for values, mean in (((10, 11), 10), ((11, 12), 12), ((0, 255), 128)):
        image = np.repeat(np.array(values, np.uint8).reshape(1, 2, 1), 3, 2).repeat(2, 0)
        assert np.array_equal(centre_crop(image, 1), np.full((1, 1, 3), mean))


def test_what_is_not_scaled_is_copied():
    image = noise(17, 30)
    for _ in range(20):
        crop = random_crop(image, 16, rng())  # 17 is less than 9/8 of 16
        assert any(
            np.array_equal(crop, image[top : top + 16, left : left + 16]) for top in range(2) for left in range(15)
        )
    assert np.array_equal(random_crop(image[:16, :16], 16, rng()), image[:16, :16])
    assert np.array_equal(centre_crop(noise(96, 65), 65), noise(96, 65)[15:80])


def test_the_middle():
    image = noise(64, 96)
    half = np.asarray(Image.fromarray(image[:, 16:80]).reduce(2))
    assert abs(centre_crop(image, 32).astype(int) - half).max() <= 1
    assert np.array_equal(centre_crop(image, 32), centre_crop(image[:, 16:80], 32))


# -- places and sizes --------------------------------------------------------------------------------------------------

DRAWS = 1_000


def places(crop, shape, size):
    """How often the crops of a picture that is not scaled begin at each (row, column)."""
    counts, state = np.zeros(shape, int), rng()
    for _ in range(DRAWS):
        column, row, _ = crop(counted(*shape), size, state)[0, 0]
        counts[row, column] += 1
    return counts


def uniform(first, end, length):
    shares = np.zeros(length)
    shares[first:end] = 1 / (end - first)
    return shares


def check_shares(counts, shares):
    """Counts are those of independent draws, within five standard deviations, and nothing is drawn that cannot be."""
    assert counts.sum() == DRAWS and not counts[shares == 0].any()
    assert (abs(counts - DRAWS * shares) <= 5 * np.sqrt(DRAWS * shares)).all()


def test_stage_1_crops_a_square_anywhere_in_any_full_square():
    """So what is at the ends of the longer side is seen less often than what is in the middle."""
    full, inside = uniform(0, 7, 24), uniform(0, 3, 24)
    shares = np.convolve(full, inside)[:24]
    rows = places(random_crop, (18, 24), 16)  # 18 is 9/8 of 16
    check_shares(rows.sum(0), shares)
    check_shares(rows.sum(1), uniform(0, 3, 18))
    check_shares(rows, np.outer(uniform(0, 3, 18), shares))
    check_shares(places(random_crop, (24, 18), 16), np.outer(shares, uniform(0, 3, 18)))


def test_stage_2_crops_near_the_middle():
    wide = places(caption_crop, (16, 57), 16)  # 41 more than a square, of which 15 are left out at first
    check_shares(wide, np.outer(uniform(0, 1, 16), uniform(15, 25, 57)))
    check_shares(places(caption_crop, (57, 16), 16), np.outer(uniform(15, 25, 57), uniform(0, 1, 16)))
    square = places(caption_crop, (18, 18), 16)  # not scaled, a third of the times
    assert square[:3, :3].all()
    check_shares(places(caption_crop, (16, 17), 16), np.outer(uniform(0, 1, 16), uniform(0, 1, 17)))


@pytest.mark.parametrize(("crop", "least", "most"), [(random_crop, 36, 48), (caption_crop, 32, 36)])
@pytest.mark.parametrize("side", [200, 40, 34])
def test_full_squares_are_resized_to_any_size_of_the_stages(crop, least, most, side):
    """For crops of 32 to between 36 and 48 a side in stage 1, and between 32 and 36 in stage 2, but never enlarged."""
    image, state = counted(side, side).astype(float) * (255 / side), rng()
    image = np.rint(image).astype(np.uint8)
    resized = np.zeros(most + 1, int)
    for _ in range(DRAWS):
        result = crop(image, 32, state).astype(float)
        wide, high = (
            (result[:, -1, 0] - result[:, 0, 0]).mean() / 31,
            (result[-1, :, 1] - result[0, :, 1]).mean() / 31,
        )
        assert abs(wide - high) < 2 / 31
        resized[round(255 / ((wide + high) / 2))] += 1
    check_shares(resized, uniform(min(side, least), min(side, most) + 1, most + 1))


@pytest.mark.parametrize(
    "crop",
    [
        lambda image, size: random_crop(image, size, rng()),
        lambda image, size: caption_crop(image, size, rng()),
        centre_crop,
    ],
    ids=["random", "caption", "centre"],
)
def test_a_picture_smaller_than_the_crop_is_an_error(crop):
    with pytest.raises(ValueError, match="at least 16 pixels a side for a crop of 16, got 30 x 15"):
        crop(np.zeros((15, 30, 3), np.uint8), 16)
