"""The native module `dalle_fast._native`, loaded once, with words about how to build it where it is missing."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path

import dalle_fast
from dalle_fast import _sources

HOW_TO_BUILD = (
    "build it in the repository: `pip install -e .`, or, where cmake, ninja, pybind11 and setuptools are installed, "
    "`make build`, which is faster and needs no network"
)


def native():
    """The module.

    Raises:
        ImportError: it was not built, does not load, or was built from other sources than those beside this package.
    """
    module, failure = _load()
    if module is None:
        raise ImportError(failure)
    return module


def why_missing() -> str | None:
    """Why `native()` would raise, or None if it would not."""
    return _load()[1]


@functools.cache
def why_no_cuda() -> str | None:
    """Why the module's CUDA kernels cannot run on this machine, whatever its GPUs are; None if they can."""
    if missing := why_missing():
        return missing
    if reason := native().build_info()["why_no_cuda"]:
        return f"the native module was built without CUDA: {reason}"
    driver, runtime = native().cuda_versions()
    if driver // 1000 >= runtime // 1000:
        return None
    has = f"is of CUDA {_dotted(driver)}" if driver else "is missing"
    return (
        f"the native module was built for CUDA {_dotted(runtime)}, and the machine's driver {has}: a newer driver will do, "
        f"or an nvcc of the driver's version, from 12.8 on, to build with (CUDACXX)"
    )


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


@functools.cache
def _load():
    import torch  # noqa: F401 (first, so that the module shares torch's OpenMP runtime and its threads)

    try:
        module = importlib.import_module("dalle_fast._native")
    except ImportError as error:
        return None, f"the native module dalle_fast._native could not be loaded ({error}); {HOW_TO_BUILD}"
    built_for = module.build_info()["version"]
    if built_for != dalle_fast.__version__:
        return None, (
            f"the native module dalle_fast._native was built for version {built_for}, "
            f"this is {dalle_fast.__version__}; {HOW_TO_BUILD}"
        )
    # As after a `git pull`, or where another checkout's module is found: its functions take other arguments.
    root = Path(dalle_fast.__file__).resolve().parent.parent
    sources = _sources.digest(root)
    if sources is not None and module.build_info().get("sources") != sources:
        return None, f"{module.__file__} was built from other sources than those in {root / 'csrc'}; {HOW_TO_BUILD}"
    return module, None
