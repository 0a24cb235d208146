"""For who watches: lines and bars on stderr, whose loss ends nothing."""

from __future__ import annotations

import contextlib
import sys

WATCHED = contextlib.suppress(OSError, ValueError)  # a terminal or a pipe that is gone or closed ends no run


def tell(line: str) -> None:
    """A line on stderr, if it is still there, above the bars that are."""
    if on_terminal():
        from tqdm import tqdm

        tqdm.write(line, file=_Watched(sys.stderr))
    elif sys.stderr is not None:  # print would take stdout
        with WATCHED:
            print(line, file=sys.stderr, flush=True)


def on_terminal() -> bool:
    """Whether stderr is a terminal, where `bar` shows one."""
    with WATCHED:
        return sys.stderr is not None and sys.stderr.isatty()
    return False


def bar(steps=None, *, total: int, unit: str, done=0, title=None, anywhere=False, **options):
    """A bar of tqdm, which has more `options`, over `steps`, or one to `update`; `steps` as they are where stderr is no
    terminal, unless one is to be shown `anywhere`, as in a notebook."""
    from tqdm import tqdm

    if on_terminal() or (anywhere and sys.stderr is not None):
        options |= {"dynamic_ncols": True, "file": _Watched(sys.stderr)}
        return tqdm(steps, initial=done, total=total, unit=unit, desc=title, **options)
    return steps


class _Watched:
    """A file for a bar, whose errors are not told: raised in tqdm, they would leave its lock taken for all other bars."""

    def __init__(self, file):
        self.file = file

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __eq__(self, other):  # tqdm asks which bars are on the file that a line is for
        return isinstance(other, _Watched) and self.file is other.file

    def write(self, text):
        with WATCHED:
            self.file.write(text)

    def flush(self):
        with WATCHED:
            self.file.flush()
