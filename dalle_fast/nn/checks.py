"""What modules refuse of their arguments, each rule in one place."""

from __future__ import annotations

import math
import numbers

import torch

from dalle_fast.integers import as_integer
from dalle_fast.masks import AttentionMask
from dalle_fast.ops.calls import autocast_dtype, has_values


def check_size(name, size, least=1) -> int:
    """See `as_integer`."""
    return as_integer(name, size, least=least)


def check_number(name, value) -> float:
    """`value` as a float; TypeError where it is not a finite number (NumPy's are taken)."""
    try:
        if not isinstance(value, bool) and isinstance(value, numbers.Real) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer that no float holds
        pass
    raise TypeError(f"{name} must be a finite number, got {value!r}")


def check_masks(masks) -> None:
    """Raise TypeError where one of `masks` is none, ValueError where there are none, or masks of different text_len or grid."""
    for mask in masks:
        if not isinstance(mask, AttentionMask):
            raise TypeError(f"masks must hold AttentionMasks, got {type(mask).__name__}")
    if len({(mask.text_len, mask.grid) for mask in masks}) != 1:
        got = tuple(dict.fromkeys(masks))
        raise ValueError(f"masks must hold at least one, all of one text_len and grid, got {got!r}")


def check_fits(name, tensor, weight) -> None:
    """Raise ValueError where `tensor` is not on the device of a module's `weight`, TypeError where not of its dtype."""
    if tensor.device != weight.device:
        raise ValueError(f"{name} must be on the module's device {weight.device}, got {tensor.device}")
    # Under autocast both are cast, but for float64.
    if (autocast_dtype(tensor) or tensor.dtype) != (autocast_dtype(weight) or weight.dtype):
        raise TypeError(f"{name} must have the module's dtype {weight.dtype}, or autocast, got {tensor.dtype}")


def check_integers(name, tensor) -> None:
    """Raise TypeError where `tensor` is no int64 tensor."""
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.int64:
        got = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be an int64 tensor, got {got}")


def check_range(name, tensor, last, what, look=None) -> None:
    """Raise ValueError where integers are not from 0 to `last`, which is `what`. `look`: see `bounds`."""
    found = bounds(tensor, look)
    if found and (found[0] < 0 or found[1] > last):
        raise ValueError(f"{name} must be from 0 to {last}, {what}, got values from {found[0]} to {found[1]}")


def bounds(tensor, look=None):
    """The smallest and the largest value, NaN where there is one; None where it is empty or not to be looked at.

    `look`: see `is_looked_at`.
    """
    if not is_looked_at(tensor, look) or not tensor.numel():
        return None
    low, high = torch.aminmax(tensor.detach())
    return low.item(), high.item()


def is_looked_at(tensor, look=None) -> bool:
    """Whether a tensor has values, and may be asked for them.

    A look costs nothing on a CPU, elsewhere it waits for the device: whether to `look`, None means where it is free.
    What a compiler, an exporter, a fake mode or a transform as vmap hands over has no values.
    """
    look = tensor.device.type == "cpu" if look is None else look
    return look and has_values(tensor)
