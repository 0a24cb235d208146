"""The codebook operation as torch operations: arguments checked once, then one of the implementations.

Rows of any leading shape are flattened here; the operations below see `hidden` (N, I), and every number that may change
from call to call without a new graph (seed, tau, temperature) as a tensor on its device. Which implementation serves is
decided when real tensors arrive, so that a compiled graph holds one opaque operation.

N rows, K codes, I size of hidden, D size of an embedding.
"""

from __future__ import annotations

import functools
import importlib
import math
import numbers
import warnings
from typing import NamedTuple

import torch

from dalle_fast import _extension
from dalle_fast.integers import is_integer
from dalle_fast.ops import choice
from dalle_fast.ops.calls import (
    autocast_dtype,
    current_device,
    device_type,
    has_tangent,
    has_transforms,
    has_values,
    is_differentiated_by_transform,
    is_graph_kept,
)
from dalle_fast.ops.choice import check_impl, choose
from dalle_fast.ops.codebook import reference
from dalle_fast.ops.dtypes import check_tensor
from dalle_fast.ops.registry import LIBRARY, register

# Whom "auto" tries on a GPU, the fastest first. On an H200, 8,192 rows and codes in bfloat16, Din = 512, milliseconds by
# CUDA graphs, a script that was not kept: the largest logit 0.25 by "cuda" and 0.11 by "triton", a loss without gradients
# 0.28 and 0.14, a sample 0.33 by "cuda". What else "triton" does was never measured on a GPU, and serves where "cuda"
# cannot: without a compiler for it, or with an older driver.
_ON_GPUS = {
    "gumbel_codebook": ("cuda", "triton"),
    "gumbel_softmax": ("cuda",),
    "codebook_argmax": ("triton", "cuda"),
    "codebook_cross_entropy": ("triton", "cuda"),
    "codebook_cross_entropy with gradients": ("cuda", "triton"),
    "codebook_sample": ("cuda", "triton"),
    "codebook_sample of logits": ("cuda",),  # what makes them, truncates them and draws
}
AUTO = {operation: {"cpu": ("cpu",), "cuda": names} for operation, names in _ON_GPUS.items()}
IMPLS = {
    operation: tuple(impl for impl in choice.IMPLS if impl != "triton" or impl in names)
    for operation, names in _ON_GPUS.items()
}
_IGNORED = -2  # the target of a row that is not counted
# Of tau and temperature: the inverse of the least, and the largest times noise, of at most 23, are still float32 numbers.
BOUNDS = 1e-37, 1e37
_COST = "holds logits of every row and code in memory"


class GumbelCodebookOutput(NamedTuple):
    """What `gumbel_codebook` returns: embedding (..., D), kl (...) and codes (...)."""

    embedding: torch.Tensor
    kl: torch.Tensor
    codes: torch.Tensor


# -- the face ----------------------------------------------------------------------------------------------------------


def gumbel_codebook(hidden, weight, bias, codebook, tau, *, hard=False, seed=None, impl="auto"):
    """See `dalle_fast.nn.functional.gumbel_codebook`, the public name of this function."""
    _check_product("gumbel_codebook", hidden, weight, bias, impl, codebook=codebook)
    if not isinstance(hard, bool):
        raise TypeError(f"hard must be True or False, got {hard!r}")
    _check_transforms(hidden, weight, bias, codebook)
    tau = _number("tau", tau, hidden, positive=True)
    seed, seed_per_row = _seed(seed, hidden)
    hidden, weight, bias, codebook = _autocast(hidden, weight, bias, codebook)
    shape, hidden = hidden.shape[:-1], _rows(hidden)
    embedding, kl, codes, _ = _ops.gumbel_codebook(hidden, weight, bias, codebook, tau, seed, seed_per_row, hard, impl)
    return GumbelCodebookOutput(embedding.view(*shape, embedding.shape[-1]), kl.view(shape), codes.view(shape))


def codebook_argmax(hidden, weight, bias=None, *, code_range=None, impl="auto"):
    """See `dalle_fast.nn.functional.codebook_argmax`."""
    _check_product("codebook_argmax", hidden, weight, bias, impl)
    start, weight, bias = _restrict(weight, bias, code_range)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    codes = _ops.codebook_sample(_rows(hidden), weight, bias, None, None, False, impl)
    return _offset(codes, start).view(hidden.shape[:-1])


def codebook_sample(hidden, weight, bias=None, *, temperature=1.0, seed=None, code_range=None, impl="auto"):
    """See `dalle_fast.nn.functional.codebook_sample`."""
    _check_product("codebook_sample", hidden, weight, bias, impl)
    temperature = _number("temperature", temperature, hidden, positive=False)
    seed, seed_per_row = _seed(seed, hidden)
    start, weight, bias = _restrict(weight, bias, code_range)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    codes = _ops.codebook_sample(_rows(hidden), weight, bias, temperature, seed, seed_per_row, impl)
    return _offset(codes, start).view(hidden.shape[:-1])


def logits_of(hidden, weight, *, impl="auto"):
    """hidden (N, I) @ weight (K, I).T, in float32 whatever the dtypes are (float64 stays): for a choice among some codes."""
    return _serving("codebook_sample of logits", impl, hidden=hidden, weight=weight).logits(hidden, weight)


def truncated(logits, temperature, top_k, top_p, *, impl="auto"):
    """As `truncation.truncated`, whose arguments it takes; logits (N, K) may be overwritten."""
    serving = _serving("codebook_sample of logits", impl, logits=logits)
    return serving.truncated(logits, bounded(temperature), top_k, top_p)


def sample_of_logits(logits, seeds, *, impl="auto"):
    """Codes (N,) that `codebook_sample` draws at temperature 1 with seeds (N,), of logits (N, K), of which some are -inf."""
    with current_device(logits):
        return _serving("codebook_sample of logits", impl, logits=logits).sample_of_logits(logits.contiguous(), seeds)


def codebook_cross_entropy(
    hidden, weight, bias, target, *, reduction="mean", ignore_index=-100, code_range=None, impl="auto"
):
    """See `dalle_fast.nn.functional.codebook_cross_entropy`."""
    _check_product("codebook_cross_entropy", hidden, weight, bias, impl)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if not is_integer(ignore_index):
        raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")
    _check_transforms(hidden, weight, bias)
    start, weight, bias = _restrict(weight, bias, code_range)
    _check_target(target, hidden, start, weight.shape[0], ignore_index)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    counted = target.reshape(-1) != ignore_index
    # What is no code becomes -1 or the number of codes, so that none of them can become what stands for ignore_index.
    target = (target.reshape(-1) - start).clamp(-1, weight.shape[0]).where(counted, _IGNORED)
    rows = _rows(hidden)
    if reduction == "none":
        return _ops.codebook_cross_entropy(rows, weight, bias, target, _IGNORED, impl).view(hidden.shape[:-1])
    if reduction == "mean":
        row_weight = counted.sum(dtype=_wide_dtype(hidden)).reciprocal()
    else:
        row_weight = torch.ones((), dtype=_wide_dtype(hidden), device=hidden.device)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (rows, weight, bias)]
    # Within vmap tensors do not say whether a gradient is needed outside of it.
    if (rows.dtype == torch.float16 and any(needs)) or _is_transformed():
        return _ops.codebook_cross_entropy(rows, weight, bias, target, _IGNORED, impl).sum() * row_weight
    operands = rows, weight, bias, target, row_weight.view(1), _IGNORED, needs, impl
    loss, *_ = _ops.codebook_cross_entropy_reduced(*operands)
    return loss


def gumbel_softmax(logits, tau=1.0, hard=False, eps=1e-10, dim=-1, *, seed=None, impl="auto"):
    """See `dalle_fast.nn.functional.gumbel_softmax`."""
    check_impl(impl, IMPLS["gumbel_softmax"])
    if eps != 1e-10:  # as torch's does; at the line that called the public function
        warnings.warn("`eps` parameter is deprecated and has no effect.", stacklevel=3)
    check_tensor("logits", logits)
    if not is_integer(dim):
        raise TypeError(f"dim must be an integer, got {dim!r}")
    if logits.dim() == 0 or not -logits.dim() <= dim < logits.dim():
        raise ValueError(f"dim must be a dimension of logits {tuple(logits.shape)}, got {dim}")
    if logits.shape[dim] == 0:
        raise ValueError(f"logits must have at least one code in dimension {dim}, got shape {tuple(logits.shape)}")
    _check_tangents(logits)
    _check_transforms(logits)
    tau = _number("tau", tau, logits, positive=True, device=tau.device if isinstance(tau, torch.Tensor) else "cpu")
    is_last = dim in (-1, logits.dim() - 1)
    moved = logits if is_last else logits.movedim(dim, -1)
    seed, _ = _seed(seed, moved, per_row=False)
    shape, rows = moved.shape, moved.reshape(-1, moved.shape[-1])
    soft, codes = _ops.gumbel_softmax(rows, tau, seed, impl)
    if hard:
        soft = torch.zeros_like(soft).scatter_(-1, codes[:, None], 1) - soft.detach() + soft
    soft = soft.view(shape)
    return soft if is_last else soft.movedim(-1, dim)


def noise_seed(seed, *, step=0, rank=0):
    """See `dalle_fast.nn.functional.noise_seed`."""
    for name, value, limit in (("seed", seed, 1 << 20), ("step", step, 1 << 32), ("rank", rank, 1 << 11)):
        if not is_integer(value):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if not 0 <= value < limit:
            raise ValueError(f"{name} must be from 0 to {limit - 1}, got {value}")
    return (int(seed) << 11 | int(rank)) << 32 | int(step)  # NumPy's integers of 32 bits lose what is shifted out


# -- arguments: checked, and as the operations below take them ---------------------------------------------------------


def _check_product(operation, hidden, weight, bias, impl, **codebook):
    """What hidden @ weight.T + bias needs, and the codebook where there is one."""
    check_impl(impl, IMPLS[operation])
    check_tensor("hidden", hidden)
    others = {"weight": weight, **codebook} if bias is None else {"weight": weight, "bias": bias, **codebook}
    for name, tensor in others.items():
        check_tensor(name, tensor)
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on hidden's device {hidden.device}, got {tensor.device}")
        if tensor.dtype != hidden.dtype and (tensor.dtype == torch.float64 or autocast_dtype(hidden) is None):
            raise TypeError(f"{name} must have hidden's dtype {hidden.dtype}, got {tensor.dtype}")
    if hidden.dim() == 0:
        raise ValueError("hidden must have shape (..., Din), got a tensor without dimensions")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(f"weight must have shape (K, {hidden.shape[-1]}) with K > 0, got {tuple(weight.shape)}")
    K = weight.shape[0]
    if bias is not None and bias.shape != (K,):
        raise ValueError(f"bias must have shape ({K},), got {tuple(bias.shape)}")
    _check_tangents(hidden, *others.values())
    for name, tensor in codebook.items():
        if tensor.dim() != 2 or tensor.shape[0] != K:
            raise ValueError(f"{name} must have shape ({K}, D), got {tuple(tensor.shape)}")


def _check_tangents(*tensors):
    """torch would take an operation that has no forward-mode derivative for one whose derivative is 0."""
    if has_tangent(tensors):
        raise NotImplementedError("the codebook operation has no forward-mode derivatives")


def _check_transforms(*tensors):
    """torch would refuse with a message about what it makes of an operation's derivative."""
    if _is_transformed() and torch.is_grad_enabled() and any(map(is_differentiated_by_transform, tensors)):
        raise NotImplementedError(
            "dalle_fast: the codebook operation is differentiated by autograd (backward, torch.autograd.grad), not by "
            "torch.func's grad, vjp and jacrev"
        )


def _is_transformed():
    """Whether a transform of torch.func is at work; what is compiled never asks."""
    return not torch.compiler.is_compiling() and has_transforms()


def _check_target(target, hidden, start, num_codes, ignore_index):
    """The range is looked at on a CPU only: elsewhere a look would wait for the device."""
    if not isinstance(target, torch.Tensor):
        raise TypeError(f"target must be an int64 tensor, got {type(target).__name__}")
    if target.dtype != torch.int64:
        raise TypeError(f"target must be an int64 tensor, got {target.dtype}")
    if target.shape != hidden.shape[:-1]:
        raise ValueError(f"target must have shape {tuple(hidden.shape[:-1])}, got {tuple(target.shape)}")
    if target.device != hidden.device:
        raise ValueError(f"target must be on hidden's device {hidden.device}, got {target.device}")
    if target.device.type != "cpu" or not has_values(target):
        return
    wrong = _wrong_targets(target, start, num_codes, ignore_index)
    if wrong.any():
        raise ValueError(
            f"target must be from {start} to {start + num_codes - 1} or ignore_index ({ignore_index}), "
            f"got {int(target[wrong][0])}"
        )


def _wrong_targets(target, start, num_codes, ignore_index):
    return ((target < start) | (target >= start + num_codes)) & (target != ignore_index)


def _check_codes(target, num_rows, num_codes, ignore_index):
    """As `_check_target`, where a compiled or exported program computes: a kernel would read beside a row of logits."""
    if target.shape != (num_rows,):
        raise ValueError(f"target must have shape ({num_rows},), got {tuple(target.shape)}")
    if target.device.type != "cpu":
        return
    wrong = _wrong_targets(target, 0, num_codes, ignore_index)
    if wrong.any():
        place = int(wrong.nonzero()[0])
        raise ValueError(
            f"target must hold codes, of code_range where there is one, or ignore_index; row {place} does not"
        )


def _check_shapes(hidden, weight, bias, codebook):
    """As `_check_product`, of what an operation is given past the public functions: by a program that was compiled ahead
    of time, which looks at no shape that it is fed, while who computes is given addresses."""
    K = weight.shape[:1]
    fits = hidden.dim() == weight.dim() == 2 and weight.shape[1] == hidden.shape[1] and weight.shape[0] > 0
    fits = fits and (bias is None or bias.shape == K)
    if not (fits and (codebook is None or (codebook.dim() == 2 and codebook.shape[:1] == K))):
        shapes = [None if x is None else tuple(x.shape) for x in (hidden, weight, bias, codebook)]
        raise ValueError(
            "hidden, weight, bias and codebook must have shapes (N, Din), (K, Din), (K,) and (K, D), "
            f"got {', '.join(map(str, shapes))}"
        )


def _check_seeds(seed, seed_per_row, num_rows):
    """The same, of seeds."""
    shape = (num_rows if seed_per_row else 1,)
    if seed is not None and seed.shape != shape:
        raise ValueError(f"seed must have shape {shape}, got {tuple(seed.shape)}")


def _restrict(weight, bias, code_range):
    """The range's first code, and the rows of weight and bias that belong to it."""
    if code_range is None:
        return 0, weight, bias
    K = weight.shape[0]
    try:
        start, stop = code_range
    except (TypeError, ValueError):
        raise TypeError(f"code_range must be a pair (start, stop) or None, got {code_range!r}") from None
    if not (is_integer(start) and is_integer(stop)):
        raise TypeError(f"code_range must be a pair of integers, got {code_range!r}")
    if not 0 <= start < stop <= K:
        raise ValueError(f"code_range must satisfy 0 <= start < stop <= {K}, got ({start}, {stop})")
    return start, weight[start:stop], None if bias is None else bias[start:stop]


def _offset(codes, start):
    return codes + start if start else codes


def _plain_number(name, value, *, positive):
    """`value` as a float: finite, and above 0 or at least 0. `bounded`, but for 0."""
    value = _checked_number(name, value, positive=positive)
    return bounded(value) if value else 0.0


def _checked_number(name, value, *, positive):
    """`value`, a tensor's as a number, as it is: one that a compiler leaves open stays open."""
    if isinstance(value, torch.Tensor):
        _check_scalar(name, value)
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number or a tensor without dimensions, got {value!r}")
    if not 0 <= value < math.inf or (positive and value == 0):  # math.isfinite takes nothing that a graph leaves open
        raise ValueError(f"{name} must be {'positive' if positive else 'at least 0'} and finite, got {value!r}")
    return value


def bounded(value) -> float:
    """Within BOUNDS."""
    least, largest = BOUNDS
    return min(max(float(value), least), largest)


def _number(name, value, like, *, positive, device=None):
    """`value` as a tensor (1,) on `device`, that of `like` if None. One that is not on a CPU is not looked at."""
    device, dtype = like.device if device is None else device, _wide_dtype(like)
    is_tensor = isinstance(value, torch.Tensor)
    if is_tensor:
        _check_scalar(name, value)
    if is_tensor and (value.device.type != "cpu" or not has_values(value)):
        return value.to(device, dtype, non_blocking=True).reshape(1)
    # What fills a tensor is a constant of a compiled graph, so that each number would be compiled; a factor is not, where
    # nothing but arithmetic has been done to it (torch 2.11 closes it at a minimum or maximum).
    if torch.compiler.is_dynamo_compiling():
        value = _checked_number(name, value, positive=positive)
        factor = torch.ones((1,), dtype=dtype, device=device) * value
        return factor.clamp(*BOUNDS) if value else factor
    value = _plain_number(name, value, positive=positive)
    return torch.full((1,), value, dtype=dtype, device=device)


def check_tau(tau):
    """Raise TypeError or ValueError for what no call takes as tau, before there is a call."""
    if isinstance(tau, torch.Tensor) and (tau.device.type != "cpu" or not has_values(tau)):
        _check_scalar("tau", tau)
    else:
        _plain_number("tau", tau, positive=True)


def _check_value(name, tensor, *, positive):
    """As `_plain_number`, of what a compiled or exported program computes with."""
    if tensor.device.type == "cpu":
        _plain_number(name, tensor.item(), positive=positive)


def _check_scalar(name, tensor):
    if tensor.dim() != 0 or not tensor.is_floating_point():
        raise TypeError(
            f"{name} must be a number or a floating-point tensor without dimensions, "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    if tensor.requires_grad:
        raise ValueError(f"{name} must not require a gradient: none is computed for it; pass {name}.detach()")


def _seed(seed, hidden, per_row=True):
    """(int64 tensor, whether every row has its own)."""
    leading, device = hidden.shape[:-1], hidden.device
    if seed is None:
        drawn = torch.randint((1 << 63) - 1, (1,), device=device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            drawn += torch.distributed.get_rank()  # ranks whose generators are in the same state draw the same
        return drawn, False
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be an integer or an int64 tensor, got {seed.dtype}")
        shapes = f"() or {tuple(leading)}" if per_row else "()"
        if seed.dim() and not (per_row and seed.shape == leading):
            raise ValueError(f"seed must have shape {shapes}, got {tuple(seed.shape)}")
        if seed.device != device:
            raise ValueError(f"seed must be on hidden's device {device}, got {seed.device}")
        return seed.reshape(-1).contiguous(), seed.dim() > 0
    if not is_integer(seed):
        raise TypeError(f"seed must be an integer, an int64 tensor or None, got {seed!r}")
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed must be from 0 to 2^63 - 1, got {seed}")
    return torch.full((1,), int(seed), dtype=torch.int64, device=device), False


def _autocast(hidden, *others):
    dtype = autocast_dtype(hidden)
    if dtype is None:
        return hidden, *others
    return tuple(None if x is None else x.to(dtype) for x in (hidden, *others))


def _rows(hidden):
    return hidden.reshape(math.prod(hidden.shape[:-1]), hidden.shape[-1])  # not -1: Din may be 0


# -- who serves --------------------------------------------------------------------------------------------------------


@functools.cache
def _implementation(name):
    return reference if name == "reference" else importlib.import_module(f"dalle_fast.ops.codebook.{name}")


def _serving(operation, impl, **tensors):
    """Who serves; with a `row_weight` it makes gradients of losses."""
    first = next(iter(tensors.values()))
    if "weight" in tensors:
        _check_shapes(*map(tensors.get, ("hidden", "weight", "bias", "codebook")))
    if tensors.get("row_weight") is not None:
        operation += " with gradients"
    return choose((operation, _COST), impl, device_type(first), _implementation, AUTO[operation], tensors)


# -- the operations ----------------------------------------------------------------------------------------------------

_ops = torch.ops.dalle_fast


def _operation(schema, fake):
    """Register the decorated function as the operation `schema` for every device; `_serving` knows who serves which."""

    def decorate(kernel):
        def below(*args):
            # Kernels read codes and seeds one behind the other, and a sample of a vmap may have its own apart.
            args = [x.contiguous() if isinstance(x, torch.Tensor) and x.dtype == torch.int64 else x for x in args]
            # no_grad: operations without a derivative come here with autograd at work.
            with torch.no_grad(), current_device(args[0]), torch.autocast(args[0].device.type, enabled=False):
                return kernel(*args)

        return register(schema, below, fake, tags=(torch.Tag.pt2_compliant_tag,)).name()

    return decorate


def _wide_dtype(tensor):
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _present(grads, like):
    """An operation returns tensors only: an empty one stands for a gradient that was not wanted."""
    return tuple(like.new_empty(0) if grad is None else grad for grad in grads)


def _wanted(grads, needs):
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _fake_gradients(needs, *tensors):
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else tensors[0].new_empty(0)
        for need, x in zip(needs, tensors, strict=True)
    )


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError("the codebook operation has no second derivative")


def _gumbel_codebook_fake(hidden, weight, bias, codebook, tau, seed, seed_per_row, hard, impl):
    N = hidden.shape[0]
    return (
        hidden.new_empty(N, codebook.shape[1]),
        hidden.new_empty(N, dtype=_wide_dtype(hidden)),
        hidden.new_empty(N, dtype=torch.int64),
        hidden.new_empty(N, 4 + _kept_columns(hidden, codebook, impl), dtype=_wide_dtype(hidden)),
    )


def _kept_columns(hidden, codebook, impl):
    """The backward pass of "triton" needs the embedding in float32: so wide are `stats` beyond 4 where it may serve.

    Decided by what is known of a call before there are tensors, so that a compiled graph knows the shape.
    """
    first = AUTO["gumbel_codebook"]["cuda"][0] == "triton" or _extension.why_no_cuda()
    may_serve = impl == "triton" or (impl == "auto" and hidden.is_cuda and first)
    return codebook.shape[1] if may_serve and hidden.dtype in (torch.float16, torch.bfloat16) else 0


@_operation(
    "gumbel_codebook(Tensor hidden, Tensor weight, Tensor? bias, Tensor codebook, Tensor tau, Tensor seed, "
    "bool seed_per_row, bool hard, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    _gumbel_codebook_fake,
)
def _gumbel_codebook(hidden, weight, bias, codebook, tau, seed, seed_per_row, hard, impl):
    _check_value("tau", tau, positive=True)
    _check_seeds(seed, seed_per_row, len(hidden))
    serving = _serving("gumbel_codebook", impl, hidden=hidden, weight=weight, bias=bias, codebook=codebook)
    embedding, kl, codes, stats = serving.gumbel_codebook(hidden, weight, bias, codebook, tau, seed, seed_per_row, hard)
    if hard:
        embedding.masked_fill_(kl.isnan()[:, None], torch.nan)  # a row that is not finite has no code
    if missing := 4 + _kept_columns(hidden, codebook, impl) - stats.shape[1]:  # "triton" refused this call
        stats = torch.nn.functional.pad(stats, (0, missing), value=torch.nan)
    return embedding, kl, codes, stats


@_operation(
    "gumbel_codebook_backward(Tensor grad_embedding, Tensor? grad_kl, Tensor hidden, Tensor weight, Tensor? bias, "
    "Tensor codebook, Tensor tau, Tensor seed, Tensor kl, Tensor codes, Tensor stats, bool seed_per_row, bool hard, "
    "bool[4] needs, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad_embedding, grad_kl, hidden, weight, bias, codebook, *rest: _fake_gradients(
        rest[-2], hidden, weight, bias, codebook
    ),
)
def _gumbel_codebook_backward(
    grad_embedding, grad_kl, hidden, weight, bias, codebook, tau, seed, kl, codes, stats, seed_per_row, hard, needs,
    impl,
):  # fmt: skip
    serving = _serving("gumbel_codebook", impl, hidden=hidden, weight=weight, bias=bias, codebook=codebook)
    grads = serving.gumbel_codebook_backward(
        grad_embedding, grad_kl, hidden, weight, bias, codebook, tau, seed, kl, codes, stats, seed_per_row, hard, needs
    )
    return _present(grads, hidden)


def _gumbel_codebook_setup(ctx, inputs, output):
    hidden, weight, bias, codebook, tau, seed, *ctx.rest = inputs
    _, kl, codes, stats = output
    ctx.mark_non_differentiable(codes, stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, codebook, tau, seed, kl, codes, stats)


def _gumbel_codebook_autograd(ctx, grad_embedding, grad_kl, grad_codes, grad_stats):
    if grad_embedding is None and grad_kl is None:
        return (None,) * 9
    saved, (seed_per_row, hard, impl) = ctx.saved_tensors, ctx.rest
    hidden, _, _, codebook, *_ = saved
    if grad_embedding is None:
        grad_embedding = hidden.new_zeros(hidden.shape[0], codebook.shape[1])
    needs = list(ctx.needs_input_grad[:4])
    grads = _ops.gumbel_codebook_backward(grad_embedding, grad_kl, *saved, seed_per_row, hard, needs, impl)
    return *_wanted(grads, needs), None, None, None, None, None


@_operation(
    "codebook_sample(Tensor hidden, Tensor weight, Tensor? bias, Tensor? temperature, Tensor? seed, bool seed_per_row, "
    "str impl) -> Tensor",
    lambda hidden, *rest: hidden.new_empty(hidden.shape[0], dtype=torch.int64),
)
def _codebook_sample(hidden, weight, bias, temperature, seed, seed_per_row, impl):
    operation = "codebook_argmax" if temperature is None else "codebook_sample"
    if temperature is not None:
        _check_value("temperature", temperature, positive=False)
    _check_seeds(seed, seed_per_row, len(hidden))
    serving = _serving(operation, impl, hidden=hidden, weight=weight, bias=bias)
    return serving.sample(hidden, weight, bias, temperature, seed, seed_per_row)


@_operation(
    "codebook_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, int ignore_index, str impl) "
    "-> Tensor",
    lambda hidden, *rest: hidden.new_empty(hidden.shape[0], dtype=_wide_dtype(hidden)),
)
def _codebook_cross_entropy(hidden, weight, bias, target, ignore_index, impl):
    _check_codes(target, len(hidden), weight.shape[0], ignore_index)
    serving = _serving("codebook_cross_entropy", impl, hidden=hidden, weight=weight, bias=bias)
    return serving.cross_entropy(hidden, weight, bias, target, ignore_index, None, (False,) * 3)[0]


@_operation(
    "codebook_cross_entropy_backward(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor row_weight, "
    "int ignore_index, bool[3] needs, str impl) -> (Tensor, Tensor, Tensor)",
    lambda hidden, weight, bias, target, row_weight, ignore_index, needs, impl: _fake_gradients(
        needs, hidden, weight, bias
    ),
)
def _codebook_cross_entropy_backward(hidden, weight, bias, target, row_weight, ignore_index, needs, impl):
    serving = _serving("codebook_cross_entropy", impl, hidden=hidden, weight=weight, bias=bias, row_weight=row_weight)
    grads = serving.cross_entropy(hidden, weight, bias, target, ignore_index, row_weight, needs)[1:]
    return _present(grads, hidden)


def _cross_entropy_setup(ctx, inputs, output):
    hidden, weight, bias, target, *ctx.rest = inputs
    ctx.save_for_backward(hidden, weight, bias, target)


def _cross_entropy_autograd(ctx, grad_loss):
    ignore_index, impl = ctx.rest
    needs = list(ctx.needs_input_grad[:3])
    grads = _ops.codebook_cross_entropy_backward(*ctx.saved_tensors, grad_loss, ignore_index, needs, impl)
    return *_wanted(grads, needs), None, None, None


# The reduced loss has the same weight for every row, so its gradients are known up to a factor while the logits are at
# hand: one product less than computing the logits again in the backward pass. Not in float16, whose range they leave
# without that factor, which is there to keep them in it (GradScaler).
@_operation(
    "codebook_cross_entropy_reduced(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor row_weight, "
    "int ignore_index, bool[3] needs, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda hidden, weight, bias, target, row_weight, ignore_index, needs, impl: (
        hidden.new_empty((), dtype=_wide_dtype(hidden)),
        *_fake_gradients(needs, hidden, weight, bias),
    ),
)
def _codebook_cross_entropy_reduced(hidden, weight, bias, target, row_weight, ignore_index, needs, impl):
    _check_codes(target, len(hidden), weight.shape[0], ignore_index)
    row_weight = row_weight.to(_wide_dtype(hidden))
    weight_or_none = row_weight if any(needs) else None
    tensors = {"hidden": hidden, "weight": weight, "bias": bias, "row_weight": weight_or_none}
    serving = _serving("codebook_cross_entropy", impl, **tensors)
    loss, *grads = serving.cross_entropy(hidden, weight, bias, target, ignore_index, weight_or_none, needs)
    return (loss.sum() * row_weight[0], *_present(grads, hidden))


def _cross_entropy_reduced_setup(ctx, inputs, output):
    ctx.needs = inputs[6]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _cross_entropy_reduced_autograd(ctx, grad_loss, *of_gradients):
    # The saved gradients are outputs, so a derivative of what was made from them arrives here and is not lost.
    if any(grad is not None for grad in of_gradients):
        _no_second_derivative(ctx)
    if grad_loss is None:
        return (None,) * 8
    grads = ctx.saved_tensors
    if not has_values(grad_loss) or grad_loss.device.type != "cpu" or grad_loss != 1 or is_graph_kept():
        grads = tuple((grad * grad_loss).to(grad.dtype) for grad in grads)  # else a copy as large as the weight
    return *_wanted(grads, ctx.needs), None, None, None, None, None


@_operation(
    "gumbel_softmax(Tensor logits, Tensor tau, Tensor seed, str impl) -> (Tensor, Tensor)",
    lambda logits, *rest: (
        torch.empty_like(logits, memory_format=torch.contiguous_format),
        logits.new_empty(logits.shape[0], dtype=torch.int64),
    ),
)
def _gumbel_softmax(logits, tau, seed, impl):
    tau = _plain_number("tau", tau.item(), positive=True)  # kernels take a number; a tau on a GPU is waited for
    return _serving("gumbel_softmax", impl, logits=logits).gumbel_softmax(logits, tau, seed)


def _gumbel_softmax_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], inputs[1])


def _gumbel_softmax_autograd(ctx, grad_soft, _):
    if grad_soft is None:
        return (None,) * 4
    soft, tau = ctx.saved_tensors
    # Without dimensions tau may be on a CPU, and does not widen the result.
    return torch._softmax_backward_data(grad_soft, soft, -1, soft.dtype) / tau.reshape(()), None, None, None


def _differentiable(name, backward, setup):
    torch.library.register_autograd(name, backward, setup_context=setup, lib=LIBRARY)


_differentiable(_gumbel_codebook, _gumbel_codebook_autograd, _gumbel_codebook_setup)
_differentiable(_codebook_cross_entropy, _cross_entropy_autograd, _cross_entropy_setup)
_differentiable(_codebook_cross_entropy_reduced, _cross_entropy_reduced_autograd, _cross_entropy_reduced_setup)
_differentiable(_gumbel_softmax, _gumbel_softmax_autograd, _gumbel_softmax_setup)
for _name in (_gumbel_codebook_backward, _codebook_cross_entropy_backward):
    _differentiable(_name, _no_second_derivative, lambda ctx, inputs, output: None)
