"""THE training loop, of both stages: an `Objective` says what is learned from what, the loop does the rest.

A run lives in one folder:

    log.jsonl            scalars, one JSON object a line; without times, so that two equal runs have equal logs
    pictures/            what the objective draws, as PNG
    tensorboard/         the same for TensorBoard, where it is installed
    checkpoints/         the last two, see `dalle_fast.checkpoint`
    model.safetensors    at the end: the averaged weights
    evaluation.json      at the end: how good they are

A step is numbered by the steps before it, a checkpoint and a line of the log by the steps done. What a step computes is
a function of its number and the weights, so that a run that was killed and resumed ends as if nothing had happened: on
a CPU with the same number of threads, of one or two processes, bit for bit.

Several processes may train together (see `dalle_fast.training.processes`): all take every step, with gradients that are
the means of theirs, and one of them writes. A resumed run may have another number of them, if as many parts of a batch
(`LoopSettings.accumulate`) come out: it then goes on as before but for rounding. So does a run of three and more, as
torch adds up their gradients in another order in the first step after a start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from dalle_fast import checkpoint
from dalle_fast.errors import UserError
from dalle_fast.outputs import held, make_folder
from dalle_fast.progress import tell
from dalle_fast.training import processes, random_state
from dalle_fast.training.ema import EMA
from dalle_fast.training.precision import PRECISIONS, precision_on
from dalle_fast.training.recipes import check
from dalle_fast.training.reports import LOG, NoReports, Reports


class TrainingError(UserError, RuntimeError):
    """Training cannot start or go on; the message says why and what is saved."""


class Objective(Protocol):
    """How a `DiscreteVAE` or a `DALLE` is trained, and no other model, as a run's files are read as one of them.

    It may have `leave(out)` too, which is called once, where a run begins: to put what its model needs into the folder.

    Attributes:
        model: a `DiscreteVAE` or a `DALLE`, on its device. What it has as `unscale_gradients` is called after each
            backward pass. While several processes train, torch's DistributedDataParallel of it is in its place, for
            `loss` to call.
        settings: name -> value, as JSON can hold them, all that the numbers of a run depend on; a resumed run must have
            the same.
        examples_per_step: for the rate that is shown.
        adamw: keywords for `torch.optim.AdamW`, such as betas and eps.
    """

    model: torch.nn.Module
    settings: dict[str, Any]
    examples_per_step: int
    adamw: dict[str, Any]

    def parameter_groups(self) -> list[dict]:
        """As AdamW takes them, with a weight_decay each."""

    def learning_rate(self, step: int) -> float: ...

    def batches(self, start: int) -> Iterator:
        """Those of the steps `start`, `start + 1` ..., without end; this process's part of them. What has several parts
        itself (`LoopSettings.accumulate`) must be a NamedTuple of tensors and lists, an example in each row."""

    def loss(self, batch, step: int, part: int) -> tuple[torch.Tensor, dict[str, torch.Tensor | float]]:
        """The loss to minimise, and scalars to log, of one part of a step's batch. The parts of all processes have
        numbers from 0 on: what is drawn for one must not be drawn for another."""

    # Of the averaged model. `at_once` examples may go through it together: as many as a part of a batch has, which fits;
    # more where they are small.

    def measures(self, model, at_once: int) -> dict[str, float]:
        """What each line of the log tells: quickly found."""

    def evaluate(self, model, at_once: int) -> dict[str, float]:
        """How good it is."""

    def pictures(self, model, at_once: int) -> dict[str, Any]:
        """Name -> (height, width, 3) uint8 array."""


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """How long and how the loop runs. `LoopSettings.of(recipe)` has a recipe's numbers in place of these defaults.

    Attributes:
        steps: updates in all. clip: largest norm of the gradient, 0 for any. ema_decay, ema_every: see `EMA`.
        accumulate: parts of a batch that go through the model one after another, for the memory of one of them. The
            gradient is the mean of theirs.
        max_skipped: steps whose loss or gradient is not finite change nothing; one more than this many in a row is an
            error.
        precision: "float32"; "bfloat16" for autocast; "auto": bfloat16 on a device that multiplies in it, which some
            CPUs do.
        log_every, picture_every, evaluate_every, checkpoint_every: steps between two; 0: not before the end.
    """

    steps: int
    clip: float = 1.0
    ema_decay: float = 0.999
    ema_every: int = 1
    accumulate: int = 1
    max_skipped: int = 20
    precision: str = "auto"
    log_every: int = 50
    picture_every: int = 0
    evaluate_every: int = 0
    checkpoint_every: int = 500

    def __post_init__(self):
        intervals = ("log_every", "picture_every", "evaluate_every", "checkpoint_every")
        check(self, positive_integers=("steps", "ema_every", "accumulate"), integers=("max_skipped", *intervals))
        check(self, not_negative=("clip",))
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be from 0 to below 1, got {self.ema_decay}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")

    @classmethod
    def of(cls, recipe, **others) -> LoopSettings:
        """What a `DVAERecipe` or a `DALLERecipe` says of the loop, as its steps and clip; the rest, and what is to differ,
        are `others`."""
        names = {field.name for field in dataclasses.fields(cls)}
        shared = {name: value for name, value in dataclasses.asdict(recipe).items() if name in names}
        return cls(**{**shared, **others})

    def that_matter(self) -> dict:
        """Those that numbers depend on, but for the precision, which "auto" leaves to the device, and the parts of a batch,
        of which other processes may have some."""
        names = ("steps", "clip", "ema_decay", "ema_every", "log_every")
        return {name: getattr(self, name) for name in names}


class TrainResult(NamedTuple):
    """What `train` returns: updates done, the signal that stopped it or None, and the evaluation ({} if stopped)."""

    step: int
    signal: int | None
    evaluation: dict[str, float]


def train(
    objective: Objective,
    out,
    settings: LoopSettings,
    *,
    resume: bool = False,
    tensorboard: bool = True,
    progress: bool = True,
) -> TrainResult:
    """Train `objective.model` and leave everything in the folder `out`.

    Where torch's default process group has several processes, all call this, on one folder.

    SIGTERM, SIGINT and SIGHUP end it after the step they meet, with a checkpoint; a second SIGINT ends it at once.
    SIGHUP stays ignored where it was, as under nohup. That second SIGINT, and what else ends it, as a report that cannot
    be written, batches that do not come or memory that is short, leave a checkpoint of the last whole step, unless they
    come while weights are changed. A third SIGINT ends that save too. A resumed run makes again what was not reported;
    with `evaluate_every` or `picture_every` 0 it goes on without. The trained model is written first; if its evaluation
    or its pictures fail then, stderr says so, and a resumed run makes them again.

    Args:
        resume: continue from the newest good checkpoint in `out`; without one start from the beginning.
        tensorboard: write its files where it is installed. progress: show a bar, or lines where no one watches.

    Raises:
        TrainingError: `out` holds a run and `resume` is False; too many steps in a row were not finite; a process that
            loads batches ended.
        ValueError: a model or settings that a checkpoint cannot hold.
        CheckpointError: a checkpoint cannot be written, or the one in `out` is of a run with other settings.
        UserError: `out` cannot be written to, or is in use by another process; processes that train together have other
            settings.
        OSError: a log or picture cannot be written.
    """
    out = Path(out)
    run = _Run(objective, out, settings)
    # As where "auto" finds another precision on another machine: the run of them all could not be resumed by any.
    run.processes.check_same_values(run.settings_that_matter, "the settings of a run")
    make_folder(out / checkpoint.CHECKPOINTS, "the folder of checkpoints")
    with held(out, "the folder") if run.processes.leads else contextlib.nullcontext():
        with run.processes.lead_first():
            if check_folder(out, resume=resume):
                run.restore(checkpoint.load(out / checkpoint.CHECKPOINTS, settings=run.settings_that_matter))
            else:
                random_state.seed(objective.settings.get("seed", 0))
                if run.processes.leads and hasattr(objective, "leave"):
                    objective.leave(out)
        # As where each has a folder of its own, or one alone finds the newest checkpoint damaged: they would go on with
        # other states of the optimizer and other learning rates.
        run.processes.check_same(run.step, f"the step that {out} is resumed from")
        return _train(run, out, tensorboard, progress)


def _train(run, out, tensorboard, progress):
    objective, settings = run.objective, run.settings
    reports = Reports if run.processes.leads else NoReports
    with (
        _StopSignals(tell=progress) as stop,
        run.processes.sharing(objective),
        reports(
            out, run.step, run.reported, settings.steps, objective.examples_per_step, tensorboard, progress
        ) as run.reports,
    ):
        stopped_by = run.go(stop)
        evaluation = {} if stopped_by else run.finish()
        run.processes.end_together()  # here, where a signal to one of those that wait does not end it
        return TrainResult(run.step, stopped_by or None, evaluation)


def check_folder(out, *, resume: bool) -> bool:
    """Whether there is a run in `out` to go on with.

    Raises:
        TrainingError: there is one, and `resume` is False; there is only what a finished one left; there is none, and a
            log that is no run's, which would be emptied.
    """
    found = checkpoint.latest(Path(out) / checkpoint.CHECKPOINTS)
    if found and not resume:
        raise TrainingError(f"{out} holds a run ({found.name}): resume it (--resume), or choose another folder")
    if not found and (Path(out) / checkpoint.MODEL).exists():
        raise TrainingError(f"{out} holds a trained model, and no checkpoint to go on from: choose another folder")
    if not found and not _is_log(Path(out) / LOG):
        raise TrainingError(f"{Path(out) / LOG} is not the log of a run: choose another folder, or move it away")
    return found is not None


def _is_log(path) -> bool:
    """Whether `path` is free, or begins as the log of a run that ended before its first checkpoint, perhaps cut short."""
    ours = b'{"step": '
    if not path.exists():
        return True
    with open(path, "rb") as file:
        start = file.read(len(ours))
    return ours.startswith(start)


class _Run:
    """The state of a run, and what happens in a step."""

    def __init__(self, objective, out, settings):
        self.objective, self.out, self.settings = objective, out, settings
        checkpoint.kind_of(objective.model)  # refuses what could not be saved now, not at the first checkpoint
        self.processes = processes.current()
        self.model = objective.model
        self.device = next(self.model.parameters()).device
        groups = objective.parameter_groups()
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, **objective.adamw)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.ema = EMA(self.model, decay=settings.ema_decay, every=settings.ema_every)
        found = precision_on(self.device, settings.precision)
        self.autocast = torch.bfloat16 if found == "bfloat16" else None
        self.settings_that_matter = {**objective.settings, **settings.that_matter(), "precision": found}
        # Of which parts a batch is: in stage 1 each has noise of its own. Who computes them changes what is rounded.
        parts = self.processes.count * settings.accumulate
        self.settings_that_matter["processes_times_accumulate"] = parts
        self.at_once = max(1, objective.examples_per_step // parts)  # see `Objective`
        try:  # as a checkpoint gives them back
            self.settings_that_matter = json.loads(json.dumps(self.settings_that_matter, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"objective.settings must be what JSON can hold: {error}") from error
        self.reports = None
        self.step = self.saved_at = 0
        self.reported = 0  # the last step whose reports are all made
        self.updates = 0  # steps that were not skipped
        self.skipped_in_a_row = self.last_skipped = 0
        self.evaluation = None  # the last one
        self.exported, self.missing = False, []  # of the end: is the model written; what could not be made of it
        self.sums, self.counted = {}, 0  # of scalars since the last line of the log

    def go(self, stop) -> int:
        """Steps until the last one, or until a signal to any of the processes: its number, else 0."""
        self.model.train()
        self.saved_at = self.reported
        batches = _Ahead(self.objective.batches(self.step), stop)
        with random_state.untouched():  # a loader may draw numbers when it starts, a resumed run's once more
            batches.fetch(self.step)
            batch = batches.take()
        stop.wait_with_lost_children()
        stopped_by = 0
        if self.reported < self.step:  # they were begun when the run ended
            self.report()
        while self.step < self.settings.steps:
            with self.saved_if_it_ends_here():  # as where another process is lost
                stopped_by = self.processes.largest(stop.received or 0)
            if stopped_by:
                break
            self.take_step(batch, batches)
            with self.saved_if_it_ends_here():
                self.reports.tick()
                self.report()
            # Where steps are skipped, weights may be lost already: those saved before stay.
            if self.due(self.settings.checkpoint_every) and not self.skipped_in_a_row:
                self.save()
            with self.saved_if_it_ends_here():
                batch = batches.take()
        if self.saved_at != self.step:
            self.save()
        return stopped_by

    @contextlib.contextmanager
    def saved_if_it_ends_here(self, undo=lambda: None):
        """Where the last step is whole, once `undo` has been called: an error is passed on, behind a checkpoint."""
        try:
            yield
        except BaseException:  # KeyboardInterrupt too: what is lost may be hours, and another one ends the save as well
            with contextlib.suppress(Exception):  # the first error says more
                if self.saved_at != self.step:
                    undo()
                    self.save()
            raise

    def undo_of_half_a_step(self):
        """What takes back all that a step changes before the optimizer changes weights, but for the gradients."""
        random = random_state.get()
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]  # as the scales of gradients

        def undo():
            random_state.put(random)
            for buffer, before in buffers:
                buffer.copy_(before)

        return undo

    def finish(self) -> dict[str, float]:
        """Export and evaluate the averaged model."""
        if not self.processes.leads:
            return {}
        if self.updates < self.step:
            self.warn_of_skipped()
        self.export()
        # The last step is always reported where any is, but for a run that was done when it was resumed.
        if self.evaluation is None and "evaluation" not in self.missing:
            with self.warned_at_the_end("evaluation"):
                self.evaluation = self.evaluate()
        if self.evaluation is not None:
            checkpoint.write_json(self.out / "evaluation.json", {"step": self.step, **self.evaluation})
        return self.evaluation or {}

    def export(self) -> None:
        """The averaged model, once: before what is made with it, which may fail."""
        if not self.exported:
            if checkpoint.latest(self.out / checkpoint.CHECKPOINTS) is None:
                self.save()  # else a run that is killed now could not go on; see `check_folder`
            checkpoint.export(self.out / checkpoint.MODEL, self.ema.model)
            self.exported = True

    @contextlib.contextmanager
    def warned_at_the_end(self, what):
        """Within it, with the trained model, `what` is made: if that fails the run ends well all the same, and says so.
        On the way it ends the run, with advice for one that would fail again."""
        try:
            yield
        except Exception as error:
            if self.step < self.settings.steps:
                without = {"evaluation": "--evaluate-every 0", "pictures": "--picture-every 0"}[what]
                tell(f"no {what} of step {self.step}: --resume tries again, and with {without} goes on without")
                raise
            self.missing.append(what)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            tell(f"warning: no {what} of the trained model, which is written: {reason} (--resume tries again)")

    def warn_of_skipped(self) -> None:
        skipped = f"{self.step - self.updates} of {self.step} steps were skipped, as loss or gradient was not finite"
        last = f"the last one was step {self.last_skipped}"
        if self.skipped_in_a_row:
            ended = self.step - self.skipped_in_a_row
            last = f"also the last {self.skipped_in_a_row}, so that training had ended at step {ended}"
        advice = "A smaller learning rate or float32 may help, in another folder"
        tell(f"warning: {skipped}; {last}. {advice}")

    def evaluate(self) -> dict[str, float]:
        found = self.objective.evaluate(self.ema.model, self.at_once)
        return {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in found.items()}

    def due(self, every: int) -> bool:
        return self.step == self.settings.steps or (every > 0 and self.step % every == 0)

    def take_step(self, batch, batches) -> None:
        with self.saved_if_it_ends_here(self.undo_of_half_a_step()):  # as where memory is short, or a process is lost
            values = self.compute_gradients(batch)
            if self.step + 1 < self.settings.steps:
                batches.fetch(self.step + 1)  # while a GPU is still at this one
            values = self.processes.mean(_numbers(values))
        self.update(values)

    def compute_gradients(self, batch) -> dict[str, torch.Tensor | float]:
        """The first half of a step; returns the loss and what else there is to log."""
        learning_rate = self.objective.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        scalars = self.add_gradients(batch)
        if hasattr(self.model, "unscale_gradients"):
            self.model.unscale_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip or math.inf)
        return {"loss": scalars.pop("loss"), "gradient_norm": norm, "learning_rate": learning_rate, **scalars}

    def update(self, values) -> None:
        """The other half: weights and average change, unless the step is skipped."""
        self.step += 1
        if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
            self.skip()
            if self.step == self.settings.steps:
                self.average_at_the_end()
            return
        self.optimizer.step()
        self.updates += 1
        self.skipped_in_a_row = 0
        self.ema.update(self.model, self.updates, last=self.step == self.settings.steps)
        self.counted += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def add_gradients(self, batch) -> dict:
        """The gradients of a batch are added up in its parts; returns the means of the parts' losses and scalars."""
        count, scalars = self.settings.accumulate, []
        for number, rows in enumerate(_dealt(batch, count)):
            part = self.processes.number + self.processes.count * number
            with self.processes.sharing_gradients(self.objective.model, number == count - 1):
                with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                    loss, of_part = self.objective.loss(rows, self.step, part)
                (loss / count).backward()
            scalars.append({"loss": loss.detach(), **of_part})
        return {name: sum(x[name] for x in scalars) / count for name in scalars[0]}

    def skip(self) -> None:
        self.skipped_in_a_row += 1
        self.last_skipped = self.step
        if self.skipped_in_a_row > self.settings.max_skipped:
            last = checkpoint.latest(self.out / checkpoint.CHECKPOINTS)
            raise TrainingError(
                f"loss or gradient was not finite in {self.skipped_in_a_row} steps in a row, up to step {self.step}; "
                f"the last checkpoint is {last.name if last else 'not there yet'}. "
                "A smaller learning rate or float32 may help, in another folder"
            )

    def average_at_the_end(self) -> None:
        """The last step was skipped: the average lacks the updates since its last turn. Lost weights stay out of it."""
        if self.updates % self.ema.every and all(p.isfinite().all() for p in self.parameters):
            self.ema.update(self.model, self.updates, last=True)

    def report(self) -> None:
        """All reports of a step: of one that ends halfway, a resumed run makes all again."""
        logged = self.due(self.settings.log_every)
        if self.processes.leads:
            self.make_reports()
        if self.missing:  # a resumed run makes these again too
            return
        if logged:  # from here on no calls, between which a signal may come
            self.sums, self.counted = {}, 0
        self.reported = self.step

    def make_reports(self) -> None:
        if self.due(self.settings.log_every):
            means = {name: total / self.counted for name, total in self.sums.items()}
            with random_state.untouched():
                measured = self.objective.measures(self.ema.model, self.at_once)
            self.reports.record(self.step, {**means, **measured, "skipped": self.step - self.updates})
        if self.step == self.settings.steps:
            self.export()
        if self.settings.evaluate_every and self.due(self.settings.evaluate_every):
            self.evaluation = None  # none of another step, where this one fails
            with self.warned_at_the_end("evaluation"):
                with random_state.untouched():
                    self.evaluation = self.evaluate()
                self.reports.record(self.step, {f"evaluation/{name}": value for name, value in self.evaluation.items()})
        if self.due(self.settings.picture_every):
            with self.warned_at_the_end("pictures"):
                with random_state.untouched():
                    pictures = self.objective.pictures(self.ema.model, self.at_once)
                self.reports.pictures(self.step, pictures)

    def save(self) -> None:
        if not self.processes.leads:
            self.saved_at = self.step
            return
        self.reports.sync()
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, parameter in enumerate(self.parameters):
            for name, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{index}.{name}"] = value
        state = {
            "settings": self.settings_that_matter,
            "updates": self.updates,
            "skipped_in_a_row": self.skipped_in_a_row,
            "last_skipped": self.last_skipped,
            "sums": self.sums,
            "counted": self.counted,
            "random": random_state.get(),
        }
        if self.reported < self.step:
            state["reported"] = self.reported
        checkpoint.save(self.out / checkpoint.CHECKPOINTS, self.step, self.ema.model, tensors=tensors, state=state)
        self.saved_at = self.step

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        self.ema.model.load_state_dict(saved.weights)
        weights = {k.removeprefix("model."): v for k, v in saved.tensors.items() if k.startswith("model.")}
        self.model.load_state_dict(weights)
        state = {}
        for key, value in saved.tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                parameter = self.parameters[int(index)]
                # With the parameter's strides, as AdamW had made it: kernels for other strides round differently.
                like = value.shape == parameter.shape
                state.setdefault(int(index), {})[name] = torch.empty_like(parameter).copy_(value) if like else value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        random_state.put(saved.state["random"])
        self.step, self.updates = saved.step, saved.state["updates"]
        self.skipped_in_a_row = saved.state["skipped_in_a_row"]
        self.last_skipped = saved.state["last_skipped"]
        self.sums, self.counted = saved.state["sums"], saved.state["counted"]
        self.reported = saved.state.get("reported", self.step)


class _Ahead:
    """The batches of a run, each fetched while the step before it is still computed, and given once that one is whole:
    so is the error of one that does not come."""

    def __init__(self, batches, stop):
        self.batches, self.stop = iter(batches), stop
        self.batch = self.error = None

    def fetch(self, step) -> None:
        if self.stop.received is not None:
            return  # it will not be needed
        try:
            self.batch = self._next(step)
        except Exception as error:  # noqa: BLE001, as `take` raises it
            self.error = error

    def take(self):
        """What was fetched last; None where nothing was, as after a signal."""
        batch, error, self.batch, self.error = self.batch, self.error, None, None
        if error is not None:
            raise error
        return batch

    def _next(self, step):
        """A signal to the whole group ends the processes that load batches: then there is none."""
        try:
            return next(self.batches)
        except StopIteration:
            raise TrainingError(f"no batch for step {step}: objective.batches must not end") from None
        except (RuntimeError, EOFError, OSError) as error:  # what is left of a process that was handing over a batch
            if self.stop.comes():
                return None
            if isinstance(error, OSError) and not isinstance(error, ConnectionError):
                raise
            raise TrainingError(f"no batch for step {step}: {error or type(error).__name__}") from error


class _StopSignals:
    """While entered, the first of SIGNALS is kept in `received` instead of ending the process; the second SIGINT does.

    Others do not: schedulers send several, and who presses Ctrl-C may close the terminal next.

    Args:
        tell: whether to say so.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self, tell):
        self.tells = os.getpid() if tell else None  # and not those it forks to load batches, which a Ctrl-C meets too
        self.received = None
        self.interrupted = False
        self.before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            for number in self.SIGNALS:
                # As under nohup. A SIGINT that is ignored, as in the background of a script, is sent on purpose.
                if number != signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN:
                    continue
                self.before[number] = signal.signal(number, self._keep)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None is one that is not Python's

    def wait_with_lost_children(self):
        """From here on a loading process that is lost ends no step halfway: the next batch does not come, which says so.

        Torch's handler, there from the first batch on, raises wherever the main thread is.
        """
        if self.before:
            self.before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def comes(self) -> bool:
        """Whether there is a signal; one to the whole group may have ended another process before it is here."""
        deadline = time.monotonic() + 0.2
        while self.received is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.received is not None

    def _keep(self, number, _):
        if number == signal.SIGINT and self.interrupted:
            raise KeyboardInterrupt
        self.interrupted |= number == signal.SIGINT
        if self.received is None:
            self.received = number
            if self.tells == os.getpid():
                self._tell()

    def _tell(self):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a stderr that is gone, or is no file
            stderr = sys.stderr.fileno()  # print is not for handlers: one may meet another print
            line = b"stopping after this step; Ctrl-C again ends at once\n"
            os.write(stderr, b"\n" + line if os.isatty(stderr) else line)  # below the progress bar, and the ^C


def _dealt(batch, count):
    """The parts of a batch, as cards are dealt: every count-th example. As several processes' are, so that as many parts
    in all are the same ones."""
    if count == 1:
        return [batch]
    if not hasattr(batch, "_fields"):
        raise TypeError(
            f"objective.batches must give NamedTuples of tensors and lists where accumulate is above 1, got "
            f"{type(batch).__name__}"
        )
    return [type(batch)(*(rows[number::count] for rows in batch)) for number in range(count)]


def _numbers(scalars: dict) -> dict[str, float]:
    """Tensors and numbers as numbers. The only time in a step that the host waits for the device."""
    tensors = {name: value for name, value in scalars.items() if isinstance(value, torch.Tensor)}
    stacked = torch.stack([value.detach().float().reshape(()) for value in tensors.values()]).tolist()
    return {**scalars, **dict(zip(tensors, stacked, strict=True))}
