"""Whether results can be kept, asked before the work: here, and by the benchmarks."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def can_write(path: Path) -> bool:
    """Whether a file can be written there; tried in its folder, which is left as it is, as is a file that is there.

    What the folder's permissions say is not enough: root has all of them in /proc, where no file can be made.
    """
    try:
        if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
            return False
        with tempfile.TemporaryFile(dir=path.parent):
            return True
    except OSError:
        return False
