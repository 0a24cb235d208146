"""Which implementation of an operation serves a call."""

from __future__ import annotations

import functools
import sys
import warnings

IMPLS = ("auto", "reference", "cpu", "triton", "cuda")  # of all operations together


def check_impl(impl, names):
    """Raise ValueError where `impl` is none of an operation's `names`."""
    if impl not in names:
        raise ValueError(f"impl must be one of {', '.join(names)}, got {impl!r}")


def choose(operation, impl, device_type, load, automatic, *tensors):
    """The implementation that serves: the named one or none, or for "auto" the fastest that can.

    Args:
        operation: the operation's name and what it costs on the reference, for the warning when "auto" lands there.
        impl: "auto", or the name of one.
        device_type: of the tensors' device.
        load: from a name to the implementation, whose `why_not(*tensors)` lists every reason why it cannot serve.
        automatic: by device type, the names that "auto" tries, the fastest first. The reference comes after them.

    Raises:
        ValueError: the named implementation cannot serve, with every reason.
    """
    if impl != "auto":
        serving = load(impl)
        if reasons := serving.why_not(*tensors):
            raise ValueError(f"impl={impl!r} cannot serve this call: {'; '.join(reasons)}")
        return serving
    refusals = []
    for name in automatic.get(device_type, ()):
        serving = load(name)
        if not (reasons := serving.why_not(*tensors)):
            return serving
        refusals.append(f"{name}: {'; '.join(reasons)}")
    _warn_once(*operation, " | ".join(refusals) or f"no faster implementation for {device_type} tensors")
    return load("reference")


@functools.cache
def _warn_once(operation, cost, reasons):
    warnings.warn(
        f"{operation} runs on the dense reference, which {cost}, because nothing faster serves this call ({reasons}); "
        'impl="reference" asks for it and silences this warning',
        UserWarning,
        stacklevel=callers_level(),
    )


def callers_level():
    """The `stacklevel` at which who calls this warns of the user's line: the nearest outside of this package and torch."""
    frame, level = sys._getframe(1), 1
    # Code that torch generates is in no module.
    while frame.f_back and frame.f_globals.get("__name__", "torch").partition(".")[0] in ("dalle_fast", "torch"):
        frame, level = frame.f_back, level + 1
    return level
