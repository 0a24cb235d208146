"""Where numbers come from: the machine, the versions and the commit that go beside every measurement."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

import dalle_fast

ROOT = Path(__file__).resolve().parent.parent  # the checkout, where the package is used from one


def describe_machine() -> dict:
    """What the numbers were measured on. Nothing in it names the host or a path."""
    try:
        usable = len(os.sched_getaffinity(0))
    except AttributeError:
        usable = os.cpu_count()
    machine = {
        "cpu": _cpu_model(),
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
    """Versions of what computes: Python, torch, Triton, CUDA, this package and the C++ compiler."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "dalle_fast": dalle_fast.__version__,
        "dalle_fast_build": _native("build_info"),
        "cxx": _compiler(),
    }


def _native(function: str):
    """What the native module's function says; None where the module is not built or refuses."""
    from dalle_fast import _extension

    try:
        return getattr(_extension.native(), function)()
    except (ImportError, ValueError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
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
    """The commit of this tree, with "+changes" where tracked files differ from it; None outside a repository."""
    commit = _output_of("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if not commit:
        return None
    return commit + ("+changes" if _output_of("git", "-C", str(ROOT), "status", "--porcelain", "-uno") else "")


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
