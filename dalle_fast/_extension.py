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
