"""Sparse attention written down plainly: dense, S x S in memory, any float dtype, any device.

With s = scale * query @ key^T where a key is visible and -inf elsewhere, over the last dimension

    lse = log(sum(exp(s)))        p = exp(s - lse)        out = p @ value

`forward` is differentiable torch code; `backward` is the same thing differentiated by hand:

    dp = grad_out @ value^T       delta = sum(p * dp) - grad_lse               ds = scale * p * (dp - delta)
    grad_query = ds @ key         grad_key = ds^T @ query                      grad_value = p^T @ grad_out

A query that sees no key has lse -inf, p and out 0 and no gradient. float16 and bfloat16 are computed in float32.

B batch, H heads, S sequence, D head size, T text. Of decoding: N samples of each of P prompts, C slots of a cache.
"""

from __future__ import annotations

import torch

from dalle_fast.ops.calls import without_autocast


def why_not(query, key, value, mask) -> list[str]:
    """Every reason why this implementation cannot serve these tensors; it always can."""
    return []


def forward(query, key, value, text_lengths, mask, scale, *, lse="exact"):
    """Returns (out, lse): out (B, H, S, D) in query's dtype; lse (B, H, S) float32, float64 for float64 inputs.

    `lse` changes nothing: it is made, and exact, whoever will see it.
    """
    with without_autocast(query):
        scores, lse = _scores(_wide(query), _wide(key), text_lengths, mask, scale)
        out = _probabilities(scores, lse) @ _wide(value)
    return out.to(query.dtype).contiguous(), lse


def backward(grad_out, grad_lse, query, key, value, out, lse, text_lengths, mask, scale):
    """Returns the gradients of query, key and value in their dtype; out and lse are recomputed, so never looked at."""
    with without_autocast(query):
        q, k, v, do = map(_wide, (query, key, value, grad_out))
        scores, lse = _scores(q, k, text_lengths, mask, scale)
        p = _probabilities(scores, lse)
        # Where nothing is visible p is 0, but 0 times an infinite or NaN gradient would not be.
        do = do.masked_fill((lse == -torch.inf)[..., None], 0)
        dp = do @ v.mT
        delta = (p * dp).sum(-1)
        if grad_lse is not None:
            delta = delta - grad_lse
        ds = (scale * p * (dp - delta[..., None])).masked_fill(scores == -torch.inf, 0)
        grads = ds @ k, ds.mT @ q, p.mT @ do
    return tuple(grad.to(query.dtype).contiguous() for grad in grads)


def decode(query, text_key, text_value, image_key, image_value, position, text_lengths, mask, scale):
    """One query (B, H, D) per sample at image position `position` against (P, H, T, D) and (B, H, C, D): (B, H, D).

    Off the CPU it waits for the device, to see the position, which is clamped to the image.
    """
    T, N = mask.text_len, query.shape[0] // max(1, len(text_key))
    i = max(0, min(int(position), mask.image_len - 1))
    j = torch.arange(i + 1, device=query.device)
    slots = mask.cache_slot(j[mask.allows(T + i, T + j)])
    hidden = torch.zeros(1, 1, T + len(slots), 1, dtype=torch.bool, device=query.device)
    if text_lengths is not None:
        position = torch.arange(T + len(slots), device=query.device)
        hidden = (position < T) & (position >= text_lengths.repeat_interleave(N)[:, None])
        hidden = hidden[:, None, :, None]
    keys, values = (
        torch.cat([_wide(text.repeat_interleave(N, 0)), _wide(image[:, :, slots])], 2).masked_fill(hidden, 0)
        for text, image in ((text_key, image_key), (text_value, image_value))
    )
    with without_autocast(query):
        scores = (keys @ _wide(query)[..., None] * scale).masked_fill(hidden, -torch.inf)
        out = torch.softmax(scores, 2).mT @ values
    return out[:, :, 0].to(query.dtype).contiguous()


def attention_weights(query, key, mask, *, scale, text_lengths=None):
    """The probabilities p, (B, H, S, S) in query's dtype; differentiable."""
    with without_autocast(query):
        return _probabilities(*_scores(_wide(query), _wide(key), text_lengths, mask, scale)).to(query.dtype)


def visible(mask, seq_len, text_lengths, device):
    """Which keys each query sees: bool, (S, S), or (B, 1, S, S) with text_lengths (B,)."""
    allowed = mask.to_dense(device, seq_len=seq_len)
    if text_lengths is None:
        return allowed
    position = torch.arange(seq_len, device=device)
    hidden = (position < mask.text_len) & (position >= text_lengths[:, None])
    return allowed & ~hidden[:, None, None, :]


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


def _scores(query, key, text_lengths, mask, scale):
    allowed = visible(mask, query.shape[-2], text_lengths, query.device)
    scores = (scale * (query @ key.mT)).masked_fill(~allowed, -torch.inf)
    return scores, torch.logsumexp(scores, -1)


def _probabilities(scores, lse):
    # exp(scores - lse), but softmax subtracts the row's largest score instead, which rounds less where lse is large.
    blind = (lse == -torch.inf)[..., None]
    return torch.softmax(scores.masked_fill(blind, 0), -1).masked_fill(scores == -torch.inf, 0)
