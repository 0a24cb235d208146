"""Folders that are written to after long work."""

from __future__ import annotations

import os
import tempfile

from dalle_fast.errors import UserError


def make_folder(path, name: str) -> None:
    """Make a folder where it is missing, and find out now whether files can be made in it.

    Args:
        name: what the folder is, for the message.

    Raises:
        UserError: it cannot be made, or not be written to.
    """
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{name} must be a folder that can be written to, got {path}: {error.strerror}") from error
