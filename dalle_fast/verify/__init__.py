"""Show on this machine that the kernels are right: every figure as pass, fail or not run, with the reason.

Without names all figures are measured, the most important first; FILE.json holds what was found, with machine,
versions, commit and date. What is interrupted, or runs out of budget, goes on where it stopped when the same command is
given again; what could not be tried is tried again, as what it lacked may be there. "Not run" never counts as passed.
The exit status is 0 where nothing failed, and 1 where something did.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from dalle_fast.verify.figures import FIGURES

    titles = {name: figure.title for name, figure in FIGURES.items()} | {"gpu": "those that a GPU changes, there alone"}
    parser.epilog = "figures:\n" + "\n".join(f"  {name:9} {title}" for name, title in titles.items())
    parser.add_argument("names", nargs="*", metavar="NAME", help="which figures, see below; all if none is named")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.json", help="where results are kept")
    parser.add_argument("--gpu", action="store_true", help="hold the GPU's kernels to the same figures")
    parser.add_argument("--budget", type=_seconds, default=600, metavar="SECONDS", help="stop beginning work after it")
    parser.add_argument("--restart", action="store_true", help="forget what FILE.json holds")


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text}")
    return value


def run(arguments) -> int:
    from dalle_fast.verify.runner import verify

    return verify(
        arguments.names,
        arguments.out,
        gpu=arguments.gpu,
        budget=arguments.budget,
        restart=arguments.restart,
    )
