"""Sources of files and fonts: what they show, and what bad input gets."""

import gc
import io
import os
import pickle
import subprocess
import sys
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalle_fast.data import DataError, Example, emoji, images, open_source, stamps, tar
from dalle_fast.data.__main__ import main
from dalle_fast.data.folder import list_pictures
from dalle_fast.data.source import SPLITS, generator, identity

SIZE = 16


def picture(number=0, width=24, height=20):
    """Pixels that tell which picture it is."""
    return np.full((height, width, 3), number, np.uint8)


def encoded(pixels, kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def bomb(width=30_000, height=30_000):
    """A PNG that says it is enormous."""
    data = bytearray(encoded(picture()))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


BAD = {
    "empty": b"",
    "text": b"no picture",
    "truncated png": encoded(picture())[:-30],
    "truncated jpeg": encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), "JPEG")[:-900],
    "bomb": bomb(),
    "other format": encoded(picture(), "PPM"),
    "too small": encoded(picture(0, 24, SIZE - 1)),
}


@pytest.fixture
def folder(tmp_path):
    """folder(files): tmp_path/data with those files, name -> bytes."""

    def make(files):
        for name, data in files.items():
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return str(tmp_path / "data")

    return make


@pytest.fixture
def shard(tmp_path):
    """shard(files, name): a tar file of a list of (name, bytes or a TarInfo)."""

    def make(files, name="x.tar"):
        path = tmp_path / name
        with tarfile.open(path, "w") as tar:
            for entry, data in files:
                if isinstance(data, tarfile.TarInfo):
                    tar.addfile(data)
                else:
                    info = tarfile.TarInfo(entry)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        return str(path)

    return make


def many(count=40):
    return {f"{x:03}.png": encoded(picture(x)) for x in range(count)}


def both_splits(spec, **options):
    return [open_source(spec, image_size=SIZE, split=split, **options) for split in ("train", "validation")]


def numbers(source):
    return [int(source[index].image[0, 0, 0]) for index in range(len(source))]


# -- folders ------------------------------------------------------------------------------------------------------------


def test_a_folder_shows_every_picture_with_its_caption(folder):
    path = folder(
        {**many(), "a/b.JPG": encoded(picture(99), "JPEG"), "a/b.txt": "\ufeff A  dog,\nünder\n".encode(), "c.md": b"x"}
    )
    train, validation = both_splits(path)
    assert (len(train), len(validation)) == (40, 1)
    assert sorted(numbers(train) + numbers(validation)) == [*range(40), 99]
    captions = {
        int(e.image[0, 0, 0]): e.caption
        for source in (train, validation)
        for e in map(source.__getitem__, range(len(source)))
    }
    assert captions.pop(99) == "A dog, ünder"
    assert set(captions.values()) == {""}
    assert np.array_equal(pickle.loads(pickle.dumps(train))[3].image, train[3].image)


def test_data_is_known_by_what_it_is_not_by_where_it_lies(folder, tmp_path, monkeypatch):
    path = folder({f"{x}.png": encoded(picture(x)) for x in range(40)})
    known = identity(open_source(path, image_size=SIZE))
    monkeypatch.chdir(tmp_path)
    assert known == identity(open_source("data/", image_size=SIZE)) and known.startswith("data, 38 pictures, ")
    os.mkdir("beside")
    for place, name in (("data", "."), ("data", "./"), ("beside", "../data"), ("data", "../data/.")):
        monkeypatch.chdir(tmp_path / place)
        assert identity(open_source(name, image_size=SIZE)) == known
    (tmp_path / "data" / "below").mkdir()
    monkeypatch.chdir(tmp_path / "data" / "below")
    assert identity(open_source("..", image_size=SIZE)) == known
    monkeypatch.chdir(tmp_path)
    os.rmdir("data/below")
    for name in os.listdir("data"):
        (tmp_path / "data" / name).write_bytes(encoded(picture(7)))
    assert identity(open_source("data", image_size=SIZE)) != known


@pytest.mark.parametrize("captions", [True, False])
def test_files_are_known_by_names_sizes_and_a_few_of_their_bytes(either, monkeypatch, captions):
    """Not by what a decoder makes of them; and captions count where they are read."""

    def known(changed):
        return identity(open_source(either(files | changed), image_size=SIZE, captions=captions))

    files = {**many(100), **{f"{x:03}.txt": b"a" for x in range(100)}}
    before = known({})
    with monkeypatch.context() as patch:
        patch.setattr(images, "decode", None)
        assert known({}) == before
    assert len({before, *(known({f"{x:03}.png": files[f"{x:03}.png"] + b"x"}) for x in range(10))}) == 11
    changed = {before, *(known({f"{x:03}.txt": b"ab"}) for x in range(10))}
    assert len(changed) == (11 if captions else 1)
    names = [f"{x:03}.txt" for x in range(100)]
    assert (known(dict.fromkeys(names, b"b")) == before) == (not captions)


class Listed(list):
    """A source of these examples."""

    name = "data"


def test_of_a_few_pictures_each_counts():
    """Its pixels, its shape and its caption."""
    examples = [Example(picture(x), f"number {x}") for x in range(10)]
    known = identity(Listed(examples))
    assert identity(Listed(examples)) == known == "data, 10 pictures, f48c835e28fbcc7a"  # as runs of before have it
    for x in range(10):
        for other in (picture(99), f"number {x}"), (picture(x, 20, 24), f"number {x}"), (picture(x), "another"):
            changed = [*examples[:x], Example(*other), *examples[x + 1 :]]
            assert identity(Listed(changed)) != known


def test_links_to_folders_are_followed_once_and_hidden_folders_are_not_looked_at(folder, tmp_path):
    path = folder({"a.png": encoded(picture(1)), "b/.c/d.png": encoded(picture(2)), "../e/f.png": encoded(picture(3))})
    (tmp_path / "data" / "link").symlink_to(tmp_path / "e")
    (tmp_path / "data" / "b" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "e" / "back").symlink_to(tmp_path / "e")
    assert list_pictures(path)[0] == ["a.png", "link/f.png"]


def test_a_split_does_not_depend_on_seed_or_place(folder, tmp_path):
    first = [numbers(source) for source in both_splits(folder(many()), seed=1)]
    os.rename(tmp_path / "data", tmp_path / "moved")
    assert [numbers(source) for source in both_splits(str(tmp_path / "moved"), seed=2)] == first


@pytest.mark.parametrize("least, most, step", [(3, 300, 1), (38_000, 90_000, 2_000)])
def test_pictures_that_were_trained_on_are_never_withheld_when_others_are_added(least, most, step):
    names = [f"{x}.jpg" for x in range(most)]
    trained = set()
    for count in range(least, most, step):
        train, validation = ({*images.in_split(names[:count], split, "data")} for split in SPLITS)
        assert train and validation and train | validation == {*range(count)} and len(train) + len(validation) == count
        assert not trained & validation
        trained |= train


def test_a_twentieth_is_withheld_and_of_many_pictures_one_or_two_thousand():
    names = [f"{x}.jpg" for x in range(400_000)]
    for count, least, most in (
        (2, 1, 1),
        (1_000, 30, 70),
        (40_000, 1_900, 2_100),
        (100_000, 900, 2_100),
        (400_000, 900, 2_100),
    ):
        assert least <= len(images.in_split(names[:count], "validation", "data")) <= most
    assert len(images.in_split(names[:1_000], "validation", "emoji", grows=False)) == 50


def test_a_name_that_is_no_text_is_a_name(folder):
    path = folder({**many(), os.fsdecode(b"\xff.png"): encoded(picture(77))})
    assert 77 in [number for source in both_splits(path) for number in numbers(source)]


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_picture_is_replaced_and_counted_once(folder, kind):
    path = folder({**many(), "bad.png": BAD[kind]})
    sources = both_splits(path)
    shown = [number for source in sources for number in numbers(source)]
    assert set(shown) == set(range(40))
    assert len(shown) == 41
    assert [numbers(source) for source in sources] == [numbers(source) for source in both_splits(path)]
    [reason] = [reason for source in sources for reason in source.bad.values()]
    assert sum(source.replaced for source in sources) == 1
    assert {
        "bomb": "more than 67108864 pixels: Image size (900000000 pixels)",
        "too small": "24 x 15 pixels, smaller than the crop of 16",
    }.get(kind, "") in reason
    assert not any(isinstance(name, str) for source in sources for name in source.bad)


def test_the_replacement_is_the_next_good_one(folder):
    source = open_source(folder({**many(60), "bad.png": b""}), image_size=SIZE)
    order = [source.names[number] for number in source._numbers]
    at = order.index("bad.png")
    assert np.array_equal(source[at].image, source[(at + 1) % len(source)].image)


def test_more_than_the_allowed_share_is_an_error_that_names_the_first(folder):
    path = folder({**many(40), **{f"bad{x}.png": BAD["text"] for x in range(3)}})
    source = open_source(path, image_size=SIZE, max_bad_share=0.04)
    with pytest.raises(
        DataError, match=r"2 of \d+ pictures looked at are bad, of 43 in all.*first is bad\d.png: not a picture of PNG"
    ):
        numbers(source)
    tolerant = open_source(path, image_size=SIZE, max_bad_share=0.1)
    numbers(tolerant)
    assert 1 <= tolerant.replaced <= 3
    numbers(tolerant)
    assert tolerant._seen == len(tolerant)  # once each


def test_many_bad_pictures_are_an_error_soon(folder):
    path = folder({f"{x}.png": b"" for x in range(1_000)})
    with pytest.raises(DataError, match=r"38 of 38 pictures looked at are bad, of 1000 in all"):
        open_source(path, image_size=SIZE)[0]


def test_many_bad_pictures_in_a_row_are_an_error_among_many_good_ones():
    class Rotten(images.Pictures):
        def read(self, number):
            if number in self._numbers[900:938]:
                raise images.BadImage("rotten")
            return Example(picture(), "")

    source = Rotten("rotten", [str(x) for x in range(1_000)], split="train", max_bad_share=0.05)
    for index in range(900):
        source[index]
    with pytest.raises(DataError, match="rotten: 38 pictures in a row are bad, of 1000 in all, .* first is .*: rotten"):
        source[900]


def looked_at(share, *, seed, count=20_000):
    """How many pictures of a large source are looked at until it is refused, or None; a share of them is bad."""
    source = images.Pictures("data", range(count), split="train", max_bad_share=0.05)
    bad = np.zeros(count, bool)
    bad[: round(share * count)] = True
    bad = np.cumsum(generator(seed, 0).permutation(bad))
    refused = (seen for seen in range(1, count + 1) if source._too_many(int(bad[seen - 1]), seen))
    return next(refused, None)


def test_a_share_of_bad_pictures_that_is_allowed_is_not_refused_by_chance(monkeypatch):
    monkeypatch.setattr(images, "in_split", lambda names, *_, **__: names)
    assert [looked_at(0.049, seed=seed) for seed in range(20)] == [None] * 20
    assert max(looked_at(0.1, seed=seed) for seed in range(20)) < 2_000
    assert max(looked_at(0.5, seed=seed) for seed in range(20)) < 100


def test_nothing_but_bad_pictures_is_an_error_whatever_share_is_allowed(folder):
    path = folder({f"{x}.png": b"" for x in range(5)})
    with pytest.raises(DataError, match="all 4 pictures of the split are bad, of 5 in all"):
        open_source(path, image_size=SIZE, max_bad_share=1)[0]


def test_a_picture_that_cannot_be_opened_is_a_bad_one(folder, tmp_path):
    path = folder(many(60))
    (tmp_path / "data" / "link.png").symlink_to("nothing")
    os.mkfifo(tmp_path / "data" / "pipe.png")
    sources = both_splits(path)
    for source in sources:
        numbers(source)
    assert sum(source.replaced for source in sources) == 2


@pytest.mark.parametrize(
    "files, message",
    [({}, "no such folder or tar file"), ({"a.md": b"x", "b.txt": b"y"}, "no pictures in it; looked for .png, .jpg")],
)
def test_nothing_there_is_an_error(folder, tmp_path, files, message):
    folder(files)
    with pytest.raises(DataError, match=message):
        open_source(tmp_path / "data", image_size=SIZE)


def test_an_empty_folder_and_a_single_file_are_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no pictures in it"):
        open_source(tmp_path / "empty", image_size=SIZE)
    (tmp_path / "a.png").write_bytes(encoded(picture()))
    with pytest.raises(DataError, match="a.png: neither a folder nor a .tar file"):
        open_source(tmp_path / "a.png", image_size=SIZE)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_folder_is_an_error(folder, tmp_path):
    path = folder(many(2))
    os.chmod(path, 0)
    try:
        with pytest.raises(DataError, match="cannot be read"):
            open_source(path, image_size=SIZE)
    finally:
        os.chmod(path, 0o700)


def test_one_picture_is_for_training(folder):
    path = folder(many(1))
    assert len(open_source(path, image_size=SIZE)) == 1
    with pytest.raises(DataError, match="no pictures for the split 'validation', of 1 in all"):
        open_source(path, image_size=SIZE, split="validation")


def test_required_captions(folder):
    path = folder(many(40))
    with pytest.raises(DataError, match="none of its 40 pictures has a caption"):
        open_source(path, image_size=SIZE, require_captions=True)
    folder({f"{x:03}.txt": b"a caption" for x in range(2, 40)} | {"000.txt": b" \n", "001.txt": b"\xff\xfe"})
    sources = both_splits(path, require_captions=True)
    shown = {source[index].caption for source in sources for index in range(len(source))}
    assert shown == {"a caption"}
    reasons = sorted(reason for source in sources for reason in source.bad.values())
    assert reasons[0] == "it has no caption"
    assert reasons[1].startswith("its caption is not UTF-8")


def names_of(source):
    return {source.names[number] for number in source._numbers}


def test_pictures_without_captions_are_left_out_where_captions_are_required(either, capsys):
    """They are no bad pictures, and the others stay in the splits that stage 1 has them in."""
    path = either({**many(80), **{f"{x:03}.txt": b"a" for x in range(0, 82, 2)}, "x.heic": b"x", "x.txt": b"x"})
    free, required = both_splits(path), both_splits(path, require_captions=True, max_bad_share=0)
    assert sorted(x for source in required for x in numbers(source)) == [*range(0, 80, 2)]
    assert all(names_of(some) <= names_of(more) for some, more in zip(required, free))
    assert images.left_out(free[0]) == [f"{path}: files that are not taken: 1 .heic"]
    assert images.left_out(required[0]) == [
        f"{path}: files that are not taken: 2 .txt without a picture, 1 .heic",
        f"{path}: 40 of 80 pictures have no caption and are left out",
    ]


def test_a_split_without_captions_is_an_error(either):
    path = either(many(5))
    [withheld] = names_of(open_source(path, image_size=SIZE, split="validation"))
    names = [f"{x:03}.txt" for x in range(5) if f"{x:03}" not in withheld]
    path = either({**many(5), **dict.fromkeys(names, b"a")})
    message = "no picture of the split 'validation' has a caption; 4 of 5 pictures have one"
    with pytest.raises(DataError, match=message):
        open_source(path, image_size=SIZE, split="validation", require_captions=True)


@pytest.fixture(params=["folder", "tar"])
def either(request, folder, shard):
    """either(files): a source's path with those files, in a folder or in a tar file."""
    if request.param == "tar":
        pytest.importorskip("webdataset")
        return lambda files: shard(files.items())
    return folder


def test_several_lines_are_one_caption_and_counted(either, capsys):
    path = either(
        {
            **many(40),
            **{f"{x:03}.txt": b"one\n\n" for x in range(20)},
            **{f"{x:03}.txt": b"a \r\n  b\n" for x in range(20, 40)},
        }
    )
    sources = both_splits(path)
    assert {source[index].caption for source in sources for index in range(len(source))} == {"one", "a b"}
    several = {number: lines for source in sources for number, lines in source.several_lines.items()}
    assert several == dict.fromkeys(range(20, 40), 2)
    assert capsys.readouterr().err == ""
    images.tell_of_bad(*sources)
    [line] = capsys.readouterr().err.splitlines()
    first = next(iter(several))
    assert line.startswith(f"{path}: captions of several lines, each taken for one caption: 20; the first is that of ")
    assert f"{sources[0].names[first]}, 2 lines; if each is a caption" in line


def test_captions_are_left_unread_where_they_are_not_wanted(either):
    sources = both_splits(either({**many(4), **{f"{x:03}.txt": b"a\nb" for x in range(4)}}), captions=False)
    assert {source[index].caption for source in sources for index in range(len(source))} == {""}
    assert not any(source.several_lines for source in sources)
    with pytest.raises(ValueError, match="captions must be True where require_captions is, got False"):
        open_source("shapes", image_size=SIZE, captions=False, require_captions=True)


def test_a_caption_that_cannot_be_read_is_bad_only_where_one_is_required(either):
    """A picture alone, as of stage 1, is good without it."""
    path = either({**many(30), **{f"{x:03}.txt": b"a" for x in range(29)}, "029.txt": b"\xff\xfe"})
    sources = both_splits(path)
    assert sorted(x for source in sources for x in numbers(source)) == [*range(30)]
    assert {source[index].caption for source in sources for index in range(len(source))} == {"a", ""}
    required = both_splits(path, require_captions=True)
    assert {*numbers(required[0]), *numbers(required[1])} == {*range(29)}


def test_captions_are_told_without_pictures(either):
    """As they come with them. Of a bad one its own, or "" where it is the caption that is bad."""
    texts = {f"{x:03}.txt": b"of\n%d" % x for x in range(30)}
    train, _ = both_splits(either({**many(30), "x.png": b"", "x.txt": b"bad", **texts}), require_captions=True)
    told = dict(map(train.named_caption, range(-1, len(train) - 1)))
    assert train.replaced == 0 and len(told) == len(train)
    for name, caption in told.items():
        stem = Path(name).stem
        assert caption == ("bad" if stem == "x" else f"of {int(stem)}")
    good = [number for number, name in enumerate(train.names) if told.get(name, "bad") != "bad"]
    assert len(good) >= 28 and all(
        train.read(number).caption.replace("\n", " ") == told[train.names[number]] for number in good
    )
    torn, _ = both_splits(either({**many(30), **texts, "000.txt": b"\xff"}), require_captions=True)
    (name,) = [name for name, caption in map(torn.named_caption, range(len(torn))) if not caption]
    assert Path(name).stem == "000"
    with pytest.raises(IndexError):
        train.named_caption(len(train))


@pytest.mark.parametrize("spec", ["shapes", "emoji", "stamps"])
def test_captions_of_what_is_drawn_are_told_without_drawing(spec):
    for split in SPLITS:
        source = opened(spec, 32, split=split)
        for index in (0, 7, len(source) - 1):
            name, caption = source.named_caption(index)
            assert caption == source[index].caption and name
        with pytest.raises(IndexError):
            source.named_caption(len(source))


def test_shards_are_indexed_once_for_both_splits(shard, monkeypatch):
    read, index_shard = [], tar.index_shard
    monkeypatch.setattr(tar, "index_shard", lambda path, *rest: read.append(path) or index_shard(path, *rest))
    for count in (40, 41):
        path = str(shard(entries(0, count)))
        assert sum(map(len, both_splits(path))) == count
    assert read == [path] * 2


@pytest.mark.parametrize("terminal", [False, True])
def test_shards_whose_headers_take_long_are_told_of_where_one_can_be(shard, monkeypatch, terminal):
    """A stderr that is gone, or was never there, ends nothing."""

    class Stderr(io.StringIO):
        def isatty(self):
            return terminal

    class Gone(Stderr):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(tar, "LONG", -1)
    for count, stderr in enumerate((Stderr(), Gone(), None), 40):
        monkeypatch.setattr(sys, "stderr", stderr)
        assert sum(map(len, both_splits(str(shard(entries(0, count)))))) == count
        if count == 40:
            told = "headers of tar files:   0%" if terminal else "reading the headers of 1 tar files, of 0 so far\n"
            assert told in stderr.getvalue()


def test_the_index_of_a_large_shard_is_kept(shard, monkeypatch, tmp_path):
    """Until the shard is another, also of the same size and time; a damaged one is made anew."""
    pytest.importorskip("webdataset")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(tar, "MANY", 40)
    read, index_shard = [], tar.index_shard
    monkeypatch.setattr(tar, "index_shard", lambda path, *rest: read.append(path) or index_shard(path, *rest))

    def everything(count=None):
        if count:
            path = str(shard([*entries(0, count), ("alone.txt", b""), ("other.heic", b"")]))
        tar._index.cache_clear()
        source = open_source(path if count else known[0], image_size=SIZE)
        return path if count else known[0], [*source.names], [source.files(x) for x in range(40)], source.passed_over

    known = everything(40)
    (kept,) = (tmp_path / "caches" / "dalle_fast" / "shards").iterdir()
    assert everything() == known and len(read) == 1
    whole, npy = kept.read_bytes(), io.BytesIO()
    np.save(npy, np.zeros(3))
    method = whole.index(b"PK\1\2") + 10  # of compression, one that there is not
    for damaged in (whole[:-30], npy.getvalue(), whole[:method] + b"\x63" + whole[method + 1 :]):
        read.clear()
        kept.write_bytes(damaged)
        assert everything() == known and len(read) == 1
    before = os.stat(known[0])
    shard([*reversed([*entries(0, 40)]), ("alone.txt", b""), ("other.heic", b"")])
    os.utime(known[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.path.getsize(known[0]) == before.st_size
    assert everything()[1] == known[1][::-1] and len(read) == 2
    assert everything(41) != known and len(read) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")  # where nothing can be kept
    assert everything() != known and len(read) == 4


def test_the_headers_of_a_shard_are_not_all_in_memory(shard):
    path = shard([(f"{number}.txt", b"") for number in range(50)])
    for number, _ in enumerate(tar._entries(path)):
        there = [x for x in gc.get_objects() if type(x) is tarfile.TarInfo] if number == 49 else []
        assert len(there) < 25


def test_endings_are_read_in_either_case(either):
    path = either(
        {"a.PNG": encoded(picture(1)), "a.TXT": b"caption", "b.png": encoded(picture(2)), "b.txt": b"caption"}
    )
    assert [source[0].caption for source in both_splits(path, require_captions=True)] == ["caption"] * 2
    with pytest.raises(DataError, match=r"which is the caption of a, a.TXT or a.txt\?|a.txt: is there twice"):
        open_source(either({"a.PNG": b"x", "a.TXT": b"caption", "a.txt": b"caption"}), image_size=SIZE)


def test_pictures_of_every_format_are_taken_and_those_of_others_counted(either):
    formats = {"a.jpg": "JPEG", "b.jpe": "JPEG", "c.JIF": "JPEG", "d.jfif": "JPEG", "e.webp": "WEBP", "f.tif": "TIFF"}
    formats |= {"g.avif": "AVIF"} if images.AVIF else {}
    files = {name: encoded(picture(200), kind) for name, kind in formats.items()}
    path = either({**files, "h.heic": b"x", "i.HEIC": b"x", "j.svg": b"x", "k.md": b"x", "l": b"x"})
    sources = both_splits(path)
    assert sum(map(len, sources)) == len(files)
    assert all(abs(x - 200) < 3 for source in sources for x in numbers(source))
    assert not any(source.bad for source in sources)
    assert [source.passed_over for source in sources] == [{".heic": 2, ".svg": 1}] * 2


def test_pictures_of_other_formats_alone_are_named(either):
    with pytest.raises(DataError, match=r"looked for .png, .*; files that are not taken: 2 .heic, 1 .svg$"):
        open_source(either({"a.heic": b"x", "b.heic": b"x", "c.svg": b"x"}), image_size=SIZE)


def test_a_pillow_that_cannot_decode_a_format_does_not_take_it(either, monkeypatch):
    monkeypatch.setattr(images, "ENDINGS", (".png",))
    assert [x.passed_over for x in both_splits(either({**many(3), "x.avif": b"x"}))] == [{".avif": 1}] * 2


# -- decoding -----------------------------------------------------------------------------------------------------------


def test_decoding_gives_upright_rgb_on_white():
    red = np.full((4, 6, 3), (200, 30, 30), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned
    turned = images.decode(encoded(red, "PNG", exif=exif))
    assert turned.shape == (6, 4, 3)
    half = np.dstack([red, np.full((4, 6), 0, np.uint8)])
    half[:, 3:, 3] = 255
    clear = images.decode(encoded(half))
    assert np.array_equal(clear[:, :3], np.full((4, 3, 3), 255))
    assert np.array_equal(clear[:, 3:], red[:, 3:])
    gray = np.linspace(0, 65_535, 24).astype(np.uint16).reshape(4, 6)
    assert np.array_equal(images.decode(encoded(gray)), np.repeat((gray >> 8)[..., None], 3, 2))
    clear = images.decode(encoded(gray, transparency=int(gray[1, 2])))
    assert (clear[1, 2] == 255).all() and np.array_equal(clear[0], np.repeat((gray[0] >> 8)[:, None], 3, 1))
    for kind in (np.float32, np.int32):  # from 0 to 1, or to 255, or to 65,535?
        with pytest.raises(images.BadImage, match="32 bits of gray, of which it is not known what is white"):
            images.decode(encoded(gray.astype(kind), "TIFF"))
    for data in (encoded(np.asarray(Image.fromarray(half).convert("LA"))), clear_palette()):
        clear = images.decode(data)
        assert (clear[:, :3] == 255).all() and (clear[:, 3:] != 255).any(2).all()
    palette = io.BytesIO()
    Image.fromarray(red).convert("P").save(palette, "GIF")
    assert abs(images.decode(palette.getvalue()).astype(int) - red).max() < 40
    cmyk = io.BytesIO()
    Image.fromarray(red).convert("CMYK").save(cmyk, "JPEG")
    assert images.decode(cmyk.getvalue()).shape == (4, 6, 3)


def clear_palette():
    """A PNG of 4 x 6 pixels with a palette, whose left half is transparent."""
    image = Image.new("P", (6, 4), 1)
    image.putpalette([0, 0, 0, 200, 30, 30])
    image.paste(0, (0, 0, 3, 4))
    file = io.BytesIO()
    image.save(file, "PNG", transparency=0)
    return file.getvalue()


def test_a_large_jpeg_is_decoded_at_a_fraction_and_no_warning_is_printed():
    large = encoded(np.zeros((1_600, 800, 3), np.uint8), "JPEG")
    assert images.decode(large, draft=96).shape == (200, 100, 3)
    assert images.decode(large, draft=101).shape == (400, 200, 3)  # no side may be smaller
    red = np.full((160, 160, 3), (200, 30, 30), np.uint8)
    assert abs(images.decode(encoded(red, "JPEG"), draft=80).astype(int) - red[:80, :80]).max() < 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(images.BadImage, match="10000 x 10000 pixels, more than"):
            images.decode(bomb(10_000, 10_000))


def test_the_limit_of_pixels_is_of_those_that_are_decoded(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 10_000)
    red = np.full((160, 160, 3), (200, 30, 30), np.uint8)
    jpeg, progressive = (encoded(red, "JPEG", progressive=progressive) for progressive in (False, True))
    assert images.decode(jpeg, draft=20).shape == (20, 20, 3)
    assert images.decode(jpeg, draft=80).shape == (80, 80, 3)
    for data, draft in ((jpeg, None), (jpeg, 81), (progressive, 20), (encoded(red), 20), (encoded(red, "WEBP"), 20)):
        with pytest.raises(images.BadImage, match="160 x 160 pixels, more than 10000"):
            images.decode(data, draft=draft)
    with pytest.raises(images.BadImage, match="more than 10000 pixels: .*decompression bomb"):
        images.decode(bomb(), draft=20)
    assert images.decode(encoded(red[:100, :100], "JPEG", progressive=True), draft=20).shape == (25, 25, 3)


def test_strips_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (23, 37, 4), np.uint8)
    rgb, gray = noise[..., :3], noise[..., 0].astype(np.uint16) * 257
    palette = Image.fromarray(rgb).quantize(200)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [
        encoded(rgb),
        encoded(noise),
        encoded(noise, exif=exif),
        encoded(noise, "WEBP"),
        encoded(noise[..., 0]),
        encoded(noise[..., 0], transparency=int(noise[3, 4, 0])),
        encoded(rgb, transparency=tuple(map(int, rgb[3, 4]))),
        encoded(gray),
        encoded(gray, transparency=int(gray[3, 4])),
        encoded(gray, "TIFF"),
        encoded(np.asarray(Image.fromarray(noise).convert("LA"))),
        encoded(rgb, "JPEG", exif=exif),
        encoded(noise[..., 0] > 100),
    ]
    for kind, options in (
        ("PNG", {}),
        ("PNG", {"transparency": 7}),
        ("PNG", {"transparency": bytes(range(200))}),
        ("GIF", {"transparency": 7}),
        ("BMP", {}),
    ):
        file = io.BytesIO()
        palette.save(file, kind, **options)
        files.append(file.getvalue())
    whole = [images.decode(data) for data in files]
    assert len({image.tobytes() for image in whole}) > len(files) - 6  # else the comparison says nothing
    for pixels in (1, 100, 37 * 22, 37 * 23):
        monkeypatch.setattr(images, "STRIP_PIXELS", pixels)
        for data, image in zip(files, whole, strict=True):
            assert np.array_equal(images.decode(data), image)


PEAK = """
import sys
from dalle_fast.data import images

def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) << 10

data = sys.stdin.buffer.read()
before = peak()
images.decode(data)
print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc to see the peak of memory")
def test_a_small_file_of_a_large_picture_takes_little_more_than_its_pixels():
    image, file = Image.new("P", (4_000, 4_000)), io.BytesIO()
    image.putpalette([200, 30, 30])
    image.save(file, "PNG", transparency=0)
    run = subprocess.run([sys.executable, "-c", PEAK], input=file.getvalue(), capture_output=True, check=True)
    pixels = 4_000 * 4_000
    assert int(run.stdout) < 1.2 * (pixels + 3 * pixels) + 2**25  # with the palette's picture, and the decoder


def test_a_file_of_too_many_bytes_is_bad(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(bytes(101))
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    with pytest.raises(images.BadImage, match="more than 100 bytes"):
        images.read_file(tmp_path / "x")
    monkeypatch.setattr(images, "MAX_BYTES", 101)
    assert images.read_file(tmp_path / "x") == bytes(101)


# -- tar shards ---------------------------------------------------------------------------------------------------------


def entries(start, count):
    for x in range(start, start + count):
        yield f"./k{x:03}.jpg" if x % 2 else f"k{x:03}.png", encoded(picture(x))
        if x % 3:
            yield f"./k{x:03}.txt" if x % 2 else f"k{x:03}.txt", f"number {x}".encode()
        yield f"k{x:03}.json", b"{}"


@pytest.mark.parametrize("spec", ["x-{000..002}.tar", "."])
def test_shards_show_every_picture_with_its_caption(shard, tmp_path, spec):
    pytest.importorskip("webdataset")
    for number in range(3):
        shard(entries(20 * number, 20), f"x-{number:03}.tar")
    train, validation = both_splits(str(tmp_path / spec))
    assert sorted(numbers(train) + numbers(validation)) == list(range(60))
    for index in range(len(train)):
        image, caption = train[index]
        number = int(image[0, 0, 0])
        assert caption == (f"number {number}" if number % 3 else "")
    assert np.array_equal(pickle.loads(pickle.dumps(train))[3].image, train[3].image)


def test_a_picture_beside_its_masks_is_the_plain_one(shard):
    pytest.importorskip("webdataset")
    files = [("k.depth.png", encoded(picture(1))), ("k.jpg", encoded(picture(2))), ("l.left.png", encoded(picture(3)))]
    assert sorted(numbers(open_source(shard(files), image_size=SIZE, split=x))[0] for x in SPLITS) == [2, 3]
    files = [("k.left.png", encoded(picture(1))), ("k.right.png", encoded(picture(2)))]
    with pytest.raises(DataError, match=r"k: which is its picture, \.left\.png or \.right\.png\?"):
        open_source(shard(files), image_size=SIZE)


JSON = {
    "a": (b'{"key": 1, "caption": " a\\n dog"}', "a dog"),
    "b": (b'{"caption": null}', 'it has no caption: no .txt, and in its .json no text "caption"'),
    "c": (b'["caption"]', 'it has no caption: no .txt, and in its .json no text "caption"'),
    "d": (b"[" * 100_000, "its .json cannot be read"),
    "e": (b'{"caption": "\\ud800"}', "its .json cannot be read"),
    "f": (b'{"caption": "\xff"}', "its .json cannot be read"),
    "g": (b'{"caption": "' + b"a" * 2**20 + b'"}', "its .json has more than 1048576 bytes"),
}


@pytest.mark.parametrize("kind", JSON)
def test_a_caption_in_json_is_that_of_a_picture_without_another(shard, kind):
    pytest.importorskip("webdataset")
    data, caption = JSON[kind]
    files = [(f"{x}.png", encoded(picture())) for x in range(4)] + [(f"{x}.json", data) for x in range(4)]
    for split in SPLITS:
        source = open_source(shard([*files]), image_size=SIZE, split=split, require_captions=True, max_bad_share=1)
        if kind == "a":
            assert {source[index].caption for index in range(len(source))} == {caption}
            assert source.several_lines == {}
        else:
            with pytest.raises(DataError, match=f"all . pictures of the split are bad, .*: {caption}"):
                source[0]
    source = open_source(shard([*files, *((f"{x}.txt", b"b") for x in range(4))]), image_size=SIZE)
    assert source[0].caption == "b"


def test_a_caption_of_a_key_with_dots_is_that_of_its_picture(shard):
    pytest.importorskip("webdataset")
    files = [("photo 1.5m.jpg", encoded(picture(1))), ("photo 1.5m.txt", b"one"), ("photo 1.txt", b"other")]
    files += [("b.seg.png", encoded(picture(2))), ("b.txt", b"two")]
    files += [("c.7.png", encoded(picture(3))), ("c.7.json", b'{"caption": "three"}'), ("c.json", b"{}")]
    sources = both_splits(shard(files), require_captions=True)
    assert {source[index].caption for source in sources for index in range(len(source))} == {"one", "two", "three"}


def test_a_caption_may_be_called_as_its_picture_with_its_ending(either):
    path = either({**many(3), **{f"{x:03}.png.txt": b"a" for x in range(2)}, "002.txt": b"b"})
    sources = both_splits(path, require_captions=True)
    captions = {int(e.image[0, 0, 0]): e.caption for s in sources for e in map(s.__getitem__, range(len(s)))}
    assert captions == {0: "a", 1: "a", 2: "b"}
    with pytest.raises(DataError, match=r"caption( of 002.png)?, (002)?\.txt or (002)?\.png.txt\?"):
        open_source(either({**many(3), "002.txt": b"b", "002.png.txt": b"b"}), image_size=SIZE)


def test_what_is_hidden_is_not_looked_at(either):
    hidden = [".git/a.png", "x/.b/c.png", "x/._d.png", "@eaDir/e.png/SYNO_THUMB.png", "x/@eaDir/f.png"]
    path = either({**dict.fromkeys(hidden, encoded(picture(99))), **many(3)})
    assert sorted(x for source in both_splits(path) for x in numbers(source)) == [0, 1, 2]


def test_two_pictures_of_a_key_are_refused(shard):
    """One would not be seen, or the other one by another package."""
    pytest.importorskip("webdataset")
    with pytest.raises(DataError, match=r"x.tar: a: which is its picture, \.jpg or \.png\?$"):
        open_source(shard([("a.png", b"x"), ("a.jpg", b"x"), ("a.txt", b"x")]), image_size=SIZE)


def test_where_a_key_ends_is_said_where_it_matters(shard):
    pytest.importorskip("webdataset")
    pictures = [(f"img.000{x}.png", encoded(picture(x))) for x in range(2)]
    with pytest.raises(
        DataError, match=r"img: which is its picture, \.0000\.png or .* ends at the first dot of a name"
    ):
        open_source(shard(pictures), image_size=SIZE)
    with pytest.raises(DataError, match=r"none of its 1 pictures has a caption, .* ends at the first dot of a name"):
        open_source(shard([pictures[0], ("img.0001.txt", b"a")]), image_size=SIZE, require_captions=True)


def test_a_colon_is_a_letter(shard):
    pytest.importorskip("webdataset")
    path = shard([("a:b.png", encoded(picture(1))), ("12:30.png", encoded(picture(2)))])
    assert sorted(x for source in both_splits(path) for x in numbers(source)) == [1, 2]


def test_webdataset_reads_the_same_pairs_in_the_same_shard(shard):
    webdataset = pytest.importorskip("webdataset")
    path = shard([*entries(0, 9), ("__meta__", b"x"), ("__info__/a.png", b"x"), ("noending", b"x")])
    theirs = {}
    for sample in webdataset.WebDataset(path, shardshuffle=False, empty_check=False):
        image = sample.get("png") or sample.get("jpg")
        if image is None:  # "k001.json" and "./k001.jpg" are two keys
            continue
        theirs[int(np.asarray(Image.open(io.BytesIO(image)))[0, 0, 0])] = sample.get("txt", b"").decode()
    ours = {
        int(e.image[0, 0, 0]): e.caption
        for source in both_splits(path)
        for e in map(source.__getitem__, range(len(source)))
    }
    assert ours == theirs


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "name, data, why",
    [
        ("../a.png", b"x", "the name leads out of the archive"),
        ("a/../../b.png", b"x", "the name leads out of the archive"),
        ("/etc/a.png", b"x", "the name leads out of the archive"),
        ("C:\\a.png", b"x", "the name leads out of the archive"),
        ("C:/a.png", b"x", "the name leads out of the archive"),
        ("a\\..\\b.png", b"x", "the name leads out of the archive"),
        ("s.png", special("s.png", tarfile.SYMTYPE, "/etc/passwd"), "it is a link"),
        ("h.png", special("h.png", tarfile.LNKTYPE, "k000.png"), "it is a link"),
        ("p.png", special("p.png", tarfile.FIFOTYPE), "it is not an ordinary file"),
        ("d.png", special("d.png", tarfile.CHRTYPE), "it is not an ordinary file"),
        ("k001.jpg", b"x", "is there twice"),
    ],
)
def test_a_dangerous_entry_is_refused_with_file_and_entry(shard, name, data, why):
    pytest.importorskip("webdataset")
    twice = [("k001.jpg", b"y")] if "twice" in why else []
    path = shard([("k000.png", encoded(picture())), *twice, (name, data)])
    with pytest.raises(DataError) as error:
        open_source(path, image_size=SIZE)
    assert str(error.value).startswith(f"{path}: {name}: ")
    assert why in str(error.value)


def test_a_tar_cut_anywhere_is_an_error(shard, tmp_path):
    pytest.importorskip("webdataset")
    path = shard(entries(0, 8))
    data = Path(path).read_bytes()
    end = max(offset for offset in range(0, len(data), 512) if any(data[offset : offset + 512])) + 512
    assert end > 512 * 20
    for length in [0, 1, 300, 512, 700, *range(1024, end, 997), *range(1024, end + 1, 512), end + 511]:
        (tmp_path / "cut.tar").write_bytes(data[:length])
        with pytest.raises(DataError, match="cut.tar: (not a readable tar file|truncated or broken at byte)"):
            open_source(tmp_path / "cut.tar", image_size=SIZE)
    (tmp_path / "cut.tar").write_bytes(data[: end + 512])  # one block of the end mark
    assert len(open_source(tmp_path / "cut.tar", image_size=SIZE)) == 7


def test_a_broken_header_and_no_tar_at_all_are_errors(shard, tmp_path):
    pytest.importorskip("webdataset")
    data = bytearray(Path(shard([(f"{x}.png", bytes(512)) for x in range(5)])).read_bytes())
    data[2 * 1024 + 10] ^= 1
    (tmp_path / "b.tar").write_bytes(data)
    with pytest.raises(DataError, match="b.tar: truncated or broken at byte 2048"):
        open_source(tmp_path / "b.tar", image_size=SIZE)
    (tmp_path / "b.tar").write_bytes(b"no tar" * 1_000)
    with pytest.raises(DataError, match="b.tar: not a readable tar file"):
        open_source(tmp_path / "b.tar", image_size=SIZE)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.tar").write_bytes(data)
    os.rename(tmp_path / "b.tar", tmp_path / "data" / "b.tar")
    shard([], "data/c.tar")
    with pytest.raises(
        DataError, match=r"^2 of 3 tar files cannot be used: \S+a.tar: trunc.*; \S+b.tar: not a readable"
    ):
        open_source(tmp_path / "data", image_size=SIZE)


def test_a_folder_with_pictures_and_tar_files_is_refused(shard, folder, tmp_path):
    """Of either kind one would not be seen."""
    path = folder({"a/1.png": encoded(picture(1)), "b.txt": b"x"})
    shard([], "data/s.tar")
    with pytest.raises(
        DataError, match=r"1 tar files \(the first is s.tar\) and 1 pictures \(the first is a/1.png\): name"
    ):
        open_source(path, image_size=SIZE)


def test_only_files_are_shards(shard, folder, tmp_path):
    path = folder({**many(3), "x.tar/7.png": encoded(picture(7)), ".y.tar": b"x"})  # a folder, and a hidden file
    assert sorted(number for source in both_splits(path) for number in numbers(source)) == [0, 1, 2, 7]
    pytest.importorskip("webdataset")
    (tmp_path / "shards").mkdir()
    shard(entries(0, 2), "shards/a.tar")
    (tmp_path / "shards" / "b.tar").symlink_to("nothing")
    with pytest.raises(DataError, match="b.tar: no such file"):
        open_source(tmp_path / "shards", image_size=SIZE)


def test_missing_compressed_empty_and_uncaptioned_shards_are_errors(shard, tmp_path):
    pytest.importorskip("webdataset")
    with pytest.raises(DataError, match="x-1.tar: no such file"):
        open_source(tmp_path / "x-{1..2}.tar", image_size=SIZE)
    with tarfile.open(tmp_path / "y.tar.gz", "w:gz"):
        pass
    with pytest.raises(DataError, match="y.tar.gz: compressed tar files cannot be read at random"):
        open_source(tmp_path / "y.tar.gz", image_size=SIZE)
    with pytest.raises(DataError, match="no pictures in 1 tar files"):
        open_source(shard([("a.txt", b"x")]), image_size=SIZE)
    with pytest.raises(DataError, match="none of its 1 pictures has a caption"):
        open_source(shard([("a.png", b"x")]), image_size=SIZE, require_captions=True)


def test_tar_files_that_a_folder_does_not_read_are_named(shard, folder):
    path = folder({"a.txt": b"x"})
    shard([], "data/x-1.tar.gz")
    message = (
        "no pictures in it; looked for .*; {} is not read: .tar files must lie directly in the folder, uncompressed"
    )
    with pytest.raises(DataError, match=message.format("x-1.tar.gz")):
        open_source(path, image_size=SIZE)
    os.rename(f"{path}/x-1.tar.gz", f"{path}/x")
    folder({"b/c.tar": b"x"})
    with pytest.raises(DataError, match=message.format("b/c.tar")):
        open_source(path, image_size=SIZE)


@pytest.mark.parametrize("name", ["*.tar", "x-00?.tar", "*"])
def test_wildcards_are_no_names(folder, name):
    with pytest.raises(
        DataError, match=r"\* and \? have no meaning here: name the folder, or .* x-\{000\.\.010\}\.tar$"
    ):
        open_source(os.path.join(folder({}), name), image_size=SIZE)


def test_bad_pictures_in_a_shard_are_replaced(shard):
    pytest.importorskip("webdataset")
    path = shard([*entries(0, 40), ("bad.png", BAD["truncated png"])])
    sources = both_splits(path)
    assert set(numbers(sources[0]) + numbers(sources[1])) == set(range(40))
    assert sum(source.replaced for source in sources) == 1
    assert any("x.tar/bad" in source.names[number] for source in sources for number in source.bad)


def test_a_shard_that_lost_its_end_after_it_was_opened_is_an_error(shard):
    pytest.importorskip("webdataset")
    path = shard(entries(0, 40))
    source = open_source(path, image_size=SIZE)
    os.truncate(path, 2_000)
    with pytest.raises(DataError, match="the tar file ends before it"):
        numbers(source)


# -- emoji and stamps ---------------------------------------------------------------------------------------------------


def opened(spec, size, **options):
    try:
        return open_source(spec, image_size=size, **options)
    except DataError as error:
        if "install" in str(error):
            pytest.skip(str(error))
        raise


def test_emoji_are_pictures_with_names():
    train, validation = opened("emoji", 32), opened("emoji", 32, split="validation")
    assert len(train) + len(validation) >= 1_200
    assert not set(train.characters) & set(validation.characters)
    shown = {example.caption: example.image for example in map(train.__getitem__, range(0, len(train), 5))}
    assert len(shown) == -(-len(train) // 5)
    for caption, image in shown.items():
        assert caption == caption.lower() and caption
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8
        assert image.min() < 200, caption
    index = train.characters.index("\U0001f34e") if "\U0001f34e" in train.characters else None
    apple = train[index] if index is not None else validation[validation.characters.index("\U0001f34e")]
    assert apple.caption == "red apple"
    middle = apple.image[12:22, 10:22].mean((0, 1))
    assert middle[0] > 150 and middle[2] < 100  # it is red
    assert np.array_equal(pickle.loads(pickle.dumps(train))[5].image, train[5].image)


def test_emoji_without_their_font(monkeypatch, tmp_path):
    monkeypatch.setenv("DALLE_FAST_EMOJI_FONT", str(tmp_path / "none.ttf"))
    with pytest.raises(
        DataError, match=r"not at DALLE_FAST_EMOJI_FONT=.*none.ttf: install it .*fonts-noto-color-emoji"
    ):
        open_source("emoji", image_size=32)
    (tmp_path / "none.ttf").write_bytes(b"no font")
    with pytest.raises(DataError, match="none.ttf: not a font"):
        open_source("emoji", image_size=32)
    monkeypatch.delenv("DALLE_FAST_EMOJI_FONT")
    monkeypatch.setattr(emoji, "FONTS", ())
    with pytest.raises(DataError, match="not in the usual places: install it"):
        open_source("emoji", image_size=32)
    with pytest.raises(DataError, match="image_size must be at most 128"):
        open_source("emoji", image_size=256)


def test_stamps_are_whole_pictures_with_english_captions():
    train = opened("stamps", 48)
    examples = [train[index] for index in range(0, len(train), 25)]
    assert all(example.image.shape == (48, 48, 3) for example in examples)
    assert all(example.caption == example.caption.lower() != "" for example in examples)
    assert train.replaced == 0


def test_stamps_are_drawn_on_white_and_without_those_that_have_no_text(folder):
    disc = np.zeros((10, 20, 4), np.uint8)
    disc[:, 5:15] = (255, 0, 0, 255)
    text = b"A Red box.\nde.utf8=Eine Kiste\n"
    path = folder(
        {"a/x.png": encoded(disc), "a/x.txt": text, "a/x_mirror.png": encoded(disc), "a/y.svg": b"", "a/y.txt": text}
    )
    source = stamps.Stamps(20, folders=("/nowhere", path))
    assert len(source) == 1
    image, caption = source[0]
    assert caption == "a red box."
    assert image.shape == (20, 20, 3)
    assert image[0, 10].tolist() == image[10, 1].tolist() == [255, 255, 255]
    assert image[10, 10].tolist() == [255, 0, 0]
    with pytest.raises(DataError, match="in /nowhere: install Tux Paint's stamps .*tuxpaint-stamps-default"):
        stamps.Stamps(20, folders=("/nowhere",))


# -- all ----------------------------------------------------------------------------------------------------------------


def test_bad_arguments(tmp_path):
    with pytest.raises(
        DataError, match="nothing: no such folder or tar file, nor one of the sources shapes, emoji, stamps"
    ):
        open_source("nothing", image_size=32)
    with pytest.raises(ValueError, match="split of 'x' must be one of train, validation, got 'heldout'"):
        open_source("x", image_size=32, split="heldout")
    with pytest.raises(ValueError, match="max_bad_share must be from 0 to 1, got 5"):
        open_source("x", image_size=32, max_bad_share=5)
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        open_source("x", image_size=0)
    with pytest.raises(TypeError, match="seed must be an integer, got 1.5"):
        open_source("x", image_size=32, seed=1.5)


def test_a_sheet_of_pictures(folder, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    assert main(["shapes", "--out", str(out), "--count", "3", "--columns", "2", "--scale", "2"]) == 0
    with Image.open(out) as sheet:
        assert sheet.width == 2 * (64 + 10) + 10
    assert capsys.readouterr().err == ""
    assert main([folder({**many(3), "x.heic": b"x"}), "--out", str(out), "--image-size", "16"]) == 0
    assert capsys.readouterr().err == f"{tmp_path}/data: files that are not taken: 1 .heic\n"
    assert main(["nothing", "--out", str(out)]) == 1
    assert "nothing: no such folder" in capsys.readouterr().err
    for name in ("none/sheet.png", "sheet.xyz", "sheet.psd", "sheet"):
        assert main(["shapes", "--out", str(tmp_path / name), "--count", "1"]) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"python -m dalle_fast.data: cannot write {tmp_path / name}: ")
