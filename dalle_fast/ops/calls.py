"""What every operation asks about a call, asked so that it costs little.

After work that has emptied the caches, each of torch's functions takes some microseconds to be found, a device's name
and a tensor's dispatch keys 20, the dispatcher's way from Python to Python 0.1 ms: as much as a tenth of attention over
1,280 tokens.
"""

from __future__ import annotations

import contextlib

import torch
from torch import _C
from torch.autograd import forward_ad, profiler
from torch.overrides import has_torch_function


def device_type(tensor) -> str:
    """`tensor.device.type`, which torch writes into a stream each time."""
    return "cpu" if tensor.is_cpu else "cuda" if tensor.is_cuda else tensor.device.type


def autocast_dtype(tensor):
    """The dtype that autocast asks for here, or None; as torch's own operations, it leaves float64 alone."""
    if not _C._is_any_autocast_enabled() or tensor.is_meta or not torch.is_autocast_enabled(device_type(tensor)):
        return None
    return None if tensor.dtype == torch.float64 else torch.get_autocast_dtype(device_type(tensor))


def without_autocast(tensor):
    """A context in which autocast leaves the tensor's device alone; meta, which has no autocast, raises in torch's."""
    return contextlib.nullcontext() if tensor.is_meta else torch.autocast(device_type(tensor), enabled=False)


def has_tangent(tensor) -> bool:
    """Whether a forward-mode derivative goes through a tensor, or None."""
    return tensor is not None and forward_ad.unpack_dual(tensor, level=0).tangent is not None


def needs_grad(tensors) -> bool:
    """Whether gradients are on and one of the tensors, or Nones, wants one."""
    if torch.is_grad_enabled():
        for x in tensors:  # not any(): a generator costs more than all it asks
            if x is not None and x.requires_grad:
                return True
    return False


def _keys(*names) -> int:
    keys = _C.DispatchKeySet(_C.DispatchKey.Undefined)
    for name in names:
        keys = keys | _C.DispatchKeySet(getattr(_C.DispatchKey, name))
    return keys.raw_repr()


# The keys of an ordinary tensor with memory, made in inference mode or not, and of a thread where nothing looks on.
_OF_TENSORS = frozenset(
    _keys(device, f"Autocast{device}", *autograd)
    for device in ("CPU", "CUDA")
    for autograd in ((), ("ADInplaceOrView", f"Autograd{device}"))
)
_OF_THREADS = frozenset((_keys("BackendSelect"), _keys("BackendSelect", "ADInplaceOrView")))


def is_plain(tensors) -> bool:
    """Whether such a call means its kernel and nothing else, but perhaps gradients: then it needs no dispatcher.

    It does where a compiler or a tracer, a transform, a mode or a profiler looks on, and for subclasses and lazy signs.
    An observer that no profiler has started (torch.profiler.ExecutionTraceObserver alone) is not noticed, and sees nothing.
    """
    if torch.compiler.is_dynamo_compiling():  # a constant for Dynamo, as what follows is not
        return False
    if (
        profiler._is_profiler_enabled
        or forward_ad._current_level >= 0
        or _C._dispatch_tls_local_include_set().raw_repr() not in _OF_THREADS
        or has_torch_function(tensors)
    ):
        return False
    for x in tensors:
        if _C._dispatch_keys(x).raw_repr() not in _OF_TENSORS:
            return False
    return True
