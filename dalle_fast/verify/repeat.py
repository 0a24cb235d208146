"""The same call gives the same bits: again, with another number of threads, and for a sample alone or in a batch."""

from __future__ import annotations

import torch

from dalle_fast.nn import functional as F
from dalle_fast.testing import attention_gradients, codebook_gradients
from dalle_fast.verify.random_calls import IMPLEMENTATIONS, attention_call, codebook_call, threads


def case(number: int, device: str) -> None:
    (_attention if number % 2 else _codebook)(number, device)


def _assert_equal(what, first, second) -> None:
    for n, (a, b) in enumerate(zip(first, second, strict=True)):
        if a is not None and not torch.equal(_bits(a), _bits(b)):
            raise AssertionError(f"{what}: result {n} differs by {float((a.double() - b.double()).abs().max()):.3g}")


def _bits(x):
    """By which -0 and 0 differ, and NaN is one of its own."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _attention(number: int, device: str) -> None:
    call, impl = attention_call(number, device), IMPLEMENTATIONS["attention"][device]

    def everything(rows):
        options = dict(call.options)
        if options["text_lengths"] is not None:
            options["text_lengths"] = options["text_lengths"][rows]

        def attend(*qkv):
            return F.sparse_attention(*qkv, call.mask, return_lse=True, impl=impl, **options)

        qkv, grad_lse = [x[rows] for x in call.qkv], None if call.grad_lse is None else call.grad_lse[rows]
        grads = attention_gradients(attend, qkv, call.grad_out[rows], grad_lse) if qkv[0].numel() else ()
        return [x.detach() for x in (*attend(*qkv), *grads)]

    together = everything(slice(None))
    _assert_equal("again", together, everything(slice(None)))
    if device == "cpu":
        with threads(2 + number % 3):
            _assert_equal(f"with {torch.get_num_threads()} threads", together, everything(slice(None)))
    last = slice(len(call.grad_out) - 1, None)
    _assert_equal("a sample alone", [x[last] for x in together], everything(last))


def _codebook(number: int, device: str) -> None:
    """Noise and codes are independent of the batch; other values to the rounding of the vendor's products."""
    call, impl = codebook_call(number, device), IMPLEMENTATIONS["codebook"][device]
    hidden, weight, bias, codebook = call.tensors
    seed = torch.arange(len(hidden), device=device) + call.seed // 2

    def gumbel(*tensors, seed=seed):
        return F.gumbel_codebook(*tensors, call.tau, seed=seed, hard=call.hard, impl=impl)

    def everything():
        grads = codebook_gradients(gumbel, call.tensors, call.grad_embedding, call.grad_kl)
        codes = F.codebook_sample(hidden, weight, bias, seed=seed, impl=impl)
        return [*(x.detach() for x in gumbel(*call.tensors)), codes, *grads]

    together = everything()
    _assert_equal("again", together, everything())
    if device == "cpu":
        product = hidden @ weight.T
        with threads(2 + number // 2 % 3):
            # Where the sums of torch's products depend on the number of threads, only codes are the same.
            which = slice(None) if torch.equal(product, hidden @ weight.T) else slice(2, 4)
            _assert_equal(f"with {torch.get_num_threads()} threads", together[which], everything()[which])
    if len(hidden):
        alone = gumbel(hidden[-1:], weight, bias, codebook, seed=seed[-1:])
        sampled = F.codebook_sample(hidden[-1:], weight, bias, seed=seed[-1:], impl=impl)
        _assert_equal("a row alone", [together[2][-1:], together[3][-1:]], [alone.codes, sampled])
