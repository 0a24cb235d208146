"""Samples have the distribution that they should, by tests that reject samplers with the mistakes kernels make.

N rows, K codes.
"""

import pytest

from dalle_fast.sampler_tests import (
    FLAWS,
    GROUPS,
    LIMIT,
    codebook_sampler,
    contrasts,
    flawed_sampler,
    rejections,
    unflawed_sampler,
)

# How many rows, against those that give the tests their power: the reference is slow, and draws the same codes bit for
# bit as the others (test_codebook_noise.py).
SIZE = {"reference": 1 / 16}


@pytest.mark.parametrize("group", GROUPS)
def test_samples(serve, group):
    found = contrasts(codebook_sampler(serve.impl, serve.device), size=SIZE.get(serve.impl, 1.0), groups=[group])
    assert not rejections(found), found


@pytest.mark.parametrize("flaw", FLAWS)
def test_flawed_samplers_are_rejected(flaw):
    sample, group = flawed_sampler(flaw)
    found = contrasts(sample, groups=[group])
    assert rejections(found), f"nothing beyond {LIMIT}: {found}"


@pytest.mark.parametrize("group", sorted({group for _, group in FLAWS.values()}))
def test_the_same_sampler_without_a_flaw_is_not(group):
    found = contrasts(unflawed_sampler(), groups=[group])
    assert not rejections(found), found
