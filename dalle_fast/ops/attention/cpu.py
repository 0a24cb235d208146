"""Sparse attention on the CPU: the C++ kernels of `csrc/cpu/attention_kernels.cpp`.

B batch, H heads, S sequence, D head size.
"""

from __future__ import annotations

import functools

import torch

from dalle_fast import _extension
from dalle_fast.ops.dtypes import DTYPES, address

MAX_HEAD_DIM = 128

_EXCHANGE = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)  # DLPack's, by which C reads a tensor's numbers
_EMPTY_LIKE = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)


def why_not(query, key, value, mask) -> list[str]:
    """Every reason why this implementation cannot serve these tensors here; empty if it can."""
    reasons = []
    if not query.is_cpu:
        reasons.append(f"it needs CPU tensors, got {query.device}")
    if query.dtype not in DTYPES:
        reasons.append(f"it computes in float32, float16 or bfloat16, got {query.dtype}")
    if query.shape[-1] > MAX_HEAD_DIM:
        reasons.append(f"its head size is at most {MAX_HEAD_DIM}, got {query.shape[-1]}")
    if missing := _extension.why_missing():
        reasons.append(missing)
    return reasons


def forward(query, key, value, text_lengths, mask, scale, *, lse="exact"):
    """Returns (out, lse): out (B, H, S, D) in query's dtype, lse (B, H, S) float32, both fresh and contiguous.

    lse: see op.py. "rounded" differs for bfloat16 on Intel's matrix unit only: off by up to 3e-3, and sooner made.
    """
    B, H, S, D = query.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse_out = None if lse == "none" else out.new_empty((B, H, S), dtype=torch.float32)
    _extension.native().attention_forward(
        _layout(mask, S),
        (B, H, D),
        DTYPES[query.dtype],
        scale,
        address(text_lengths),
        lse == "exact",
        [numbers_of(x) for x in (query, key, value, out, lse_out)],
        torch.get_num_threads(),
    )
    return out, lse_out


def forward_at_once(query, key, value, mask):
    """`forward` of whole sequences, all that the mask has, at the usual scale: out alone, or None if it is not that.

    The kernel is given the tensors, and itself finds out whether it takes them as they are. With cold caches that saves
    0.1 ms of checks and numbers: a tenth of attention over 1,280 tokens.
    """
    if _EXCHANGE is None or _extension.why_missing():
        return None
    shape = query.shape
    if len(shape) != 4 or shape[2] != mask.seq_len:  # nobody waits for a layout that is not needed
        return None
    native, layout, threads = _extension.native(), _layout(mask, mask.seq_len), torch.get_num_threads()
    return native.attention_forward_at_once(_EXCHANGE, layout, query, key, value, MAX_HEAD_DIM, _EMPTY_LIKE, threads)


def backward(grad_out, grad_lse, query, key, value, out, lse, text_lengths, mask, scale):
    """Returns the gradients of query, key and value, fresh and contiguous, in their dtype."""
    B, H, S, D = query.shape
    grads = tuple(query.new_empty((B, H, S, D)) for _ in range(3))
    _extension.native().attention_backward(
        _layout(mask, S),
        (B, H, D),
        DTYPES[query.dtype],
        scale,
        address(text_lengths),
        [numbers_of(x) for x in (query, key, value, out, lse, grad_out, grad_lse, *grads)],
        torch.get_num_threads(),
    )
    return grads


def decode(query, text_key, text_value, image_key, image_value, position, text_lengths, mask, scale):
    """One query (B, H, D) per sample against (P, H, T, D) and (B, H, C, D): (B, H, D), fresh and contiguous.

    Fastest where the text positions of text_key are neighbours in memory, as in a (P, H, D, T) tensor's `.mT`: other
    layouts are transposed at every step.
    """
    B, H, D = query.shape
    out = query.new_empty((B, H, D))
    slots, counts = mask.visible_slots()
    _extension.native().attention_decode(
        (B, len(text_key), H, mask.text_len, D),
        DTYPES[query.dtype],
        scale,
        address(text_lengths),
        (slots.data_ptr(), slots.stride(0), counts.data_ptr()),
        int(position),
        [numbers_of(x) for x in (query[:, :, None], text_key, text_value, image_key, image_value, out[:, :, None])],
        torch.get_num_threads(),
    )
    return out


@functools.lru_cache(maxsize=64)
def _layout(mask, seq_len):
    return _extension.native().AttentionLayout(mask.encode(), seq_len)


def numbers_of(tensor):
    """Address and strides of a (B, H, S, D) or (B, H, S) tensor; the address of None is 0."""
    if tensor is None:
        return (0, 0, 0, 0, 0)
    return (tensor.data_ptr(), *tensor.stride(), 0)[:5]
