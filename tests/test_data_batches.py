"""Batches: a stream that depends on the source, the seed and the batch's number alone."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_fast.data import DataError, Example, batches, loading, open_source
from dalle_fast.data.crops import caption_crop, centre_crop, random_crop
from dalle_fast.data.source import generator, identity

PICTURE = np.zeros((40, 50, 3), np.uint8)


class Numbers:
    """A source of pictures (40, 50) that tell column, row and number."""

    name, crop = "numbers", True

    def __init__(self, size, crop=True):
        self.size, self.crop = size, crop

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        image = np.zeros((40, 50, 3), np.uint8)
        image[..., 0], image[..., 1], image[..., 2] = 5 * np.arange(50), 6 * np.arange(40)[:, None], index
        return Example(image, f"number {index}")


def stream(source, count, batch_size=8, image_size=16, seed=0, **options):
    return list(itertools.islice(batches(source, batch_size, image_size=image_size, seed=seed, **options), count))


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(a.images, b.images) and a.captions == b.captions and a.indices == b.indices
        for a, b in zip(ours, theirs)
    )


def test_a_batch_is_what_it_says():
    [batch] = stream(Numbers(30), 1)
    assert batch.images.shape == (8, 3, 16, 16)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous()
    assert batch.captions == [f"number {index}" for index in batch.indices]
    assert batch.images[:, 2, 0, 0].tolist() == batch.indices


@pytest.mark.parametrize("size, batch_size", [(30, 8), (7, 3), (5, 8), (1, 4), (16, 8)])
def test_a_stream_from_any_batch_on_is_the_stream_from_there(size, batch_size):
    whole = stream(Numbers(size), 12, batch_size)
    for start in (1, 3, 4, 5, 11):
        assert same(stream(Numbers(size), 12 - start, batch_size, start=start), whole[start:])
    far = stream(Numbers(size), 2, batch_size, start=10**12)
    assert same(far[1:], stream(Numbers(size), 1, batch_size, start=10**12 + 1))


def test_every_epoch_shows_every_picture_once_in_an_order_of_its_own():
    order = [index for batch in stream(Numbers(30), 30, 8) for index in batch.indices]
    epochs = [order[start : start + 30] for start in range(0, 240, 30)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 8
    assert list(range(30)) not in epochs


def test_seeds_and_epochs_crop_differently():
    source = Numbers(8)
    first, second = stream(source, 2)
    [other] = stream(source, 1, seed=1)
    assert first.indices != other.indices
    crops = [
        {index: image.numpy().tobytes() for index, image in zip(batch.indices, batch.images)}
        for batch in (first, second, other)
    ]
    assert all(crops[a][x] != crops[b][x] for a, b in ((0, 1), (0, 2), (1, 2)) for x in range(8))


def test_workers_and_global_random_states_change_nothing_and_are_not_changed():
    source = open_source("shapes", image_size=16)
    whole = stream(source, 6)
    torch.manual_seed(5)
    np.random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert same(stream(source, 4, start=2, num_workers=2), whole[2:])
    assert same(stream(source, 6), whole)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_validation_is_one_pass_in_order_with_centre_crops(num_workers):
    source = Numbers(19)
    passed = stream(source, None, train=False, flip=True, num_workers=num_workers)
    assert [batch.indices for batch in passed] == [[*range(8)], [*range(8, 16)], [16, 17, 18]]
    assert np.array_equal(passed[2].images[2].permute(1, 2, 0).numpy(), centre_crop(source[18].image, 16))
    assert same(stream(source, None, train=False, start=2), passed[2:])
    assert stream(source, None, train=False, start=3) == []


def test_flips_are_of_half_of_the_pictures_and_only_where_asked():
    source = open_source("shapes", image_size=16)
    plain, flipped = (stream(source, 20, flip=flip) for flip in (False, True))
    pairs = [(a, b) for one, other in zip(plain, flipped) for a, b in zip(one.images, other.images)]
    turned = [torch.equal(a.flip(-1), b) and not torch.equal(a, b) for a, b in pairs]
    assert all(turn or torch.equal(a, b) for turn, (a, b) in zip(turned, pairs))
    assert 50 < sum(turned) < 110  # of 160
    assert all(source.check(a.permute(1, 2, 0).numpy()) is not None for a, _ in pairs[:8])


def test_a_source_that_is_not_to_be_cropped_is_taken_whole():
    source = open_source("shapes", image_size=32)
    [batch] = stream(source, 1, image_size=32)
    for image, caption, index in zip(*batch):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), source[index].image)
        assert source.check(image.permute(1, 2, 0).numpy()) == caption
    with pytest.raises(
        ValueError, match="image_size must be that of the source shapes, got 16 and a picture of 32 x 32"
    ):
        stream(source, 1, image_size=16)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_crop_of_training_can_be_chosen(num_workers):
    """What it gives is a function of seed, epoch and index, too."""
    source = Numbers(8)
    chosen = stream(source, 4, crop=caption_crop, num_workers=num_workers)
    assert same(stream(source, 2, crop=caption_crop, start=2), chosen[2:])
    assert not same(chosen, stream(source, 4)) and same(stream(source, 4, crop=random_crop), stream(source, 4))
    for epoch, batch in enumerate(chosen):
        for image, index in zip(batch.images, batch.indices):
            expected = caption_crop(source[index].image, 16, generator(0, loading._CROP, epoch, index))
            assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)
    assert same(stream(source, 1, train=False, crop=caption_crop), stream(source, 1, train=False))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stage_2_warns_once_of_a_picture_longer_than_2_to_1(folder, num_workers):
    for x in range(10):
        Image.new("RGB", (60, 24)).save(folder / f"long{x}.png")
        Image.new("RGB", (32, 64)).save(folder / f"just{x}.png")
    source = open_source(folder, image_size=16)
    with pytest.warns(UserWarning, match=r"one side of long\d.png is 2.5 times the other") as warned:
        stream(source, 20, crop=caption_crop, num_workers=num_workers)
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream(source, 20, num_workers=num_workers)  # of stage 1
        stream(source, None, train=False, crop=caption_crop, num_workers=num_workers)


# -- bad pictures, bad arguments ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for x in range(60):
        Image.new("RGB", (20, 20), (x, x, x)).save(tmp_path / f"{x}.png")
    return tmp_path


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_workers_replace_is_counted_here(folder, num_workers):
    (folder / "bad.png").write_bytes(b"")
    source = open_source(folder, image_size=16)
    if all(source.names[number] != "bad.png" for number in source._numbers):
        pytest.fail("bad.png should be in training for this test")
    epoch = stream(source, 8, num_workers=num_workers)
    assert source.replaced == 1
    assert same(stream(open_source(folder, image_size=16), 8), epoch)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_bad_pictures_end_the_stream(folder, num_workers):
    for x in range(9):
        (folder / f"bad{x}.png").write_bytes(b"")
    source = open_source(folder, image_size=16)
    with pytest.raises(DataError, match=r"4 of \d+ pictures looked at are bad, of 69 in all.*the first is bad\d.png"):
        stream(source, 9, num_workers=num_workers)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_pictures_are_told_in_one_line_that_counts_all_that_were_looked_at(folder, num_workers):
    for x in range(9):
        (folder / f"bad{x}.png").write_bytes(b"")
    source = open_source(folder, image_size=16, max_bad_share=0)
    order = [index for batch in stream(Numbers(len(source)), 9, 4) for index in batch.indices]  # the same
    first = next(at for at, index in enumerate(order) if source.names[source._numbers[index]].startswith("bad"))
    with pytest.raises(DataError) as error:
        stream(source, 9, 4, num_workers=num_workers)
    assert f": 1 of {first + 1} pictures looked at are bad, of 69 in all" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_an_own_source_raises_is_raised_here(num_workers):
    class Broken(Numbers):
        def __getitem__(self, index):
            raise DataError(f"number {index} is lost")

    with pytest.raises(DataError, match=r"^number \d is lost$"):
        stream(Broken(9), 1, num_workers=num_workers)


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"image_size": 1.5}, TypeError, "image_size must be an integer, got 1.5"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": 1 << 64}, ValueError, "seed must be below 2\\^64, got 18446744073709551616"),
        ({"start": -1}, ValueError, "start must be at least 0, got -1"),
    ],
)
def test_bad_arguments(changed, error, message):
    with pytest.raises(error, match=message):
        stream(Numbers(5), 1, **changed)


@pytest.mark.parametrize(
    ("picture", "got"),
    [
        (np.zeros((40, 50, 3)), r"float64 of shape \(40, 50, 3\)"),
        (np.zeros((40, 50), np.uint8), r"uint8 of shape \(40, 50\)"),
        (Image.new("RGB", (50, 40)), "Image"),
        (torch.zeros(3, 40, 50, dtype=torch.uint8), "Tensor"),
    ],
    ids=["floats", "grey", "Pillow's", "torch's"],
)
def test_pictures_of_another_kind_are_an_error(picture, got):
    class Others(Numbers):
        def __getitem__(self, index):
            return Example(picture, "")

    message = rf"source must give pictures as \(height, width, 3\) uint8 arrays, got {got} for number \d"
    with pytest.raises(TypeError, match=message):
        stream(Others(3), 1)


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (PICTURE, r"source must give \(image, caption\), as .*Example, got ndarray for number \d"),
        ({"image": PICTURE, "caption": ""}, r"\(image, caption\), .* got dict"),
        ((PICTURE, None), 'captions as text, "" for none, got None for number'),
    ],
    ids=["no caption", "by name", "None"],
)
def test_what_is_no_example_is_an_error(example, words):
    class Others(Numbers):
        def __getitem__(self, index):
            return example

    for look in (lambda source: stream(source, 1), identity):
        with pytest.raises(TypeError, match=words):
            look(Others(3))


def test_a_source_without_pictures_is_an_error():
    with pytest.raises(ValueError, match="source numbers must have pictures, got none"):
        stream(Numbers(0), 1)
