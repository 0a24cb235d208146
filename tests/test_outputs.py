"""A folder is held by one process, as long as that lives."""

import multiprocessing
import os
import signal
import time

import pytest

from dalle_fast.errors import UserError
from dalle_fast.outputs import held

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
    with pytest.raises(UserError, match="in use by another process"), held(tmp_path, "it"):
        pass
    holding.__exit__(None, None, None)
    with held(tmp_path, "it"):
        pass
