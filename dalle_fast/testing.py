"""What tests hold implementations against: an oracle in float64, and tolerances that are measured, not chosen.

The oracles are short enough to be trusted by eye and use none of the code they judge but the masks and the noise's
definition.

B batch, H heads, S sequence, D head size, T text. Of codebooks: N rows, K codes, I size of hidden, D size of an
embedding.
"""

from __future__ import annotations

import contextlib
import math

import torch

from dalle_fast.masks import AttentionMask, causal_mask, column_mask, conv_mask, row_mask
from dalle_fast.ops.codebook import noise as _noise

__all__ = [
    "SMALL_MASKS",
    "assert_as_exact_as_eager",
    "attention_oracle",
    "check_attention",
    "check_attention_gradients",
    "check_codebook",
    "check_codebook_gradients",
    "check_codes",
    "codebook_gradient_terms",
    "codebook_noise",
    "codebook_oracle",
    "codebook_terms",
    "eager_attention",
    "eager_codebook",
    "every_mask",
    "gradient_terms",
    "lse_terms",
    "nan_poisoned",
    "output_terms",
]

# Every rule on odd rectangular grids, text longer and shorter than the grid, windows wider than the grid, dilation.
SMALL_MASKS = (
    causal_mask(5, (3, 7)),
    row_mask(5, (3, 7)),
    row_mask(19, (5, 3)),
    row_mask(5, (3, 7), wrap=False),
    column_mask(5, (3, 7)),
    column_mask(19, (6, 4)),
    conv_mask(5, (3, 7), 3),
    conv_mask(0, (5, 5), 11),
    conv_mask(19, (7, 5), 5, dilation=2),
    conv_mask(5, (3, 7), 3, edges="clip"),
    conv_mask(5, (7, 5), 3, dilation=2, edges="clip"),
    conv_mask(5, (5, 6), 3, edges="torus"),
    conv_mask(5, (3, 7), 3, edges="corner"),
    conv_mask(2, (7, 6), 3, dilation=2, edges="corner"),
)


def every_mask(text_len: int, grid, kernel_size: int = 3, dilation: int = 1) -> dict[str, AttentionMask]:
    """One mask of every rule on one grid, by the rule's name."""
    masks = [causal_mask(text_len, grid), row_mask(text_len, grid), row_mask(text_len, grid, wrap=False)]
    masks.append(column_mask(text_len, grid))
    masks += [conv_mask(text_len, grid, kernel_size, dilation, edges) for edges in ("flat", "clip", "torus", "corner")]
    return {mask.rule: mask for mask in masks}


def attention_oracle(query, key, value, mask, *, scale=None, text_lengths=None):
    """Dense attention in float64: the truth. Differentiable.

    Args:
        query, key, value: (B, H, S, D), any float dtype; taken as they are and computed in float64.
        mask: AttentionMask. scale: None means 1 / sqrt(D). text_lengths: None or (B,) integers.

    Returns:
        out (B, H, S, D) and lse (B, H, S) in float64; 0 and -inf for a query that sees no key.
    """
    return eager_attention(query.double(), key.double(), value.double(), mask, scale=scale, text_lengths=text_lengths)


def eager_attention(query, key, value, mask, *, scale=None, text_lengths=None):
    """The same expressions in the dtype of the tensors: what a user would write without this package."""
    B, _, S, D = query.shape
    attends = mask.to_dense(query.device, seq_len=S).expand(B, 1, S, S)
    if text_lengths is not None:
        position = torch.arange(S, device=query.device)
        attends = attends & ((position >= mask.text_len) | (position < text_lengths[:, None]))[:, None, None, :]
    logits = query @ key.transpose(-1, -2) * (D**-0.5 if scale is None else scale)
    blind = ~attends.any(-1, keepdim=True)
    # Rows in which nothing is visible get finite logits here, so that no NaN comes into the gradients.
    logits = logits.masked_fill(~attends & ~blind, -torch.inf).masked_fill(blind, 0)
    lse = torch.logsumexp(logits, -1).masked_fill(blind[..., 0], -torch.inf)
    return torch.softmax(logits, -1).masked_fill(blind, 0) @ value, lse


def lse_terms(query, key, *, scale=None):
    """How large the terms are that lse is added up from, float64 (B, H, S): the products in its largest logit, and 1.

    A logit of terms that cancel has the rounding of the terms, and the sum of exponentials is rounded before its
    logarithm is taken: both stay when lse itself is near zero.
    """
    logits = query.detach().double().abs() @ key.detach().double().abs().mT
    return (logits * abs(query.shape[-1] ** -0.5 if scale is None else scale)).amax(-1) + 1


def output_terms(query, key, value, mask, *, scale=None, text_lengths=None):
    """How large the terms are that out is added up from, float64 (B, H, S, D).

    Each probability carries the rounding of its logit, float32 whatever the dtype, which moves out by p * (value - out):
    at logits of some tens that is more than what the sum itself rounds.
    """
    wide = [x.detach().double() for x in (query, key, value)]
    identity = torch.eye(query.shape[-2], dtype=torch.float64, device=query.device).expand(*query.shape[:-1], -1)
    options = {"scale": scale, "text_lengths": text_lengths}
    p = attention_oracle(*wide[:2], identity, mask, **options)[0]
    ratio = min(1.0, torch.finfo(torch.float32).eps / torch.finfo(query.dtype).eps)
    sizes = wide[0].abs() @ wide[1].abs().mT * (abs(scale) if scale is not None else query.shape[-1] ** -0.5)
    out, v = p @ wide[2], wide[2].abs()
    # |value - out| is at most |value| + |out|
    wobble = (p * sizes) @ v + (p * sizes).sum(-1, keepdim=True) * out.abs()
    return out.abs() + out.square().mean().sqrt() + ratio * wobble


def gradient_terms(query, key, value, mask, grad_out, grad_lse=None, *, scale=None, text_lengths=None):
    """How large the terms are whose sums the gradients are: the same sums of absolute values, float64.

    The terms of grad_query and grad_key cancel: with one visible key eager attention is exact, and an implementation
    that adds up in another order is off by some of their last digits. Probabilities that are computed again, from an
    lse that was kept in float32, also carry its rounding.
    """
    q, k, v, do = (x.detach().double().abs() for x in (query, key, value, grad_out))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    identity = torch.eye(query.shape[-2], dtype=torch.float64, device=query.device).expand(*query.shape[:-1], -1)
    options = {"scale": scale, "text_lengths": text_lengths}
    p = attention_oracle(query.detach(), key.detach(), identity, mask, **options)[0]
    float32_eps, eps = torch.finfo(torch.float32).eps, torch.finfo(query.dtype).eps
    p = p * (1 + lse_terms(query, key, scale=scale)[..., None] * min(1, float32_eps / eps)) if p.numel() else p
    dp = do @ v.mT
    delta = (p * dp).sum(-1) + (0 if grad_lse is None else grad_lse.detach().double().abs())
    ds = abs(scale) * p * (dp + delta[..., None])
    return ds @ k, ds.mT @ q, p.mT @ do


def codebook_noise(seed, num_rows, num_codes):
    """The noise of rows 0 to N - 1 under `seed`, or of row 0 under each of N seeds (N,): float64 (N, K)."""
    seed = torch.as_tensor(seed)
    if seed.dim():
        return _noise.gumbel_noise(seed.cpu(), torch.zeros(1, dtype=torch.int64), num_codes, torch.float64)
    return _noise.gumbel_noise(seed.cpu()[None], torch.arange(num_rows), num_codes, torch.float64)


def codebook_oracle(hidden, weight, bias, codebook, tau, noise, *, hard=False):
    """Dense Gumbel-softmax over a codebook in float64: the truth. Differentiable.

    Args:
        hidden (N, I), weight (K, I), bias (K,) or None, codebook (K, D): any float dtype; taken as they are.
        tau: a number. noise: (N, K), see `codebook_noise`. hard: straight-through.

    Returns:
        embedding (N, D) and kl (N,) in float64, codes (N,).
    """
    wide = [None if x is None else x.double() for x in (hidden, weight, bias, codebook)]
    return eager_codebook(*wide, tau, noise.double(), hard=hard)


def eager_codebook(hidden, weight, bias, codebook, tau, noise, *, hard=False):
    """The same expressions in the dtype of the tensors: what a user would write without this package."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    noisy = logits + noise
    soft, codes = torch.softmax(noisy / tau, -1), noisy.argmax(-1)
    if hard:
        one_hot = torch.nn.functional.one_hot(codes, len(weight)).to(soft.dtype)
        soft = one_hot - soft.detach() + soft
    log_p = torch.log_softmax(logits, -1)
    kl = (log_p.exp() * (log_p.masked_fill(log_p.isneginf(), 0) + math.log(len(weight)))).sum(-1)
    return soft @ codebook, kl, codes


def _codebook_parts(hidden, weight, bias, tau, noise):
    """What the terms of the codebook operation are made of, in float64.

    Returns:
        y and p, softmaxes with and without noise, nowhere below what makes 2^-126 of them, where an exponential may
        stop instead of at 0; log p, 0 where p is; how large the terms are that noisy logits and
        logits are added up from; and in units of hidden's eps the relative rounding of y and of p, given float32
        logits, at most all of them.
    """
    h, w = hidden.detach().double(), weight.detach().double()
    b = torch.zeros(len(w), dtype=h.dtype, device=h.device) if bias is None else bias.detach().double()
    logits = h @ w.T + b
    y, log_p = torch.softmax((logits + noise) / tau, -1), torch.log_softmax(logits, -1)
    p = log_p.exp()
    log_p = log_p.masked_fill(p == 0, 0)
    sizes = h.abs() @ w.abs().T + b.abs().masked_fill(b.isinf(), 0) + 1
    noisy_sizes = sizes + noise.abs()
    eps = torch.finfo(hidden.dtype).eps
    ratio = min(1.0, torch.finfo(torch.float32).eps / eps)
    of_y = ratio * (noisy_sizes + (y * noisy_sizes).sum(-1, keepdim=True)) / tau
    of_p = ratio * (sizes + (p * sizes).sum(-1, keepdim=True))
    y, p = (x.clamp(min=2**-126 / eps) for x in (y, p))
    return y, p, log_p, noisy_sizes, sizes, of_y.clamp(max=1 / eps), of_p.clamp(max=1 / eps)


def codebook_terms(hidden, weight, bias, codebook, tau, noise):
    """How large the terms are that the results are added up from, float64: of embedding, kl, and noisy logits (N, K).

    For `assert_as_exact_as_eager`. Probabilities carry the rounding of float32 logits and noise, divided by tau,
    whatever the dtype; kl is float32 unless hidden is float64.
    """
    y, p, log_p, noisy_sizes, sizes, of_y, _ = _codebook_parts(hidden, weight, bias, tau, noise)
    c, log_K = codebook.detach().double(), math.log(len(weight))
    embedding = (y * (1 + of_y)) @ c.abs() + (y * of_y).sum(-1, keepdim=True) * (y @ c).abs()
    kl = (p * (log_p + log_K)).sum(-1, keepdim=True)
    of_kl = 1 + log_K + (p * (log_p.abs() + (log_p + log_K - kl).abs() * sizes)).sum(-1)
    return embedding, of_kl, noisy_sizes


def codebook_gradient_terms(hidden, weight, bias, codebook, tau, noise, grad_embedding, grad_kl=None, *, hard=False):
    """The same for the gradients: a list for hidden, weight, bias (None without one) and codebook.

    Sums of the absolute values of what the gradients are sums of, each as wrong as probabilities and logits are.
    """
    y, p, log_p, _, _, of_y, of_p = _codebook_parts(hidden, weight, bias, tau, noise)
    g, c = grad_embedding.detach().double().abs(), codebook.detach().double().abs()
    dy, wobbly = g @ c.T, y * (1 + of_y)
    dz = (wobbly * (dy + (y * dy).sum(-1, keepdim=True)) + y * (wobbly * dy).sum(-1, keepdim=True)) / tau
    if grad_kl is not None:
        log_K = math.log(len(weight))
        kl = (p * (log_p + log_K)).sum(-1, keepdim=True)
        dz = dz + grad_kl.detach().double().abs()[:, None] * p * ((log_p.abs() + log_K + kl.abs() + 1) * (1 + of_p))
    of_codebook = wobbly.T @ g
    if hard:
        with torch.no_grad():
            codes = codebook_oracle(hidden, weight, bias, codebook, tau, noise)[2]
        of_codebook = torch.zeros_like(c).index_add_(0, codes, g)
    return [
        dz @ weight.detach().double().abs(),
        dz.T @ hidden.detach().double().abs(),
        None if bias is None else dz.sum(0),
        of_codebook,
    ]


def assert_as_exact_as_eager(name, actual, eager, exact, *, factor=2.0, terms=None):
    """Raise AssertionError where `actual` errs more than `factor` times as much as `eager` does, plus rounding.

    For each element: abs(actual - exact) <= factor * max(abs(eager - exact)) + eps * terms, with eps of actual's
    dtype, and the maximum over the tensor. Infinities must agree, and NaN is never right.

    Args:
        name: what `actual` is, for the message.
        actual: the tensor to judge.
        eager: what plain torch gives in actual's dtype; its largest error is the yardstick.
        exact: the oracle's result, float64.
        terms: the size of what is rounded; None means abs(exact) + rms(exact).
    """
    if actual.shape != exact.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}")
    eps = torch.finfo(actual.dtype).eps
    actual, eager, exact = (x.detach().double() for x in (actual, eager, exact))
    finite = exact.isfinite()
    if not torch.equal(actual[~finite], exact[~finite]):
        raise AssertionError(f"{name}: wrong where the exact result is not finite")
    if not finite.any():
        return
    actual, eager, exact = (x.masked_fill(~finite, 0) for x in (actual, eager, exact))
    error, yardstick = (actual - exact).abs(), (eager - exact).abs().max()
    if terms is None:
        terms = exact.abs() + exact[finite].square().mean().sqrt()
    allowed = factor * yardstick + eps * terms
    wrong = ~(error <= allowed)  # also true of NaN
    if wrong.any():
        excess = (error / allowed.clamp_min(1e-300)).nan_to_num(nan=torch.inf)
        at = torch.unravel_index(excess.argmax(), excess.shape)
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements beyond the tolerance; the worst is at "
            f"{tuple(int(i) for i in at)}: {float(actual[at])!r}, exact {float(exact[at])!r}, "
            f"error {float(error[at]):.3g}, allowed {float(allowed[at]):.3g}, eager's largest {float(yardstick):.3g}"
        )


# -- whole calls held against the oracle --------------------------------------------------------------------------------


def check_attention(attend, query, key, value, mask, **options):
    """Hold `attend(query, key, value, mask, return_lse=True, **options)` against the oracle; returns out and lse.

    Raises AssertionError as `assert_as_exact_as_eager` does.
    """
    with nan_poisoned():
        out, lse = attend(query, key, value, mask, **options, return_lse=True)
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    _assert_kind("out", out, query.shape, query.dtype)
    _assert_kind("lse", lse, query.shape[:3], lse_dtype)
    exact, exact_lse = attention_oracle(query, key, value, mask, **options)
    eager = eager_attention(query, key, value, mask, **options)[0]
    terms = output_terms(query, key, value, mask, **options) if query.numel() else None
    assert_as_exact_as_eager("out", out, eager, exact, terms=terms)
    wide = (x.to(lse_dtype) for x in (query, key, value))  # logits are kept in float32
    if query.numel():
        terms = lse_terms(query, key, scale=options.get("scale"))
        assert_as_exact_as_eager("lse", lse, eager_attention(*wide, mask, **options)[1], exact_lse, terms=terms)
    return out, lse


def _assert_kind(name, tensor, shape, dtype):
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        got = f"{tuple(tensor.shape)} {tensor.dtype} with strides {tensor.stride()}"
        raise AssertionError(f"{name} must be contiguous {tuple(shape)} {dtype}, got {got}")


def attention_gradients(attend, qkv, grad_out, grad_lse=None):
    """Gradients of sum(out * grad_out) + sum(lse * grad_lse over what is finite) in `qkv`; `attend(*qkv)` gives both."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    out, lse = attend(*leaves)
    if grad_lse is None:
        return torch.autograd.grad(out, leaves, grad_out.to(out.dtype))
    of_lse = grad_lse.to(lse.dtype).masked_fill(lse.isinf(), 0)
    return torch.autograd.grad((out, lse), leaves, (grad_out.to(out.dtype), of_lse))


def check_attention_gradients(attend, qkv, mask, grad_out, grad_lse=None, **options):
    """Hold the gradients of `attend(*qkv, mask, return_lse=True, **options)` against the oracle's; returns them."""
    with nan_poisoned():
        actual = attention_gradients(lambda *x: attend(*x, mask, return_lse=True, **options), qkv, grad_out, grad_lse)
    eager = attention_gradients(lambda *x: eager_attention(*x, mask, **options), qkv, grad_out, grad_lse)
    wide = [x.double() for x in qkv]
    exact = attention_gradients(lambda *x: attention_oracle(*x, mask, **options), wide, grad_out.double(), grad_lse)
    terms = gradient_terms(*qkv, mask, grad_out, grad_lse, **options)
    names = ("grad_query", "grad_key", "grad_value")
    for name, a, e, x, t in zip(names, actual, eager, exact, terms, strict=True):
        _assert_kind(name, a.contiguous(), qkv[0].shape, qkv[0].dtype)
        assert_as_exact_as_eager(name, a, e, x, terms=t)
    return actual


def float32_eager(tensors, *rest):
    """Eager embedding, kl and codes with logits in float32 as every implementation has them: the yardstick."""
    return eager_codebook(*(None if x is None else x.float() for x in tensors), *rest)


def check_codes(codes, exact, sizes):
    """Every code is the largest of `exact` noisy logits (N, K), but for rounding of terms as large as `sizes`."""
    K = exact.shape[1]
    if codes.dtype != torch.int64 or not ((codes >= 0) & (codes < K)).all():
        raise AssertionError(f"codes must be int64 from 0 to {K - 1}, got {codes.dtype}: {codes}")
    behind = exact.amax(-1) - exact.gather(-1, codes[:, None])[:, 0]
    allowed = 4 * torch.finfo(torch.float32).eps * sizes.amax(-1)
    if not (behind <= allowed).all():
        raise AssertionError(f"a code is {float(behind.max()):.3g} behind the largest")
    if len(codes) >= 40 and K > 1 and (codes == exact.argmax(-1)).float().mean() <= 0.98:  # ties are rare
        raise AssertionError("more than a fiftieth of the codes are not the largest")


def check_codebook(gumbel_codebook, tensors, tau=1.0, *, seed):
    """Hold `gumbel_codebook(*tensors, tau, seed=seed)`, soft and hard, against the oracle; returns the soft output.

    tensors: hidden (N, I), weight (K, I), bias (K,) or None, codebook (K, D).
    """
    hidden, weight, _, codebook = tensors
    N, K = hidden.shape[0], weight.shape[0]
    noise = codebook_noise(seed, N, K).to(hidden.device)
    with nan_poisoned():
        out = gumbel_codebook(*tensors, tau, seed=seed)
        hard = gumbel_codebook(*tensors, tau, seed=seed, hard=True)
    exact, exact_kl, _ = codebook_oracle(*tensors, tau, noise)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    _assert_kind("embedding", out.embedding, exact.shape, hidden.dtype)
    _assert_kind("kl", out.kl, (N,), wide)
    if N:
        of_embedding, of_kl, sizes = codebook_terms(*tensors, tau, noise)
        eager, eager_kl, _ = float32_eager(tensors, tau, noise.float())
        assert_as_exact_as_eager("embedding", out.embedding, eager.to(hidden.dtype), exact, terms=of_embedding)
        assert_as_exact_as_eager("kl", out.kl, eager_kl, exact_kl, terms=of_kl)
        noisy = torch.nn.functional.linear(*(None if x is None else x.double() for x in tensors[:3])) + noise
        check_codes(out.codes, noisy, sizes)
        if not (out.kl >= -5e-6).all():
            raise AssertionError(f"kl is {float(out.kl.min())}, below 0")
    if not (torch.equal(hard.codes, out.codes) and torch.equal(hard.kl, out.kl)):
        raise AssertionError("hard and soft samples have other codes or kl")
    if not torch.equal(hard.embedding, codebook[hard.codes]):
        raise AssertionError("a hard embedding is not the codebook's row")
    return out


def codebook_gradients(function, tensors, *cotangents, dtype=None):
    """Gradients of the sum of output * cotangent (None: not used) in every tensor; None for a tensor that is None."""
    leaves = [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    outputs = function(*leaves)
    used = [(o, c.to(o.dtype)) for o, c in zip(outputs, cotangents, strict=False) if c is not None]
    there = [x for x in leaves if x is not None]
    found = iter(torch.autograd.grad([o for o, _ in used], there, [c for _, c in used], allow_unused=True))
    return [None if x is None else next(found) for x in leaves]


def check_codebook_gradients(gumbel_codebook, tensors, tau, of_embedding, of_kl, *, seed, hard=False):
    """Hold the gradients for the cotangents `of_embedding` (N, D) and `of_kl` (N,) against the oracle's; returns them.

    Either cotangent may be None: that output is not used then.
    """
    hidden, weight, _, codebook = tensors
    noise = codebook_noise(seed, hidden.shape[0], weight.shape[0]).to(hidden.device)
    used = of_embedding, of_kl
    with nan_poisoned():
        actual = codebook_gradients(lambda *x: gumbel_codebook(*x, tau, seed=seed, hard=hard), tensors, *used)
    exact = codebook_gradients(
        lambda *x: codebook_oracle(*x, tau, noise, hard=hard), tensors, *used, dtype=torch.float64
    )
    in_float32 = codebook_gradients(
        lambda *x: eager_codebook(*x, tau, noise.float(), hard=hard), tensors, *used, dtype=torch.float32
    )
    if of_embedding is None:
        of_embedding = torch.zeros(hidden.shape[0], codebook.shape[1], device=hidden.device)
    terms = codebook_gradient_terms(*tensors, tau, noise, of_embedding, of_kl, hard=hard)
    names = ("grad_hidden", "grad_weight", "grad_bias", "grad_codebook")
    for name, a, e, x, t in zip(names, actual, in_float32, exact, terms, strict=True):
        if x is None:  # no bias, or a codebook that only kl does not depend on
            if a is not None and not (a == 0).all():
                raise AssertionError(f"{name} must be absent or 0")
            continue
        _assert_kind(name, a.contiguous(), x.shape, hidden.dtype)
        if x.numel():
            assert_as_exact_as_eager(name, a, e.to(a.dtype), x, terms=t)
    return actual


@contextlib.contextmanager
def nan_poisoned():
    """Within it, memory that `torch.empty` and its relatives return is NaN (the largest value for integers).

    So that an element which a kernel forgot to write, or read before it was written, shows.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]
