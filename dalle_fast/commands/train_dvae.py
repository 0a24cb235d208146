"""Train a discrete VAE, stage 1: pictures to codes and back.

The run lives in one folder: its log, pictures, checkpoints, and at the end the model and how good it is. Ended by
SIGTERM or Ctrl-C it saves first, and exits with 128 + the signal's number (143, 130); --resume goes on from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

from dalle_fast.errors import UserError
from dalle_fast.training.recipes import RECIPES, DVAERecipe

LIKELIHOODS = ("logit_laplace", "l1", "l2")
PRECISIONS = ("auto", "float32", "bfloat16")


def add_arguments(parser) -> None:
    _add_run_arguments(parser.add_argument_group("the run"))
    _add_model_arguments(parser.add_argument_group("the model; what is not given is the preset's"))
    _add_recipe_arguments(parser.add_argument_group("the recipe; what is not given is the preset's"))
    _add_loop_arguments(parser.add_argument_group("the loop"))


def _add_run_arguments(group) -> None:
    switch = argparse.BooleanOptionalAction
    group.add_argument("--data", required=True, metavar="SOURCE", help="shapes, emoji, stamps, a folder, .tar shards")
    group.add_argument("--out", required=True, metavar="DIR", help="folder of the run")
    group.add_argument("--resume", action="store_true", help="go on from the newest good checkpoint in DIR")
    group.add_argument("--preset", choices=RECIPES, default="tiny", help="of the model and its recipe")
    group.add_argument("--seed", type=int, default=0, help="of weights, noise and the order of pictures")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:N; auto: a GPU where there is one")
    group.add_argument("--precision", choices=PRECISIONS, default="auto", help="auto: bfloat16 on a GPU that has it")
    group.add_argument("--workers", type=int, default=0, help="processes that load pictures; 0: the trainer's own")
    group.add_argument("--flip", action=switch, default=False, help="mirror half of the pictures")


def _add_model_arguments(group) -> None:
    def add(flag, help, **keywords):  # a flag that is not given is no attribute
        group.add_argument(flag, help=help, default=argparse.SUPPRESS, **keywords)

    add("--image-size", "pixels of a side", type=int, metavar="N")
    add("--downsampling", "pixels of a side per code, a power of two", type=int, metavar="N")
    add("--num-codes", "size of the codebook", type=int, metavar="N")
    add("--hidden", "channels of the first group", type=int, metavar="N")
    add("--likelihood", "of the pixels", choices=LIKELIHOODS)
    add("--min-log-scale", "the smallest ln b of logit_laplace", type=float, metavar="X")
    add("--hard", "train on sampled codes, straight-through", action="store_true")


def _add_recipe_arguments(group) -> None:
    for field in dataclasses.fields(DVAERecipe):
        kind = type(field.default)
        form = "," if kind is int else ".4g"
        defaults = ", ".join(f"{preset} {getattr(recipe, field.name):{form}}" for preset, recipe in RECIPES.items())
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            type=kind,
            metavar="N" if kind is int else "X",
            default=argparse.SUPPRESS,
            help=f"{field.metadata['help']} (default: {defaults})",
        )


def _add_loop_arguments(group) -> None:
    switch = argparse.BooleanOptionalAction
    group.add_argument("--ema-decay", type=float, default=0.999, metavar="X", help="of the averaged weights")
    group.add_argument("--max-skipped", type=int, default=20, metavar="N", help="non-finite steps in a row to skip")
    group.add_argument("--log-every", type=int, default=50, metavar="N", help="steps between two lines of the log")
    group.add_argument("--picture-every", type=int, default=500, metavar="N", help="steps between two pictures")
    group.add_argument("--evaluate-every", type=int, default=0, metavar="N", help="steps between two evaluations")
    group.add_argument("--checkpoint-every", type=int, default=500, metavar="N", help="steps between two checkpoints")
    group.add_argument("--tensorboard", action=switch, default=True, help="write files for TensorBoard")


def run(arguments) -> int:
    from dalle_fast.data import DataError
    from dalle_fast.training import LoopSettings, train

    try:
        objective = make_objective(arguments)
        settings = LoopSettings(
            steps=objective.recipe.steps,
            clip=objective.recipe.clip,
            precision=arguments.precision,
            **{
                name: getattr(arguments, name)
                for name in ("ema_decay", "max_skipped", "log_every", "picture_every", "evaluate_every")
            },
            checkpoint_every=arguments.checkpoint_every,
        )
    except (ValueError, OSError, ImportError) as error:
        raise UserError(str(error)) from error
    try:
        result = train(objective, arguments.out, settings, resume=arguments.resume, tensorboard=arguments.tensorboard)
    except DataError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"{error.filename or arguments.out}: {error.strerror or error}") from error
    if result.signal is not None:
        print(f"stopped by signal {result.signal} after step {result.step} of {settings.steps}; --resume goes on")
        return 128 + result.signal
    print(json.dumps(result.evaluation, indent=1))
    print(f"try: dalle-fast reconstruct --model {arguments.out} IMAGE --out FILE.png")
    return 0


def make_objective(arguments):
    """The `DVAEObjective` of the flags.

    Raises:
        ValueError: a flag's value that the model, the recipe or the data refuse.
    """
    from dalle_fast.data import open_source
    from dalle_fast.nn import dvae
    from dalle_fast.training import stage1

    given = vars(arguments)
    config = _replaced(dvae.PRESETS[arguments.preset], given)
    sources = {
        split: open_source(arguments.data, image_size=config.image_size, split=split, seed=arguments.seed)
        for split in ("train", "validation", *(["heldout"] if arguments.data == "shapes" else []))
    }
    return stage1.DVAEObjective(
        config,
        _replaced(RECIPES[arguments.preset], given),
        sources["train"],
        sources["validation"],
        heldout=sources.get("heldout"),
        seed=arguments.seed,
        flip=arguments.flip,
        workers=arguments.workers,
        device=_device(arguments.device),
    )


def _replaced(preset, given):
    fields = {field.name for field in dataclasses.fields(preset)}
    return dataclasses.replace(preset, **{name: value for name, value in given.items() if name in fields})


def _device(name):
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros((), device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return torch.device(name)
