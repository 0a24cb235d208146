"""Random calls against dense float64: results and gradients, of every implementation that the device has."""

from __future__ import annotations

import functools

import torch

from dalle_fast.nn import functional as F
from dalle_fast.testing import (
    assert_as_exact_as_eager,
    check_attention,
    check_attention_gradients,
    check_codebook,
    check_codebook_gradients,
    check_codes,
    codebook_noise,
    codebook_terms,
)
from dalle_fast.verify.random_calls import IMPLEMENTATIONS, CodebookCall, attention_call, codebook_call

ATTENTION_SHARE = 3  # of four cases; the reference, which is short enough to be read, gets every eighth


def case(number: int, device: str) -> None:
    try_it = _attention if number % 4 < ATTENTION_SHARE else _codebook
    try_it(number, device)


def _impl(operation: str, number: int, device: str) -> str:
    return "reference" if number % 8 == 0 else IMPLEMENTATIONS[operation][device]


def _attention(number: int, device: str) -> None:
    call = attention_call(number, device)
    attend = functools.partial(F.sparse_attention, impl=_impl("attention", number, device))
    check_attention(attend, *call.qkv, call.mask, **call.options)
    if call.qkv[0].numel():
        check_attention_gradients(attend, call.qkv, call.mask, call.grad_out, call.grad_lse, **call.options)


def _codebook(number: int, device: str) -> None:
    impl = _impl("codebook", number // 4, device)
    call = codebook_call(number, device)
    gumbel_codebook = functools.partial(F.gumbel_codebook, impl=impl)
    check_codebook(gumbel_codebook, call.tensors, call.tau, seed=call.seed)
    check_codebook_gradients(
        gumbel_codebook, call.tensors, call.tau, call.grad_embedding, call.grad_kl, seed=call.seed, hard=call.hard
    )
    _codes_and_loss(call, impl)


def _codes_and_loss(call: CodebookCall, impl: str) -> None:
    hidden, weight, bias, codebook = call.tensors
    N, K = len(hidden), len(weight)
    noise = codebook_noise(call.seed, N, K).to(hidden.device)
    logits = torch.nn.functional.linear(*(None if x is None else x.double() for x in (hidden, weight, bias)))
    terms = codebook_terms(hidden, weight, bias, codebook, 1.0, noise)[2] if N else logits
    if N:
        check_codes(F.codebook_argmax(hidden, weight, bias, impl=impl), logits, terms)
        temperature = call.tau
        codes = F.codebook_sample(hidden, weight, bias, temperature=temperature, seed=call.seed, impl=impl)
        check_codes(codes, logits + temperature * noise, terms * max(1, temperature))
    generator = torch.Generator().manual_seed(N)
    target = torch.randint(0, K, (N,), generator=generator).to(hidden.device)
    loss = F.codebook_cross_entropy(hidden, weight, bias, target, reduction="none", impl=impl)
    exact = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    wide = torch.nn.functional.linear(*(None if x is None else x.float() for x in (hidden, weight, bias)))
    eager = torch.nn.functional.cross_entropy(wide, target, reduction="none")
    if N:
        assert_as_exact_as_eager("loss", loss, eager, exact, terms=terms.amax(-1))
