"""From captions to pictures: batches that change nothing, the best of many, parts that do not fit each other.

P captions, N images of each, C channels, H x W pixels.
"""

import dataclasses
import pickle
import re
import types

import numpy as np
import pytest
import torch

import dalle_fast.nn as fnn
from dalle_fast import sampling
from dalle_fast.nn.generation import TooManyImages

DVAE = fnn.DVAEConfig(
    image_size=12, downsampling=4, num_codes=11, embedding_dim=6, hidden=8, blocks_per_group=1, min_log_scale=-2.0
)
DALLE = fnn.DALLEConfig(vocab_size=30, text_len=5, num_codes=11, grid=3, layers=3, width=32, num_heads=2, head_dim=16)
CAPTIONS = ["a cat", "", "fog", "a dog", "ice"]


class Letters:
    """A tokenizer of lower-case letters with the interface of `dalle_fast.data.text.Tokenizer`."""

    vocab_size = 27

    def encode(self, captions, text_len, *, truncate=False):
        if not truncate and max(map(len, captions), default=0) > text_len:
            raise ValueError(f"captions must have at most {text_len} tokens")
        captions = [caption[:text_len] for caption in captions]
        ids = torch.zeros(len(captions), text_len, dtype=torch.int64)
        for row, caption in zip(ids, captions, strict=True):
            row[: len(caption)] = torch.tensor([ord(letter) % 32 % 27 for letter in caption])
        return ids, torch.tensor([len(caption) for caption in captions], dtype=torch.int64)


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    dalle, dvae = fnn.DALLE(DALLE), fnn.DiscreteVAE(DVAE)
    for model in (dalle, dvae):
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return dalle, dvae, Letters()


def brightness(images, caption):
    return images.mean((1, 2, 3))


def test_pictures_do_not_depend_on_batches(parts):
    whole = sampling.draw(*parts, CAPTIONS, num_images=4, seed=1)
    assert whole.shape == (5, 4, 3, 12, 12)
    assert len(whole.flatten(2).flatten(0, 1).unique(dim=0)) > 15
    for batch_size in (1, 3, 8, 9):
        again = sampling.draw(*parts, CAPTIONS, num_images=4, seed=1, batch_size=batch_size)
        torch.testing.assert_close(again, whole, rtol=0, atol=1e-5)
    alone = sampling.draw(*parts, CAPTIONS[3:4], num_images=2, seed=1)
    torch.testing.assert_close(alone[0], whole[3, :2], rtol=0, atol=1e-5)


def test_without_a_seed_all_batches_have_the_same_one(parts):
    torch.manual_seed(3)
    whole = sampling.draw(*parts, CAPTIONS, num_images=2)
    torch.manual_seed(3)
    torch.testing.assert_close(sampling.draw(*parts, CAPTIONS, num_images=2, batch_size=1), whole, rtol=0, atol=1e-5)


def test_the_best_of_many_are_kept_best_first(parts):
    """Each caption's before the next one is decoded, with their numbers among those drawn and their scores."""
    seen = []

    def score(images, caption):
        seen.append((len(images), caption))
        return brightness(images, caption)

    whole = sampling.draw(*parts, CAPTIONS, num_images=5, seed=1)
    best = sampling.draw(*parts, CAPTIONS, num_images=5, seed=1, score=score, keep=2, batch_size=3)
    assert seen == [(5, caption) for caption in CAPTIONS]
    order = whole.mean((2, 3, 4)).argsort(1, descending=True)[:, :2]
    torch.testing.assert_close(best, whole[torch.arange(5)[:, None], order], rtol=0, atol=1e-5)
    first = sampling.draw(*parts, CAPTIONS, num_images=5, seed=1, keep=2)
    torch.testing.assert_close(first, whole[:, :2], rtol=0, atol=1e-5)
    seen.clear()
    each = sampling.draw_each(*parts, CAPTIONS, num_images=5, seed=1, score=score, keep=2)
    assert not seen
    for number, drawn in enumerate(each):
        assert len(seen) == number + 1
        torch.testing.assert_close(drawn.images, best[number], rtol=0, atol=1e-5)
        assert drawn.numbers == order[number].tolist()
        assert drawn.scores == pytest.approx(brightness(best[number], "").tolist(), abs=1e-5)


def test_a_score_may_work_in_place(parts):
    whole = sampling.draw(*parts, CAPTIONS, num_images=3, seed=1)
    scored = sampling.draw(*parts, CAPTIONS, num_images=3, seed=1, score=lambda x, _: -x.sub_(5)[:, 0, 0, 0], keep=3)
    assert torch.equal(scored.sort(1).values, whole.sort(1).values)


def test_completion_goes_with_its_caption(parts):
    codes = torch.randint(11, (5, 3, 3), generator=torch.Generator().manual_seed(0))
    known = torch.zeros(5, 3, 3, dtype=torch.bool)
    known[:, :2] = True
    options = {"num_images": 2, "seed": 1, "batch_size": 4}
    alone = [sampling.draw(*parts, [CAPTIONS[p]], codes=codes[p, None, :2], **options)[0] for p in range(5)]
    assert not torch.equal(alone[0], sampling.draw(*parts, CAPTIONS[:1], **options)[0])
    for given in ({"codes": codes[:, :2]}, {"codes": codes, "known": known}, {"codes": codes, "known": known[0]}):
        pictures = sampling.draw(*parts, CAPTIONS, **given, **options)
        torch.testing.assert_close(pictures, torch.stack(alone), rtol=0, atol=1e-5)
    known[1:3, 1] = False
    alone = [sampling.draw(*parts, [CAPTIONS[p]], codes=codes[[p]], known=known[[p]], **options)[0] for p in range(5)]
    pictures = sampling.draw(*parts, CAPTIONS, codes=codes, known=known, **options)
    torch.testing.assert_close(pictures, torch.stack(alone), rtol=0, atol=1e-5)
    for count in (4, 6):
        with pytest.raises(
            ValueError, match=f"codes must be of as many images as there are captions, got {count} and 5"
        ):
            sampling.draw(*parts, CAPTIONS, codes=codes[:1].expand(count, 3, 3), **options)


def test_best_of(make):
    images = make((4, 3, 2, 2))[0]
    before = images.clone()
    best = sampling.best_of(images, lambda x: torch.tensor([1.0, 3.0, 2.0, 3.0]), keep=3)
    assert torch.equal(best, images[[1, 3, 2]])
    assert torch.equal(sampling.best_of(images, lambda x: [0, 0, 0, 1]), images[[3]])
    best.zero_()
    assert torch.equal(images, before)
    images = torch.arange(200)
    scores = torch.arange(200) % 3  # so many equal ones that a sort mixes them, unless it is asked not to
    best = sampling.best_of(images, lambda x: scores, keep=130)
    assert torch.equal(best, torch.cat((images[2::3], images[1::3]))[:130])


@pytest.mark.parametrize(
    ("score", "keep", "message"),
    [
        (lambda x: torch.zeros(4), 0, "keep must be at least 1, got 0"),
        (lambda x: torch.zeros(4), 5, "keep must be from 1 to 4, the images that are drawn, got 5"),
        (lambda x: torch.zeros(4, 1), 1, r"score must return 4 numbers, one for each image, got \(4, 1\)"),
        (lambda x: torch.tensor([0, torch.nan, 0, 0]), 1, "score must return numbers, got NaN for image 1"),
    ],
)
def test_bad_scores_are_refused(make, score, keep, message):
    with pytest.raises(ValueError, match=message):
        sampling.best_of(make((4, 3, 2, 2))[0], score, keep)


@pytest.mark.parametrize("scores", [torch.ones(4).to_sparse(), torch.ones(4, dtype=torch.complex64), [1j] * 4])
def test_scores_that_have_no_order_are_refused(make, scores):
    with pytest.raises(
        TypeError, match="score must return 4 real numbers, not sparse, got torch.(float32|complex64) in"
    ):
        sampling.best_of(make((4, 3, 2, 2))[0], lambda x: scores)


def test_no_captions(parts):
    """Make no pictures, yet what is wrong is told."""
    assert sampling.draw(*parts, [], num_images=2).shape == (0, 2, 3, 12, 12)
    for options, message in (
        ({"temperature": -1}, "temperature must be at least 0, got -1"),
        ({"seed": -5}, "seed must be from 0 to .*, got -5"),
        ({"num_images": 0}, "num_images must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            sampling.draw(*parts, [], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"known": np.ones((3, 3), bool)}, "known must be a bool tensor on cpu, got ndarray"),
        ({"known": [[True] * 3] * 3}, "known must be a bool tensor on cpu, got list"),
        ({"codes": [[0] * 9] * 2}, "codes must be an int64 tensor, got list"),
        ({"num_images": 2.0}, "num_images must be an integer, got 2.0"),
        ({"num_images": "2"}, "num_images must be an integer, got '2'"),
        ({"batch_size": None}, "batch_size must be an integer, got None"),
        ({"batch_size": 2.0}, "batch_size must be an integer, got 2.0"),
        ({"keep": 1.0}, "keep must be an integer, got 1.0"),
        ({"keep": True}, "keep must be an integer, got True"),
        ({"captions": None}, "captions must be a sequence of strings, got None"),
        ({"captions": ["a", 3]}, "captions must be a sequence of strings, got 3"),
    ],
)
def test_what_is_of_the_wrong_kind_is_named(parts, options, message):
    codes = torch.zeros(2, 9, dtype=torch.int64)
    with pytest.raises(TypeError, match=message):
        sampling.draw(*parts, **{"captions": ["a", "b"], "codes": codes, "num_images": 2, **options})


def test_bad_requests_are_refused_before_anything_is_drawn(parts):
    for options, message in (
        ({"keep": 3}, "keep must be from 1 to 2, the images that are drawn, got 3"),
        ({"num_images": 0}, "num_images must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"captions": ["much too long"]}, "captions must have at most 5 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            sampling.draw(*parts, **{"captions": CAPTIONS, "num_images": 2, **options})
    with pytest.raises(TypeError, match="captions must be a sequence of strings, got the string 'a cat'"):
        sampling.draw(*parts, "a cat")
    assert sampling.draw(*parts, ["much too long"], truncate=True).shape == (1, 1, 3, 12, 12)
    codes = torch.zeros(5, 9, dtype=torch.int64)
    for options, kind, message in (
        ({"score": 5}, TypeError, "score must be a callable of images and their caption, or None, got int"),
        ({"known": torch.ones(3, 3, dtype=torch.bool)}, ValueError, "known needs codes, got none"),
        ({"codes": [1, 2]}, TypeError, "codes must be an int64 tensor, got list"),
        ({"codes": codes.index_fill(0, torch.tensor(4), 11)}, ValueError, "codes must be from 0 to 10, .* to 11"),
        ({"codes": codes, "known": torch.ones(3, 4, dtype=torch.bool)}, ValueError, "known must have shape"),
        ({"first_image": 1}, TypeError, "multiple values for keyword argument 'first_image'"),
    ):
        with pytest.raises(kind, match=message):
            sampling.draw_each(*parts, CAPTIONS, batch_size=1, **options)


class GenerateError(torch.OutOfMemoryError):
    """As `generate` raises it; fits: images of each caption."""

    def __init__(self, fits):
        super().__init__(f"generating ...: num_images={fits} would fit")
        self.fits = fits


@pytest.mark.parametrize(
    ("error", "num_images", "batch_size", "message"),
    [
        (GenerateError(2), 6, 64, r"drawing 30 images at once .* free on cpu: batch_size=10 would fit$"),
        (GenerateError(2), 6, 12, r"drawing 12 images at once .* free on cpu: batch_size=4 would fit$"),
        (GenerateError(3), 512, 64, r"drawing 64 images at once .* free on cpu: batch_size=3 would fit$"),
        (GenerateError(0), 6, 64, r"drawing 30 images at once .* free on cpu: try batch_size=2$"),
        (GenerateError(0), 6, 1, r"drawing 1 images at once .* free on cpu: not even one fits$"),
        (MemoryError("x"), 6, 64, r"drawing 30 images at once ran out of memory: try batch_size=15 \(x\)$"),
    ],
)
def test_a_batch_that_does_not_fit_is_told_as_the_callers_own(
    parts, monkeypatch, error, num_images, batch_size, message
):
    def generate(text, **_):
        if len(text):  # not the first call, which looks at the options
            raise error

    monkeypatch.setattr(parts[0], "generate", generate)
    for guidance in (None, 2.0):
        with pytest.raises(sampling.DoesNotFit, match=message) as caught:
            sampling.draw(*parts, CAPTIONS, num_images=num_images, batch_size=batch_size, guidance=guidance)
    number = re.search(r"batch_size=(\d+)", message)
    assert (caught.value.argument is None) == (number is None)
    assert number is None or caught.value.fits == int(number[1])


def test_pictures_that_cannot_be_held_are_refused_before_any_is_drawn(parts, monkeypatch):
    monkeypatch.setattr(parts[0], "generate", lambda *_, **__: pytest.fail("drawn in vain"))
    with pytest.raises(
        torch.OutOfMemoryError, match=r"1000000000 images of each of 5 captions take 1.21e\+04 GB, .* GB"
    ):
        sampling.draw(*parts, CAPTIONS, num_images=10**9)
    image = 3 * 12 * 12 * 4
    for free, advice in ((28 * image, "num_images=4 would fit"), (6 * image, "pass fewer captions")):
        monkeypatch.setattr(sampling, "free_memory", lambda device, free=free: free)
        with pytest.raises(torch.OutOfMemoryError, match=f"6 images of each of 5 captions .* free on cpu: {advice}"):
            sampling.draw(*parts, CAPTIONS, num_images=6)
    for free, advice in ((11 * image, "num_images=5 would fit"), (image, "not even one fits")):  # one after another
        monkeypatch.setattr(sampling, "free_memory", lambda device, free=free: free)
        with pytest.raises(torch.OutOfMemoryError, match=f"6 images of a caption .* free on cpu: {advice}"):
            sampling.draw_each(*parts, CAPTIONS, num_images=6)
    for free, advice in ((21 * image, "num_images=5 would fit"), (13 * image, "pass fewer captions, or keep fewer")):
        monkeypatch.setattr(sampling, "free_memory", lambda device, free=free: free)
        with pytest.raises(
            sampling.DoesNotFit, match=f"6 .* 5 captions, 2 of them kept, take .* cpu: {advice}"
        ) as told:
            sampling.draw(*parts, CAPTIONS, num_images=6, keep=2)
        if told.value.argument:  # that many fit, and no more
            with pytest.raises(pytest.fail.Exception, match="drawn in vain"):
                sampling.draw(*parts, CAPTIONS, num_images=told.value.fits, keep=2)
    for free, advice in ((11 * image, "num_images=5 would fit"), (3 * image, "not even 2 fit")):
        monkeypatch.setattr(sampling, "free_memory", lambda device, free=free: free)
        with pytest.raises(sampling.DoesNotFit, match=f"6 images of a caption, 2 of them kept, .* on cpu: {advice}"):
            sampling.draw_each(*parts, CAPTIONS, num_images=6, keep=2)
    monkeypatch.undo()
    monkeypatch.setattr(sampling, "free_memory", lambda device: 10**15)
    with pytest.raises(ValueError, match="num_images must be at most 477218588 images of a caption, got 477218589"):
        sampling.draw(*parts, [], num_images=477218589)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_decoding_that_runs_out_of_memory_says_which_batch_to_try(parts, monkeypatch, error):
    dvae = parts[1]
    decode, fits = dvae.decode, 1

    def decode_few(codes):
        if len(codes) > fits:
            raise error
        return decode(codes)

    monkeypatch.setattr(dvae, "decode", decode_few)
    for batch_size, at_once, half in ((64, 5, 2), (3, 3, 1)):
        message = rf"decoding {at_once} images at once ran out of memory: try batch_size={half} \(.*memory\)"
        with pytest.raises(torch.OutOfMemoryError, match=message):
            sampling.draw(*parts, CAPTIONS, num_images=5, batch_size=batch_size)
    assert sampling.draw(*parts, CAPTIONS, num_images=2, batch_size=1).shape == (5, 2, 3, 12, 12)
    fits = 0
    with pytest.raises(torch.OutOfMemoryError, match="not even one fits"):
        sampling.draw(*parts, CAPTIONS, batch_size=8)
    error = RuntimeError("another one")
    with pytest.raises(RuntimeError, match="^another one"):
        sampling.draw(*parts, CAPTIONS)


@pytest.mark.parametrize(
    ("dvae", "vocab_size", "message"),
    [
        ({"num_codes": 12}, 27, "the dVAE has 12 codes, the transformer takes 11"),
        ({"image_size": 16}, 27, "the dVAE makes a grid of 4 x 4 codes, the transformer takes 3 x 3"),
        ({}, 31, "the tokenizer has 31 tokens, the transformer takes 30"),
    ],
)
def test_parts_of_different_models_are_refused_with_both_sides(parts, dvae, vocab_size, message):
    dvae = fnn.DiscreteVAE(dataclasses.replace(DVAE, **dvae))
    with pytest.raises(ValueError, match=message):
        sampling.draw(parts[0], dvae, types.SimpleNamespace(vocab_size=vocab_size), CAPTIONS)
    with pytest.raises(ValueError, match="the dVAE is on meta, the transformer on cpu: both must be on one device"):
        sampling.draw(parts[0], dvae.to("meta"), parts[2], CAPTIONS)


def test_a_grid_is_saved_row_by_row(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    images = torch.arange(6).view(2, 3, 1, 1, 1).expand(2, 3, 3, 4, 5) / 5
    sampling.save_grid(images, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (15, 8)
        assert [picture.getpixel((5 * c + 2, 4 * r + 2)) for r in range(2) for c in range(3)] == [
            (51 * k,) * 3 for k in range(6)
        ]
    sampling.save_grid(images[0, :, :1], tmp_path / "flat.png")  # grey; two columns, the last place stays black
    with Image.open(tmp_path / "flat.png") as picture:
        assert picture.size == (10, 8)
        assert [picture.getpixel(at)[0] for at in ((2, 2), (7, 2), (2, 6), (7, 6))] == [0, 51, 102, 0]
    with pytest.raises(ValueError, match=r"images must have shape \(N, C, H, W\) with N > 0 .* got \(0, 3, 4, 5\)"):
        sampling.save_grid(images[0, :0], tmp_path / "none.png")
    with pytest.raises(ValueError, match="images must have shape .* got ndarray"):
        sampling.save_grid(images.numpy(), tmp_path / "none.png")
    for columns, kind in ((-1, ValueError), (0, ValueError), (2.0, TypeError)):
        with pytest.raises(kind, match=f"columns must be .*, got {columns}"):
            sampling.save_grid(images, tmp_path / "none.png", columns)


@pytest.mark.parametrize(
    "error",
    [
        sampling.DoesNotFit("much", "batch_size", 3, known=False, reason=MemoryError("no room")),
        sampling.DoesNotFit("much", "num_images", 0, otherwise="pass fewer captions"),
        TooManyImages("too many", 2, 5, None),
    ],
    ids=str,
)
def test_what_does_not_fit_is_told_to_other_processes(error):
    """As a pool of processes does, which waits for ever for an exception that cannot be unpickled."""
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error)
