"""What a user can put right: the command `dalle-fast` prints such an error as one line, without a traceback."""

import sys


class UserError(Exception):
    """A wrong flag, file or folder; the message says what came and what was expected."""


def told(error: UserError) -> int:
    """Print it; returns the command's exit status."""
    print(f"dalle-fast: error: {error}", file=sys.stderr)
    return 2
