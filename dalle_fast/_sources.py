"""What the native module was built from, told by the build and asked when it is loaded. `setup.py` runs this file by
itself, before there is a package: it imports nothing of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

ENDINGS = (".cpp", ".h", ".cu", ".cuh", ".in")  # and not what an editor leaves beside them


def digest(root: Path) -> str | None:
    """A hash of the C++ and CUDA sources below `root`, names and contents; None where there are none.

    A `csrc` without CMakeLists.txt beside it is another's: packages have left theirs in `site-packages`.
    """
    files = sorted(path for path in (root / "csrc").rglob("*") if path.suffix in ENDINGS)
    if not files or not (root / "CMakeLists.txt").is_file():
        return None
    hashed = hashlib.sha256()
    for path in (root / "CMakeLists.txt", *files):
        content = path.read_bytes()
        hashed.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return hashed.hexdigest()[:16]
