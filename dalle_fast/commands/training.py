"""What the commands that train have in common: flags of the recipe and of the loop, and the run itself."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys

from dalle_fast.errors import UserError, told
from dalle_fast.training.precision import PRECISIONS

BYTES_OF_A_PARAMETER = 20  # in float32: itself, its gradient, AdamW's two moments, the average


def add_run_arguments(group, presets) -> None:
    data = (
        "a folder of pictures, .tar shards; or shapes, scenes that are drawn; emoji, of the font fonts-noto-color-emoji; "
        "stamps, glyphs on coloured cards"
    )
    group.add_argument("--data", required=True, metavar="SOURCE", help=data)
    group.add_argument("--out", required=True, metavar="DIR", help="folder of the run")
    group.add_argument(
        "--resume", action="store_true", help="go on from the newest good checkpoint in DIR, with the same flags"
    )
    begin = (
        "run whose trained model this one begins with, instead of a new one: flags of the model are for its settings; "
        "--resume does not read it again"
    )
    group.add_argument("--init", metavar="DIR", help=begin)
    preset = "of the recipe and, without --init, of the model"
    group.add_argument("--preset", choices=presets, default="tiny", help=preset)
    group.add_argument("--seed", type=int, default=0, help="of all that is random, from 0 to 2^20 - 1")
    add_device_argument(group)
    add_precision_argument(group)
    share = "of pictures that may be bad (broken, too large or small, the caption unreadable): more are an error"
    group.add_argument("--max-bad-share", type=float, default=0.05, metavar="X", help=share)
    group.add_argument("--workers", type=int, default=0, help="processes that load pictures; 0: the trainer's own")


def add_device_argument(group) -> None:
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:N; auto: a GPU where there is one")


def add_precision_argument(group) -> None:
    group.add_argument("--precision", choices=PRECISIONS, default="auto", help="auto: bfloat16 where the device has it")


def add_recipe_arguments(group, recipes) -> None:
    """A flag for each field of the recipes' class; one that is not given is no attribute of the arguments."""
    for field in dataclasses.fields(next(iter(recipes.values()))):
        kind = type(field.default)
        form = "," if kind is int else ".4g"
        defaults = ", ".join(f"{preset} {getattr(recipe, field.name):{form}}" for preset, recipe in recipes.items())
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            type=kind,
            metavar="N" if kind is int else "X",
            default=argparse.SUPPRESS,
            help=f"{field.metadata['help']} (default: {defaults})",
        )


def add_loop_arguments(group, *, evaluations=None) -> None:
    """
    Args:
        evaluations: None, or how many there are of a run whose flags do not say.
    """
    switch = argparse.BooleanOptionalAction
    parts = "parts of a batch that go through the model one after another, for the activations of one of them"
    group.add_argument("--accumulate", type=int, default=1, metavar="N", help=parts)
    group.add_argument("--max-skipped", type=int, default=20, metavar="N", help="non-finite steps in a row to skip")
    for flag, what, default in (
        ("log", "lines of the log", 50),
        ("picture", "pictures", 500),
        ("evaluate", "evaluations", 0 if evaluations is None else argparse.SUPPRESS),
        ("checkpoint", "checkpoints", 500),
    ):
        interval = f"steps between two {what}; 0: only at the end"
        if default is argparse.SUPPRESS:
            interval += f" (default: so many that there are {evaluations})"
        group.add_argument(f"--{flag}-every", type=int, default=default, metavar="N", help=interval)
    group.add_argument("--tensorboard", action=switch, default=True, help="write files for TensorBoard")


def run_training(
    make_objective, arguments, recipes, then: str, *, sources=lambda objective: (), evaluations=None
) -> int:
    """Train, and say how it ended: the command's exit status.

    Args:
        make_objective: of the arguments and a recipe; what it refuses is the user's to put right.
        recipes: by preset. then: what can be done with the model.
        sources: of an objective, those whose bad pictures show only while it is trained.
        evaluations: as of `add_loop_arguments`.
    """
    from dalle_fast.training import processes

    if arguments.workers < 0:
        raise UserError(f"--workers must be at least 0, got {arguments.workers}")
    with processes.joined():
        try:
            return _run_training(make_objective, arguments, recipes, then, sources, evaluations)
        except UserError as error:  # told before the group is left, which takes a while in which torchrun may end us
            return told(error)


def _run_training(make_objective, arguments, recipes, then, sources, evaluations) -> int:
    from dalle_fast.data import DataError
    from dalle_fast.data.images import tell_of_bad
    from dalle_fast.training import LoopSettings, processes, train
    from dalle_fast.training.malloc import keep_freed_memory

    together = processes.current()
    _check_apart(arguments.data, arguments.out)
    try:
        recipe = replaced(recipes[arguments.preset], vars(arguments))
        given = {"evaluate_every": recipe.steps // (evaluations or 1), **vars(arguments)}
        settings = replaced(LoopSettings.of(recipe), given)
        mine = together.part([0] * recipe.batch_size)  # refuses what cannot be shared now, not in the first step
        if len(mine) % settings.accumulate:
            of_what = "batch_size" if together.count == 1 else "a process's part of batch_size"
            raise ValueError(f"{of_what} must be a multiple of --accumulate {settings.accumulate}, got {len(mine)}")
        objective = make_objective(arguments, recipe)
    except (ValueError, OSError, ImportError) as error:
        raise UserError(str(error)) from error
    if objective.device.type == "cpu":
        keep_freed_memory()
    try:
        result = train(
            objective,
            arguments.out,
            settings,
            resume=arguments.resume,
            tensorboard=arguments.tensorboard,
            progress=together.leads,
        )
    except DataError as error:  # too many bad pictures, which shows only on the way
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"{error.filename or arguments.out}: {error.strerror or error}") from error
    if not together.leads:
        return 0 if result.signal is None else 128 + result.signal
    with _if_there_is_a_terminal():
        tell_of_bad(*sources(objective))
        if result.signal is None:
            print(json.dumps(result.evaluation, indent=1))
            print(f"try: {then}")
        else:
            print(f"stopped by signal {result.signal} after step {result.step} of {settings.steps}; --resume goes on")
    return 0 if result.signal is None else 128 + result.signal


@contextlib.contextmanager
def _if_there_is_a_terminal():
    """What is printed within this may be lost, with a terminal that was closed, say: all is saved, and the status says so."""
    with contextlib.suppress(OSError):
        yield
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # what is left of it would be flushed at exit, and change the status
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _check_apart(data, out) -> None:
    """What a run draws must not come among the pictures that it learns from: resumed, it would have other data."""
    from dalle_fast.data.folder import reads_below
    from dalle_fast.data.source import SOURCES
    from dalle_fast.training.reports import PICTURES

    drawn = os.path.join(out, PICTURES)
    if data not in SOURCES and os.path.isdir(data) and reads_below(data, drawn):
        raise UserError(
            f"--out must not draw its pictures, in {drawn}, where --data {data} reads those to train on, got --out {out}"
        )


def tell_of_left_out(source) -> None:
    """Once, however many processes train: what lies among a source's files and is not taken."""
    from dalle_fast.data.images import left_out
    from dalle_fast.progress import tell
    from dalle_fast.training import processes

    if processes.current().leads:
        for line in left_out(source):
            tell(line)


def check_memory(config, device) -> None:
    """Refuse a `DALLE` of which a device cannot hold what training keeps, before hours in which pictures become codes.

    Raises:
        UserError: with both numbers. ValueError: it is no model.
    """
    import torch

    from dalle_fast.nn.dalle import DALLE
    from dalle_fast.nn.memory import free_memory

    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in DALLE(config).parameters())
    needed, free = parameters * BYTES_OF_A_PARAMETER, free_memory(device)
    if free is not None and needed > free:
        kept = (
            f"{parameters:,} parameters of {BYTES_OF_A_PARAMETER} bytes, with gradient, AdamW's two moments and average"
        )
        raise UserError(
            f"the model does not fit: training keeps {needed / 2**30:.1f} GiB ({kept}), besides activations, and "
            f"--device {device} has {free / 2**30:.1f} GiB free"
        )


def replaced(preset, given: dict):
    """A preset with the fields that were given."""
    fields = {field.name for field in dataclasses.fields(preset)}
    return dataclasses.replace(preset, **{name: value for name, value in given.items() if name in fields})


def beginning(arguments, kind: str, presets) -> tuple:
    """The config that the flags of the model change, and what `begin_with` takes as `initial`.

    A run that goes on has its weights in a checkpoint, and its settings say what it began with: then --init is not
    read, as it may be gone, or trained further.

    Args:
        kind: of model; see `checkpoint.load_model`. presets: its configs.

    Raises:
        CheckpointError: --init is to be read, and holds no such model.
    """
    from dalle_fast import checkpoint

    if not arguments.init:
        return presets[arguments.preset], None
    if arguments.resume:
        saved = checkpoint.saved_settings(os.path.join(arguments.out, checkpoint.CHECKPOINTS))
        if "initial" in saved:
            fields = {name.removeprefix("model."): x for name, x in saved.items() if name.startswith("model.")}
            try:
                config = checkpoint.config_from_json(type(presets[arguments.preset]), fields)
            except (TypeError, ValueError) as error:  # of the other stage, say
                raise UserError(f"--out {arguments.out} holds a run of no {kind} of this version: {error}") from error
            return config, {"initial": saved["initial"]}
    initial = checkpoint.load_model(arguments.init, kind=kind)
    return initial.config, initial


def device(name: str):
    """The torch.device of a flag.

    Raises:
        UserError: it cannot be used here.
    """
    import torch

    from dalle_fast import _extension
    from dalle_fast.training.processes import own_gpu

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = own_gpu()
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"--device {name} cannot be used: it must be cpu, cuda, cuda:N or auto")
    try:
        found = torch.zeros((), device=name).device
        if found.type == "cuda":
            torch.cuda.set_device(found)  # the one that NCCL takes
        if found.type == "cpu" and not _extension.why_missing():
            _extension.native().instruction_set()  # refuses a wrong DALLE_FAST_ISA now, not in the first step
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return torch.device(name)
