"""No kernel touches memory outside of the tensors it is given: each lies against a page that cannot be read or written.

An access beyond an end ends the process with a signal, which the runner counts. Even numbers put the unreadable page
behind the tensors, odd ones before them. What a call itself allocates, its results and scratch memory, lies where torch
puts it: accesses beyond those are for the sanitizers (`native`), and here only seen where they break the heap.
"""

from __future__ import annotations

import ctypes
import mmap

import torch

from dalle_fast.nn import functional as F
from dalle_fast.testing import attention_gradients, codebook_gradients
from dalle_fast.verify.figures import NotRun
from dalle_fast.verify.random_calls import attention_call, codebook_call

_kept = []  # mappings of the tensors of one case


def case(number: int, device: str) -> None:
    try:
        (_attention if number % 4 < 2 else _codebook)(number, guarding(at_end=number % 2 == 0))
    finally:
        _kept.clear()


def guarding(*, at_end: bool):
    """The function that gives a contiguous copy of a tensor, or None of None, with the page behind it unreadable (or
    before it). Copies are not to be used after the case.

    Raises:
        NotRun: this system has no mprotect.
    """
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    except (OSError, AttributeError) as error:
        raise NotRun(f"no mprotect here: {error}") from None
    return lambda tensor: None if tensor is None else _guarded(libc, tensor, at_end=at_end)


def _guarded(libc, tensor, *, at_end: bool):
    """A contiguous copy of `tensor` whose last byte (or first) lies beside a page without any access."""
    tensor = tensor.contiguous()
    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    body = -(-max(1, size) // page) * page
    memory = mmap.mmap(-1, body + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (start, start + page + body):
        if libc.mprotect(guard, page, 0):
            raise OSError(ctypes.get_errno(), "mprotect failed")
    _kept.append(memory)
    offset = page + (body - size if at_end else 0)
    if not size:
        return tensor
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    return copy.copy_(tensor)


def _attention(number: int, guarded) -> None:
    call = attention_call(number, "cpu")
    qkv, grad_out, grad_lse = [guarded(x) for x in call.qkv], guarded(call.grad_out), guarded(call.grad_lse)
    options = {**call.options, "text_lengths": guarded(call.options["text_lengths"])}

    def attend(*qkv):
        return F.sparse_attention(*qkv, call.mask, return_lse=True, impl="cpu", **options)

    if qkv[0].numel():
        attention_gradients(attend, qkv, grad_out, grad_lse)
    attend(*qkv)


def _codebook(number: int, guarded) -> None:
    call = codebook_call(number, "cpu")
    tensors = [guarded(x) for x in call.tensors]
    hidden, weight, bias, _ = tensors
    seed = guarded(torch.arange(len(hidden)))
    target = guarded(torch.arange(len(hidden)) % len(weight))
    codebook_gradients(
        lambda *x: F.gumbel_codebook(*x, call.tau, seed=seed, hard=call.hard, impl="cpu"),
        tensors,
        guarded(call.grad_embedding),
        guarded(call.grad_kl),
    )
    F.codebook_sample(hidden, weight, bias, seed=seed, impl="cpu")
    F.codebook_argmax(hidden, weight, bias, impl="cpu")
    leaves = [x.requires_grad_() if x is not None else None for x in tensors[:3]]
    F.codebook_cross_entropy(*leaves, target, impl="cpu").backward()
