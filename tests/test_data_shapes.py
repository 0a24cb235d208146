"""Drawn scenes: what the caption says is in the pixels and can be read back, and the held-out split holds out."""

import collections
import dataclasses
import itertools
import pickle

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dalle_fast.data import (
    DataError,
    Scene,
    all_scenes,
    caption_of_scene,
    draw,
    open_source,
    read_caption,
    read_captions,
    scene_of_caption,
    shapes,
)

ATTRIBUTES = [field.name for field in dataclasses.fields(Scene)]


def pictures(size, count=2_000):
    """Images (count, size, size, 3) and captions of all three splits."""
    sources = [open_source("shapes", image_size=size, split=split) for split in shapes.LENGTHS]
    examples = [sources[x % 3][x // 3] for x in range(count)]
    return np.stack([example.image for example in examples]), [example.caption for example in examples]


def worsened(images, sigma, blur):
    """With a Gaussian blur of `blur` pixels and Gaussian noise of `sigma`, in units of the full range."""
    noise = np.random.default_rng(0).normal(0, 255 * sigma, images.shape)
    if blur:
        images = [np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(blur))) for image in images]
    return np.rint(np.clip(images + noise, 0, 255)).astype(np.uint8)


def share_right(images, captions):
    return sum(read == caption for read, caption in zip(read_captions(images), captions)) / len(captions)


@pytest.mark.parametrize("size", [16, 32, 64, 37, 100])
def test_every_clean_scene_is_read(size):
    images, captions = pictures(size, 2_000 if size in (32, 64) else 300)
    assert share_right(images, captions) == 1


@pytest.mark.parametrize("sigma, blur, least", [(0.03, 0.7, 0.995), (0.03, 1.4, 0.98), (0.08, 0.0, 0.98)])
def test_noisy_and_blurred_scenes_are_read(sigma, blur, least):
    images, captions = pictures(32, 1_000)
    assert share_right(worsened(images, sigma, blur), captions) >= least


def test_what_is_no_scene_is_not_read():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (300, 32, 32, 3), np.uint8)
    flat = np.broadcast_to(rng.integers(0, 256, (300, 1, 1, 3), np.uint8), (300, 32, 32, 3))
    assert read_captions(noise) == [None] * 300
    assert read_captions(flat) == [None] * 300
    smooth = [
        np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)) for image in noise[:, :4, :4]
    ]
    captions = pictures(32, 300)[1]
    assert share_right(np.stack(smooth), captions) < 0.02  # chance


def test_two_objects_are_not_one():
    for scene in all_scenes()[::7]:
        one = draw(dataclasses.replace(scene, place="top left"), 32)
        two = draw(dataclasses.replace(scene, place="bottom right", shape="circle", size="small"), 32)
        both = one.copy()
        both[16:, 16:] = two[16:, 16:]
        assert read_caption(one) is not None
        assert read_caption(both) is None, scene


def test_a_scene_that_is_hardly_seen_is_not_read():
    texture = np.where(np.indices((32, 32)).sum(0) % 2, 90, -90)[..., None]
    for scene in all_scenes()[::50]:
        image = np.clip(128 + (draw(scene, 32) - 128.0) / 3 + texture, 0, 255)
        assert read_caption(image.astype(np.uint8)) is None, scene


def test_a_changed_attribute_changes_what_is_read():
    scene = Scene("square", "red", "large", "center", "white")
    tables = dict(zip(ATTRIBUTES, (shapes.SHAPES, shapes.COLOURS, shapes.SIZES, shapes.PLACES, shapes.BACKGROUNDS)))
    for name, table in tables.items():
        for value in table:
            other = dataclasses.replace(scene, **{name: value})
            assert read_caption(draw(other, 32)) == caption_of_scene(other)


def test_captions_and_scenes_are_one_to_one():
    captions = [caption_of_scene(scene) for scene in all_scenes()]
    assert len(set(captions)) == len(all_scenes()) == 4 * 6 * 2 * 5 * 3
    assert [scene_of_caption(caption) for caption in captions] == list(all_scenes())
    assert "a small red circle at the top left on a white background" in captions
    for caption in ("", "a red circle", captions[0] + ".", captions[0].replace("red", "pink")):
        with pytest.raises(ValueError, match="caption must be like|colour must be one of"):
            scene_of_caption(caption)


def test_a_tenth_of_the_combinations_is_held_out_and_every_pair_of_values_is_not():
    heldout = {scene for scene in all_scenes() if scene.heldout}
    assert len(heldout) == 72
    seen = [scene for scene in all_scenes() if not scene.heldout]
    for first, second in itertools.combinations(ATTRIBUTES, 2):
        pairs = collections.Counter((getattr(scene, first), getattr(scene, second)) for scene in seen)
        every = {(getattr(scene, first), getattr(scene, second)) for scene in all_scenes()}
        assert set(pairs) == every
        gone = [getattr(scene, first) + getattr(scene, second) for scene in heldout]
        assert max(collections.Counter(gone).values()) <= 0.125 * 720 / len(every)
    drawn = {split: open_source("shapes", image_size=16, split=split) for split in shapes.LENGTHS}
    for split, source in drawn.items():
        shown = {scene_of_caption(source[index].caption) for index in range(len(source.scenes))}
        assert shown == (heldout if split == "heldout" else set(seen))  # each once


def test_splits_share_no_picture():
    images = [
        {source[index].image.tobytes() for index in range(1_500)}
        for source in (open_source("shapes", image_size=32, split=split) for split in shapes.LENGTHS)
    ]
    assert len(set.union(*images)) == 4_500


def test_what_varies_does_not_repeat_in_another_split_or_seed():
    def variation(source):
        examples = [source[index] for index in range(20)]
        return [
            tuple(image[0, 0].astype(int) - shapes.BACKGROUNDS[scene_of_caption(caption).background])
            for image, caption in examples
        ]

    sources = [open_source("shapes", image_size=32, split=split) for split in shapes.LENGTHS]
    sources.append(open_source("shapes", image_size=32, seed=1))
    assert len({tuple(variation(source)) for source in sources}) == 4


def test_a_picture_is_a_function_of_seed_split_and_index():
    source, other = (open_source("shapes", image_size=32, seed=seed) for seed in (5, 6))
    again = pickle.loads(pickle.dumps(source))
    for index in (0, 7, 49_999):
        assert np.array_equal(source[index].image, again[index].image)
        assert not np.array_equal(source[index].image, other[index].image)
        assert source.check(source[index].image) == source[index].caption
    assert np.array_equal(source[-1].image, source[49_999].image)
    with pytest.raises(IndexError, match="must be below 50000"):
        source[50_000]


def test_scenes_of_one_caption_differ():
    scene = all_scenes()[0]
    drawn = {draw(scene, 32, np.random.default_rng(seed)).tobytes() for seed in range(100)}
    assert len(drawn) == 100


def test_bad_arguments():
    with pytest.raises(DataError, match="image_size must be at least 16, got 15"):
        open_source("shapes", image_size=15)
    with pytest.raises(ValueError, match="split of 'shapes' must be one of train, validation, heldout, got 'test'"):
        open_source("shapes", image_size=32, split="test")
    with pytest.raises(ValueError, match=r"images must be uint8 \(N, S, S, 3\), got float64 \(1, 32, 32, 3\)"):
        read_caption(np.zeros((32, 32, 3)))
    with pytest.raises(ValueError, match=r"got uint8 \(1, 32, 31, 3\)"):
        read_caption(np.zeros((32, 31, 3), np.uint8))
    with pytest.raises(ValueError, match="at least 16 pixels a side, got 8"):
        read_caption(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="shape must be one of circle, square, triangle, cross, got 'star'"):
        Scene("star", "red", "small", "center", "white")
    assert read_captions(np.zeros((0, 64, 64, 3), np.uint8)) == []
