"""Where numbers come from: the machine, the versions and the commit that go beside every measurement."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

import dalle_fast

ROOT = Path(__file__).resolve().parent.parent  # the checkout, where the package is used from one
# What a result depends on, as git takes it; results that a run itself writes are none of it.
SOURCES = ("benchmarks", "build_backend", "csrc", "dalle_fast", "tests", "CMakeLists.txt", "pyproject.toml", "setup.py")
SOURCES += (":(exclude)benchmarks/results",)


def describe_machine() -> dict:
    """What the numbers were measured on. Nothing in it names the host or a path."""
    try:
        usable = len(os.sched_getaffinity(0))
    except AttributeError:
        usable = os.cpu_count()
    machine = {
        "cpu": cpu_model(),
        "cores": usable,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "dalle_fast_isa": _native("instruction_set"),
        "system": f"{platform.system()} {platform.machine()}",
        "memory_gib": None,
        "gpu": None,
    }
    with contextlib.suppress(AttributeError, ValueError, OSError):
        machine["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        machine["gpu"] = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
        }
    return machine


def describe_versions() -> dict:
    """Versions of what computes: Python, torch, Triton, CUDA, this package and the C++ compiler. No path is in them either."""
    build = _native("build_info")
    if build is not None:  # the reason may name an nvcc in someone's home
        build = {name: value for name, value in build.items() if name != "why_no_cuda"}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": torch.version.cuda,
        "dalle_fast": dalle_fast.__version__,
        "dalle_fast_build": build,
        "cxx": _compiler(),
    }


def _native(function: str):
    """What the native module's function says; None where the module is not built or refuses."""
    from dalle_fast import _extension

    try:
        return getattr(_extension.native(), function)()
    except (ImportError, ValueError):
        return None


def version(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name, or its architecture where the system has none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _compiler() -> str | None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return None
    return _output_of(compiler, "--version").partition("\n")[0] or None


def describe_commit() -> str | None:
    """The commit of this checkout; None outside of one, in a repository of something else, or where git cannot say.

    Where sources differ from it "+changes-" and a hash of those follow, so that two changed trees are not taken for one
    another. (A native module of other sources is not loaded.)
    """
    try:
        if Path(_git("rev-parse", "--show-toplevel").rstrip("\n")).resolve() != ROOT:
            return None
        commit = _git("rev-parse", "HEAD").strip()
        changed = _git("diff", "--name-only", "--no-renames", "-z", "HEAD", "--", *SOURCES)
        changed += _git("ls-files", "--others", "--exclude-standard", "-z", "--", *SOURCES)
    except (OSError, subprocess.SubprocessError):
        return None
    if changed:
        found = hashlib.sha256()
        for name in changed.rstrip("\0").split("\0"):
            path = ROOT / name
            found.update(repr((name, path.read_bytes() if path.is_file() else None)).encode(errors="surrogateescape"))
        commit += f"+changes-{found.hexdigest()[:8]}"
    return commit


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    # Names are bytes: as Path takes them back.
    ran = subprocess.run(command, capture_output=True, timeout=20, check=True)
    return os.fsdecode(ran.stdout)


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
