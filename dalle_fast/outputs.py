"""Whether results can be kept, asked before long work; files written whole or not at all; one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import threading
from pathlib import Path

from dalle_fast.errors import UserError
from dalle_fast.progress import tell

UNFINISHED = ".writing-"  # before the name of what is being written


def can_write(path: str | os.PathLike) -> bool:
    """Whether `written_whole` can write a file there; tried in its folder, which is left as it is, as is a file that is
    there.

    What the folder's permissions say is not enough: root has all of them in /proc, where no file can be made. The name
    that is tried is the one that will be written, as it is the longer one, behind a link in another folder.
    """
    path, unfinished = _whole_and_unfinished(path)
    try:
        for other in (path, unfinished):  # what a killed process left, too
            if other.exists() and not (other.is_file() and os.access(other, os.W_OK)):
                return False
        if not unfinished.exists():
            unfinished.touch(exist_ok=False)
            unfinished.unlink()
        return True
    except OSError:
        return False


def make_folder(path: str | os.PathLike, name: str) -> None:
    """Make a folder where it is missing, and find out now whether files can be made in it.

    Args:
        name: what the folder is, for the message.

    Raises:
        UserError: it cannot be made, or not be written to.
    """
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{name} must be a folder that can be written to, got {path}: {error.strerror}") from error


@contextlib.contextmanager
def written_whole(path: str | os.PathLike, *, durable: bool = False):
    """The path of another file in the same folder, with the same ending, for the caller to write; it then takes the
    place of `path`. Where that fails, as on a full disk, what was at `path` is still there, and nothing beside it. What
    a killed process leaves has one name, which the next write of `path` takes.

    Args:
        durable: the new file outlives the machine, too, once this is left.

    Raises:
        OSError: `path` cannot be written to.
    """
    path, unfinished = _whole_and_unfinished(path)
    try:
        if path.exists():
            open(path, "ab").close()  # refused where it is a folder, or is not to be written to
        yield unfinished
        if durable:
            fsync(unfinished)  # before the rename, or there may be the name and not what was written
        os.replace(unfinished, path)
        if durable:
            fsync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def _whole_and_unfinished(path) -> tuple[Path, Path]:
    """The file that is written, as a link stays one, and its name until it is whole."""
    path = Path(os.path.realpath(path))
    return path, path.with_name(UNFINISHED + path.name)


def fsync(path: str | os.PathLike) -> None:
    """Of a file, or of a folder: that the names in it last."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def held(path: str | os.PathLike, name: str, *, wait: bool = False):
    """While entered, no other process that asks can hold the folder, which must be there; nor another thread. The one that
    holds it may ask again.

    It is let go when the process ends, however it ends, also where processes that it forked live on. Where folders cannot
    be locked a file ".lock" in it is; where that cannot be either, nothing is held. A file system of several machines may
    keep a folder's lock to one of them, as Linux's NFS does.

    Args:
        name: what the folder is, for the message. wait: for the other process, instead of an error.

    Raises:
        UserError: another process holds it.
    """
    found = os.stat(path)
    place = found.st_dev, found.st_ino, threading.get_ident()
    if place in _holding:  # another descriptor of it would wait for ours
        yield
        return
    _holding[place] = os.open(path, os.O_RDONLY)
    try:
        try:
            _lock(_holding[place], path, name, wait)
        except OSError:
            with contextlib.suppress(OSError):
                file = os.open(os.path.join(path, ".lock"), os.O_RDWR | os.O_CREAT, 0o666)
                os.close(_holding[place])
                _holding[place] = file
                _lock(file, path, name, wait)
        yield
    finally:
        if place in _holding:  # not in a forked process
            os.close(_holding.pop(place))


def _lock(descriptor, path, name, wait) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        if not wait:
            raise UserError(f"{name} {path} is in use by another process") from error
        tell(f"waiting for another process that uses {name} {path}")
        fcntl.flock(descriptor, fcntl.LOCK_EX)


_holding: dict[tuple[int, int, int], int] = {}  # device, inode, thread -> descriptor


def _let_go() -> None:
    """In a process that was forked, such as one that loads pictures: it shares the lock as long as it has the descriptor,
    and outlives a parent that is killed by seconds."""
    while _holding:
        os.close(_holding.popitem()[1])


os.register_at_fork(after_in_child=_let_go)
