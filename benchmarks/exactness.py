"""How far results are from float64, and how far they may be.

Errors are a dictionary: of each tensor's name those of `compare`, or others.
"""

from __future__ import annotations

import math


def compare(names, outputs, exact) -> dict:
    """Of each tensor the largest error, its root mean square relative to that of the exact values, and their largest."""
    errors = {}
    for name, output, expected in zip(names, outputs, exact):
        difference = output.detach().double() - expected
        size = difference.norm()
        errors[name] = {
            "max_abs": float(difference.abs().max()),
            "rms_relative": float(size / expected.norm()) if size != 0 else 0.0,
            "largest": float(expected.abs().max()),
        }
    return errors


def limits(eager: dict, epsilon: float, sizes: dict | None = None) -> dict:
    """What is tolerated of each tensor: twice what eager torch errs (`compare`), plus one rounding.

    Of the largest error, which few elements decide, and of the root mean square, to which all contribute.

    Args:
        sizes: of what is rounded, where that is not the tensor itself.
    """
    allowed = {}
    for name, errors in eager.items():
        largest, size = errors["largest"], (sizes or {}).get(name, errors["largest"])
        rounding = epsilon * size / largest if largest else math.inf  # of what is 0 throughout there is no relative one
        allowed[name] = {
            "max_abs": 2 * errors["max_abs"] + epsilon * size,
            "rms_relative": 2 * errors["rms_relative"] + rounding,
        }
    return allowed


def beyond(errors: dict, allowed: dict) -> dict:
    """What is not within its limits, NaN included."""
    return {
        name: errors[name]
        for name, limits in allowed.items()
        if not all(errors[name][which] <= limit for which, limit in limits.items())
    }


def worst(errors: dict, key: str) -> float:
    """The largest of a case's tensors; NaN if any is (null in a results file)."""
    values = [entry[key] for entry in errors.values()]
    return math.nan if any(value is None or math.isnan(value) for value in values) else max(values)
