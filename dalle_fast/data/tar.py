"""WebDataset tar shards: pictures and captions whose names differ in the ending only lie together in a tar file.

Shards are listed and entries grouped by the `webdataset` library's rules, but read at random: a shard is indexed once,
by its headers, and an entry is read where it lies. The library itself reads shards from front to back, which can
neither be resumed at a given batch nor shuffled over a whole epoch, and passes over links and what follows a broken
header in silence. Nothing is ever unpacked to disk.

Captions are read as those of `dalle_fast.data.folder`. Of a picture without a .txt entry it is the text "caption" in
its .json entry, as img2dataset has it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import tarfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dalle_fast.data.folder import Files, is_hidden
from dalle_fast.data.images import ENDINGS, MAX_BYTES, OTHERS, BadImage, count_passed_over, is_picture
from dalle_fast.data.source import DataError
from dalle_fast.data.strings import Strings
from dalle_fast.outputs import written_whole
from dalle_fast.progress import bar, on_terminal, tell

_BLOCK = 512
MAX_JSON = 2**20  # bytes
NAMED = 10  # tar files, in a message
MANY = 1000  # pictures in a shard, of which the index is kept
LONG = 2  # seconds, until it is told that headers are read
DOTS = " (A key ends at the first dot of a name, as WebDataset has it: a.0001.png and a.0002.png are of one key.)"


class Entry(NamedTuple):
    """A file in the tar file of shard number `shard`: where it lies and how long it is, in bytes."""

    shard: int
    offset: int
    size: int
    is_json: bool = False


NONE = Entry(-1, -1, -1)


class Tar(Files):
    """The source of tar shards. See `open_source`; pictures with less than `image_size` pixels a side are bad ones.

    Raises:
        DataError: a shard is not there or broken, or has an entry that reaches outside or links; no pictures in all,
            or no captions where they are required.
        ImportError: webdataset is not installed.
    """

    def __init__(
        self, spec: str, image_size: int, *, split: str, captions: bool, require_captions: bool, max_bad_share: float
    ):
        self.shards = find_shards(spec)
        self._index, self._captions = _index(tuple(map(_version, self.shards))), captions
        names, passed_over = self._index.names, self._index.passed_over
        captioned = self._index.captions[:, 0] >= 0 if captions else np.zeros(len(names), bool)
        if not names:
            others = f"; {count_passed_over(passed_over)}" if passed_over else ""
            looked_for = f"looked for {', '.join(ENDINGS)}{others}"
            raise DataError(f"{spec}: no pictures in {len(self.shards)} tar files; {looked_for}")
        if require_captions and not captioned.any():
            raise DataError(
                f"{spec}: none of its {len(names)} pictures has a caption, an entry .txt or .json of the same key{DOTS}"
            )
        options = {"split": split, "require_captions": require_captions, "max_bad_share": max_bad_share}
        super().__init__(spec, names, image_size, captioned=captioned.tolist(), passed_over=passed_over, **options)

    def files(self, number: int) -> list[Entry]:
        return self._index.entries(number, self._captions)

    def size(self, file: Entry) -> int:
        return file.size

    def caption(self, file: Entry) -> str:
        return read_json_caption(self.data(file)) if file.is_json else super().caption(file)

    def data(self, file: Entry) -> bytes:
        if file.size > MAX_BYTES:
            raise BadImage(f"more than {MAX_BYTES} bytes")
        try:
            with open(self.shards[file.shard], "rb") as shard:
                shard.seek(file.offset)
                data = shard.read(file.size)
        except OSError as error:
            raise BadImage(error.strerror or str(error)) from error
        if len(data) < file.size:
            raise BadImage("the tar file ends before it")
        return data


def read_json_caption(data: bytes) -> str:
    """The text "caption" of a JSON object, its white space made single spaces.

    Raises:
        BadImage: there is none, or it is not to be read.
    """
    if len(data) > MAX_JSON:
        raise BadImage(f"its .json has more than {MAX_JSON} bytes")
    try:
        found = json.loads(data)
        caption = found.get("caption") if isinstance(found, dict) else None
        if isinstance(caption, str):
            caption.encode()  # half a surrogate pair is no text
            return " ".join(caption.split())
    except (ValueError, RecursionError) as error:
        raise BadImage(f"its .json cannot be read: {error}") from error
    raise BadImage('it has no caption: no .txt, and in its .json no text "caption"')


def find_shards(spec: str) -> list[str]:
    """The tar files of a folder, or of a path in which braces count ("x-{000..003}.tar").

    Raises:
        DataError: there is none, one is missing, or it is compressed.
        ImportError: webdataset is not installed.
    """
    if os.path.isdir(spec):
        shards = shards_in(spec)
    else:
        shards = [spec] if os.path.exists(spec) else _webdataset("shardlists").expand_urls(spec)
    wrong = [f"{shard}: {reason}" for shard in shards if (reason := _why_not(shard))]
    if wrong:
        raise DataError(_all_of(wrong, len(shards)))
    return shards


def _why_not(shard: str) -> str | None:
    if not os.path.isfile(shard):
        return "no such file"
    if not shard.endswith(".tar"):
        return "compressed tar files cannot be read at random: unpack it to a .tar"
    return None


def _all_of(wrong: list[str], count: int) -> str:
    """All tar files that are wrong, in a line, so that not each costs another start."""
    if len(wrong) == 1:
        return wrong[0]
    more = f"; and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
    return f"{len(wrong)} of {count} tar files cannot be used: {'; '.join(wrong[:NAMED])}{more}"


def shards_in(folder: str) -> list[str]:
    """The .tar files directly in a folder, but for hidden ones. (A link that leads nowhere is one: it is missed.)

    Raises:
        DataError: the folder cannot be read.
    """
    try:
        names = [name for name in sorted(os.listdir(folder)) if name.endswith(".tar") and not name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from error
    return [path for name in names if not os.path.isdir(path := os.path.join(folder, name))]


def _version(path: str) -> tuple[str, int, int, int, int]:
    """A shard, and all that tells it from another at its place: stores and reproducible builds give all files one time."""
    found = os.stat(path)
    return path, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


class Index(NamedTuple):
    """N pictures in shards, in the order in which they lie there, in arrays: of Python's objects each process, and with
    time each of its workers, would have 377 bytes a picture.

    names: N of them. shards: (N,), the number of each one's shard. images, captions: (N, 2) int64, offset and size in it;
    of one without a caption -1. is_json: (N,) bool, of the captions. passed_over: see `Pictures`.
    """

    names: Strings
    shards: np.ndarray
    images: np.ndarray
    captions: np.ndarray
    is_json: np.ndarray
    passed_over: dict[str, int]

    @classmethod
    def of(cls, number: int, path: str, found: dict[str, tuple[Entry, Entry | None]]) -> Index:
        """Of the pictures that `index_shard` found in shard `number`."""
        names = Strings.of(f"{os.path.basename(path)}/{key}" for key in found)
        images, captions = ([pair[which] or NONE for pair in found.values()] for which in (0, 1))
        places = ([entry[1:3] for entry in entries] for entries in (images, captions))
        images_at, captions_at = (np.array(place, np.int64).reshape(-1, 2) for place in places)
        is_json = np.array([entry.is_json for entry in captions], bool)
        return cls(names, np.full(len(names), number, np.int32), images_at, captions_at, is_json, {})

    def entries(self, number: int, with_caption: bool) -> list[Entry]:
        """The image's, and the caption's if there is one."""
        shard, (offset, size) = int(self.shards[number]), self.captions[number].tolist()
        image = Entry(shard, *self.images[number].tolist())
        if not with_caption or offset < 0:
            return [image]
        return [image, Entry(shard, offset, size, bool(self.is_json[number]))]


@functools.lru_cache(maxsize=1)  # the splits of a source are opened one behind the other
def _index(shards: tuple) -> Index:
    """Of all pictures in these shards. To be looked at, not changed.

    Raises:
        DataError: as of `index_shard`, of all shards that are wrong.
    """
    parts, passed_over, wrong = [], {}, []
    for number, version in enumerate(_bar(shards)):
        try:
            parts.append(_kept_or_made(version, number))
        except DataError as error:
            wrong.append(str(error))
    if wrong:
        raise DataError(_all_of(wrong, len(shards)))
    for part in parts:
        for ending, count in part.passed_over.items():
            passed_over[ending] = passed_over.get(ending, 0) + count
    names, *arrays, _ = zip(*parts, strict=True)
    return Index(Strings.joined(names), *map(np.concatenate, arrays), passed_over)


# Of a large shard the index is kept on disk: the headers of 10 million pictures take half an hour, in each process and
# at each start.


def _kept_or_made(version, number) -> Index:
    kept = _kept_at(version)
    if kept is not None and (index := _read_kept(kept, number)):
        return index
    passed_over = {}
    index = Index.of(number, version[0], index_shard(version[0], number, passed_over))._replace(passed_over=passed_over)
    if kept is not None and len(index.names) >= MANY:
        with contextlib.suppress(OSError):  # a disk that is full, or not to be written to
            kept.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(kept) as unfinished:
                _write_kept(unfinished, index)
    return index


def _kept_at(version) -> Path | None:
    """The file of a shard's index, named by all that it is made of: the shard's place and version, and our rules."""
    digest = hashlib.sha256(_rules())
    place = os.path.realpath(version[0]), os.path.basename(version[0])  # a link's name is in those of its pictures
    digest.update(f"{place} {version[1:]} {ENDINGS} {OTHERS}".encode("utf-8", "surrogateescape"))
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(caches, "dalle_fast", "shards", f"{digest.hexdigest()[:32]}.npz") if os.path.isabs(caches) else None


@functools.cache
def _rules() -> bytes:
    """The sources of what makes an index, and of how it is kept."""
    library = _webdataset("tariterators").__file__
    ours = (Path(__file__).with_name(name) for name in ("tar.py", "folder.py", "images.py", "strings.py"))
    return b"".join(Path(path).read_bytes() for path in (*ours, library))


def _write_kept(path, index) -> None:
    words = np.frombuffer(json.dumps(index.passed_over).encode(), np.uint8)
    arrays = {"images": index.images, "captions": index.captions, "is_json": index.is_json, "passed_over": words}
    with open(path, "wb") as file:  # of a path numpy would change the ending
        np.savez(file, names=index.names.data, lengths=index.names.lengths, **arrays)


def _read_kept(path, number) -> Index | None:
    try:
        with np.load(path, allow_pickle=False) as kept:
            names = Strings(kept["names"], kept["lengths"].cumsum())
            passed_over = json.loads(kept["passed_over"].tobytes())
            shards = np.full(len(names), number, np.int32)
            return Index(names, shards, kept["images"], kept["captions"], kept["is_json"], passed_over)
    except Exception:  # noqa: BLE001, not there, or damaged, of which zipfile and numpy make errors of many classes
        return None


def _bar(shards):
    """The shards, and where their headers take long, as a million do a minute, something to see: of several processes
    that torchrun started of the first one."""
    if os.environ.get("RANK", "0") != "0":
        yield from shards
    elif on_terminal():
        yield from bar(shards, total=len(shards), unit="file", title="headers of tar files", delay=LONG, leave=False)
    else:
        since, told = time.monotonic(), False
        for number, shard in enumerate(shards):
            if not told and time.monotonic() - since > LONG:
                tell(f"reading the headers of {len(shards)} tar files, of {number} so far")
                told = True
            yield shard


def index_shard(path: str, number: int, passed_over: dict[str, int]) -> dict[str, tuple[Entry, Entry | None]]:
    """The pictures of a tar file, shard `number`: key -> where its image and its caption lie.

    Files of pictures in other formats, and captions without a picture, are counted in `passed_over`; see `Pictures`.

    Raises:
        DataError: the file cannot be read to its end mark; an entry's name is absolute or has "..", or it is a link
            or a device; a name that is there twice; two captions of a picture; several pictures of a key, unless one
            has the only ending of one part.
    """
    base_plus_ext = _webdataset("tariterators").base_plus_ext
    found: dict[str, dict[str, Entry]] = {}
    for entry in _entries(path):
        key, ending = base_plus_ext(entry.name)
        if key is None or re.match(r"__[^/]*__($|/)", entry.name):  # the library's mark of what is no example
            continue
        if any(map(is_hidden, entry.name.split("/"))):
            continue
        files, ending = found.setdefault(key, {}), ending.lower()
        if ending in files:
            raise DataError(f"{path}: {entry.name}: is there twice")
        files[ending] = Entry(number, entry.offset_data, entry.size)
    pairs = {}
    for key, files in found.items():
        images = [ending for ending in sorted(files) if is_picture("x." + ending, passed_over)]
        images = [ending for ending in images if "." not in ending] or images  # not .mask.png beside .png
        if len(images) > 1:
            which = " or ".join("." + ending for ending in images)
            raise DataError(f"{path}: {key}: which is its picture, {which}?{DOTS * any('.' in x for x in images)}")
        if images:
            pairs[key] = files[images[0]], _caption(f"{path}: {key}", files, images[0])
        elif alone := sum(ending.rpartition(".")[2] == "txt" for ending in files):
            passed_over[".txt"] = passed_over.get(".txt", 0) + alone
    return pairs


def _caption(place, files, image) -> Entry | None:
    """The caption of a key's picture; `image` is its ending, as 5m.jpg of "photo 1.5m.jpg"."""
    stem, dot, _ = image.rpartition(".")
    found = [ending for ending in (f"{stem}{dot}txt", f"{image}.txt") if ending in files]
    if len(found) > 1:
        raise DataError(f"{place}: which is its caption, .{found[0]} or .{found[1]}?")
    if found or "txt" in files:
        return files[found[0] if found else "txt"]
    entry = files.get(f"{stem}{dot}json") or files.get("json")
    return entry and entry._replace(is_json=True)


def _entries(path: str):
    """The files in a tar, each checked to lie inside it."""
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for entry in tar:
                tar.members.clear()  # it keeps them all, with 400 bytes each
                _check_entry(path, entry)
                if entry.isreg():
                    yield entry
            # tarfile takes a broken header, or the end of the file, for the end of the archive: see that it is one.
            file.seek(tar.offset)
            mark = file.read(_BLOCK)
    except (OSError, tarfile.TarError, EOFError, ValueError, UnicodeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a readable tar file: {error}") from error
    if mark != bytes(_BLOCK):
        raise DataError(f"{path}: truncated or broken at byte {tar.offset}: no end mark there")


def _check_entry(path: str, entry: tarfile.TarInfo):
    parts = re.split(r"[/\\]", entry.name)
    if parts[0] == "" or ".." in parts or re.match(r"[A-Za-z]:[/\\]", entry.name):  # but a:b.png is a name
        raise DataError(f"{path}: {entry.name}: refused, as the name leads out of the archive")
    if not (entry.isreg() or entry.isdir()) or entry.issparse():
        kind = "a link" if entry.issym() or entry.islnk() else "not an ordinary file"
        raise DataError(f"{path}: {entry.name}: refused, as it is {kind}")


def _webdataset(part: str):
    import importlib

    try:
        return importlib.import_module(f"webdataset.{part}")
    except ImportError as error:
        raise ImportError("tar shards need webdataset: pip install 'dalle_fast[data]'") from error
