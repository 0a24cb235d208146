"""Which implementation of an operation serves a call."""

from __future__ import annotations

import functools
import sys
import warnings

IMPLS = ("auto", "reference", "cpu", "triton", "cuda")


def check_impl(impl):
    """Raise ValueError where `impl` is no name of an implementation."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")


def choose(operation, impl, device_type, load, automatic, *tensors):
    """The implementation that serves: the named one or none, or for "auto" the fastest that can.

    Args:
        operation: the operation's name and what it costs on the reference, for the warning when "auto" lands there.
        impl: one of IMPLS.
        device_type: of the tensors' device.
        load: from a name to the implementation, whose `why_not(*tensors)` lists every reason why it cannot serve; or
            to a list of reasons, where there is no such implementation.
        automatic: by device type, the names that "auto" tries, the fastest first. The reference comes after them.

    Raises:
        ValueError: the named implementation cannot serve, with every reason.
    """
    if impl != "auto":
        serving, reasons = _try(load, impl, tensors)
        if reasons:
            raise ValueError(f"impl={impl!r} cannot serve this call: {'; '.join(reasons)}")
        return serving
    refusals = []
    for name in automatic.get(device_type, ()):
        serving, reasons = _try(load, name, tensors)
        if not reasons:
            return serving
        refusals.append(f"{name}: {'; '.join(reasons)}")
    _warn_once(*operation, " | ".join(refusals) or f"no faster implementation for {device_type} tensors")
    return load("reference")


def _try(load, name, tensors):
    implementation = load(name)
    if isinstance(implementation, list):
        return None, implementation
    return implementation, implementation.why_not(*tensors)


@functools.cache
def _warn_once(operation, cost, reasons):
    warnings.warn(
        f"{operation} runs on the dense reference, which {cost}, because nothing faster serves this call ({reasons}); "
        'impl="reference" asks for it and silences this warning',
        UserWarning,
        stacklevel=_callers_level(),
    )


def _callers_level():
    """The `stacklevel` at which who calls this warns of the user's line: the nearest outside of this package and torch."""
    frame, level = sys._getframe(1), 1
    # Code that torch generates is in no module.
    while frame.f_back and frame.f_globals.get("__name__", "torch").partition(".")[0] in ("dalle_fast", "torch"):
        frame, level = frame.f_back, level + 1
    return level
