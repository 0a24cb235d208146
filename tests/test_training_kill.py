"""Training outlives SIGKILL at random moments, bit for bit. DALLE_FAST_KILLS sets how many (6 where it is unset)."""

import os

import pytest

from dalle_fast import checkpoint, kill_tests
from dalle_fast.kill_tests import kill_and_resume

KILLS = int(os.environ.get("DALLE_FAST_KILLS", "6"))


@pytest.mark.timeout(60 + 10 * KILLS)
def test_killed_and_resumed_runs_equal_undisturbed_ones(tmp_path, capsys):
    report = kill_and_resume(tmp_path, kills=KILLS, inside=KILLS // 3)
    with capsys.disabled():
        print(f"\n{report}")
    assert report.failures == []
    assert report.kills >= KILLS and report.inside_writes >= KILLS // 3 and report.runs >= 1


def _train_with_a_forgotten_state(run, place):
    """A resume that forgets the optimizer's state, in the process that is killed."""
    import torch

    torch.optim.AdamW.load_state_dict = lambda self, state: None
    kill_tests_train(run, place)


kill_tests_train = kill_tests._train


def test_a_resume_that_forgets_is_found(tmp_path, monkeypatch):
    """The comparison can fail: the same with the optimizer's state left out."""
    monkeypatch.setattr(kill_tests, "_train", _train_with_a_forgotten_state)
    monkeypatch.setattr(kill_tests, "SHORTEST_WAIT", 0.8)  # after the first checkpoint
    monkeypatch.setattr(kill_tests, "LONGEST_WAIT", 1.2)
    report = kill_and_resume(tmp_path, kills=1)
    assert any("differs" in failure and checkpoint.MODEL in failure for failure in report.failures)
