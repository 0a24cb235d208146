"""The training loop and stage 1's objective: schedules, averages, skipped steps, signals, and resuming bit for bit."""

import contextlib
import dataclasses
import fcntl
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tqdm import tqdm

import dalle_fast.nn as fnn
from dalle_fast import checkpoint, progress
from dalle_fast.checkpoint import CheckpointError, CheckpointWarning
from dalle_fast.data import batches, open_source
from dalle_fast.errors import UserError
from dalle_fast.training import (
    DALLERecipe,
    DVAEObjective,
    DVAERecipe,
    LoopSettings,
    TrainingError,
    loop,
    precision,
    processes,
    random_state,
    stage1,
    train,
)
from dalle_fast.training.codes import fingerprint
from dalle_fast.training.ema import EMA
from dalle_fast.training.recipes import RECIPES
from dalle_fast.training.schedules import cosine, warmup
from dalle_fast.training.stage1 import evaluate, usage

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = fnn.DVAEConfig(image_size=16, downsampling=8, num_codes=12, embedding_dim=4, hidden=8, blocks_per_group=1)
RECIPE = DVAERecipe(steps=12, batch_size=4, learning_rate=1e-2, learning_rate_share=1, beta_share=0.5, tau_share=0.8)
QUIET = {"tensorboard": False, "progress": False}


class FewShapes(NamedTuple):
    """A source of a handful of scenes."""

    source: object
    size: int
    name: str = "shapes"
    crop: bool = False

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return self.source[index]

    def check_all(self, images):
        return self.source.check_all(images)


def objective(recipe=RECIPE, config=SMALL, **options):
    train_, validation = (FewShapes(open_source("shapes", image_size=16, split=x), 8) for x in ("train", "validation"))
    return DVAEObjective(config, recipe, train_, validation, **options)


def settings(**changes):
    return LoopSettings(**{"steps": RECIPE.steps, "log_every": 3, "checkpoint_every": 5, "ema_decay": 0.9, **changes})


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def contents(folder):
    """What must not depend on whether a run was interrupted."""
    names = ["log.jsonl", "evaluation.json", checkpoint.MODEL]
    names += sorted(f"pictures/{path.name}" for path in (folder / "pictures").iterdir())
    last = checkpoint.latest(folder / checkpoint.CHECKPOINTS)
    return {name: (folder / name).read_bytes() for name in names} | {
        f"{last.name}/{path.name}": path.read_bytes() for path in sorted(last.iterdir())
    }


# -- schedules ---------------------------------------------------------------------------------------------------------


def test_schedules_begin_and_end_exactly():
    """tau ends at exactly 1/16 and beta at exactly 6.6, whatever the number of steps; between them is a cosine."""
    for preset, recipe in RECIPES.items():
        for steps in (1, 7, 1000, recipe.steps):
            scaled = dataclasses.replace(recipe, steps=steps)
            assert (scaled.tau_at(0), scaled.beta_at(0)) == (1.0, 0.0) or steps == 1
            assert scaled.tau_at(steps) == 1 / 16, preset
            assert scaled.beta_at(steps) == recipe.beta, preset
    paper = RECIPES["openai"]
    assert (paper.beta, paper.beta_at(5_000), paper.tau_at(150_000)) == (6.6, 6.6, 1 / 16)
    assert paper.beta_at(4_999) < 6.6 and paper.tau_at(149_999) > 1 / 16
    assert paper.learning_rate_at(0) == 1e-4
    assert paper.learning_rate_at(1_199_999) > paper.learning_rate_at(1_200_000) == 1.25e-6
    assert paper.learning_rate_at(600_000) == pytest.approx((1e-4 + 1.25e-6) / 2)
    assert paper.beta_at(2_500) == pytest.approx(3.3)
    assert paper.tau_at(50_000) == pytest.approx(1 / 16 + 15 / 16 * (1 + math.cos(math.pi / 3)) / 2)


def test_cosine_is_monotone_and_never_outside_its_ends():
    for start, end in ((1.0, 1 / 16), (0.0, 6.6), (3.0, 3.0)):
        values = [cosine(step, start=start, end=end, steps=100) for step in range(-2, 104)]
        assert values[:3] == [start] * 3 and values[-4:] == [end] * 4
        assert all(min(start, end) <= value <= max(start, end) for value in values)
        assert values in (sorted(values), sorted(values, reverse=True))
    assert cosine(0, start=1.0, end=2.0, steps=0) == 2.0


def test_warmup():
    assert [warmup(step, steps=4) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert warmup(0, steps=0) == 1


def test_the_loop_takes_its_numbers_from_a_recipe():
    found = LoopSettings.of(DALLERecipe(steps=7), log_every=3)
    assert found == LoopSettings(steps=7, clip=4.0, ema_decay=0.99, ema_every=25, log_every=3)
    assert LoopSettings.of(dataclasses.replace(RECIPE, clip=0.5), steps=5, ema_decay=0.9) == LoopSettings(5, 0.5, 0.9)


# -- the average -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
def test_the_average_follows_its_formula(every):
    model = torch.nn.Linear(1, 1, bias=False).double()
    torch.nn.init.constant_(model.weight, 5.0)
    ema, expected = EMA(model, decay=0.7, every=every), 5.0
    for update in range(1, 20):
        with torch.no_grad():
            model.weight.fill_(float(update))
        ema.update(model, update, last=update == 19)
        if update % every == 0 or update == 19:
            n = math.ceil(update / every)
            decay = min(0.7, (1 + n) / (10 + n))
            expected = decay * expected + (1 - decay) * update
        assert ema.model.weight.item() == pytest.approx(expected, rel=1e-12)
    assert not ema.model.weight.requires_grad and not ema.model.training


def test_the_average_is_what_is_evaluated_drawn_and_exported(tmp_path):
    o = objective()
    seen = []
    o.evaluate = lambda model, at_once: seen.append(model) or {"psnr": 1.0}
    o.pictures = lambda model, at_once: seen.append(model) or {}
    train(o, tmp_path, settings(), **QUIET)
    assert len(seen) == 2 and seen[0] is seen[1] and seen[0] is not o.model
    exported = checkpoint.load_model(tmp_path, kind="DiscreteVAE")
    averaged, raw = seen[0].state_dict(), o.model.state_dict()
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in exported.state_dict().items())
    assert not any(torch.equal(averaged[name], tensor) for name, tensor in raw.items() if tensor.any())
    assert json.loads((tmp_path / "evaluation.json").read_text()) == {"step": 12, "psnr": 1.0}


# -- resuming ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(objective(), folder, settings(), **QUIET)
    return contents(folder)


class StopAt:
    """An objective that is stopped in a step, by a signal or an exception."""

    def __init__(self, step, how):
        self.step, self.how = step, how

    def __call__(self, o):
        loss = o.loss

        def stopping(batch, step, part):
            if step == self.step:
                self.how()
            return loss(batch, step, part)

        o.loss = stopping
        return o


def disturb_random_states():
    torch.manual_seed(99)
    np.random.seed(99)


def test_a_signal_saves_and_resuming_is_exact(tmp_path, uninterrupted):
    """SIGTERM in step 3 (no checkpoint yet) and SIGINT in step 7, in the middle of an interval of the log."""
    for step, number in ((3, signal.SIGTERM), (7, signal.SIGINT)):
        stop = StopAt(step, lambda number=number: os.kill(os.getpid(), number))
        result = train(stop(objective()), tmp_path, settings(), resume=True, **QUIET)
        assert (result.step, result.signal, result.evaluation) == (step + 1, number, {})
        assert checkpoint.latest(tmp_path / checkpoint.CHECKPOINTS).name == f"step-{step + 1:09d}"
        assert not (tmp_path / "evaluation.json").exists()
        disturb_random_states()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    result = train(objective(), tmp_path, settings(), resume=True, **QUIET)
    assert (result.step, result.signal) == (12, None)
    assert contents(tmp_path) == uninterrupted


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize(("stopped", "last"), [(False, "evaluation.json"), (True, "step-000000003")])
def test_processes_that_train_together_end_once_all_is_written(tmp_path, monkeypatch, stopped, last):
    """When one of them ends torchrun soon kills the others. And a signal does not end one that waits."""
    found = []

    def end_together(self):
        send(signal.SIGTERM)
        found.append({path.name for path in tmp_path.rglob("*")})

    monkeypatch.setattr(processes.Processes, "end_together", end_together)
    stop = StopAt(2 if stopped else 99, lambda: send(signal.SIGTERM))
    result = train(stop(objective()), tmp_path, settings(steps=4), **QUIET)
    assert result.signal == (signal.SIGTERM if stopped else None)
    assert len(found) == 1 and last in found[0]


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGHUP,),
        (signal.SIGINT, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP),
        (signal.SIGTERM, signal.SIGINT),
    ],
)
def test_only_a_second_interrupt_does_not_wait_for_the_step(tmp_path, capfd, numbers):
    """Schedulers send pairs of signals, and a terminal that is closed another one."""
    stop = StopAt(3, lambda: send(*numbers))
    result = train(stop(objective()), tmp_path, settings(), tensorboard=False)
    assert (result.step, result.signal) == (4, numbers[0])
    assert checkpoint.latest(tmp_path / checkpoint.CHECKPOINTS).name == "step-000000004"
    assert all(signal.getsignal(number) is signal.SIG_DFL for number in (signal.SIGTERM, signal.SIGHUP))
    assert capfd.readouterr().err.count("\nstopping after this step; Ctrl-C again ends at once\n") == 1


def test_a_group_that_is_stopped_says_so_once(tmp_path, capfd):
    """A Ctrl-C meets the processes that load batches too."""

    def stop_all():
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGINT)
        time.sleep(0.1)
        send(signal.SIGINT)

    train(StopAt(3, stop_all)(objective(workers=1)), tmp_path, settings(), tensorboard=False)
    assert capfd.readouterr().err.count("stopping after this step") == 1


def test_nohup_keeps_a_run_from_hanging_up(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopAt(3, lambda: send(signal.SIGHUP))
        assert train(stop(objective()), tmp_path, settings(), **QUIET).signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("where", ["loss", "evaluate"])
def test_an_abort_leaves_a_checkpoint_of_the_last_whole_step(tmp_path, uninterrupted, where):
    o = objective()
    of_objective = getattr(o, where)

    def interrupted(*arguments):
        if where == "evaluate" or arguments[1] == 6:
            send(signal.SIGINT, signal.SIGINT)
        return of_objective(*arguments)

    setattr(o, where, interrupted)
    evaluate_every = 6 if where == "evaluate" else 0
    with pytest.raises(KeyboardInterrupt):
        train(o, tmp_path, settings(evaluate_every=evaluate_every), **QUIET)
    assert checkpoint.latest(tmp_path / checkpoint.CHECKPOINTS).name == "step-000000006"
    train(objective(), tmp_path, settings(evaluate_every=evaluate_every), resume=True, **QUIET)
    assert contents(tmp_path)[checkpoint.MODEL] == uninterrupted[checkpoint.MODEL]


def test_a_third_interrupt_ends_the_save_too(tmp_path, monkeypatch):
    def interrupt(phase):
        if phase == "model written":
            send(signal.SIGINT)

    monkeypatch.setattr(checkpoint, "_reached", interrupt)
    stop = StopAt(3, lambda: send(signal.SIGINT, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(stop(objective()), tmp_path, settings(), **QUIET)
    assert checkpoint.latest(tmp_path / checkpoint.CHECKPOINTS) is None


class Crash(Exception):
    pass


def crash():
    raise Crash


def train_and_crash_in_the_update(step, folder):
    """What comes while weights change leaves no checkpoint, as a kill does not wherever it comes."""

    def crashing(optimizer, closure=None):
        if next(taken) == step:
            raise Crash
        return of_torch(optimizer, closure)

    taken, of_torch = itertools.count(), torch.optim.AdamW.step
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(torch.optim.AdamW, "step", crashing)
        train(objective(), folder, settings(), **QUIET)


def test_a_crash_after_a_checkpoint_resumes_exactly(tmp_path, uninterrupted):
    """The log has lines beyond the checkpoint, which are dropped; and one that was cut short."""
    train_and_crash_in_the_update(9, tmp_path)
    assert [line["step"] for line in log_of(tmp_path)] == [3, 6, 9]
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 11, "lo')
    disturb_random_states()
    train(objective(), tmp_path, settings(), resume=True, **QUIET)
    assert contents(tmp_path) == uninterrupted


@pytest.mark.parametrize("where", ["loss", "backward"])
def test_an_error_in_a_step_leaves_a_checkpoint_of_the_steps_before_it(tmp_path, uninterrupted, where):
    """As where memory is short. What is drawn in the half step is not in it."""

    def short_of_memory(*_):
        raise torch.OutOfMemoryError("no memory")

    def half(batch, step, part):
        value, scalars = loss(batch, step, part)
        if step == 8:
            disturb_random_states()
            short_of_memory() if where == "loss" else value.register_hook(short_of_memory)
        return value, scalars

    o = objective()
    loss, o.loss = o.loss, half
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        train(o, tmp_path, settings(), **QUIET)
    assert checkpoint.latest(tmp_path / checkpoint.CHECKPOINTS).name == "step-000000008"
    train(objective(), tmp_path, settings(), resume=True, **QUIET)
    assert contents(tmp_path) == uninterrupted


def test_scales_of_gradients_are_those_of_the_steps_before_an_error(tmp_path):
    """They change behind the backward pass, where a process that is lost shows too."""
    o = objective()
    o.model.register_buffer("scale", torch.ones(()))
    o.model.unscale_gradients = lambda: o.model.scale.mul_(2)
    of_torch, taken = torch.nn.utils.clip_grad_norm_, itertools.count()

    def clip(*arguments):
        if next(taken) == 3:
            crash()
        return of_torch(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
        train(o, tmp_path, settings(), **QUIET)
    saved = checkpoint.load(tmp_path / checkpoint.CHECKPOINTS)
    assert (saved.step, saved.tensors["model.scale"]) == (3, 8) and o.model.scale == 8


def test_a_torn_checkpoint_costs_the_steps_since_the_one_before_it(tmp_path, uninterrupted):
    train_and_crash_in_the_update(11, tmp_path)
    path = tmp_path / checkpoint.CHECKPOINTS / "step-000000010" / checkpoint.TRAINING
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(CheckpointWarning, match="step-000000010 is damaged: training"):
        train(objective(), tmp_path, settings(), resume=True, **QUIET)
    assert contents(tmp_path) == uninterrupted


def test_a_run_whose_only_checkpoint_was_about_to_be_replaced_is_one(tmp_path):
    """It was killed between the two renames; taken for none, another run emptied its log."""
    train(objective(), tmp_path, settings(steps=2), **QUIET)
    (tmp_path / checkpoint.MODEL).unlink()
    last = checkpoint.latest(tmp_path / checkpoint.CHECKPOINTS)
    last.rename(last.with_name(f".replaced-{last.name}"))
    with pytest.raises(TrainingError, match=r"holds a run \(.replaced-step-000000002\)"):
        train(objective(), tmp_path, settings(steps=2), **QUIET)
    assert train(objective(), tmp_path, settings(steps=2), resume=True, **QUIET).step == 2
    assert [line["step"] for line in log_of(tmp_path)] == [2]


def test_resuming_a_finished_run_evaluates_it_again(tmp_path, uninterrupted):
    train(objective(), tmp_path, settings(), **QUIET)
    (tmp_path / "evaluation.json").unlink()
    (tmp_path / checkpoint.MODEL).unlink()
    train(objective(), tmp_path, settings(), resume=True, **QUIET)
    assert contents(tmp_path) == uninterrupted


@pytest.mark.parametrize("resume", [False, True])
def test_a_model_without_its_checkpoints_is_not_replaced(tmp_path, resume):
    train(objective(), tmp_path, settings(), **QUIET)
    shutil.rmtree(tmp_path / checkpoint.CHECKPOINTS)
    with pytest.raises(TrainingError, match="holds a trained model, and no checkpoint to go on from: choose another"):
        train(objective(), tmp_path, settings(), resume=resume, **QUIET)


@pytest.mark.parametrize("resume", [False, True])
def test_a_log_that_is_no_runs_is_not_emptied(tmp_path, resume):
    """One of a run that ended before its first checkpoint is."""
    log = tmp_path / "log.jsonl"
    for text in ('{"time": 1}\n', "a log\n", '{"step": 1, "loss"\n'[1:]):
        log.write_text(text)
        with pytest.raises(TrainingError, match=r"log.jsonl is not the log of a run: choose another folder"):
            train(objective(), tmp_path, settings(), resume=resume, **QUIET)
        assert log.read_text() == text and not list((tmp_path / checkpoint.CHECKPOINTS).iterdir())
    for number, text in enumerate(('{"st', '{"step": 3, "loss": 1.0}\n{"step": 6', "")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "log.jsonl").write_text(text)
        train(objective(), folder, settings(steps=1), resume=resume, **QUIET)
        assert [line["step"] for line in log_of(folder)] == [1]


def test_a_folder_is_for_one_run_at_a_time(tmp_path):
    other = os.open(tmp_path, os.O_RDONLY)  # as another process has it
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="is in use by another process"):
        train(objective(), tmp_path, settings(), **QUIET)
    os.close(other)
    train(objective(), tmp_path, settings(), **QUIET)


def test_a_report_that_cannot_be_written_ends_the_run_behind_a_checkpoint(tmp_path, uninterrupted):
    o = objective()
    o.pictures = lambda model, at_once: shutil.rmtree(tmp_path / "pictures") or {"a": np.zeros((2, 2, 3), np.uint8)}
    with pytest.raises(FileNotFoundError):
        train(o, tmp_path, settings(picture_every=7), **QUIET)
    assert checkpoint.latest(tmp_path / checkpoint.CHECKPOINTS).name == "step-000000007"
    train(objective(), tmp_path, settings(), resume=True, **QUIET)
    assert contents(tmp_path) == uninterrupted


@pytest.mark.parametrize("what", ["evaluate", "pictures"])
@pytest.mark.parametrize("step", [6, 12])
def test_reports_that_are_cut_short_are_made_again(tmp_path, what, step, capsys):
    """The first of them is in the log already: a resumed one has it once, and means of no more steps than others.

    Those of the trained model end no run: it is written first, in parts no larger than those of a batch.
    """
    whole = settings(evaluate_every=3, picture_every=3)
    train(objective(), tmp_path / "whole", whole, **QUIET)
    o, calls = objective(), itertools.count(3, 3)
    of_objective = getattr(o, what)
    setattr(o, what, lambda *of: crash() if next(calls) == step else of_objective(*of))
    with pytest.raises(Crash) if step < 12 else contextlib.nullcontext():
        assert train(o, tmp_path / "parts", whole, **QUIET)[:2] == (12, None)
    assert log_of(tmp_path / "parts")[-1]["step"] == step
    of_it = "evaluation" if what == "evaluate" else what
    told = f"warning: no {of_it} of the trained model, which is written: Crash (--resume tries again)\n"
    if step < 12:
        without = {"evaluate": "--evaluate-every 0", "pictures": "--picture-every 0"}[what]
        told = f"no {of_it} of step 6: --resume tries again, and with {without} goes on without\n"
    assert capsys.readouterr().err == told
    assert (tmp_path / "parts" / checkpoint.MODEL).exists() == (step == 12)
    assert (tmp_path / "parts" / "evaluation.json").exists() == (step == 12 and what == "pictures")
    train(objective(), tmp_path / "parts", whole, resume=True, **QUIET)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize("what", ["evaluate", "pictures"])
def test_a_run_can_go_on_without_what_always_fails(tmp_path, uninterrupted, what):
    """As with a picture for validation that is gone, or samples for which memory is short."""

    every = {"evaluate": "evaluate_every", "pictures": "picture_every"}[what]
    for _ in range(2):
        o = objective()
        setattr(o, what, lambda model, at_once: crash())
        with pytest.raises(Crash):
            train(o, tmp_path, settings(**{every: 3}), resume=True, **QUIET)
    train(objective(), tmp_path, settings(), resume=True, **QUIET)
    assert contents(tmp_path) == uninterrupted


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("error", [BrokenPipeError, ValueError])
def test_a_run_goes_on_if_no_one_can_be_told(tmp_path, uninterrupted, monkeypatch, terminal, error):
    """As behind `| head`, or where a terminal was closed or stderr was from the start."""

    class Gone(io.StringIO):
        def isatty(self):
            return terminal

        def write(self, text):
            raise error

    for number, gone in enumerate((Gone(), None)):
        monkeypatch.setattr(sys, "stderr", gone)
        train(objective(), tmp_path / str(number), settings(), tensorboard=False)
        assert contents(tmp_path / str(number)) == uninterrupted
    found = []
    lock = tqdm.get_lock().locks[0]  # of both, which all bars of all threads take
    other = threading.Thread(target=lambda: found.append(lock.acquire(timeout=1) and (lock.release() or True)))
    other.start()
    other.join()
    assert found == [True]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_lost_loading_process_ends_the_run_behind_a_checkpoint(tmp_path, uninterrupted, number):
    """SIGKILL as where memory is short; SIGTERM as to the whole group, which is no error."""

    def lose_it():
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, number)
        worker.join()
        if number == signal.SIGTERM:
            os.kill(os.getpid(), number)

    o = StopAt(6, lose_it)(objective(workers=1))
    if number == signal.SIGTERM:
        assert train(o, tmp_path, settings(), **QUIET).signal == number
    else:
        with pytest.raises(TrainingError, match=r"no batch for step \d+: DataLoader worker"):
            train(o, tmp_path, settings(), **QUIET)
    assert checkpoint.latest(tmp_path / checkpoint.CHECKPOINTS).name >= "step-000000007"
    train(objective(), tmp_path, settings(), resume=True, **QUIET)
    assert contents(tmp_path) == uninterrupted


@pytest.mark.parametrize("error", [RuntimeError, EOFError, ConnectionResetError, FileNotFoundError])
@pytest.mark.parametrize("late", [False, True])
def test_a_loader_that_the_groups_signal_ended_is_no_error(tmp_path, error, late):
    """Whatever a torn hand-over of a batch looks like, and if the signal is here a moment later."""

    def ending(start):
        for number, batch in enumerate(of_objective(start)):
            if number == 5:
                if late:
                    threading.Timer(0.03, os.kill, (os.getpid(), signal.SIGTERM)).start()
                else:
                    os.kill(os.getpid(), signal.SIGTERM)
                raise error
            yield batch

    o = objective()
    of_objective, o.batches = o.batches, ending
    result = train(o, tmp_path, settings(), **QUIET)
    assert (result.step, result.signal) == (5, signal.SIGTERM)
    assert checkpoint.latest(tmp_path / checkpoint.CHECKPOINTS).name == "step-000000005"


@pytest.mark.parametrize(
    ("error", "expected"),
    [(EOFError, TrainingError), (ConnectionResetError, TrainingError), (PermissionError, PermissionError)],
)
def test_a_loader_that_ends_by_itself_is_one(tmp_path, error, expected):
    def ending(start):
        yield from itertools.islice(of_objective(start), 5)
        raise error

    o = objective()
    of_objective, o.batches = o.batches, ending
    with pytest.raises(expected):
        train(o, tmp_path, settings(), **QUIET)
    assert checkpoint.latest(tmp_path / checkpoint.CHECKPOINTS).name == "step-000000005"


def test_settings_must_be_those_of_the_run(tmp_path):
    train_and_crash_in_the_update(6, tmp_path)
    with pytest.raises(TrainingError, match=r"holds a run \(step-000000005\)"):
        train(objective(), tmp_path, settings(), **QUIET)
    other = objective(dataclasses.replace(RECIPE, batch_size=5), dataclasses.replace(SMALL, num_codes=13), seed=3)
    with pytest.raises(CheckpointError, match=r"batch_size 4, not 5; model.num_codes 12, not 13; seed 0, not 3$"):
        train(other, tmp_path, settings(), resume=True, **QUIET)
    for name, found in (("ema_decay", 0.9), ("clip", 1.0)):  # clip is the recipe's too: what the loop does counts
        with pytest.raises(CheckpointError, match=f"run with {name} {found}, not 0.5$"):
            train(objective(), tmp_path, settings(**{name: 0.5}), resume=True, **QUIET)
    assert checkpoint.load(tmp_path / checkpoint.CHECKPOINTS).step == 5


class Several(processes.Processes):
    """Two processes, of which the other one goes on from another step."""

    def check_same_values(self, values, what):
        pass

    def largest(self, number):
        return max(number, 5)


def test_a_run_of_an_earlier_version_may_be_evaluated_more_often(tmp_path, monkeypatch):
    """Of which settings have what no step depends on."""
    of_version = LoopSettings.that_matter
    with monkeypatch.context() as earlier:
        earlier.setattr(LoopSettings, "that_matter", lambda loop: of_version(loop) | {"evaluate_every": 0})
        train_and_crash_in_the_update(6, tmp_path)
    assert checkpoint.saved_settings(tmp_path / checkpoint.CHECKPOINTS)["evaluate_every"] == 0
    train(objective(), tmp_path, settings(evaluate_every=6), resume=True, **QUIET)
    assert [line["step"] for line in log_of(tmp_path) if "evaluation/psnr" in line] == [6, 12]


def test_processes_that_would_resume_from_other_steps_are_refused(tmp_path, monkeypatch):
    """As where each has a folder of its own; and the parts of a batch are those of all processes."""
    monkeypatch.setattr(processes, "current", lambda: Several(0, 2))
    o = objective()
    words = (
        f"the step that {re.escape(str(tmp_path))} is resumed from must be the same for all 2 processes, got -5 to 5"
    )
    with pytest.raises(UserError, match=words):
        train(o, tmp_path, settings(accumulate=2), **QUIET)
    assert loop._Run(o, tmp_path, settings(accumulate=2)).at_once == 1


def test_processes_with_other_settings_are_refused_before_the_first_step(tmp_path, monkeypatch):
    """As of machines of which one multiplies in bfloat16. What is compared: tests/test_processes.py."""

    def refuse(self, values, what):
        raise UserError(f"{what}: {values['precision']}, seed {values['seed']}")

    monkeypatch.setattr(processes.Processes, "check_same_values", refuse)
    with pytest.raises(UserError, match="^the settings of a run: float32, seed 0$"):
        train(objective(), tmp_path, settings(precision="float32"), **QUIET)
    assert list(tmp_path.iterdir()) == []


class OwnModel(fnn.DiscreteVAE):
    pass


def test_what_no_checkpoint_could_hold_is_refused_before_the_first_step(tmp_path):
    o = objective()
    o.model.__class__ = OwnModel
    with pytest.raises(
        ValueError, match="model must be a DiscreteVAE or a DALLE, itself and no subclass, .*, got .*OwnModel"
    ):
        train(o, tmp_path, settings(), **QUIET)
    for value, reason in ((torch.float32, "dtype is not JSON serializable"), (math.nan, "not JSON compliant")):
        o = objective()
        o.settings["own"] = value
        with pytest.raises(ValueError, match=f"objective.settings must be what JSON can hold: .*{reason}"):
            train(o, tmp_path, settings(), **QUIET)
    assert not list(tmp_path.iterdir())


def test_settings_are_compared_as_json_holds_them(tmp_path):
    for resume in (False, True):
        o = objective()
        o.settings |= {"betas": (0.9, 0.95), "by number": {1: 2}}
        train(o, tmp_path, settings(), resume=resume, **QUIET)


def test_an_objectives_batches_and_numbers(tmp_path, uninterrupted):
    """Any iterable of batches, which must not end; scalars of any shape with one number, and evaluations of tensors."""
    o, few = objective(), objective()
    every = o.batches(0)
    some = [next(every) for _ in range(12)]
    loss, evaluate_ = o.loss, o.evaluate

    def with_tensors(batch, step, part):
        value, scalars = loss(batch, step, part)
        return value, {name: torch.tensor([scalar]) for name, scalar in scalars.items()}

    o.batches, o.loss = lambda start: some, with_tensors
    o.evaluate = lambda *of: {name: torch.tensor(value) for name, value in evaluate_(*of).items()}
    train(o, tmp_path / "a", settings(), **QUIET)
    assert contents(tmp_path / "a")[checkpoint.MODEL] == uninterrupted[checkpoint.MODEL]
    few.batches = lambda start: some[:7]
    with pytest.raises(TrainingError, match=r"no batch for step 7: objective.batches must not end"):
        train(few, tmp_path / "b", settings(), **QUIET)
    assert checkpoint.latest(tmp_path / "b" / checkpoint.CHECKPOINTS).name == "step-000000007"


def test_random_states_come_back():
    import random

    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()

    draw()  # so that both have half of a pair of normal numbers in store
    state = json.loads(json.dumps(random_state.get()))
    first = draw()
    random_state.put(state)
    assert draw() == first
    random_state.put(state)
    with random_state.untouched():
        disturb_random_states()
    assert draw() == first


# -- steps that are not finite -----------------------------------------------------------------------------------------


def spoil(o, steps, how):
    loss = o.loss

    def spoiled(batch, step, part):
        value, scalars = loss(batch, step, part)
        return (how(value) if step in steps else value), scalars

    o.loss = spoiled
    return o


@pytest.mark.parametrize("how", [lambda x: x * math.nan, lambda x: x * math.inf, lambda x: (x - x.detach()).sqrt()])
def test_steps_that_are_not_finite_change_nothing_and_are_counted(tmp_path, how):
    """The last of them has a finite loss, and a gradient that is not."""
    before = []
    o = spoil(objective(), {4, 5}, how)
    o.learning_rate = lambda step: before.append([p.clone() for p in o.model.parameters()]) or 1e-2
    train(o, tmp_path, settings(max_skipped=2), **QUIET)
    same = [all(torch.equal(a, b) for a, b in zip(x, y)) for x, y in zip(before, before[1:])]
    assert same == [step in {4, 5} for step in range(11)]
    assert [line["skipped"] for line in log_of(tmp_path)] == [0, 2, 2, 2]
    assert all(math.isfinite(value) for line in log_of(tmp_path) for value in line.values())


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (set(), None),
        ({4, 5}, "2 of 12 steps were skipped, as loss or gradient was not finite; the last one was step 6. A smaller"),
        ({2, *range(7, 12)}, "6 of 12 steps .*; also the last 5, so that training had ended at step 7. A smaller"),
    ],
    ids=["none", "some", "the last"],
)
def test_a_run_says_at_its_end_what_was_skipped(tmp_path, capsys, steps, words):
    """Also one that was resumed after the last of them."""
    stop = StopAt(8, lambda: os.kill(os.getpid(), signal.SIGTERM))
    for o in (
        stop(spoil(objective(), steps, lambda x: x * math.nan)),
        spoil(objective(), steps, lambda x: x * math.nan),
    ):
        assert "warning" not in capsys.readouterr().err
        train(o, tmp_path, settings(), resume=True, **QUIET)
    error = capsys.readouterr().err
    assert re.match(f"warning: {words}", error) and error.count("\n") == 1 if words else not error


def test_too_many_in_a_row_are_an_error_that_names_the_last_checkpoint(tmp_path):
    with pytest.raises(TrainingError, match=r"3 steps in a row, up to step 10; the last checkpoint is step-000000005"):
        train(spoil(objective(), range(7, 12), lambda x: x * math.nan), tmp_path, settings(max_skipped=2), **QUIET)
    for value in checkpoint.load(tmp_path / checkpoint.CHECKPOINTS).weights.values():
        assert value.isfinite().all()


def test_no_checkpoint_is_made_while_steps_are_skipped(tmp_path):
    """What made them not finite may have ruined the weights: good ones would make room for them."""
    with pytest.raises(TrainingError, match="the last checkpoint is step-000000003"):
        o = spoil(objective(), range(3, 12), lambda x: x * math.nan)
        train(o, tmp_path, settings(max_skipped=7, checkpoint_every=1), **QUIET)
    assert len(list((tmp_path / checkpoint.CHECKPOINTS).iterdir())) == 2


def test_an_interval_without_a_finite_step(tmp_path):
    train(spoil(objective(), {3, 4, 5}, lambda x: x * math.nan), tmp_path, settings(), **QUIET)
    line = log_of(tmp_path)[1]
    assert line.keys() == {"step", "perplexity", "codes_used", "skipped"} and line["skipped"] == 3


# -- what a run tells --------------------------------------------------------------------------------------------------


def test_log_pictures_and_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(objective(), tmp_path, settings(picture_every=6, evaluate_every=6), progress=False)
    log = log_of(tmp_path)
    assert [line["step"] for line in log] == [3, 6, 6, 9, 12, 12]
    names = {"loss", "reconstruction", "kl", "tau", "beta", "sampled_perplexity", "sampled_codes_used", "learning_rate"}
    assert (
        names | {"perplexity", "codes_used"} <= log[0].keys()
        and {"evaluation/psnr", "evaluation/captions_read"} <= log[2].keys()
    )
    assert 1 <= log[0]["sampled_perplexity"] <= 12 and 0 < log[0]["sampled_codes_used"] <= 1
    o, model = objective(), checkpoint.load_model(tmp_path)
    with torch.no_grad():  # the likeliest codes of the eight validation pictures
        codes = model.encode(next(o._in_order(o.validation)).images.float() / 255)
    perplexity, used = usage(torch.bincount(codes.flatten(), minlength=12))
    monkeypatch.setattr(stage1, "LEAST_PIXELS", 0)
    measured = {"perplexity": pytest.approx(perplexity.item()), "codes_used": pytest.approx(used.item())}
    assert o.measures(model, 3) == measured and {name: log[4][name] for name in measured} == measured
    at_once, encode, whole = [], model.encode, json.loads((tmp_path / "evaluation.json").read_text())
    model.encode = lambda images: at_once.append(len(images)) or encode(images)
    assert o.evaluate(model, 3) == pytest.approx({name: x for name, x in whole.items() if name != "step"}, rel=1e-4)
    assert o.pictures(model, 3)["reconstructions"].shape == (2 + 2 * 98, 2 + 8 * 98, 3) and at_once == [3, 3, 2] * 2
    assert log[0]["beta"] == pytest.approx(np.mean([RECIPE.beta_at(step) for step in range(3)]))
    for step in (6, 12):
        with Image.open(tmp_path / "pictures" / f"reconstructions-{step:09d}.png") as picture:
            assert picture.size == (2 + 8 * 98, 2 + 2 * 98)  # 8 pictures of 16 pixels, six times as large
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert names | {"evaluation/psnr", "examples_per_second"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("kl")] == [3, 6, 9, 12]
    assert [event.step for event in events.Images("reconstructions")] == [6, 12]


def test_without_tensorboard_there_is_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    train(objective(), tmp_path, settings(), progress=False)
    assert capsys.readouterr().err.splitlines() == [
        "tensorboard is not installed: no files for it (pip install tensorboard)"
    ]
    assert not (tmp_path / "tensorboard").exists()


def test_lines_where_no_one_watches(tmp_path, capsys):
    train(objective(), tmp_path, settings(evaluate_every=12), tensorboard=False)
    *lines, evaluation = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["3/12", "6/12", "9/12", "12/12"]
    assert all("examples/s" in line and "loss" in line and "perplexity" in line for line in lines)
    assert evaluation.startswith("step 12/12 images 8 psnr ")  # no rate, of the steps since the line before


def test_an_evaluation_leaves_beside_the_bar_what_stood_there(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    train(objective(), tmp_path, settings(evaluate_every=12), tensorboard=False)
    assert re.search("12/12 .* examples/s loss ", terminal.getvalue().split("\r")[-1])


# -- the objective -----------------------------------------------------------------------------------------------------


def test_a_line_is_told_above_the_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    steps = progress.bar(total=2, unit="step")
    steps.update()
    progress.tell("warning: of one thing")
    steps.close()
    line, bar = terminal.getvalue().strip("\n").split("\n")  # what "\r" ends is written over
    assert [shown.strip() for shown in line.split("\r")][-2:] == ["", "warning: of one thing"] and "1/2" in bar


def test_evaluation_counts_what_is_right():
    """Of a model that returns the first picture for all: its own caption is read, and the others are not."""
    source = FewShapes(open_source("shapes", image_size=16, split="validation"), 5)

    class First:
        config = SMALL

        def parameters(self):
            return iter([torch.zeros(1)])

        def encode(self, images):
            self.first = images[:1].expand_as(images)
            return torch.tensor([[0, 3], [3, 3]]).expand(len(images), 2, 2)

        def decode(self, codes):
            return self.first

    result = evaluate(First(), source, batches(source, 5, image_size=16, seed=0, train=False))
    pictures = np.stack([source[index].image for index in range(5)]) / 255
    errors = np.square(pictures - pictures[:1]).mean((1, 2, 3))
    assert result["images"] == 5 and result["captions_read"] == 1 / 5 and result["captions_read_from_originals"] == 1
    assert result["psnr"] == pytest.approx(-10 * np.log10(errors.mean()))
    assert result["psnr_mean"] == pytest.approx((-10 * np.log10(errors[1:]).sum() + 120) / 5)
    assert result["codes_used"] == 2 / 12
    assert result["perplexity"] == pytest.approx(math.exp(-0.25 * math.log(0.25) - 0.75 * math.log(0.75)))


def test_usage():
    perplexity, used = usage(torch.tensor([5, 5, 0, 5, 5, 0, 0, 0]))
    assert perplexity.item() == pytest.approx(4) and used.item() == 0.5
    assert usage(torch.tensor([7, 0]))[0].item() == 1


def test_the_divergence_does_not_depend_on_the_batch_size():
    """Of the same pictures twice, it is what it was: nothing is divided by 1 or by a sum over the batch."""
    o = objective(dataclasses.replace(RECIPE, beta_share=0.0))
    batch = next(o.batches(0))
    twice = batch._replace(images=batch.images.repeat(2, 1, 1, 1))
    with torch.no_grad():
        (_, one), (_, two) = o.loss(batch, 3, 0), o.loss(twice, 3, 0)
    torch.testing.assert_close(one["kl"], two["kl"], rtol=1e-5, atol=1e-7)
    assert one["beta"] == 6.6


def test_weights_are_the_seeds():
    """And leave the caller's random numbers alone."""
    disturb_random_states()
    before = random_state.get()
    first = objective().model.state_dict()
    assert random_state.get() == before
    for seed in (0, 1):
        other = objective(seed=seed).model.state_dict()
        assert all(torch.equal(tensor, other[name]) for name, tensor in first.items()) == (seed == 0)


def test_it_begins_with_the_weights_of_another():
    """Convolutions do not know how large pictures are."""
    first = objective(seed=1).model
    o = objective(initial=first)
    assert all(torch.equal(tensor, o.model.state_dict()[name]) for name, tensor in first.state_dict().items())
    assert o.settings["initial"] == fingerprint(first) and "initial" not in objective().settings
    objective(config=dataclasses.replace(SMALL, image_size=32, likelihood="logit_laplace"), initial=first)
    with pytest.raises(ValueError, match=r"initial must have the weights of the model that is trained: \S+ is \(12"):
        objective(config=dataclasses.replace(SMALL, num_codes=13), initial=first)


def test_noise_differs_between_steps_and_seeds_and_batches_follow_the_start():
    o, other = objective(), objective(seed=1)
    other.model.load_state_dict(o.model.state_dict())
    batch = next(o.batches(2))
    stream = o.batches(0)
    assert [next(stream).indices for _ in range(3)][2] == batch.indices != next(other.batches(2)).indices
    with torch.no_grad():
        losses = [
            o.loss(batch, 20, 0)[0],
            o.loss(batch, 21, 0)[0],
            other.loss(batch, 20, 0)[0],
            o.loss(batch, 20, 0)[0],
        ]
    assert len({x.item() for x in losses}) == 3 and losses[0] == losses[3]


def test_it_learns_at_low_precision_too(tmp_path):
    recipe = dataclasses.replace(RECIPE, steps=60, tau_share=1.0, beta=0.1, batch_size=8)
    for dtype in ("float32", "bfloat16"):
        folder = tmp_path / dtype
        train(objective(recipe), folder, settings(steps=60, log_every=10, precision=dtype), **QUIET)
        log = log_of(folder)
        assert log[-1]["reconstruction"] < log[0]["reconstruction"] - 0.3, dtype
        weights = checkpoint.load(folder / checkpoint.CHECKPOINTS).tensors
        assert all(x.dtype == torch.float32 for x in weights.values())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DVAERecipe(steps=0), ["steps must be at least 1, got 0"]),
        (lambda: DVAERecipe(tau=0.0), ["tau", "positive", "0.0"]),
        (lambda: DVAERecipe(beta=-1.0), ["beta", "-1.0"]),
        (lambda: DVAERecipe(beta=math.nan), ["beta", "nan"]),
        (lambda: DVAERecipe(tau_share=1.5), ["tau_share", "from 0 to 1", "1.5"]),
        (lambda: LoopSettings(steps=0), ["steps", "0"]),
        (lambda: LoopSettings(steps=2.5), ["steps must be an integer, got 2.5"]),
        (lambda: LoopSettings(steps=True), ["steps must be an integer, got True"]),
        (lambda: LoopSettings(steps=1, ema_every=0), ["ema_every must be at least 1, got 0"]),
        (lambda: LoopSettings(steps=1, accumulate=0), ["accumulate must be at least 1, got 0"]),
        (lambda: LoopSettings(steps=1, log_every=1.5), ["log_every must be an integer, got 1.5"]),
        (lambda: LoopSettings(steps=1, max_skipped=-1), ["max_skipped must be at least 0, got -1"]),
        (lambda: LoopSettings(steps=1, clip=-1.0), ["clip", "-1"]),
        (lambda: LoopSettings.of(RECIPE, clip=-1.0), ["clip", "-1"]),
        (lambda: LoopSettings(steps=1, precision="float8"), ["precision", "bfloat16", "float8"]),
        (lambda: objective(seed=-1), ["seed", "-1"]),
        (lambda: objective(config=dataclasses.replace(SMALL, channels=1)), ["channels", "3", "1"]),
        (lambda: settings(ema_decay=1.0), ["ema_decay must be from 0 to below 1, got 1.0"]),
    ],
)
def test_bad_input(make, words):
    with pytest.raises((TypeError, ValueError)) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


def test_numpys_integers_are_numbers_of_a_recipe_too():
    recipe = dataclasses.replace(RECIPE, steps=np.int64(12), batch_size=np.int32(4))
    assert json.dumps(dataclasses.asdict(recipe)) == json.dumps(dataclasses.asdict(RECIPE))


def test_a_run_is_not_resumed_in_another_precision(tmp_path, monkeypatch):
    """ "auto" leaves it to the device: a run that moves to another one must not change it unasked."""
    monkeypatch.setattr(precision, "_has_bfloat16", lambda device: True)
    train(objective(), tmp_path, settings(steps=2, precision="auto"), **QUIET)
    monkeypatch.setattr(precision, "_has_bfloat16", lambda device: False)
    with pytest.raises(CheckpointError) as error:
        train(objective(), tmp_path, settings(steps=2, precision="auto"), resume=True, **QUIET)
    assert all(word in str(error.value) for word in ("precision", "bfloat16", "float32"))
    train(objective(), tmp_path, settings(steps=2, precision="bfloat16"), resume=True, **QUIET)
