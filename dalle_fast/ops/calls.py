"""What every operation asks about a call, asked so that it costs little; and the only place of torch's private names.

After work that has emptied the caches, each of torch's functions takes some microseconds to be found, a device's name
and a tensor's dispatch keys 20, the dispatcher's way from Python to Python 0.1 ms: as much as a tenth of attention over
1,280 tokens.

A later torch may lack a private name. Importing this package does not fail then: a question that cannot be asked any
more has the answer after which a call goes the longer way, through the dispatcher or to torch's own operation.
"""

from __future__ import annotations

import contextlib
import types

import torch
from torch import _C
from torch.autograd import forward_ad, profiler
from torch.overrides import has_torch_function


def _asked(owner, name, otherwise):
    """torch's function of this name, or one that says `otherwise` where there is none."""
    return getattr(owner, name, None) or (lambda *_: otherwise)


def _watched(owner, name, otherwise):
    """What has torch's variable of this name, which changes; or where there is none, always `otherwise`."""
    return owner if hasattr(owner, name) else types.SimpleNamespace(**{name: otherwise})


_levels = _watched(forward_ad, "_current_level", 0)
_profilers = _watched(profiler, "_is_profiler_enabled", True)
_transforms = _asked(_C, "_are_functorch_transforms_active", True)
_any_autocast = _asked(_C, "_is_any_autocast_enabled", True)
_functorch = getattr(_C, "_functorch", None)
# No tensors of a kind that torch no longer asks for.
_is_legacy_batched = _asked(_functorch, "is_legacy_batchedtensor", False)
_is_wrapped = _asked(_functorch, "is_functorch_wrapped_tensor", False)
_is_graph_kept = _asked(getattr(_C, "_autograd", None), "_get_current_graph_task_keep_graph", True)
_has_any_global_hook = _asked(torch.nn.modules.module, "_has_any_global_hook", True)

# -- devices and autocast ----------------------------------------------------------------------------------------------


def device_type(tensor) -> str:
    """`tensor.device.type`, which torch writes into a stream each time."""
    return "cpu" if tensor.is_cpu else "cuda" if tensor.is_cuda else tensor.device.type


def current_device(tensor):
    """Kernels are launched on the current device, which need not be the tensors': a context that makes it so."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def is_any_autocast_on() -> bool:
    """Whether autocast is on for some device: sooner known than for which."""
    return _any_autocast()


def autocast_dtype(tensor):
    """The dtype that autocast asks for here, or None; as torch's own operations, it leaves float64 alone."""
    if not _any_autocast() or tensor.is_meta or not torch.is_autocast_enabled(device_type(tensor)):
        return None
    return None if tensor.dtype == torch.float64 else torch.get_autocast_dtype(device_type(tensor))


def without_autocast(tensor):
    """A context in which autocast leaves the tensor's device alone; meta, which has no autocast, raises in torch's."""
    return contextlib.nullcontext() if tensor.is_meta else torch.autocast(device_type(tensor), enabled=False)


# -- gradients and transforms ------------------------------------------------------------------------------------------


def needs_grad(tensors) -> bool:
    """Whether gradients are on and one of the tensors, or Nones, wants one."""
    if torch.is_grad_enabled():
        for x in tensors:  # not any(): a generator costs more than all it asks
            if x is not None and x.requires_grad:
                return True
    return False


def is_forward_mode() -> bool:
    """Whether forward-mode derivatives are taken around this call, by torch.autograd.forward_ad or torch.func."""
    return _levels._current_level >= 0


def has_tangent(tensors) -> bool:
    """Whether a forward-mode derivative goes through one of the tensors, or Nones."""
    if _levels._current_level >= 0:
        for x in tensors:
            if x is not None and forward_ad.unpack_dual(x, level=0).tangent is not None:
                return True
    return False


def has_transforms() -> bool:
    """Whether transforms of torch.func (vmap, grad, jvp, ...) are around this call."""
    return _transforms()


def is_transformed() -> bool:
    """Whether a call is more than its values: within torch.func's transforms or forward-mode derivatives."""
    return _levels._current_level >= 0 or _transforms()


def is_differentiated_by_transform(tensor) -> bool:
    """Whether torch.func's grad, vjp or jacrev wants a gradient of the tensor, or None."""
    while tensor is not None and _is_wrapped(tensor):
        if _functorch.is_gradtrackingtensor(tensor) and tensor.requires_grad:
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False


def has_values(tensor) -> bool:
    """Whether a tensor's numbers are its own to be looked at: not a compiler's, a subclass's or a transform's."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and not _transforms()
        and not _is_legacy_batched(tensor)  # torch.autograd.grad's is_grads_batched
    )


def is_graph_kept() -> bool:
    """May the backward pass that runs be run again (retain_graph)? Then what was saved is not given away."""
    return _is_graph_kept()


def has_global_hooks() -> bool:
    """Whether hooks of all modules are set, which expect to see every module called."""
    return _has_any_global_hook()


# -- the dispatcher ----------------------------------------------------------------------------------------------------


def _keys(*names) -> int:
    keys = _C.DispatchKeySet(_C.DispatchKey.Undefined)
    for name in names:
        keys = keys | _C.DispatchKeySet(getattr(_C.DispatchKey, name))
    return keys.raw_repr()


try:
    # The keys of an ordinary tensor with memory, made in inference mode or not, and of a thread where nothing looks on.
    _OF_TENSORS = frozenset(
        _keys(device, f"Autocast{device}", *autograd)
        for device in ("CPU", "CUDA")
        for autograd in ((), ("ADInplaceOrView", f"Autograd{device}"))
    )
    _OF_THREADS = frozenset((_keys("BackendSelect"), _keys("BackendSelect", "ADInplaceOrView")))
    _of_tensor, _of_thread = _C._dispatch_keys, _C._dispatch_tls_local_include_set
except AttributeError:
    _profilers = types.SimpleNamespace(_is_profiler_enabled=True)  # no call is plain


def is_plain(tensors) -> bool:
    """Whether such a call means its kernel and nothing else, but perhaps gradients: then it needs no dispatcher.

    It does where a compiler or a tracer, a transform, a mode or a profiler looks on, and for subclasses and lazy signs.
    An observer that no profiler has started (torch.profiler.ExecutionTraceObserver alone) is not noticed, and sees nothing.
    """
    if torch.compiler.is_dynamo_compiling():  # a constant for Dynamo, as what follows is not
        return False
    if (
        _profilers._is_profiler_enabled
        or _levels._current_level >= 0
        or _of_thread().raw_repr() not in _OF_THREADS
        or has_torch_function(tensors)
    ):
        return False
    for x in tensors:
        if _of_tensor(x).raw_repr() not in _OF_TENSORS:
            return False
    return True


def is_hooked(module) -> bool:
    """Whether calling a module does something before or after its class's `forward`, or instead."""
    state = module.__dict__  # attributes of a module take ten times as long
    return bool(state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state or "_call_impl" in state)


# -- autograd kernels --------------------------------------------------------------------------------------------------


class SingleLevelFunction(getattr(torch.autograd.function, "_SingleLevelFunction", torch.autograd.Function)):
    """A function of a single level of functorch's transforms. Where torch has none, it refuses such functions in transforms."""

    @staticmethod
    def _compiled_autograd_key(ctx):  # as of torch.autograd.Function, for torch._dynamo.config.compiled_autograd
        return (ctx._autograd_function_id,)


try:
    from torch._functorch.autograd_function import enable_single_level_autograd_function as single_level
except ImportError:
    single_level = contextlib.nullcontext


def below_autograd():
    """A context in which operations go past autograd's kernels, of all levels."""
    return _C._AutoDispatchBelowAutograd()


def with_forward_mode():
    """A context in which forward-mode derivatives are taken again, which a torch.autograd.Function turns off."""
    return forward_ad._set_fwd_grad_enabled(True)
