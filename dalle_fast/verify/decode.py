"""Decoding one token after another gives what the full forward pass gives: every rule, every image position.

Caches begin as NaN, so that a slot that must not be looked at shows; two samples share their caption's text.
"""

from __future__ import annotations

import torch

from dalle_fast.nn import functional as F
from dalle_fast.testing import SMALL_MASKS, assert_as_exact_as_eager, eager_attention, output_terms
from dalle_fast.verify.random_calls import DTYPES, IMPLEMENTATIONS

CASES = [(mask, dtype) for mask in SMALL_MASKS for dtype in DTYPES]
PROMPTS, SAMPLES, HEADS, HEAD_DIM = 2, 2, 2, 24


def case(number: int, device: str) -> None:
    mask, dtype = CASES[number]
    generator, T = torch.Generator().manual_seed(number), mask.text_len
    shape = (PROMPTS, SAMPLES, HEADS, mask.seq_len, HEAD_DIM)
    query, key, value = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    for x in (key, value):
        x[:, :, :, :T] = x[:, :1, :, :T].clone()
    text = [x[:, 0, :, :T] for x in (key, value)]
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    caches = [x.new_full((*x.shape[:2], mask.cache_slots, HEAD_DIM), torch.nan) for x in (key, value)]
    impl = IMPLEMENTATIONS["attention"][device]
    outs = []
    for i in range(mask.image_len):
        for cache, x in zip(caches, (key, value), strict=True):
            cache[:, :, mask.cache_slot(i)] = x[:, :, T + i]
        outs.append(F.sparse_attention_decode(query[:, :, T + i], *text, *caches, mask, i, impl=impl))
    exact = eager_attention(query.double(), key.double(), value.double(), mask)[0]
    eager = eager_attention(query, key, value, mask)[0]
    terms = output_terms(query, key, value, mask)
    image = (slice(None), slice(None), slice(T, None))
    assert_as_exact_as_eager(repr(mask), torch.stack(outs, 2), eager[image], exact[image], terms=terms[image])
