"""A folder is held by one process, as long as that lives; a file is written whole."""

import errno
import fcntl
import multiprocessing
import os
import signal
import stat
import time

import pytest

from dalle_fast.errors import UserError
from dalle_fast.outputs import can_write, held, written_whole

FORK = multiprocessing.get_context("fork")


def _hold_beside_a_child(path, told):
    """As training with workers does: the child is forked while the folder is held, and outlives a parent that is killed."""
    with held(path, "it"):
        child = FORK.Process(target=time.sleep, args=(60,))
        child.start()
        told.send(child.pid)
        child.join()


def test_a_folder_is_free_once_its_process_is_killed_though_a_forked_one_lives_on(tmp_path):
    told, tell = FORK.Pipe()
    parent = FORK.Process(target=_hold_beside_a_child, args=(tmp_path, tell))
    parent.start()
    child = told.recv()
    try:
        with pytest.raises(UserError, match="in use by another process"), held(tmp_path, "it"):
            pass
        parent.kill()
        parent.join()
        os.kill(child, 0)  # lives
        with held(tmp_path, "it"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def _is_held(path):
    """As another process finds it."""
    child = os.fork()
    if child == 0:
        try:
            with held(path, "it"):
                os._exit(0)
        except UserError:
            os._exit(1)
    return bool(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def test_a_forked_process_that_leaves_the_block_lets_nothing_go(tmp_path):
    """Nor does it close what has the descriptor's number there by then."""
    holding = held(tmp_path, "it")
    holding.__enter__()
    child = os.fork()
    if child == 0:
        others = [os.open(tmp_path, os.O_RDONLY) for _ in range(9)]
        holding.__exit__(None, None, None)
        try:
            for other in others:
                os.fstat(other)
        except OSError:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert _is_held(tmp_path)
    holding.__exit__(None, None, None)
    assert not _is_held(tmp_path)


def test_who_holds_a_folder_may_ask_again_by_another_name(tmp_path):
    """As where codes are kept in a run's folder: a second lock of it would wait for the first one, without end."""
    (tmp_path / "link").symlink_to(tmp_path)
    with held(tmp_path, "it"):
        with held(tmp_path / "link", "it"):
            pass
        assert _is_held(tmp_path)
    assert not _is_held(tmp_path)


@pytest.mark.parametrize("writable", [True, False])
def test_where_folders_cannot_be_locked_a_file_is(tmp_path, monkeypatch, writable):
    """Nothing, where that cannot be made; and no file is left where a folder can be locked."""
    with held(tmp_path, "it"):
        assert os.listdir(tmp_path) == []
    flock = fcntl.flock

    def refusing(descriptor, how):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", refusing)
    if not writable:
        (tmp_path / ".lock").mkdir()
    with held(tmp_path, "it"):
        assert _is_held(tmp_path) == writable
    assert not _is_held(tmp_path)


@pytest.mark.parametrize(
    ("name", "possible"),
    [
        ("new", True),
        ("old", True),
        ("n" * 246, True),
        ("n" * 247, False),  # its name until it is whole is of 256 bytes
        ("n" * 256, False),
        ("missing/new", False),
        ("to_old", True),
        ("to_new", True),
        ("to_missing", False),
        ("to_nowhere_in_proc", False),
        (".", False),
        ("old/new", False),
        ("left", True),  # by a process that was killed
        ("taken", False),
    ],
)
def test_can_write_is_true_of_what_is_then_written(tmp_path, name, possible):
    (tmp_path / "old").write_text("old")
    for link, target in (("old", "old"), ("new", "new"), ("missing", "missing/x"), ("nowhere_in_proc", "/proc/x")):
        os.symlink(target, tmp_path / f"to_{link}")
    (tmp_path / ".writing-left").write_text("half")
    (tmp_path / ".writing-taken").mkdir()
    before = sorted(os.listdir(tmp_path))
    assert can_write(tmp_path / name) == possible
    assert sorted(os.listdir(tmp_path)) == before and (tmp_path / "old").read_text() == "old"
    if possible:
        with written_whole(tmp_path / name) as unfinished:
            unfinished.write_text("whole")
        assert (tmp_path / name).read_text() == "whole"
    else:
        with pytest.raises(OSError), written_whole(tmp_path / name) as unfinished:
            unfinished.write_text("whole")


@pytest.mark.parametrize("durable", [False, True])
def test_a_durable_file_is_synced_before_its_name_and_the_folder_after(tmp_path, monkeypatch, durable):
    events, fsync, replace = [], os.fsync, os.replace

    def log_fsync(descriptor):
        events.append("fsync " + os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def log_replace(path, target):
        events.append(f"rename {os.path.basename(path)}")
        replace(path, target)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "replace", log_replace)
    (tmp_path / ".writing-x").write_text("of a process that was killed")
    with written_whole(tmp_path / "x", durable=durable) as unfinished:
        unfinished.write_text("new")
    synced = ["fsync .writing-x", "rename .writing-x", f"fsync {tmp_path.name}"]
    assert events == (synced if durable else synced[1:2])
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "new"
