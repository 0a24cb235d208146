"""The native module `dalle_fast._native`, loaded once, with words about how to build it where it is missing."""

from __future__ import annotations

import functools
import importlib

import dalle_fast

HOW_TO_BUILD = "build it with `pip install -e . --no-build-isolation --no-deps` (or `make build`) in the repository"


def native():
    """The module.

    Raises:
        ImportError: it was not built, does not load, or was built from another version of the sources.
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
    return module, None
