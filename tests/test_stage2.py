"""Stage 2: codes that are computed once, the objective, resuming bit for bit, and the command train-dalle."""

import argparse
import dataclasses
import errno
import fcntl
import io
import itertools
import json
import math
import os
import shutil
import signal
import sys
import threading
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import dalle_fast.nn as fnn
from dalle_fast import checkpoint, cli, outputs, sampling
from dalle_fast.checkpoint import CheckpointError
from dalle_fast.commands import train_dalle
from dalle_fast.data import Example, Tokenizer, loading, open_source
from dalle_fast.data.crops import caption_crop
from dalle_fast.data.strings import Strings
from dalle_fast.errors import UserError
from dalle_fast.nn import dalle
from dalle_fast.outputs import held
from dalle_fast.training import DALLEObjective, DALLERecipe, LoopSettings, codes, loop, stage2, train
from dalle_fast.training.codes import encode_source
from dalle_fast.training.recipes import DALLE_RECIPES

pytestmark = pytest.mark.usefixtures("one_thread")

VAE = fnn.DVAEConfig(image_size=16, downsampling=4, num_codes=12, embedding_dim=4, hidden=16, blocks_per_group=1)
SMALL = fnn.DALLEConfig(
    vocab_size=300, text_len=30, num_codes=12, grid=4, layers=2, width=16, num_heads=2, head_dim=8, kernel_size=3
)
RECIPE = DALLERecipe(
    steps=12, batch_size=4, learning_rate=1e-2, warmup_share=0.25, ema_decay=0.9, ema_every=2, caption_dropout=0.3
)
QUIET = {"tensorboard": False, "progress": False}


class FewShapes(NamedTuple):
    """A source of a handful of scenes."""

    source: object
    size: int
    crop: bool = False
    name: str = "shapes"

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return self.source[index]


def few(split="train", size=8, image_size=16, **fields):
    return FewShapes(open_source("shapes", image_size=image_size, split=split), size, **fields)


def make_dvae(seed=0):
    """With weights for which the codes of ten pictures differ."""
    torch.manual_seed(seed + 9)
    model = fnn.DiscreteVAE(VAE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.1)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def dvae():
    return make_dvae()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([few(size=60)[index].caption for index in range(60)], 300)


@pytest.fixture(scope="module")
def encoded(dvae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("codes")
    sizes = {"train": 10, "validation": 7}
    return [encode_source(dvae, few(s, n), folder=folder, split=s, progress=False) for s, n in sizes.items()]


@pytest.fixture
def objective(dvae, tokenizer, encoded):
    def make(recipe=RECIPE, config=SMALL, dvae=dvae, tokenizer=tokenizer, encoded=encoded, **options):
        return DALLEObjective(config, recipe, dvae, tokenizer, *encoded, **options)

    return make


def test_what_is_no_codes_is_refused(objective, encoded):
    with pytest.raises(
        TypeError, match="validation must be codes and captions, as encode_source makes .* got FewShapes"
    ):
        objective(encoded=[encoded[0], few()])


# -- codes -------------------------------------------------------------------------------------------------------------


def test_codes_and_captions_are_those_of_the_pictures(dvae, encoded):
    assert len({tuple(row) for row in encoded[0].codes.tolist()}) == 10  # else the comparison says nothing
    for split, some in zip(("train", "validation"), encoded):
        source = few(split, len(some.codes))
        of_caption = {}
        for image, caption in (source[index] for index in range(len(source))):
            pixels = torch.from_numpy(image).movedim(-1, 0)[None].float() / 255
            of_caption[caption] = dvae.encode(pixels).flatten()
        assert some.codes.dtype == torch.int16 and sorted(some.captions) == sorted(of_caption)
        for row, caption in zip(some.codes, some.captions):
            assert torch.equal(row.long(), of_caption[caption])
    assert encoded[1].captions == [few("validation", 7)[index].caption for index in range(7)]  # in order


def forbid(*_, **__):
    raise AssertionError("the codes were computed again")


def test_codes_are_computed_once(dvae, tmp_path, monkeypatch):
    source = few(size=9)
    first = encode_source(dvae, source, folder=tmp_path, split="train", progress=False)
    monkeypatch.setattr(codes, "_encode", forbid)
    again = encode_source(dvae, source, folder=tmp_path, split="train", progress=False)
    assert torch.equal(first.codes, again.codes) and first[1:] == again[1:]
    assert len(list(tmp_path.iterdir())) == 1


class Repainted(FewShapes):
    """The same scenes, but for one pixel."""

    def __getitem__(self, index):
        image, caption = self.source[index]
        image = image.copy()
        image[0, 0] = 7
        return Example(image, caption)


@pytest.mark.parametrize("change", ["dvae", "count", "seed", "split", "length", "pictures"])
def test_what_was_computed_from_something_else_is_not_taken(dvae, tmp_path, change):
    keywords = {"folder": tmp_path, "split": "validation", "count": 5, "seed": 1, "progress": False}
    first = encode_source(dvae, few(size=9), **keywords)
    source = {"length": few(size=8), "pictures": Repainted(*few(size=9))}.get(change, few(size=9))
    keywords |= {"count": {"count": 6}, "seed": {"seed": 2}, "split": {"split": "train"}}.get(change, {})
    second = encode_source(make_dvae(1) if change == "dvae" else dvae, source, **keywords)
    assert first.key != second.key and len(list(tmp_path.iterdir())) == 2
    if change == "dvae":
        assert not torch.equal(first.codes, second.codes)


def test_codes_are_read_where_nothing_can_be_written(dvae, tmp_path, monkeypatch):
    first = encode_source(dvae, few(), folder=tmp_path, split="train", progress=False)
    monkeypatch.setattr(codes, "make_folder", forbid)
    assert torch.equal(encode_source(dvae, few(), folder=tmp_path, split="train", progress=False).codes, first.codes)


def test_a_damaged_file_is_computed_again(dvae, tmp_path, capsys):
    first = encode_source(dvae, few(), folder=tmp_path, split="train", progress=False)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    again = encode_source(dvae, few(), folder=tmp_path, split="train", progress=False)
    assert torch.equal(first.codes, again.codes) and path.read_bytes() == whole
    assert "computing the codes again" in capsys.readouterr().err


def test_what_cannot_be_read_is_not_damaged(dvae, tmp_path, monkeypatch):
    """As another user's file, which could not be replaced either. (Tests may be root's, who may read all.)"""
    encode_source(dvae, few(), folder=tmp_path, split="train", progress=False)
    (path,) = tmp_path.iterdir()
    path.unlink()
    path.mkdir()
    monkeypatch.setattr(codes, "batches", forbid)
    with pytest.raises(OSError, match=path.name):
        encode_source(dvae, few(), folder=tmp_path, split="train", progress=False)


@pytest.mark.parametrize("terminal", [False, True])
def test_codes_are_computed_if_no_one_can_be_told(dvae, tmp_path, monkeypatch, terminal):
    """As behind `| head`, or where a terminal was closed or stderr was from the start."""

    class Gone(io.StringIO):
        def isatty(self):
            return terminal

        def write(self, text):
            raise BrokenPipeError

    for number, gone in enumerate((Gone(), None)):
        monkeypatch.setattr(sys, "stderr", gone)
        assert len(encode_source(dvae, few(), folder=tmp_path / str(number), split="train").codes) == len(few())


def test_a_full_disk_leaves_no_half_of_a_file(dvae, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(outputs, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        encode_source(dvae, few(), folder=tmp_path, split="train", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_other_codes_is_not_taken(dvae, tmp_path, capsys):
    """Were it to have the name of these."""
    files = []
    for seed in (1, 2):
        known = set(tmp_path.glob("*.safetensors"))
        wanted = encode_source(dvae, few(), folder=tmp_path, split="train", seed=seed, progress=False)
        files += set(tmp_path.glob("*.safetensors")) - known
    files[1].unlink()  # what was returned is mapped from it
    files[1].write_bytes(files[0].read_bytes())
    again = encode_source(dvae, few(), folder=tmp_path, split="train", seed=2, progress=False)
    assert torch.equal(again.codes, wanted.codes) and again.captions == wanted.captions
    assert "computing the codes again" in capsys.readouterr().err


def test_the_seed_decides_the_order(dvae, tmp_path):
    first, second = (
        encode_source(dvae, few(), folder=tmp_path, split="train", seed=seed, progress=False) for seed in (1, 2)
    )
    assert first.captions != second.captions and sorted(first.captions) == sorted(second.captions)


class Captioned(FewShapes):
    """Scenes with other captions."""

    captions = ("", "ünder", "雨", "")

    def __getitem__(self, index):
        return self.source[index]._replace(caption=self.captions[index])


class Uncaptioned(Captioned):
    captions = ("",) * 4


@pytest.mark.parametrize("kind", [Captioned, Uncaptioned])
def test_captions_come_back_from_the_file_as_they_were(dvae, tmp_path, monkeypatch, kind):
    folder = tmp_path / "made" / "where it is missing"
    for _ in range(2):
        encoded = encode_source(dvae, kind(*few("validation", 4)), folder=folder, split="validation", progress=False)
        assert encoded.captions == list(kind.captions)
        monkeypatch.setattr(codes, "_encode", forbid)


@pytest.mark.parametrize(("num_codes", "dtype"), [(1 << 15, torch.int16), ((1 << 15) + 1, torch.int32)], ids=str)
def test_the_last_code_of_a_large_codebook_is_kept(tmp_path, num_codes, dtype):
    config = dataclasses.replace(VAE, num_codes=num_codes, embedding_dim=1, hidden=4)
    dvae = fnn.DiscreteVAE(config).requires_grad_(False)
    dvae.encoder.blocks.output.conv.b[-1] = 1e3
    encoded = encode_source(dvae, few(size=2), folder=tmp_path, split="train", progress=False)
    assert encoded.codes.dtype == dtype and (encoded.codes == num_codes - 1).all()


def test_a_model_is_known_by_its_config_too(dvae):
    other = fnn.DiscreteVAE(dataclasses.replace(VAE, likelihood="l1"))
    other.load_state_dict(dvae.state_dict())
    assert codes.fingerprint(other) != codes.fingerprint(dvae) == codes.fingerprint(make_dvae())


class Ended(Exception):
    pass


@pytest.mark.parametrize("split", ["train", "validation"])
def test_what_was_computed_before_the_process_ended_is_kept(dvae, tmp_path, monkeypatch, split):
    monkeypatch.setattr(codes, "BATCH", 2)
    monkeypatch.setattr(codes, "SAVE_SECONDS", -1)
    whole = encode_source(dvae, few(size=9), folder=tmp_path / "whole", split=split, progress=False)
    encode, seen = dvae.encode, []

    def ending(images, calls):
        if not next(calls):
            raise Ended
        seen.append(len(images))
        return encode(images)

    for batches in (2, 1):
        calls = iter([True] * batches + [False])
        monkeypatch.setattr(dvae, "encode", lambda images, calls=calls: ending(images, calls))
        with pytest.raises(Ended):
            encode_source(dvae, few(size=9), folder=tmp_path / "parts", split=split, progress=False)
    assert len(list((tmp_path / "parts").iterdir())) == 3
    monkeypatch.setattr(dvae, "encode", lambda images: seen.append(len(images)) or encode(images))
    resumed = encode_source(dvae, few(size=9), folder=tmp_path / "parts", split=split, progress=False)
    assert len(seen) == 5  # each batch once
    assert torch.equal(resumed.codes, whole.codes) and resumed[1:] == whole[1:]
    ours, theirs = (list((tmp_path / name).iterdir()) for name in ("parts", "whole"))
    assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]


@pytest.mark.parametrize("batch", [2, 4])
def test_a_damaged_part_is_computed_again(dvae, tmp_path, monkeypatch, batch):
    """And one of batches of another size."""
    monkeypatch.setattr(codes, "BATCH", 2)
    monkeypatch.setattr(codes, "SAVE_SECONDS", -1)
    whole = encode_source(dvae, few(size=9), folder=tmp_path / "whole", split="train", progress=False)
    with monkeypatch.context() as patch, pytest.raises(Ended):
        calls = iter([True, True, True])
        patch.setattr(dvae, "encode", lambda images, e=dvae.encode: e(images) if next(calls, False) else raise_ended())
        encode_source(dvae, few(size=9), folder=tmp_path / "parts", split="train", progress=False)
    second = sorted((tmp_path / "parts").iterdir())[1]
    second.write_bytes(second.read_bytes()[:-10])
    monkeypatch.setattr(codes, "BATCH", batch)
    again = encode_source(dvae, few(size=9), folder=tmp_path / "parts", split="train", progress=False)
    assert torch.equal(again.codes, whole.codes) and again.captions == whole.captions


def test_of_parts_that_overlap_one_is_taken(dvae, tmp_path, monkeypatch):
    """As two runs leave them where the folder cannot be held; what is not in it is computed again."""
    monkeypatch.setattr(codes, "BATCH", 2)
    whole = encode_source(dvae, few(size=9), folder=tmp_path, split="train", progress=False)
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()
    some, captions = whole.codes.clone(), [*whole.captions]
    path.unlink()
    for first, end in ((0, 3), (2, 4)):  # of five batches
        part = codes.Encoded(
            some[2 * first : 2 * end], Strings.of(captions[2 * first : 2 * end]), codes._key_of_part(whole.key, first)
        )
        codes._write(codes._part(path, first), part)
    seen, encode = [], dvae.encode
    monkeypatch.setattr(dvae, "encode", lambda images: seen.append(len(images)) or encode(images))
    encode_source(dvae, few(size=9), folder=tmp_path, split="train", progress=False)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before] and seen == [2, 1]


def test_what_a_process_left_that_was_killed_before_it_removed_its_parts_is_removed(dvae, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Ended):
        patch.setattr(codes, "_remove_parts", lambda path: raise_ended())
        encode_source(dvae, few(), folder=tmp_path, split="train", progress=False)
    path = codes.path_of(tmp_path, codes.key_of(dvae, few(), split="train", count=None, seed=0))
    (tmp_path / f".writing-{path.stem}-part-000000007.safetensors").write_bytes(b"cut short")
    assert len(list(tmp_path.iterdir())) == 3
    other = os.open(tmp_path, os.O_RDONLY)  # as another process has it, at work on other codes
    fcntl.flock(other, fcntl.LOCK_EX)
    encode_source(dvae, few(), folder=tmp_path, split="train", progress=False)
    assert len(list(tmp_path.iterdir())) == 3
    os.close(other)
    encode_source(dvae, few(), folder=tmp_path, split="train", progress=False)
    assert list(tmp_path.iterdir()) == [path]


def raise_ended():
    raise Ended


def test_another_process_that_wants_the_same_codes_waits(dvae, tmp_path, capsys):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(encode_source(dvae, few(), folder=tmp_path, split="train", progress=False))
    )
    with held(tmp_path, "the folder"):
        thread.start()
        thread.join(0.5)
        assert thread.is_alive() and not results
    thread.join(60)
    assert len(results) == 1 and "waiting for another process" in capsys.readouterr().err


@pytest.mark.parametrize(("split", "count"), [("train", None), ("train", 3), ("train", 200), ("validation", 9)])
def test_captions_are_known_ahead_of_the_pictures(dvae, tmp_path, split, count):
    """Those of the file that will be there, crops after crops; of a bad picture its own."""
    folder = captioned_folder(tmp_path / "data")
    source = open_source(str(folder), image_size=16, split=split, require_captions=True)
    chosen = {"split": split, "count": count, "seed": 1}
    names, captions = codes.captions_ahead(source, **chosen)
    encoded = encode_source(dvae, source, folder=tmp_path, progress=False, **chosen)
    assert captions == encoded.captions
    assert [*names] == [f"{caption}.png" for caption in captions]
    assert split != "train" or [*names] == sorted(names)  # as files are read from front to back
    other = next(number for number, name in enumerate(names) if name != names[0])
    (folder / f"{names[0]}").write_bytes(b"")
    (folder / f"{captions[other]}.txt").write_bytes(b"\xff")
    again = codes.captions_ahead(source, **chosen)
    assert again[0] == names and [again[1][0], again[1][other]] == [captions[0], ""]
    assert codes.captions_ahead(few(), **chosen) is None  # a source that cannot tell


def captioned_folder(path, **captions):
    """Of 60 pictures, each with its name without ending for a caption but for those given."""
    path.mkdir()
    for number in range(60):
        Image.fromarray(np.full((40, 30, 3), 4 * number, np.uint8)).save(path / f"s{number}.png")
        (path / f"s{number}.txt").write_text(captions.get(f"s{number}", f"s{number}"))
    return path


class Unsaid(list):
    """A source of these examples that does not say whether it can be cropped."""

    name = "unsaid"


def test_more_examples_than_pictures_are_further_crops(dvae, tmp_path):
    """Of a source that can be cropped; a drawn scene stays whole, so that its caption stays true."""
    large = few(size=5, image_size=48, crop=True)
    many = encode_source(dvae, large, folder=tmp_path, split="train", count=20, progress=False)
    assert len(many.codes) == len(many.captions) == 20 and len(set(many.captions)) == 5
    assert len({(caption, *row) for caption, row in zip(many.captions, many.codes.tolist())}) > 10
    unsaid = Unsaid(large[index] for index in range(5))
    assert len(encode_source(dvae, unsaid, folder=tmp_path, split="train", count=20, progress=False).codes) == 20
    for source, split in ((few(size=5), "train"), (few("validation", 5, 48, crop=True), "validation")):
        encoded = encode_source(dvae, source, folder=tmp_path, split=split, count=20, progress=False)
        assert len(encoded.codes) == encoded.key["count"] == 5


def test_training_codes_are_of_stage_2s_crops_and_known_by_them(dvae, tmp_path):
    """A drawn scene is not cropped: its codes are known by the key that they always had."""
    large, keywords = few(size=5, image_size=48, crop=True), {"split": "train", "count": 20}
    encoded = encode_source(dvae, large, folder=tmp_path, **keywords, progress=False)
    [batch] = itertools.islice(loading.batches(large, 20, image_size=16, seed=0, crop=caption_crop), 1)
    assert encoded.captions == batch.captions
    assert torch.equal(encoded.codes.long(), dvae.encode(batch.images.float() / 255).flatten(1))
    assert encoded.key["crop"] == "caption_crop"
    assert codes.key_of(dvae, large, split="validation", count=2, seed=0)["crop"] == "centre_crop"
    whole = codes.key_of(dvae, few(size=5), split="train", count=None, seed=0)
    assert whole.keys() == {"dvae", "data", "split", "count", "seed"}


# -- the objective -----------------------------------------------------------------------------------------------------


def test_a_batch_is_a_function_of_its_step(objective):
    o = objective()
    stream = o.batches(0)
    third = [next(stream) for _ in range(3)][2]
    for mine, other in zip(third, next(o.batches(2)), strict=True):
        assert torch.equal(mine, other)
    assert not torch.equal(third.codes, next(objective(seed=1).batches(2)).codes)


def test_a_batch_has_the_examples_codes_and_captions(objective, encoded, tokenizer):
    """An epoch shows each example once, and of a caption nothing is lost but what is hidden."""
    o = objective(dataclasses.replace(RECIPE, batch_size=10))
    batch = next(o.batches(0))
    known = {tuple(row): caption for row, caption in zip(encoded[0].codes.tolist(), encoded[0].captions)}
    assert sorted(map(tuple, batch.codes.tolist())) == sorted(known)
    for row, length, picture in zip(batch.text, batch.text_lengths, batch.codes.tolist()):
        assert length == 0 or tokenizer.decode(row[:length]) == known[tuple(picture)]


def test_dropout_of_words_and_of_captions(objective):
    plain = dataclasses.replace(RECIPE, batch_size=200, bpe_dropout=0.0, caption_dropout=0.0)
    lengths = {}
    for name, changes in {"plain": {}, "bpe": {"bpe_dropout": 0.1}, "hidden": {"caption_dropout": 0.3}}.items():
        stream = objective(dataclasses.replace(plain, **changes)).batches(0)
        lengths[name] = [next(stream).text_lengths for _ in range(2)]
    assert all((x > 0).all() for x in lengths["plain"] + lengths["bpe"])
    assert lengths["bpe"][0].float().mean() > lengths["plain"][0].float().mean() + 1
    assert lengths["bpe"][0].max() <= SMALL.text_len
    shares = [(x == 0).float().mean().item() for x in lengths["hidden"]]
    assert all(0.15 < share < 0.45 for share in shares) and not torch.equal(*[x == 0 for x in lengths["hidden"]])


def test_dropout_differs_between_steps_and_seeds(objective):
    """The same captions are cut otherwise, and other places of a batch are without one."""
    cut, hidden = [], []
    for seed, step in ((0, 0), (0, 1), (1, 0)):  # each an epoch, of which a batch is all
        for bpe, caption in ((0.3, 0.0), (0.0, 0.5)):
            recipe = dataclasses.replace(RECIPE, batch_size=10, bpe_dropout=bpe, caption_dropout=caption)
            batch = next(objective(recipe, seed=seed).batches(step))
            if bpe:
                cut.append(sorted(zip(batch.codes.tolist(), batch.text.tolist(), strict=True)))
            else:
                hidden.append((batch.text_lengths == 0).tolist())
    for seen in (cut, hidden):
        assert all(a != b for a, b in itertools.combinations(seen, 2))


def test_a_caption_that_dropout_makes_too_long_is_not_cut(objective, tokenizer, encoded):
    longest = int(tokenizer.encode([*encoded[0].captions, *encoded[1].captions], 99)[1].max())
    config = dataclasses.replace(SMALL, text_len=longest)
    o = objective(dataclasses.replace(RECIPE, bpe_dropout=0.9, caption_dropout=0.0, batch_size=10), config)
    batch = next(o.batches(0))
    captions = [tokenizer.decode(row[:length]) for row, length in zip(batch.text, batch.text_lengths)]
    assert sorted(captions) == sorted(encoded[0].captions)
    o.truncate = True  # which whoever sets it allows
    batch = next(o.batches(0))
    assert (batch.text_lengths == longest).all()


def test_captions_too_long_are_refused_or_cut(objective):
    config = dataclasses.replace(SMALL, text_len=4)
    with pytest.raises(ValueError, match=r"10 of 10 captions are longer than text_len 4, the longest has 28 "):
        objective(config=config)
    o = objective(config=config, truncate=True)
    batch = next(o.batches(0))
    assert batch.text.shape[1] == 4 and batch.text_lengths.max() == 4
    o.pictures(o.model, 64)  # of captions that are cut too


def test_a_long_caption_is_refused_before_its_turn_comes(objective, encoded):
    train_ = encoded[0]._replace(captions=[*encoded[0].captions[:-1], "a circle " * 20])
    message = r"1 of 10 captions are longer than text_len 30, .*: --text-len 120, better 156, .*, or --truncate"
    with pytest.raises(ValueError, match=message + "; it is 'a circle"):
        objective(encoded=[train_, encoded[1]])
    train_ = encoded[0]._replace(captions=[*encoded[0].captions[:-1], "caf\udcff"])
    with pytest.raises(ValueError, match="caption must be text in UTF-8"):
        objective(encoded=[train_, encoded[1]], truncate=True)


def test_weights_are_the_seeds(objective):
    torch.manual_seed(99)
    first = objective().model.state_dict()
    torch.manual_seed(98)
    for seed in (0, 1):
        other = objective(seed=seed).model.state_dict()
        assert all(torch.equal(tensor, other[name]) for name, tensor in first.items()) == (seed == 0)


def test_it_begins_with_the_weights_of_another(objective, tokenizer):
    """What a model has besides may be another: masks, and how losses are weighted."""
    first = objective().model
    torch.nn.init.normal_(first.transformer.blocks[0].attention.out.weight)
    before = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    o = objective(config=dataclasses.replace(SMALL, rules=("row", "causal"), text_weight=0.5), initial=first)
    assert all(torch.equal(tensor, before[name]) for name, tensor in o.model.state_dict().items())
    assert o.settings["initial"] == codes.fingerprint(first) and "initial" not in objective().settings
    with torch.no_grad():
        for parameter in o.model.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in first.state_dict().items())
    with pytest.raises(
        ValueError, match=r"initial must have the weights .*: \S+ is \(330, 16\), expected \(330, 32\); and \d+ more"
    ):
        objective(config=dataclasses.replace(SMALL, width=32, head_dim=16), initial=first)
    with pytest.raises(ValueError, match=r"is \(2, 2\), expected \(3, 2\); and 13 more differ"):
        objective(config=dataclasses.replace(SMALL, layers=3), initial=first)


def test_a_model_knows_whether_it_saw_empty_captions(objective, tmp_path):
    """In the file at the end, and in those of checkpoints. What began with another model may have seen some before."""
    never = dataclasses.replace(RECIPE, caption_dropout=0.0, steps=2)
    train(objective(never), tmp_path, LoopSettings(steps=2), **QUIET)
    for folder in (tmp_path, checkpoint.latest(tmp_path / checkpoint.CHECKPOINTS)):
        assert checkpoint.load_model(folder).trained_with == {"caption_dropout": 0.0}
    first = objective().model
    assert first.trained_with == {"caption_dropout": 0.3}
    assert objective(never, initial=first).model.trained_with == {}
    assert objective(initial=first).model.trained_with == {"caption_dropout": 0.3}


def test_settings_name_all_that_a_run_depends_on(objective):
    """What differs is one name."""
    settings = objective().settings
    for name, other in {
        "seed": objective(seed=1),
        "truncate": objective(truncate=True),
        "learning_rate": objective(dataclasses.replace(RECIPE, learning_rate=1e-3)),
        "bpe_dropout": objective(dataclasses.replace(RECIPE, bpe_dropout=0.5)),
        "model.num_heads": objective(config=dataclasses.replace(SMALL, num_heads=4)),
        "model.text_weight": objective(config=dataclasses.replace(SMALL, text_weight=0.5)),
    }.items():
        assert [x for x in settings | other.settings if settings.get(x) != other.settings.get(x)] == [name]


def test_the_loss_is_the_models(objective):
    o = objective(activation_checkpointing=True)
    assert o.model.transformer.activation_checkpointing
    batch = next(o.batches(0))
    loss, scalars = o.loss(batch, 0, 0)
    expected = o.model(batch.text, batch.codes, text_lengths=batch.text_lengths)
    assert {"loss": loss, **scalars} == expected._asdict()


def test_losses_of_the_validation_examples_are_means_over_their_tokens(objective, encoded, monkeypatch):
    """Of tokens, not of captions: these differ in length, and weights of this size in their losses."""
    captions = ["a", "a red circle and a blue square", "a", "", "a blue square above a green circle", "red", "a"]
    o = objective(encoded=[encoded[0], encoded[1]._replace(captions=captions)])
    model = o.model.eval()
    torch.nn.init.normal_(model.text_embedding.weight, generator=torch.Generator().manual_seed(0))
    whole = o.evaluate(model, 64)
    monkeypatch.setattr(stage2, "LEAST_POSITIONS", 0)
    in_parts = o.evaluate(model, 3)
    assert whole["examples"] == in_parts["examples"] == 7
    for name in ("text_loss", "image_loss"):
        assert in_parts[name] == pytest.approx(whole[name], rel=1e-5)
    text, lengths = o.validation_text
    logits, _ = model.logits(text, o.validation.codes.long(), text_lengths=lengths)
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), text, reduction="none")
    valid = torch.arange(SMALL.text_len) < lengths[:, None]
    assert whole["text_loss"] == pytest.approx(losses[valid].mean().item(), rel=1e-4)


def test_validation_without_words_has_no_loss_of_text(objective, encoded):
    o = objective(encoded=[encoded[0], encoded[1]._replace(captions=[""] * 7)])
    assert o.evaluate(o.model, 64)["text_loss"] == 0


def test_a_caption_that_comes_twice_is_shown_once(objective, encoded):
    captions = [*encoded[1].captions[:1] * 3, *encoded[1].captions[3:]]
    assert objective(encoded=[encoded[0], encoded[1]._replace(captions=captions)]).shown == captions[2:]


def test_pictures_show_the_first_captions(objective):
    o = objective()
    first, again = o.pictures(o.model.eval(), 64), o.pictures(o.model, 64)
    assert first.keys() == {"samples"} and np.array_equal(first["samples"], again["samples"])
    cell = 16 * 6 + 2  # pixels of a picture, six times as large, and the gap
    assert first["samples"].shape == (2 + 6 * cell, 2 + 6 * cell, 3) and len(set(o.shown)) == 6


def test_optimizer_and_schedule_are_the_papers(objective):
    o = objective()
    decays, others = o.parameter_groups()
    assert decays["weight_decay"] == 4.5e-2 and others["weight_decay"] == 0
    names = {id(p): name for name, p in o.model.named_parameters()}
    assert all("embedding" not in names[id(p)] and p.dim() > 1 for p in decays["params"])
    assert len(decays["params"]) + len(others["params"]) == len(names)
    assert o.adamw == {"betas": (0.9, 0.96), "eps": 1e-8}
    assert [o.learning_rate(step) for step in (0, 1, 2)] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2], rel=0.1)
    paper = DALLE_RECIPES["12b"]
    assert (paper.batch_size, paper.clip, paper.ema_decay, paper.ema_every) == (1024, 4.0, 0.99, 25)
    assert paper.learning_rate_at(5_000) == pytest.approx(4.5e-4, rel=1e-3) and paper.learning_rate_at(0) < 1e-6
    assert set(DALLE_RECIPES) == set(dalle.PRESETS)
    for recipe in DALLE_RECIPES.values():
        assert recipe.learning_rate_at(recipe.steps) == recipe.final_learning_rate


def test_it_learns(objective, tmp_path):
    recipe = dataclasses.replace(RECIPE, steps=60, batch_size=10, bpe_dropout=0.0, caption_dropout=0.0)
    train(objective(recipe), tmp_path, LoopSettings(steps=60, log_every=10), **QUIET)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["text_loss"] < log[0]["text_loss"] - 1
    assert log[-1]["image_loss"] < log[0]["image_loss"] - 0.3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda make: DALLERecipe(steps=0), ["steps must be at least 1, got 0"]),
        (lambda make: DALLERecipe(learning_rate=0.0), ["learning_rate", "positive", "0.0"]),
        (lambda make: DALLERecipe(clip=-1.0), ["clip", "-1.0"]),
        (lambda make: DALLERecipe(bpe_dropout=1.5), ["bpe_dropout", "from 0 to 1", "1.5"]),
        (lambda make: DALLERecipe(caption_dropout=math.nan), ["caption_dropout", "nan"]),
        (lambda make: make(config=dataclasses.replace(SMALL, num_codes=13)), ["12 codes", "13"]),
        (lambda make: make(config=dataclasses.replace(SMALL, grid=(4, 3))), ["4 x 4", "4 x 3"]),
        (lambda make: make(config=dataclasses.replace(SMALL, vocab_size=299)), ["300 tokens", "299"]),
        (lambda make: make(seed=-1), ["seed", "-1"]),
        (lambda make: encode_source(make_dvae(), few(), folder=".", split="train", count=0), ["count", "1", "0"]),
    ],
)
def test_bad_input(objective, make, words):
    with pytest.raises(ValueError) as caught:
        make(objective)
    for word in words:
        assert word in str(caught.value)


# -- resuming ----------------------------------------------------------------------------------------------------------


def contents(folder):
    """What must not depend on whether a run was interrupted."""
    last = checkpoint.latest(folder / checkpoint.CHECKPOINTS)
    paths = [folder / name for name in ("log.jsonl", "evaluation.json", checkpoint.MODEL)]
    paths += sorted((folder / "pictures").iterdir()) + sorted(last.iterdir())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_resuming_is_exact(objective, tmp_path):
    settings = LoopSettings(
        steps=12, log_every=3, checkpoint_every=5, ema_decay=0.9, ema_every=2, evaluate_every=4, picture_every=6
    )
    train(objective(), tmp_path / "whole", settings, **QUIET)
    for step, number in ((3, signal.SIGTERM), (7, signal.SIGINT)):
        o = objective()
        loss = o.loss

        def stopping(batch, at, part, loss=loss, step=step, number=number):
            if at == step:
                os.kill(os.getpid(), number)
            return loss(batch, at, part)

        o.loss = stopping
        assert train(o, tmp_path / "parts", settings, resume=True, **QUIET).step == step + 1
        torch.manual_seed(99)
    train(objective(), tmp_path / "parts", settings, resume=True, **QUIET)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize("scaling", [False, True], ids=["plain", "scaled blocks"])
def test_a_batch_in_parts_learns_what_the_whole_does(objective, tmp_path, scaling):
    """Of codes alone, whose losses are of as many tokens in every part; gradients that are clipped, too."""
    logs, weights = [], []
    for parts in (1, 2, 8):
        recipe = dataclasses.replace(RECIPE, steps=5, batch_size=8, bpe_dropout=0.0, clip=0.5)
        o = objective(recipe, dataclasses.replace(SMALL, text_weight=0.0))
        o.model.transformer.gradient_scaling = scaling
        settings = LoopSettings(steps=5, clip=0.5, log_every=1, precision="float32", accumulate=parts)
        train(o, tmp_path / str(parts), settings, **QUIET)
        logs.append([json.loads(line) for line in (tmp_path / str(parts) / "log.jsonl").read_text().splitlines()])
        weights.append(o.model.state_dict())
    assert logs[0][0]["gradient_norm"] > 0.5
    for log, other in zip(logs[1:], weights[1:], strict=True):
        for mine, whole in zip(log, logs[0], strict=True):
            for name in ("loss", "image_loss", "gradient_norm"):
                assert mine[name] == pytest.approx(whole[name], rel=1e-4), (mine["step"], name)
        for name, tensor in weights[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-3)


def test_gradient_scaling_changes_nothing_but_the_scales(objective, tmp_path):
    """In float32 scaling by powers of two is exact: the loop must take the scales out before it clips."""
    weights = []
    for scaling in (False, True):
        o = objective()
        o.model.transformer.gradient_scaling = scaling
        train(o, tmp_path / str(scaling), LoopSettings(steps=4), **QUIET)
        weights.append(dict(o.model.named_parameters()))
        assert (o.model.transformer.updates_at_scale == (4 if scaling else 0)).all()
    for name, parameter in weights[0].items():
        assert torch.equal(weights[1][name], parameter), name


def test_a_resumed_run_needs_the_same_codes_and_tokenizer(objective, tokenizer, tmp_path):
    settings = LoopSettings(steps=12, checkpoint_every=5)
    train(objective(), tmp_path / "run", settings, **QUIET)
    other = make_dvae(1)
    encoded = [encode_source(other, few(s), folder=tmp_path, split=s, progress=False) for s in ("train", "validation")]
    with pytest.raises(CheckpointError, match="codes.dvae '[0-9a-f]{64}', not '[0-9a-f]{64}'"):
        train(objective(dvae=other, encoded=encoded), tmp_path / "run", settings, resume=True, **QUIET)
    other = Tokenizer.train([few(size=60)[index].caption for index in range(60)], 299)
    with pytest.raises(CheckpointError, match="of a run with tokenizer '"):
        train(objective(tokenizer=other), tmp_path / "run", settings, resume=True, **QUIET)


# -- the command -------------------------------------------------------------------------------------------------------

FLAGS = ["--steps", "4", "--batch-size", "4", "--examples", "40", "--layers", "2", "--width", "16", "--num-heads", "2"]
FLAGS += ["--head-dim", "8", "--text-len", "30", "--vocab-size", "300", "--device", "cpu", "--no-tensorboard"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A VAE's folder, and a run of train-dalle with it."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "dvae").mkdir()
    checkpoint.export(folder / "dvae" / checkpoint.MODEL, make_dvae())
    assert command(folder / "dvae", folder / "dalle") == 0
    return folder / "dvae", folder / "dalle"


def command(dvae, out, *flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_dalle, "VALIDATION", 20)
        of_dvae = ["--dvae", dvae] if dvae else []
        arguments = ["train-dalle", "--data", "shapes", *of_dvae, "--out", out, *FLAGS, *flags]
        return cli.main([str(argument) for argument in arguments])


def test_a_run_is_all_that_generating_needs(folders):
    _, run = folders
    model = checkpoint.load_model(run, kind="DALLE")
    tokenizer = Tokenizer.load(run / sampling.TOKENIZER)
    assert model.config.vocab_size == tokenizer.vocab_size == 300
    assert (model.config.num_codes, model.config.grid) == (12, (4, 4))  # the VAE's
    copy = checkpoint.load_model(run / sampling.DVAE, kind="DiscreteVAE").state_dict()
    assert all(torch.equal(tensor, copy[name]) for name, tensor in make_dvae().state_dict().items())
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation.keys() == {"step", "examples", "text_loss", "image_loss"} and evaluation["examples"] == 20
    assert (run / "pictures" / "samples-000000004.png").exists()
    assert len((run / stage2.CAPTIONS).read_text().splitlines()) == stage2.SHOWN


def test_a_run_of_train_is_all_that_drawing_needs(objective, dvae, tmp_path):
    """As one of the command is. What it has is not replaced when it goes on."""
    made = objective()
    train(made, tmp_path, LoopSettings(steps=1), **QUIET)
    drawn = sampling.draw(*sampling.load(tmp_path), ["a red circle"], num_images=2, seed=1)
    trained = checkpoint.load_model(tmp_path)
    assert torch.equal(drawn, sampling.draw(trained, dvae, made.tokenizer, ["a red circle"], num_images=2, seed=1))
    (tmp_path / sampling.TOKENIZER).unlink()
    train(objective(), tmp_path, LoopSettings(steps=1), resume=True, **QUIET)
    with pytest.raises(UserError, match=f"{tmp_path} has no tokenizer.json"):
        sampling.load(tmp_path)


def test_resume_takes_codes_and_tokenizer_of_the_run(folders, monkeypatch, capsys):
    dvae, run = folders
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr(codes, "_encode", forbid)
    monkeypatch.setattr(Tokenizer, "train", forbid)
    assert command(dvae, run, "--resume") == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_resume_with_other_flags_is_refused_before_pictures_become_codes(folders, tmp_path, monkeypatch, capsys):
    """Each as the loop would refuse it, also where the newest checkpoint is damaged."""
    dvae, run = folders
    shutil.copytree(run, tmp_path / "run")
    monkeypatch.setattr(codes, "_encode", forbid)
    (tmp_path / "run" / train_dalle.CODES).rename(tmp_path / "moved")
    cases = {
        ("--seed", "1"): "of a run with codes.data 'shapes, ",
        ("--examples", "41"): "of a run with codes.count 40, not 41",
        ("--truncate",): "of a run with truncate False, not True",
        ("--layers", "3"): "of a run with model.layers 2, not 3",
        ("--learning-rate", "0.5"): "of a run with learning_rate 0.002, not 0.5",
    }
    checkpoints = tmp_path / "run" / checkpoint.CHECKPOINTS
    for torn in (False, True):
        if torn:
            state = shutil.copytree(checkpoints / "step-000000004", checkpoints / "step-000000005") / checkpoint.STATE
            state.write_text(state.read_text().replace('"seed": 0', '"seed": 1'))
        for flags, words in cases.items():
            assert command(dvae, tmp_path / "run", *flags, "--resume") == 2
            error = capsys.readouterr().err
            assert words in error and error.count("\n") == 1, error
            assert ("seed 0, not 1" in error) == (flags[0] == "--seed")


def test_a_tokenizer_can_be_given(folders, tmp_path):
    dvae, run = folders
    assert command(dvae, tmp_path, "--tokenizer", run / sampling.TOKENIZER, "--codes", run / train_dalle.CODES) == 0
    assert (tmp_path / sampling.TOKENIZER).read_bytes() == (run / sampling.TOKENIZER).read_bytes()
    assert not (tmp_path / train_dalle.CODES).exists()


def test_a_run_begins_with_another_ones_model(folders, tmp_path, capsys):
    """With its tokenizer and VAE; on other data, here of another seed. Its settings are those of the model."""
    dvae, run = folders
    other = ["--final-learning-rate", "0", "--seed", "1", "--truncate"]
    assert command(None, tmp_path / "more", "--init", run, "--learning-rate", "1e-12", *other) == 0
    for name in (sampling.TOKENIZER, f"{sampling.DVAE}/{checkpoint.MODEL}"):
        assert (tmp_path / "more" / name).read_bytes() == (run / name).read_bytes()
    old, new = (checkpoint.load_model(folder) for folder in (run, tmp_path / "more"))
    assert new.config == old.config
    for name, tensor in old.state_dict().items():
        torch.testing.assert_close(new.state_dict()[name], tensor, rtol=0, atol=1e-9)
    flags = ["--init", run, "--learning-rate", "1e-12", *other]
    assert command(None, tmp_path / "more", *flags, "--resume") == 0
    assert command(None, run, "--resume") == 0  # its own VAE
    capsys.readouterr()
    cases = {
        (None, tmp_path / "more", *flags[2:], "--dvae", dvae, "--resume"): "of a run with initial '",
        (
            None,
            tmp_path / "a",
        ): "--dvae must be given, the folder of a run of train-dvae, or --init, whose VAE is taken",
        (None, tmp_path / "b", "--init", dvae): "holds a DiscreteVAE, expected a DALLE",
        (None, tmp_path / "c", "--init", run, "--width", "32"): "initial must have the weights of the model that is",
        (None, tmp_path / "d", "--init", tmp_path / "none"): "none holds no model",
        (None, tmp_path / "e", "--init", run / "checkpoints" / "step-000000004"): "dvae holds no model",
    }
    for arguments, words in cases.items():
        assert command(*arguments) == 2, arguments
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith("dalle-fast: error: ") and words in line, (arguments, line)


def test_a_resumed_run_does_not_need_what_it_began_with(folders, tmp_path, capsys):
    """Nor its VAE and its tokenizer, of which the run has copies. The model is the one that it began with, too."""
    _, run = folders
    first = shutil.copytree(run, tmp_path / "first")
    flags = ["--init", first, "--codes", run / train_dalle.CODES, "--checkpoint-every", "2"]
    for out in ("whole", "ended"):
        assert command(None, tmp_path / out, *flags) == 0
    shutil.rmtree(tmp_path / "ended" / "checkpoints" / "step-000000004")
    (tmp_path / "ended" / checkpoint.MODEL).unlink()
    shutil.rmtree(first)
    assert command(None, tmp_path / "ended", *flags, "--resume") == 0
    for file in (checkpoint.MODEL, "log.jsonl", f"checkpoints/step-000000004/{checkpoint.STATE}"):
        assert (tmp_path / "ended" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    capsys.readouterr()
    of_dvae = ["train-dvae", "--data", "shapes", "--init", first, "--resume", "--device", "cpu"]
    assert cli.main([*map(str, of_dvae), "--out", str(tmp_path / "ended")]) == 2
    assert "ended holds a run of no DiscreteVAE of this version: " in capsys.readouterr().err


def test_masks_of_the_layers_can_be_chosen(folders, tmp_path, capsys):
    """They are the model's, and a run's that is resumed."""
    dvae, run = folders
    codes_ = ["--codes", run / train_dalle.CODES]
    flags = [
        *codes_,
        "--layers",
        "5",
        "--masks",
        "axial_row, column,conv_clip",
        "--last-mask",
        "causal",
        "--kernel-size",
        "3",
    ]
    assert command(dvae, tmp_path, *flags) == 0
    model = checkpoint.load_model(tmp_path)
    assert [mask.rule for mask in model.config.masks] == ["axial_row", "column", "conv_clip", "axial_row", "causal"]
    assert [mask.kernel_size for mask in model.config.masks] == [1, 1, 3, 1, 1]
    capsys.readouterr()
    assert command(dvae, tmp_path, *flags, "--last-mask", "row", "--resume") == 2
    error = capsys.readouterr().err
    assert "model.rules ['axial_row', 'column', 'conv_clip', 'axial_row', 'causal'], not [" in error
    assert "'row']" in error and error.count("\n") == 1


def test_the_papers_masks_are_the_default(folders):
    """Named or not, for a run that began without them too."""
    dvae, run = folders
    assert checkpoint.load_model(run).config.rules is None
    flags = ["--masks", train_dalle.MASKS, "--last-mask", train_dalle.LAST_MASK]
    assert command(dvae, run, "--resume", *flags) == 0
    for layers in range(1, 12):
        assert train_dalle._rules(*flags[1::2], layers) is None
        rules = train_dalle._rules(f"{train_dalle.MASKS},{train_dalle.MASKS}", train_dalle.LAST_MASK, layers)
        assert rules == tuple(mask.rule for mask in dataclasses.replace(SMALL, layers=layers).masks)


def test_what_the_user_can_put_right_is_one_line(folders, tmp_path, capsys):
    dvae, run = folders
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    other = tmp_path / "other"
    other.mkdir()
    checkpoint.export(other / checkpoint.MODEL, make_dvae(1))
    (tmp_path / "text.json").write_text("{}")
    cases = {
        (other, run): ["holds a run (step-000000004)", "resume it"],
        (other, run, "--resume"): ["began with another discrete VAE", "other"],
        (run, tmp_path / "out"): ["holds a DALLE, expected a DiscreteVAE"],
        (tmp_path / "nothing", tmp_path / "out"): ["nothing holds no model"],
        (dvae, tmp_path / "out", "--text-len", "4"): [
            "longer than text_len 4, the longest has",
            ", or --truncate; it is 'a ",
        ],
        (dvae, tmp_path / "out", "--examples", "0"): ["--examples must be at least 1, got 0"],
        (dvae, tmp_path / "out", "--workers", "-1"): ["--workers must be at least 0, got -1"],
        (dvae, tmp_path / "out", "--tokenizer", tmp_path / "text.json"): ["text.json: not a BPE tokenizer"],
        (dvae, tmp_path / "out", "--width", "0"): ["width must be at least 1, got 0"],
    }
    for arguments, words in cases.items():
        assert command(*arguments) == 2, arguments
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith("dalle-fast: error: ")
        for word in words:
            assert word in line, (arguments, line)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("split", ["train", "validation"])
def test_captions_are_refused_before_pictures_become_codes(folders, tmp_path, capsys, monkeypatch, split):
    """By a tokenizer that is given, and by one that is trained; the message names the picture."""
    dvae, run = folders
    stem = open_source(str(captioned_folder(tmp_path / "data")), image_size=16, split=split).named_caption(1)[1]
    data = captioned_folder(tmp_path / "long", **{stem: "a red circle " * 20})
    monkeypatch.setattr(codes, "_encode", forbid)
    for flags in ([], ["--tokenizer", run / sampling.TOKENIZER]):
        assert command(dvae, tmp_path / "out", "--data", data, "--examples", "200", *flags) == 2
        *_, line = capsys.readouterr().err.splitlines()
        assert " captions are longer than text_len 30, " in line
        assert "or --truncate; it is 'a red circle" in line and line.endswith(f"is that of {stem}.png")
    with pytest.raises(AssertionError, match="the codes were computed again"):
        command(dvae, tmp_path / "out", "--data", data, "--truncate")


def test_a_run_that_may_learn_by_heart_says_so(folders, tmp_path, capsys, monkeypatch):
    """By evaluations, unless flags say otherwise, and by a line where every picture is always seen in the same crop."""
    dvae, run = folders
    seen = []
    of_run = loop.TrainResult(0, None, {})
    monkeypatch.setattr(loop, "train", lambda _, __, settings, **___: seen.append(settings.evaluate_every) or of_run)
    for number, flags in enumerate(([], ["--steps", "39"], ["--steps", "39", "--evaluate-every", "0"])):
        assert command(dvae, tmp_path / str(number), "--codes", run / train_dalle.CODES, *flags) == 0
    assert seen == [0, 3, 0] and "crop" not in capsys.readouterr().err
    source = open_source(str(captioned_folder(tmp_path / "data")), image_size=16)
    for examples, steps, told in ((None, 300, True), (None, 200, False), (100, 300, False)):
        recipe = dataclasses.replace(RECIPE, steps=steps)
        train_dalle._tell_of_few_crops(argparse.Namespace(examples=examples), recipe, source)
        assert (f"--examples {10 * len(source)} takes ten crops" in capsys.readouterr().err) == told


@pytest.mark.parametrize(
    ("used", "num_codes", "warned"),
    [(12, 12, False), (11, 12, True), (16, 64, False), (163, 8192, True), (164, 8192, False)],
)
def test_how_many_codes_the_pictures_use_is_told(used, num_codes, warned, capsys):
    """Of codes that are counted part by part, and of all codes that an int16 holds."""
    of_each = torch.arange(num_codes - used, num_codes, dtype=torch.int16)
    train_dalle._tell_of_used_codes(of_each.repeat(9000 // used + 1)[:, None], num_codes)
    error = capsys.readouterr().err
    assert f"the pictures use {used} of {num_codes} codes\n" in error and ("collapsed" in error) == warned


def test_a_model_that_does_not_fit_is_refused_before_pictures_become_codes(folders, tmp_path, capsys, monkeypatch):
    _, run = folders
    monkeypatch.setattr(codes, "_encode", forbid)
    Tokenizer.train(["a red circle"], 260).save(tmp_path / "text.json")
    cases = {("--width", "32"): "is (330, 16), expected (330, 32)"}
    cases["--tokenizer", tmp_path / "text.json"] = "is (330, 16), expected (290, 16)"
    for flags, words in cases.items():
        assert command(None, tmp_path / "out", "--init", run, "--truncate", *flags) == 2
        error = capsys.readouterr().err
        assert "initial must have the weights of the model that is trained: " in error and words in error


def test_the_tokenizer_is_of_the_captions_whose_pictures_are_good(folders, tmp_path, capsys):
    """As all are, unless a picture is bad: then it is trained anew, not on what was read ahead."""
    dvae, _ = folders
    data = captioned_folder(tmp_path / "data", **{f"s{x}": "ab" * (x + 1) for x in range(60)})
    flags = ["--data", data, "--examples", "200", "--text-len", "150"]
    trained, train_ = [], Tokenizer.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tokenizer, "train", lambda *arguments: trained.append(arguments) or train_(*arguments))
        for bad in (False, True):
            if bad:
                first = open_source(str(data), image_size=16, require_captions=True)
                (data / first.named_caption(3)[0]).write_bytes(b"")
            assert command(dvae, tmp_path / str(bad), *flags) == 0
            assert len(trained) == 1 + 2 * bad
    for bad in (False, True):
        (kept,) = (tmp_path / str(bad) / train_dalle.CODES).glob("train-*")
        text, lengths = (checkpoint.load_tensors(kept)[0][name] for name in ("captions", "caption_lengths"))
        captions = [bytes(part.tolist()).decode() for part in text.split(lengths.tolist())]
        train_(captions, 300).save(tmp_path / "expected.json")
        found = tmp_path / str(bad) / sampling.TOKENIZER
        assert found.read_bytes() == (tmp_path / "expected.json").read_bytes()


def test_what_is_refused_after_pictures_became_codes_says_that_these_are_kept(folders, tmp_path, capsys, monkeypatch):
    dvae, _ = folders
    monkeypatch.setattr(codes, "captions_ahead", lambda *_, **__: None)  # as of a source that cannot tell
    assert command(dvae, tmp_path / "out", "--text-len", "4") == 2
    assert f"(the codes are kept, in {tmp_path / 'out' / train_dalle.CODES})" in capsys.readouterr().err
    monkeypatch.setattr(codes, "_encode", forbid)
    assert command(dvae, tmp_path / "out") == 0


def test_folders_and_a_tokenizer_are_refused_before_pictures_become_codes(folders, tmp_path, capsys, monkeypatch):
    dvae, run = folders
    (tmp_path / "file").write_text("{}")
    monkeypatch.setattr(codes, "_encode", forbid)
    cases = {
        (dvae, tmp_path / "file"): "--out must be a folder that can be written to, got",
        (dvae, tmp_path / "out", "--codes", tmp_path / "file"): "the folder of codes must be a folder that can",
        (dvae, tmp_path / "out", "--tokenizer", tmp_path / "file"): "file: not a BPE tokenizer",
        (dvae, tmp_path / "out", "--tokenizer", tmp_path / "nosuch"): "nosuch: not a BPE tokenizer",
        (dvae, tmp_path / "out", "--tokenizer", tmp_path / "unknown.json"): "must be 0 for a tokenizer with unk_token",
        (dvae, tmp_path / "out", "--vocab-size", "10"): "--vocab-size must be at least 257, got 10",
        (dvae, tmp_path / "out", "--width", "65536"): "the model does not fit: training keeps ",
        (dvae, tmp_path / "out", "--head-dim", "300"): "head_dim must be at most 128, got 300",
        (
            dvae,
            tmp_path / "out",
            "--masks",
            "row,diagonal",
        ): "--masks must be of causal, row, axial_row, column, conv_flat",
        (dvae, tmp_path / "out", "--accumulate", "0"): "accumulate must be at least 1, got 0",
        (dvae, tmp_path / "out", "--accumulate", "3"): "batch_size must be a multiple of --accumulate 3, got 4",
        (dvae, tmp_path / "out", "--masks", ""): "with commas between them, got ''",
        (dvae, tmp_path / "out", "--seed", "2000000"): "seed must be from 0 to 1048575, got 2000000",
        (dvae, tmp_path / "out", "--ema-decay", "1"): "ema_decay must be from 0 to below 1, got 1.0",
        (dvae, tmp_path / "out", "--max-skipped", "-1"): "max_skipped must be at least 0, got -1",
        (dvae, tmp_path / "out", "--learning-rate", "1e300"): "learning_rate must be a positive number below 1e+38",
    }
    tokenizer = json.loads((run / sampling.TOKENIZER).read_text())
    tokenizer["model"]["unk_token"] = "a"
    (tmp_path / "unknown.json").write_text(json.dumps(tokenizer))
    for arguments, words in cases.items():
        assert command(*arguments) == 2, arguments
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
