"""Functions: sparse attention, and torch's `scaled_dot_product_attention` that also takes an `AttentionMask`; the
codebook operation; a linear layer of few rows.

B batch, H heads, S sequence, D head size, T text. Of codebooks: K codes, Din size of hidden, D size of an embedding.
"""

from __future__ import annotations

import numbers
from typing import Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from dalle_fast.masks import AttentionMask
from dalle_fast.ops import attention
from dalle_fast.ops import codebook as codebook_ops
from dalle_fast.ops import linear as linear_ops
from dalle_fast.ops.codebook import GumbelCodebookOutput
from dalle_fast.ops.dtypes import check_tensor

__all__ = [
    "GumbelCodebookOutput",
    "codebook_argmax",
    "codebook_cross_entropy",
    "codebook_sample",
    "gumbel_codebook",
    "gumbel_softmax",
    "linear",
    "noise_seed",
    "scaled_dot_product_attention",
    "sparse_attention",
    "sparse_attention_decode",
]

_torch_sdpa = torch.nn.functional.scaled_dot_product_attention  # kept, as ours may be put in its place


@overload
def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    *,
    scale: float | Tensor | None = None,
    text_lengths: Tensor | None = None,
    return_lse: Literal[False] = False,
    impl: str = "auto",
) -> Tensor: ...


@overload
def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    *,
    scale: float | Tensor | None = None,
    text_lengths: Tensor | None = None,
    return_lse: Literal[True],
    impl: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    *,
    scale: float | Tensor | None = None,
    text_lengths: Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * query @ key^T where `mask` allows it) @ value, computing little more than the allowed pairs.

    The keys of a query are text and image keys together in one softmax (Ramesh et al. 2021, appendix B). Differentiable
    in query, key and value, `lse` included, and bit-repeatable; a second derivative goes through the dense reference.
    Under autocast the inputs are cast to autocast's dtype.

    Args:
        query, key, value: (B, H, S, D) each, of one dtype on one device; float32, float16 or bfloat16 (float64 on the
            reference). Any strides, so views of a packed projection are read in place. S may be shorter than the
            mask's sequence and means its first S positions; D is from 1 to 128. B, H and S may be 0.
        mask: an `AttentionMask`.
        scale: factor of the logits, a number or a CPU tensor without dimensions; D ** -0.5 if None.
        text_lengths: (B,) integers from 0 to T on the inputs' device, or None: text positions >= text_lengths[b] are
            hidden as keys from every query of sample b (a caption's padding). Off the CPU, where a look would wait for
            the device, the range is not checked and values are clamped to it.
        return_lse: also return the log-sum-exp of each query's logits.
        impl: "auto" takes the fastest implementation that serves the call and warns once when that is the dense
            reference; "reference", "cpu" or "triton" take that one or raise.

    Returns:
        out (B, H, S, D), contiguous, in the inputs' dtype; with `return_lse` the pair (out, lse), lse (B, H, S) in
        float32 (float64 for float64 inputs), natural logarithm. A query that sees no key (possible with text_lengths)
        has zeros in out, -inf in lse and no gradient.

    Raises:
        TypeError: an argument is not of the right kind or dtype.
        ValueError: an argument has the wrong shape, device or value, or `impl` cannot serve it (with every reason).
    """
    if not type(query) is type(key) is type(value) is torch.Tensor and _is_foreign(query, key, value):
        options = {"scale": scale, "text_lengths": text_lengths, "return_lse": return_lse, "impl": impl}
        return handle_torch_function(sparse_attention, (query, key, value), query, key, value, mask, **options)
    return attention.sparse_attention(
        query, key, value, mask, scale=scale, text_lengths=text_lengths, return_lse=return_lse, impl=impl
    )


def _is_foreign(*tensors):
    """Whether one is no tensor but stands for one, as torch.fx's proxies do, and wants to be asked what a call means."""
    for x in tensors:
        if x is not None and not isinstance(x, torch.Tensor) and has_torch_function((x,)):
            return True
    return False


def sparse_attention_decode(
    query: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    image_key: Tensor,
    image_value: Tensor,
    mask: AttentionMask,
    position: int | Tensor,
    *,
    text_lengths: Tensor | None = None,
    scale: float | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """One step of decoding: what `sparse_attention` gives at image position `position`, from cached keys and values.

    The text is stored once for all samples of a caption, which is most of what a step reads, and an image cache keeps
    only the tokens that the mask can still see. One softmax over the text and the image keys that the query sees
    (Ramesh et al. 2021, appendix B). A sample's result does not depend on the others, bit for bit. Not differentiable,
    and autocast does not touch it: the query must have the caches' dtype.

    Args:
        query: (B, H, D), of the image token at `position` of B samples; float32, float16 or bfloat16 (float64 on the
            reference), D from 1 to 128.
        text_key, text_value: (P, H, T, D), T = mask.text_len, of P prompts. B is a multiple of P: the first B / P
            samples belong to prompt 0, the next ones to prompt 1, and so on.
        image_key, image_value: (B, H, C, D), C = mask.cache_slots: image token j is in slot mask.cache_slot(j), the
            token at `position` included. Slots that the query does not see are never looked at.
        mask: an `AttentionMask`.
        position: of the query in the image, in raster order: an integer from 0 to H * W - 1 of the mask's grid, or an
            int64 tensor without dimensions on query's device. A tensor off the CPU is read by the kernel, so that a
            CUDA graph follows it; it is clamped to the image.
        text_lengths: (P,) integers from 0 to T on query's device, or None: text keys >= text_lengths[p] are hidden.
        scale: factor of the logits, D ** -0.5 if None.
        impl: as in `sparse_attention`.

    All tensors are of one dtype on one device and may have any strides. On a CPU a text_key whose positions are
    neighbours in memory, as in the `.mT` of a (P, H, D, T) tensor, is fastest: a single sample's step took a quarter less
    time than with a contiguous one, which every step transposes anew.

    Returns:
        (B, H, D), contiguous, in query's dtype.

    Raises:
        TypeError: an argument is not of the right kind or dtype.
        ValueError: an argument has the wrong shape, device or value, or `impl` cannot serve it (with every reason).
        RuntimeError: gradients are on and an argument needs one.
    """
    tensors = query, text_key, text_value, image_key, image_value
    if _is_foreign(*tensors):
        options = {"text_lengths": text_lengths, "scale": scale, "impl": impl}
        return handle_torch_function(sparse_attention_decode, tensors, *tensors, mask, position, **options)
    return attention.sparse_attention_decode(
        query,
        text_key,
        text_value,
        image_key,
        image_value,
        mask,
        position,
        text_lengths=text_lengths,
        scale=scale,
        impl=impl,
    )


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | AttentionMask | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, where `attn_mask` may also be an `AttentionMask`.

    Without an `AttentionMask` the call goes to torch unchanged. With one it is `sparse_attention`, which takes less than
    torch does: key and value must have query's S and D, D is at most 128, and there is no dropout.

    Args:
        query: (..., S, D): the dimension before S counts heads, those before it are batch; none is needed.
        key, value: (..., S, D) like query, or with fewer heads and `enable_gqa`.
        attn_mask: None, a tensor as torch takes it, or an `AttentionMask`.
        dropout_p: must be 0 with an `AttentionMask`.
        is_causal: must be False with an `AttentionMask`, which is causal already.
        scale: factor of the logits, a number or a CPU tensor without dimensions; D ** -0.5 if None.
        enable_gqa: with an `AttentionMask`, query head h attends to key and value head h // (query heads / key heads).
            Key and value are never repeated in memory; tensors whose batch and heads do not merge into one dimension
            as a view (a packed projection with B > 1) are copied once.

    Returns:
        (..., S, D) like query.

    Raises:
        TypeError, ValueError: as `sparse_attention`, and for what an `AttentionMask` does not go with.
    """
    if not isinstance(attn_mask, AttentionMask):
        return _torch_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if _is_foreign(query, key, value):
        given = query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        return handle_torch_function(scaled_dot_product_attention, given[:3], *given)
    if not isinstance(dropout_p, numbers.Real):
        raise TypeError(f"dropout_p must be a number, got {type(dropout_p).__name__}")
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool, got {type(flag).__name__}")
    if dropout_p != 0:
        raise ValueError(f"dropout_p must be 0 with an AttentionMask, got {dropout_p}")
    if is_causal:
        raise ValueError("is_causal must be False with an AttentionMask, which is causal already, got True")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor)
        if tensor.dim() < 2:
            raise ValueError(f"{name} must have at least 2 dimensions (..., S, D), got shape {tuple(tensor.shape)}")
        if tensor.shape[-2:] != query.shape[-2:]:
            S, D = query.shape[-2:]
            raise ValueError(f"{name} must have shape (..., {S}, {D}), like query, got {tuple(tensor.shape)}")
    given = query.shape, key.shape, value.shape
    if enable_gqa:
        query, key, value = _group(query, key, value)
    leading = _broadcast(query, key, value, given)
    out = attention.sparse_attention(*(_to_4d(x, leading) for x in (query, key, value)), attn_mask, scale=scale)
    out = out.view(*leading, *out.shape[2:])
    return out.flatten(-4, -3) if enable_gqa else out


def _group(query, key, value):
    """Query heads that share a key head become the heads of one sample, for which the key head has stride 0."""
    if query.dim() < 3 or not query.dim() == key.dim() == value.dim():
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(f"query, key and value must have the same 3 or more dimensions with enable_gqa, got {shapes}")
    heads, groups = query.shape[-3], key.shape[-3]
    if value.shape[-3] != groups or groups == 0 or heads % groups:
        raise ValueError(
            "query's number of heads must be a multiple of the one of key and value with enable_gqa, got "
            f"{heads}, {groups} and {value.shape[-3]}"
        )
    query = query.unflatten(-3, (groups, heads // groups))
    return query, key.unsqueeze(-3), value.unsqueeze(-3)


def _broadcast(query, key, value, given):
    """The leading dimensions that the three have together; an error reports their shapes as the caller gave them."""
    leading = [x.shape[:-2] for x in (query, key, value)]
    if leading[0] == leading[1] == leading[2]:
        return leading[0]
    try:
        return torch.broadcast_shapes(*leading)
    except RuntimeError:
        shapes = ", ".join(str(tuple(x)) for x in given)
        raise ValueError(
            f"the dimensions of query, key and value before the last two must broadcast, got shapes {shapes}"
        ) from None


def _to_4d(x, leading):
    """(B, H, S, D) with x expanded to `leading`: a view where strides allow one, else a copy made before H is expanded."""
    *batch, heads = leading or (1,)
    x = x[(None,) * max(0, 3 - x.dim())]
    x = x.expand(*batch, *x.shape[-3:])
    x = x.flatten(0, -4) if batch else x[None]
    return x.expand(-1, heads, -1, -1)


def gumbel_codebook(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    codebook: Tensor,
    tau: float | Tensor,
    *,
    hard: bool = False,
    seed: int | Tensor | None = None,
    impl: str = "auto",
) -> GumbelCodebookOutput:
    """Gumbel-softmax over a codebook: softmax((hidden @ weight.T + bias + gumbel) / tau) @ codebook.

    What a discrete VAE does between encoder and decoder (Ramesh et al. 2021, section 2.1; Jang et al. 2016), without a
    tensor of size (..., K) in memory, forward or backward: noise and probabilities are computed again. Noise is float32
    and a function of (seed, row, code) alone. Differentiable in hidden, weight, bias and codebook, and bit-repeatable; by
    autograd, not by torch.func's transforms. Under autocast these four are cast to autocast's dtype.

    Args:
        hidden: (..., Din); float32, float16, bfloat16, or float64 on the reference. It may have no rows.
        weight: (K, Din). bias: (K,) or None. codebook: (K, D). Of hidden's dtype and device.
        tau: the softmax's temperature, a positive number, or a tensor without dimensions that needs no gradient. A
            tensor on a GPU is not looked at.
        hard: take codebook[codes], with the gradient of the soft embedding in hidden, weight and bias
            (straight-through; Bengio et al. 2013).
        seed: of the noise. An integer from 0 to 2^63 - 1 or an int64 tensor without dimensions numbers the rows; an
            int64 tensor (...) is a seed for each row, which makes the noise of a row independent of its batch. None
            draws one from torch's generator, and on the ranks of a process group different ones.
        impl: "auto" takes the fastest implementation that serves the call and warns once when that is the dense
            reference; "reference", "cpu", "cuda" or, of 16-bit tensors on a GPU, "triton" take that one or raise. "triton"
            keeps D numbers of float32 a row for the backward pass.

    Returns:
        GumbelCodebookOutput: embedding (..., D) in hidden's dtype; kl (...) float32 (float64 for float64), in nats, of
        p = softmax(hidden @ weight.T + bias), without noise, to uniform: sum(p * (log p + log K)), at most rounding
        below 0; codes (...) int64, the argmax of the noisy logits. A row that holds NaN or infinity has NaN in
        embedding and kl and some code from 0 to K - 1; other rows do not notice it.

    Raises:
        TypeError: an argument is not of the right kind or dtype.
        ValueError: an argument has the wrong shape, device or value, or `impl` cannot serve it (with every reason).
    """
    tensors = hidden, weight, bias, codebook
    if _is_foreign(*tensors):
        options = {"hard": hard, "seed": seed, "impl": impl}
        return handle_torch_function(gumbel_codebook, tensors, *tensors, tau, **options)
    return codebook_ops.gumbel_codebook(hidden, weight, bias, codebook, tau, hard=hard, seed=seed, impl=impl)


def codebook_argmax(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    code_range: tuple[int, int] | None = None,
    impl: str = "auto",
) -> Tensor:
    """The largest logit's code: argmax(hidden @ weight.T + bias), the first of equals. Not differentiable.

    Args:
        hidden, weight, bias, impl: as in `gumbel_codebook`.
        code_range: (start, stop) restricts it to these codes, as if the others did not exist; None means all K.

    Returns:
        codes (...) int64, from 0 to K - 1 even where logits are NaN.

    Raises:
        TypeError, ValueError: as `gumbel_codebook`.
    """
    tensors = hidden, weight, bias
    if _is_foreign(*tensors):
        return handle_torch_function(codebook_argmax, tensors, *tensors, code_range=code_range, impl=impl)
    return codebook_ops.codebook_argmax(hidden, weight, bias, code_range=code_range, impl=impl)


def codebook_sample(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    seed: int | Tensor | None = None,
    code_range: tuple[int, int] | None = None,
    impl: str = "auto",
) -> Tensor:
    """An exact sample of softmax((hidden @ weight.T + bias) / temperature), by the Gumbel-max method (Gumbel 1954).

    It is argmax(logits + temperature * noise) with the noise of 32 random bits in float32. Not differentiable.

    Args:
        hidden, weight, bias, seed, impl: as in `gumbel_codebook`, and `impl` as in `codebook_argmax`.
        temperature: a number from 0, which means argmax, or a tensor without dimensions.
        code_range: (start, stop) restricts it to these codes, as if the others did not exist: the code `start` has the
            noise of code 0. None means all K.

    Returns:
        codes (...) int64, from 0 to K - 1 even where logits are NaN.

    Raises:
        TypeError, ValueError: as `gumbel_codebook`.
    """
    tensors = hidden, weight, bias
    if _is_foreign(*tensors):
        options = {"temperature": temperature, "seed": seed, "code_range": code_range, "impl": impl}
        return handle_torch_function(codebook_sample, tensors, *tensors, **options)
    return codebook_ops.codebook_sample(
        hidden, weight, bias, temperature=temperature, seed=seed, code_range=code_range, impl=impl
    )


def codebook_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    code_range: tuple[int, int] | None = None,
    impl: str = "auto",
) -> Tensor:
    """`torch.nn.functional.cross_entropy(hidden @ weight.T + bias, target)` without the logits in memory.

    Differentiable once, in hidden, weight and bias, by autograd, not by torch.func's transforms. With reduction "mean" or
    "sum" the forward pass also makes the gradients that are needed, up to their common factor (but in float16, where the
    factor keeps them in range).

    Args:
        hidden, weight, bias, impl: as in `gumbel_codebook`.
        target: (...) int64, codes from 0 to K - 1 or ignore_index. On a CPU others raise; elsewhere, where a look would
            wait for the device, they give NaN in the loss.
        reduction: "none", "mean" (over the targets that are not ignored; NaN if there are none) or "sum".
        ignore_index: rows with this target have loss 0 and no gradient.
        code_range: (start, stop): logits and targets of these codes only, as if the others did not exist, as for the
            text or the image part of a joint vocabulary. None means all K.

    Returns:
        The loss in nats, float32 (float64 for float64): (...) with reduction "none", else a scalar.

    Raises:
        TypeError, ValueError: as `gumbel_codebook`.
    """
    tensors = hidden, weight, bias, target
    if _is_foreign(*tensors):
        options = {"reduction": reduction, "ignore_index": ignore_index, "code_range": code_range, "impl": impl}
        return handle_torch_function(codebook_cross_entropy, tensors, *tensors, **options)
    return codebook_ops.codebook_cross_entropy(
        hidden, weight, bias, target, reduction=reduction, ignore_index=ignore_index, code_range=code_range, impl=impl
    )


def gumbel_softmax(
    logits: Tensor,
    tau: float | Tensor = 1.0,
    hard: bool = False,
    eps: float = 1e-10,
    dim: int = -1,
    *,
    seed: int | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """`torch.nn.functional.gumbel_softmax` in one pass over memory, with float32 noise whatever the logits' dtype.

    Differentiable in logits, twice too, by autograd, not by torch.func's transforms.

    Args:
        logits: any shape with at least one dimension; float32, float16, bfloat16, or float64 on the reference.
        tau: temperature, a positive number, or a tensor without dimensions that needs no gradient; unlike torch, which
            also broadcasts a tensor and differentiates it. A tensor on a GPU is waited for: a number is not.
        hard: return one-hot vectors, with the gradient of the soft ones (straight-through).
        eps: has no effect, as in torch.
        dim: the dimension of the codes.
        seed: of the noise, as in `gumbel_codebook` but one for all rows: an integer, a tensor without dimensions, or
            None.
        impl: as in `gumbel_codebook`.

    Returns:
        A tensor of logits' shape and dtype. The codes are neighbours in memory, whatever `dim` is and unlike torch's, so a
        result of another `dim` than the last takes `reshape` where torch's takes `view`.

    Raises:
        TypeError, ValueError: as `gumbel_codebook`.
    """
    if _is_foreign(logits):
        given, options = (logits, tau, hard, eps, dim), {"seed": seed, "impl": impl}
        return handle_torch_function(gumbel_softmax, (logits,), *given, **options)
    return codebook_ops.gumbel_softmax(logits, tau, hard, eps, dim, seed=seed, impl=impl)


def noise_seed(seed: int, *, step: int = 0, rank: int = 0) -> int:
    """One integer for `seed=` from a run's seed, a step and a rank: no two triples give the same, nor the same noise.

    Args:
        seed: from 0 to 2^20 - 1. step: from 0 to 2^32 - 1. rank: from 0 to 2^11 - 1.

    Raises:
        TypeError, ValueError: a value that is no integer or out of its range.
    """
    return codebook_ops.noise_seed(seed, step=step, rank=rank)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None, impl: str = "auto"
) -> Tensor:
    """`torch.nn.functional.linear`, faster where x has few rows, as it does when tokens come one after another.

    Weights are read once and where they lie; on a CPU libraries pack them for every product. Sums are float32, and a
    row's result does not depend on the other rows. That way is taken without gradients and outside autocast, on a CPU
    for a handful of rows (with AVX-512 and float32 3 to 16, with AMX and bfloat16 1 to 64), on a GPU for 1 to 64 in 16
    bits where the weight is large (2^20 numbers) and aligned; every other call goes to torch unchanged.

    Args:
        x: (..., K). weight: (N, K). bias: (N,) or None.
        activation: None, or "gelu" for `torch.nn.functional.gelu` of the result. Ours take it of the float32 sum, before
            that is rounded to x's dtype; torch's of the rounded result.
        impl: "auto" decides as above; "reference" is torch's; "cpu" and "triton" are ours, or raise. "triton" serves
            1 to 64 rows of any size in float16 and bfloat16.

    Returns:
        (..., N) in x's dtype.

    Raises:
        ValueError: `activation` or `impl` is none of these, or `impl` cannot serve (with every reason). What torch's
            raises.
    """
    tensors = x, weight, bias
    if _is_foreign(*tensors):
        return handle_torch_function(linear, tensors, *tensors, activation=activation, impl=impl)
    return linear_ops.linear(x, weight, bias, activation=activation, impl=impl)
