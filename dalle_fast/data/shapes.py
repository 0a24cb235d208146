"""`shapes`: drawn scenes with captions that can be read back from the pixels alone.

A scene is one object of a shape, colour and size at a place on a background; its caption names all five. Within what
the caption says, place, size and colours vary, so that a caption has many pictures. `read_caption` is the judge of
reconstructions and of generated pictures: it fits the picture with every shape, size and place by least squares.

S pixels of a side, P = S * S pixels, M templates, N pictures. Lengths are in units of the picture's side, x to the
right and y downwards.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re

import numpy as np

from dalle_fast.data.source import DataError, Example, check_count, check_index, generator

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (220, 40, 40),
    "yellow": (240, 210, 40),
    "green": (40, 165, 60),
    "cyan": (50, 205, 215),
    "blue": (40, 70, 225),
    "purple": (175, 50, 200),
}
SIZES = {"small": 0.20, "large": 0.28}  # the radius; the largest may reach a little beyond the picture
PLACES = {
    "top left": (0.31, 0.31),
    "top right": (0.69, 0.31),
    "center": (0.5, 0.5),
    "bottom left": (0.31, 0.69),
    "bottom right": (0.69, 0.69),
}
BACKGROUNDS = {"white": (245, 245, 245), "gray": (140, 140, 140), "black": (20, 20, 20)}

PLACE_JITTER = 0.04  # at most, to each side; size and colours likewise
SIZE_JITTER = 0.1
COLOUR_JITTER = 8

LENGTHS = {"train": 50_000, "validation": 2_000, "heldout": 2_000}
MIN_SIZE = 16
READ_SIZE = 32  # pictures are read at this size, larger ones reduced to it
READ_CHUNK = 64  # pictures that are read together
READ_BLUR = 0.04  # of the blurred half of the templates: reconstructions have soft edges
MIN_EXPLAINED = 0.25  # of a picture's variance, below which it is not read as a scene
MAX_SECOND = 0.2  # of the variance that the object explains may be explained by a second one, beside it
MAX_COLOUR_ERROR = 100  # distance in RGB, beyond which a colour is not one of ours

_CAPTION = re.compile(r"a (\w+) (\w+) (\w+) at the ([\w ]+) on a (\w+) background")
_DRAW, _ORDER = 1, 2  # uses of randomness


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a caption says. Each attribute is a name from the table that is called like it.

    Raises:
        ValueError: no such name.
    """

    shape: str
    colour: str
    size: str
    place: str
    background: str

    def __post_init__(self):
        for (name, value), allowed in zip(dataclasses.asdict(self).items(), _TABLES):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")

    @property
    def heldout(self) -> bool:
        """Whether the combination is kept from training: a tenth of them, of every value and every pair about alike."""
        shape, colour, size, place, background = (
            list(table).index(value) for value, table in zip(dataclasses.astuple(self), _TABLES)
        )
        return (shape + colour + 5 * size + 2 * place + 3 * background) % 10 == 0


_TABLES = (SHAPES, COLOURS, SIZES, PLACES, BACKGROUNDS)


@functools.cache
def all_scenes() -> tuple[Scene, ...]:
    """Every scene there is."""
    return tuple(itertools.starmap(Scene, itertools.product(*_TABLES)))


def caption_of_scene(scene: Scene) -> str:
    """Such as "a small red circle at the top left on a white background"."""
    return f"a {scene.size} {scene.colour} {scene.shape} at the {scene.place} on a {scene.background} background"


def scene_of_caption(caption: str) -> Scene:
    """The inverse of `caption_of_scene`.

    Raises:
        ValueError: it is not such a caption.
    """
    match = _CAPTION.fullmatch(caption)
    if match is None:
        raise ValueError(f"caption must be like {caption_of_scene(all_scenes()[0])!r}, got {caption!r}")
    size, colour, shape, place, background = match.groups()
    return Scene(shape, colour, size, place, background)


# -- drawing ------------------------------------------------------------------------------------------------------------


def draw(scene: Scene, image_size: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """A picture of a scene.

    Args:
        image_size: S, at least 16.
        rng: where place, size and colours vary; None draws the scene without variation.

    Returns:
        (S, S, 3) uint8.
    """
    image_size = check_count("image_size", image_size, minimum=MIN_SIZE)
    jitter = np.zeros(9) if rng is None else rng.uniform(-1, 1, 9)
    centre = np.array(PLACES[scene.place]) + PLACE_JITTER * jitter[:2]
    radius = SIZES[scene.size] * (1 + SIZE_JITTER * jitter[2])
    colour = np.array(COLOURS[scene.colour]) + COLOUR_JITTER * jitter[3:6]
    background = np.array(BACKGROUNDS[scene.background]) + COLOUR_JITTER * jitter[6:]
    cover = coverage(scene.shape, radius, centre, image_size)[:, :, None]
    return np.rint(background + cover * (colour - background)).astype(np.uint8)


def coverage(shape: str, radius: float, centre, image_size: int) -> np.ndarray:
    """The share of each pixel that the object covers, (S, S): its edge is a ramp of one pixel across the outline."""
    middle = (np.arange(image_size) + 0.5) / image_size
    x, y = middle[None, :] - centre[0], middle[:, None] - centre[1]
    return np.clip(0.5 - image_size * distance(shape, x, y, radius), 0, 1)


def distance(shape: str, x, y, r: float):
    """Signed distance to the outline (a bound of it beyond corners), negative inside; shapes fill much of [-r, r]^2."""
    x = abs(x)
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return np.maximum(x, abs(y)) - 0.86 * r
    if shape == "triangle":  # apex at (0, -r), base from (-r, r) to (r, r)
        return np.maximum((2 * x - y - r) / 5**0.5, y - r)
    y, arm = abs(y), 0.36 * r  # cross
    return np.minimum(np.maximum(x - r, y - arm), np.maximum(x - arm, y - r))


# -- reading ------------------------------------------------------------------------------------------------------------


def read_caption(image: np.ndarray) -> str | None:
    """The caption of a picture of a scene, from its pixels; None where it shows none. See `read_captions`."""
    return read_captions(np.asarray(image)[None])[0]


def read_captions(images: np.ndarray) -> list[str | None]:
    """The captions of pictures (N, S, S, 3) uint8, from their pixels.

    Every template, a shape of a size at a place or a little off, is fitted as background + coverage * (colour -
    background), by least squares. The one that explains most of the variance gives shape, size and place, and its two
    colours are named by the nearest of ours. None where little is explained or a colour is far from all of ours.

    Raises:
        ValueError: not uint8, not of that shape, or S below 16.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3:
        raise ValueError(f"images must be uint8 (N, S, S, 3), got {images.dtype} {images.shape}")
    if images.shape[1] < MIN_SIZE:
        raise ValueError(f"images must be at least {MIN_SIZE} pixels a side, got {images.shape[1]}")
    if images.shape[1] > READ_SIZE:
        images = np.stack([_reduce(image) for image in images]) if len(images) else images[:, :READ_SIZE, :READ_SIZE]
    chunks = [_read_chunk(images[start : start + READ_CHUNK]) for start in range(0, len(images), READ_CHUNK)]
    return [caption for chunk in chunks for caption in chunk]


def _read_chunk(images) -> list[str | None]:
    objects, bank, mean, norm = _templates(images.shape[1])
    pixels = images.reshape(len(images), -1, 3).astype(np.float32)
    level = pixels.mean(1)
    pixels -= level[:, None]
    products = np.moveaxis(np.tensordot(bank, pixels, (1, 1)), 1, 0)  # (N, M, 3)
    best = np.square(products).sum(2).argmax(1)
    contrast = products[np.arange(len(images)), best]  # (N, 3), along the template of norm 1
    # A second object is what the best template leaves over and another one explains.
    rest = products - (bank @ bank[best].T).T[:, :, None] * contrast[:, None]
    second = np.square(rest).sum(2).max(1)
    explained, variance = np.square(contrast).sum(1), np.square(pixels).sum((1, 2))
    is_scene = (explained > 0) & (explained >= MIN_EXPLAINED * variance) & (second <= MAX_SECOND * explained)
    contrast /= norm[best, None]  # colour - background
    background = level - mean[best, None] * contrast
    return [
        _name(objects[best[n]], background[n] + contrast[n], background[n]) if is_scene[n] else None
        for n in range(len(images))
    ]


def _name(thing, colour, background) -> str | None:
    shape, size, place = thing
    colour, background = _nearest(colour, COLOURS), _nearest(background, BACKGROUNDS)
    if colour is None or background is None:
        return None
    return caption_of_scene(Scene(shape, colour, size, place, background))


def _nearest(colour, table) -> str | None:
    far = {name: float(np.linalg.norm(colour - np.array(value))) for name, value in table.items()}
    name = min(far, key=far.get)
    return name if far[name] <= MAX_COLOUR_ERROR else None


def _reduce(image):
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((READ_SIZE, READ_SIZE), Image.Resampling.BOX))


@functools.cache
def _templates(image_size: int):
    """What pictures are compared with: (shape, size, place) of the templates, their coverage as rows (M, P) of mean 0 and
    norm 1, and the mean and the norm that were taken out."""
    steps = PLACE_JITTER * np.array([-0.75, -0.25, 0.25, 0.75])  # the middles of quarters and thirds of what varies
    scales = 1 + SIZE_JITTER * np.array([-2 / 3, 0, 2 / 3])
    blurs = [np.eye(image_size), _blur(image_size, READ_BLUR)]
    objects, rows = [], []
    for shape, (size, radius), (place, (x, y)) in itertools.product(SHAPES, SIZES.items(), PLACES.items()):
        for scale, dx, dy in itertools.product(scales, steps, steps):
            cover = coverage(shape, scale * radius, (x + dx, y + dy), image_size)
            for blur in blurs:
                objects.append((shape, size, place))
                rows.append((blur @ cover @ blur.T).ravel())
    bank = np.array(rows, np.float32)
    mean = bank.mean(1)
    bank -= mean[:, None]
    norm = np.linalg.norm(bank, axis=1)
    return objects, bank / norm[:, None], mean, norm


def _blur(image_size: int, sigma: float) -> np.ndarray:
    """(S, S): a Gaussian blur of one axis."""
    middle = (np.arange(image_size) + 0.5) / image_size
    weights = np.exp(-0.5 * ((middle[:, None] - middle) / sigma) ** 2)
    return weights / weights.sum(1, keepdims=True)


# -- the source ---------------------------------------------------------------------------------------------------------


class Shapes:
    """The source "shapes": pictures of scenes, a pure function of (seed, split, index). See `open_source`.

    Attributes:
        scenes: those of this split; each `len(scenes)` pictures in a row show every one once.
    """

    name = "shapes"
    crop = False
    replaced = 0

    def __init__(self, image_size: int, *, split: str = "train", seed: int = 0):
        if image_size < MIN_SIZE:
            raise DataError(f"shapes: image_size must be at least {MIN_SIZE}, got {image_size}")
        self.image_size, self.split, self.seed = image_size, split, seed
        self.scenes = [scene for scene in all_scenes() if scene.heldout == (split == "heldout")]
        self._stream = list(LENGTHS).index(split)
        self._order = generator(seed, _ORDER, self._stream).permutation(len(self.scenes))

    def __len__(self) -> int:
        return LENGTHS[self.split]

    def __getitem__(self, index: int) -> Example:
        index = check_index(index, len(self))
        scene = self._scene(index)
        image = draw(scene, self.image_size, generator(self.seed, _DRAW, self._stream, index))
        return Example(image, caption_of_scene(scene))

    def named_caption(self, index: int) -> tuple[str, str]:
        index = check_index(index, len(self))
        return f"picture {index}", caption_of_scene(self._scene(index))

    def _scene(self, index):
        return self.scenes[self._order[index % len(self.scenes)]]

    def check(self, image: np.ndarray) -> str | None:
        """`read_caption`."""
        return read_caption(image)

    def check_all(self, images: np.ndarray) -> list[str | None]:
        """`read_captions`."""
        return read_captions(images)
