"""Random calls against dense float64: results and gradients, of every implementation that the device has.

Of 120 one has heads that threads share, in shares that depend on their speed, and one scores of hundreds.
"""

from __future__ import annotations

import contextlib
import functools
import random

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
    nan_poisoned,
)
from dalle_fast.verify.random_calls import IMPLEMENTATIONS, CodebookCall, attention_call, codebook_call, threads

ATTENTION_SHARE = 3  # of four cases; the reference, which is short enough to be read, gets every eighth
# Numbers modulo the first: attention, not of the reference, and beyond those a GPU gets.
SLICES, LARGE, SHARP = 120, 117, 93
AGAIN = 15  # times, as threads take over what others leave, which is another part each time


def case(number: int, device: str) -> None:
    try_it = _attention if number % 4 < ATTENTION_SHARE else _codebook
    try_it(number, device)


def _impl(operation: str, number: int, device: str) -> str:
    return "reference" if number % 8 == 0 else IMPLEMENTATIONS[operation][device]


def _attention(number: int, device: str) -> None:
    large = number % SLICES == LARGE
    call = attention_call(number, device, large=large, sharp=number % SLICES == SHARP)
    attend = functools.partial(F.sparse_attention, impl=_impl("attention", number, device))
    with threads(2 + number // SLICES % 4) if large else contextlib.nullcontext():
        found = check_attention(attend, *call.qkv, call.mask, **call.options)
        for _ in range(AGAIN if large else 0):
            with nan_poisoned():
                again = attend(*call.qkv, call.mask, **call.options, return_lse=True)
            if not all(torch.equal(a, b) for a, b in zip(found, again, strict=True)):
                raise AssertionError(f"again with {torch.get_num_threads()} threads: other bits")
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
    # Of 16 bits these are Triton's where "auto" chooses, and the others' where they are asked.
    _codes_and_loss(call, "auto" if impl == "cuda" and number // 4 % 2 else impl)


def _codes_and_loss(call: CodebookCall, impl: str) -> None:
    """With a range of the codes in every other case, and targets that are ignored, one of the codes among them."""
    hidden, weight, bias, codebook = call.tensors
    pick, N, K = random.Random(call.seed), len(hidden), len(weight)
    start, stop = (0, K) if pick.random() < 0.5 else sorted(pick.sample(range(K + 1), 2))
    chosen = {"code_range": None if (start, stop) == (0, K) else (start, stop), "impl": impl}
    noise = codebook_noise(call.seed, N, stop - start).to(hidden.device)
    part = [None if x is None else x[start:stop] for x in (weight, bias, codebook)]
    logits = torch.nn.functional.linear(*(None if x is None else x.double() for x in (hidden, *part[:2])))
    terms = codebook_terms(hidden, *part, 1.0, noise)[2] if N else logits
    if N:
        check_codes(F.codebook_argmax(hidden, weight, bias, **chosen) - start, logits, terms)
        temperature = call.tau
        codes = F.codebook_sample(hidden, weight, bias, temperature=temperature, seed=call.seed, **chosen)
        check_codes(codes - start, logits + temperature * noise, terms * max(1, temperature))
    generator = torch.Generator().manual_seed(N)
    target = torch.randint(start, stop, (N,), generator=generator).to(hidden.device)
    chosen["ignore_index"] = pick.choice((-100, pick.randrange(K)))
    target[torch.rand(N, generator=generator).to(hidden.device) < 0.2] = chosen["ignore_index"]
    wide = torch.nn.functional.linear(*(None if x is None else x.float() for x in (hidden, *part[:2])))
    inside = (target - start).where(target != chosen["ignore_index"], -100)
    for reduction in ("none", "sum", "mean") if (inside != -100).any() else ("none", "sum"):
        loss = F.codebook_cross_entropy(hidden, weight, bias, target, reduction=reduction, **chosen)
        exact, eager = (torch.nn.functional.cross_entropy(x, inside, reduction=reduction) for x in (logits, wide))
        if N:
            of_row = terms.amax(-1) * (inside != -100)
            of_loss = {"none": of_row, "sum": of_row.sum(), "mean": of_row.sum() / (inside != -100).sum()}[reduction]
            assert_as_exact_as_eager(f"loss, {reduction}", loss, eager, exact, terms=of_loss)
