"""The command `dalle-fast`. A command is a module named in COMMANDS with a docstring, `add_arguments(parser)` and
`run(arguments) -> exit status`; it imports what is heavy in `run`, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
import textwrap

import dalle_fast
from dalle_fast.errors import UserError, told
from dalle_fast.progress import tell

COMMANDS = {
    "train-dvae": "dalle_fast.commands.train_dvae",
    "train-dalle": "dalle_fast.commands.train_dalle",
    "generate": "dalle_fast.commands.generate",
    "reconstruct": "dalle_fast.commands.reconstruct",
    "convert": "dalle_fast.commands.convert",
    "verify": "dalle_fast.verify",
    "info": "dalle_fast.info",
}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows defaults, but not "(default: None)"."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)

    def _fill_text(self, text, width, indent):
        """Paragraphs run on, the lines of a table, which begin with spaces, do not."""
        if "\n  " not in text:
            return super()._fill_text(text, width, indent)
        return "\n".join(textwrap.fill(line, width, subsequent_indent=" " * 12) for line in text.splitlines())


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `arguments.run(arguments)` runs the chosen one."""
    parser = argparse.ArgumentParser(prog="dalle-fast", description="DALL-E style models, fast. See COMMAND --help.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {dalle_fast.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module_name in COMMANDS.items():
        module = importlib.import_module(module_name)
        command = commands.add_parser(
            name,
            help=module.__doc__.partition("\n")[0],
            description=module.__doc__,
            formatter_class=_HelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; `argv` is `sys.argv[1:]` if None. Returns the exit status: 2 for what the user can put right."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed, as by `2>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: no file's name ends a run by being printed
    try:
        arguments = make_parser().parse_args(argv)
        status = arguments.run(arguments)
        sys.stdout.flush()
    except UserError as error:
        return told(error)
    except KeyboardInterrupt:  # training loops save first, and return the same status
        tell("dalle-fast: interrupted")
        return 128 + signal.SIGINT
    except BrokenPipeError:  # whoever read our output, as `head` does, has had enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at exit
        return 1
    return status
