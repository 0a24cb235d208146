"""What a user can put right: the command `dalle-fast` prints such an error as one line, without a traceback."""


class UserError(Exception):
    """A wrong flag, file or folder; the message says what came and what was expected."""
