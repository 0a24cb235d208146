"""What the command lines of the benchmarks share: flags, the types of their values, and what they are called."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import torch

try:
    from dalle_fast.masks import causal_mask
except ImportError as error:
    sys.exit(f"dalle_fast cannot be imported ({error}); install it from the repository's root: pip install -e .")

from dalle_fast.nn.functional import sparse_attention
from dalle_fast.ops.choice import IMPLS
from dalle_fast.outputs import can_write

ROOT = Path(__file__).resolve().parent.parent
OURS = "dalle_fast"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORWARD, FORWARD_BACKWARD = "forward", "forward+backward"
PASSES = (FORWARD, FORWARD_BACKWARD)


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose help shows defaults, and that takes no abbreviated flags."""
    return argparse.ArgumentParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)


def add_shared_flags(parser, *, dtypes: str, rounds: int, seconds: float, passes: bool = True) -> None:
    """The flags that every benchmark has. `dtypes` says which are measured without --dtype; `passes`: --pass too."""
    add = parser.add_argument
    add("--dtype", choices=DTYPES, action="append", help=f"repeatable (default: {dtypes})")
    if passes:
        add("--pass", dest="pass_", choices=PASSES, action="append", help="repeatable (default: both)")
    add("--impl", choices=IMPLS, default="auto", help="implementation of this package")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is the best present")
    add("--threads", type=integer(1), default=torch.get_num_threads(), help="CPU threads, of all contenders")
    add("--seconds", type=positive_seconds, help="timing per case, all contenders together (default: "
        f"{seconds:g}{', or 1 with --quick' * (seconds != 1)}); at least {rounds} rounds are timed, or 3")  # fmt: skip
    add("--json", type=output_file(".json"), metavar="FILE.json", help="write the results there")
    add("--plot", type=output_file(".png"), metavar="FILE.png", help="draw the ratios there")


def settle_shared_flags(parser: argparse.ArgumentParser, args, seconds: float) -> None:
    """Defaults that depend on others, and what this machine cannot do; exits with a usage error there."""
    args.seconds = args.seconds or (1.0 if args.quick else seconds)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch finds no CUDA device here; expected auto or cpu")
    args.device = best_device() if args.device == "auto" else args.device
    if args.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            parser.error("argument --plot: needs matplotlib (pip install matplotlib)")


def best_device() -> str:
    """The device to measure on: cuda if torch can use a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def refuse_what_cannot_serve(parser: argparse.ArgumentParser, args, attempt) -> None:
    """A usage error now, not a line of the report behind all peers, where --impl cannot serve a case on this machine.

    Args:
        attempt: a function of a case, which raises ValueError there.
    """
    if args.impl != "auto":
        for case in args.cases:
            try:
                attempt(case)
            except ValueError as error:
                parser.error(f"argument --impl: {error}")


@functools.cache
def attend(dtype: str, head_dim: int, device: str, impl: str) -> None:
    """Attention of a token to itself, for `refuse_what_cannot_serve`."""
    token = torch.zeros(1, 1, 1, head_dim, dtype=DTYPES[dtype], device=device)
    sparse_attention(token, token, token, causal_mask(0, 1), impl=impl)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows defaults, but not "(default: None)" or that of a switch."""

    def _get_help_string(self, action):
        if action.default in (None, False) or action.default is argparse.SUPPRESS:
            return action.help
        return super()._get_help_string(action)


# -- types of values ---------------------------------------------------------------------------------------------------


def integer(minimum: int):
    """An argparse type: an integer of at least `minimum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < minimum:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {minimum}, got {text!r}")
        return value

    return parse


def positive_seconds(text: str) -> float:
    """An argparse type: a positive, finite number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text!r}")
    return value


def grid(text: str) -> tuple[int, int]:
    """An argparse type: a grid of image tokens, "32" or "32x48" (rows x columns)."""
    parts = text.lower().split("x")
    if len(parts) == 1:
        parts *= 2
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected ROWSxCOLUMNS or one integer, such as 32x48 or 32, got {text!r}")
    return int(parts[0]), int(parts[1])


def output_file(*endings: str):
    """An argparse type: a file that can be written, in a folder that exists, with one of these endings."""

    def parse(text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() not in endings:
            raise argparse.ArgumentTypeError(f"expected a file name ending in {' or '.join(endings)}, got {text!r}")
        if not can_write(path):
            raise argparse.ArgumentTypeError(f"expected a writable file in an existing folder, got {text!r}")
        return path

    return parse
