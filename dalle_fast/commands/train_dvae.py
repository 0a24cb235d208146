"""Train a discrete VAE, stage 1: pictures to codes and back.

The run lives in one folder: its log, pictures, checkpoints, and at the end the model and how good it is. Ended by
SIGTERM, Ctrl-C or a terminal that is closed (SIGHUP, unless nohup ignores it) it saves first, and exits with 128 + the
signal's number (143, 130, 129); --resume goes on from there.
The processes that torchrun starts (torchrun --nproc-per-node N --shutdown-timeout 600 -m dalle_fast train-dvae ...)
share every batch. When torchrun is stopped it kills them after that many seconds, by default 30.
"""

from __future__ import annotations

import argparse
import shlex

from dalle_fast.commands import training
from dalle_fast.errors import UserError
from dalle_fast.training.recipes import LARGEST, RECIPES

LIKELIHOODS = ("logit_laplace", "l1", "l2")
MOST_PARTS = 1 << 11  # of a batch, each with noise of its own: the ranks that `noise_seed` knows


def add_arguments(parser) -> None:
    run = parser.add_argument_group("the run")
    training.add_run_arguments(run, RECIPES)
    run.add_argument("--flip", action=argparse.BooleanOptionalAction, default=False, help="mirror half of the pictures")
    _add_model_arguments(parser.add_argument_group("the model; what is not given is the preset's, or that of --init"))
    training.add_recipe_arguments(parser.add_argument_group("the recipe; what is not given is the preset's"), RECIPES)
    loop = parser.add_argument_group("the loop")
    loop.add_argument("--ema-decay", type=float, default=0.999, metavar="X", help="of the averaged weights")
    training.add_loop_arguments(loop)


def _add_model_arguments(group) -> None:
    def add(flag, help, **keywords):  # a flag that is not given is no attribute
        group.add_argument(flag, help=help, default=argparse.SUPPRESS, **keywords)

    add("--image-size", "pixels of a side", type=int, metavar="N")
    add("--downsampling", "pixels of a side per code, a power of two", type=int, metavar="N")
    add("--num-codes", "size of the codebook", type=int, metavar="N")
    add("--hidden", "channels of the first group", type=int, metavar="N")
    add("--likelihood", "of the pixels", choices=LIKELIHOODS)
    floor = "the smallest ln b of logit_laplace: about -1 for drawings and for pictures on pure white, as of products, "
    floor += "whose flat parts outweigh all else without; =-inf, none, for photographs full of detail"
    add("--min-log-scale", floor, type=float, metavar="X")
    add("--hard", "train on sampled codes, straight-through", action="store_true")


def run(arguments) -> int:
    then = f"dalle-fast reconstruct --model {shlex.quote(arguments.out)} IMAGE --out FILE.png"
    return training.run_training(
        make_objective,
        arguments,
        RECIPES,
        then,
        sources=lambda objective: (objective.source, objective.validation),
    )


def make_objective(arguments, recipe):
    """The `DVAEObjective` of the flags, trained by `recipe`.

    Raises:
        ValueError: a flag's value that the model, the recipe or the data refuse.
        UserError: one that they would take, but cannot use.
    """
    from dalle_fast.training import processes

    with processes.current().lead_first():  # which says what is wrong, once
        return _make_objective(arguments, recipe)


def _make_objective(arguments, recipe):
    from dalle_fast.data import open_source
    from dalle_fast.nn import dvae
    from dalle_fast.nn import functional as F
    from dalle_fast.training import processes, stage1

    F.noise_seed(arguments.seed)  # refuses what is out of range, before the data does, whose range is another
    if (parts := arguments.accumulate * processes.current().count) > MOST_PARTS:
        raise UserError(f"--accumulate times the processes must be at most {MOST_PARTS}, got {parts}")
    given = vars(arguments)
    if not given.get("min_log_scale", 0.0) < LARGEST:  # not a number, too
        raise UserError(f"--min-log-scale must be a number below {LARGEST:g}, got {arguments.min_log_scale}")
    preset, initial = training.beginning(arguments, "DiscreteVAE", dvae.PRESETS)
    config = training.replaced(preset, given)
    options = {"image_size": config.image_size, "seed": arguments.seed, "max_bad_share": arguments.max_bad_share}
    sources = {
        split: open_source(arguments.data, split=split, captions=False, **options)
        for split in ("train", "validation", *(["heldout"] if arguments.data == "shapes" else []))
    }
    training.tell_of_left_out(sources["train"])
    return stage1.DVAEObjective(
        config,
        recipe,
        sources["train"],
        sources["validation"],
        initial=initial,
        heldout=sources.get("heldout"),
        seed=arguments.seed,
        flip=arguments.flip,
        workers=arguments.workers,
        device=training.device(arguments.device),
    )
