"""Sparse attention and discrete codebooks for DALL-E style models.

`import dalle_fast` itself loads nothing; `dalle_fast.masks`, `dalle_fast.nn` and the other parts load when first used.
"""

import importlib

__version__ = "0.1.0"

_PARTS = ("checkpoint", "data", "masks", "nn", "ops", "sampling", "training")


def __getattr__(name):
    if name in _PARTS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_PARTS])
