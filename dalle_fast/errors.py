"""What a user can put right: the command `dalle-fast` prints such an error as one line, without a traceback."""

from dalle_fast.progress import tell


class UserError(Exception):
    """A wrong flag, file or folder; the message says what came and what was expected."""


def told(error: UserError) -> int:
    """Tell it; returns the command's exit status."""
    tell(f"dalle-fast: error: {error}")
    return 2
