"""Decoding one token after another gives what the full forward pass gives: every rule, every image position.

Attention alone, and on a CPU a transformer's steps, which are one native call each. Caches begin as NaN, so that a slot
that must not be looked at shows; two samples share their caption's text, which may end early.
"""

from __future__ import annotations

import copy

import torch

from dalle_fast.nn import KVCache, Transformer
from dalle_fast.nn import functional as F
from dalle_fast.testing import SMALL_MASKS, assert_as_exact_as_eager, eager_attention, nan_poisoned, output_terms
from dalle_fast.verify.random_calls import DTYPES, IMPLEMENTATIONS

CASES = [(mask, dtype) for mask in SMALL_MASKS for dtype in DTYPES]
PROMPTS, SAMPLES, HEADS, HEAD_DIM, WIDTH = 2, 2, 2, 24, 40


def case(number: int, device: str) -> None:
    mask, dtype = CASES[number]
    generator = torch.Generator().manual_seed(number)
    lengths = torch.tensor([mask.text_len // 2, mask.text_len], device=device)
    for text_lengths in (None, lengths, lengths.flip(0)):
        _attention(mask, dtype, device, generator, text_lengths)
    if device == "cpu":
        _steps(mask, dtype, generator, text_lengths)


def _attention(mask, dtype, device, generator, text_lengths) -> None:
    T = mask.text_len
    shape = (PROMPTS, SAMPLES, HEADS, mask.seq_len, HEAD_DIM)
    query, key, value = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    for x in (key, value):
        x[:, :, :, :T] = x[:, :1, :, :T].clone()
    text = [x[:, 0, :, :T] for x in (key, value)]
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    caches = [x.new_full((*x.shape[:2], mask.cache_slots, HEAD_DIM), torch.nan) for x in (key, value)]
    options = {"text_lengths": text_lengths, "impl": IMPLEMENTATIONS["attention"][device]}
    outs = []
    for i in range(mask.image_len):
        for cache, x in zip(caches, (key, value), strict=True):
            cache[:, :, mask.cache_slot(i)] = x[:, :, T + i]
        outs.append(F.sparse_attention_decode(query[:, :, T + i], *text, *caches, mask, i, **options))
    of_sample = {"text_lengths": None if text_lengths is None else text_lengths.repeat_interleave(SAMPLES)}
    exact = eager_attention(query.double(), key.double(), value.double(), mask, **of_sample)[0]
    eager = eager_attention(query, key, value, mask, **of_sample)[0]
    terms = output_terms(query, key, value, mask, **of_sample)
    image = (slice(None), slice(None), slice(T, None))
    assert_as_exact_as_eager(repr(mask), torch.stack(outs, 2), eager[image], exact[image], terms=terms[image])


@torch.no_grad()
def _steps(mask, dtype, generator, text_lengths) -> None:
    """Two blocks, biases and gains that show, and inputs so small that the norms' eps does."""
    model, first = Transformer((mask, mask), WIDTH, HEADS, HEAD_DIM), mask.text_len + 1
    for name, parameter in model.named_parameters():
        spread = 0.5 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.2
        numbers = torch.randn(parameter.shape, generator=generator) * spread
        parameter.copy_(numbers + float("norm.weight" in name))
    inputs = (torch.randn(PROMPTS, SAMPLES, mask.seq_len, WIDTH, generator=generator) * 0.01).to(dtype)
    inputs[:, :, :first] = inputs[:, :1, :first].clone()
    model = model.to(dtype)
    cache = KVCache(
        model.masks, num_prompts=PROMPTS, num_images=SAMPLES, num_heads=HEADS, head_dim=HEAD_DIM,
        text_lengths=text_lengths, dtype=dtype,
    )  # fmt: skip
    with nan_poisoned():
        model(inputs[:, 0, :first], text_lengths, cache)
        tokens = inputs.flatten(0, 1)
        actual = torch.stack([model.step(tokens[:, n], cache) for n in range(first, mask.seq_len)], 1)
    of_sample = text_lengths.repeat_interleave(SAMPLES)
    plain = Transformer((mask, mask), WIDTH, HEADS, HEAD_DIM, impl="reference")
    plain.load_state_dict(model.state_dict())
    eager = copy.deepcopy(plain).to(dtype)(tokens, of_sample)[:, first:]
    exact = plain.double()(tokens.double(), of_sample)[:, first:]
    assert_as_exact_as_eager(f"steps, {mask!r}", actual, eager, exact)
