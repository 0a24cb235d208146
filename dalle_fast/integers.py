"""What an argument that is an integer may be. Without torch, as masks and recipes do without."""

from __future__ import annotations

import numbers
import operator


def is_integer(value) -> bool:
    """Whether `value` is an integer, of Python, of NumPy or one that a compiler leaves open; no tensor, no truth value."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def as_integer(name: str, value, *, least: int) -> int:
    """`value` as a Python integer; TypeError where it is no integer (NumPy's are), ValueError where it is below `least`."""
    # A tensor of one truth value has an index as a bool does.
    if isinstance(value, bool) or str(getattr(value, "dtype", None)) == "torch.bool":
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}") from None
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value
