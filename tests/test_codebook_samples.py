"""Samples have the distribution that they should, by tests that reject samplers with the mistakes kernels make.

N rows, K codes.
"""

import functools

import pytest
import torch

from dalle_fast.sampler_tests import GROUPS, LIMIT, codebook_sampler, contrasts, rejections

# How many rows, against those that give the tests their power: the reference is slow, and draws the same codes bit for
# bit as the others (test_codebook_noise.py).
SIZE = {"reference": 1 / 16}


@pytest.mark.parametrize("group", GROUPS)
def test_samples(serve, group):
    found = contrasts(codebook_sampler(serve.impl, serve.device), size=SIZE.get(serve.impl, 1.0), groups=[group])
    assert not rejections(found), found


# -- samplers with a flaw ----------------------------------------------------------------------------------------------


def mixed(x):
    """A hash of 64 bits (the finalizer of MurmurHash3), so that noise is a function of (seed, row, code) here too."""
    for factor in (-0x00AE502812AA7333, -0x3B314601E57A13AD):
        x = (x ^ (x >> 33 & 0x7FFFFFFF)) * factor
    return x ^ (x >> 33 & 0x7FFFFFFF)


def words_of(seed, row, num_codes):
    """(N, K) random numbers of 32 bits."""
    return mixed(mixed(seed * 0x9E3779B9 + (row << 32))[:, None] + torch.arange(num_codes)) >> 16 & 0xFFFFFFFF


def gumbel(words):
    return -torch.log(-torch.log1p(-(words.float() * 2**-32 + 2**-33).clamp(max=1 - 2**-24)))


def exact_noise(seed, row, num_codes):
    return gumbel(words_of(seed, row, num_codes))


def in_dtype(dtype, seed, row, num_codes):
    return exact_noise(seed, row, num_codes).to(dtype).float()


def of_24_bits(seed, row, num_codes):
    u = (words_of(seed, row, num_codes) >> 8).float() * 2**-24 + 2**-25
    return -torch.log(-torch.log1p(-u))


def of_24_bits_from_0(seed, row, num_codes):
    u = (words_of(seed, row, num_codes) >> 8).float() * 2**-24
    return -torch.log(-torch.log1p(-u.clamp(min=1e-10)))


def more_of_even_codes(seed, row, num_codes):
    noise = exact_noise(seed, row, num_codes)
    noise[:, ::2] += 0.0198  # log 1.02
    return noise


def off_by_one_at_a_tiles_edge(seed, row, num_codes):
    noise = exact_noise(seed, row, num_codes + 1)
    noise[:, 63:num_codes:64] = noise[:, 64 : num_codes + 1 : 64]
    return noise[:, :num_codes]


def shared_by_neighbouring_rows(seed, row, num_codes):
    return exact_noise(seed, row // 2 * 2, num_codes)


def shared_by_words(seed, row, num_codes):
    """A Philox counter whose four words are all its first: codes 16 apart draw the same."""
    code = torch.arange(num_codes)
    return exact_noise(seed, row, num_codes)[:, code // 64 * 64 + code % 16]


def row_added_to_the_seed(seed, row, num_codes):
    return exact_noise(seed + row, row * 0, num_codes)


def ignores_the_high_word(seed, row, num_codes):
    return exact_noise(seed & 0xFFFFFFFF, row, num_codes)


def sampler(noise):
    """A sampler by argmax of logits + temperature * noise(seed, row, K)."""

    def sample(logits, num_rows, *, temperature=1.0, seed=0):
        K, codes = logits.shape[-1], []
        for start in range(0, num_rows, step := max(1, (1 << 18) // K)):  # in cache
            stop = min(num_rows, start + step)
            if isinstance(seed, torch.Tensor):
                g = noise(seed[start:stop], torch.zeros(stop - start, dtype=torch.int64), K)
            else:
                g = noise(torch.tensor([seed]), torch.arange(start, stop), K)
            part = logits if logits.dim() == 1 else logits[start:stop]
            codes.append((part + temperature * g).argmax(-1))
        return torch.cat(codes)

    return sample


# Each flaw, and the group of contrasts that is to reject it.
FLAWS = {
    "bfloat16 noise": (functools.partial(in_dtype, torch.bfloat16), "128 equal logits"),
    "bfloat16 noise, its grid": (functools.partial(in_dtype, torch.bfloat16), "margins"),
    "float16 noise": (functools.partial(in_dtype, torch.float16), "margins"),
    "24-bit noise": (of_24_bits, "tails"),
    "24-bit noise from 0": (of_24_bits_from_0, "tails"),
    "2% more of even codes": (more_of_even_codes, "128 equal logits"),
    "off by one at a tile's edge": (off_by_one_at_a_tiles_edge, "128 equal logits"),
    "noise shared by neighbouring rows": (shared_by_neighbouring_rows, "neighbours"),
    "row added to the seed": (row_added_to_the_seed, "neighbours"),
    "only the seed's low word": (ignores_the_high_word, "a seed for each row"),
    "one word for four codes": (shared_by_words, "128 equal logits"),
    "temperature left out": (exact_noise, "temperature"),
    "noise cut off at 11": (lambda seed, row, K: exact_noise(seed, row, K).clamp(max=11), "rare codes"),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_flawed_samplers_are_rejected(flaw):
    noise, group = FLAWS[flaw]
    sample = sampler(noise)
    if flaw == "temperature left out":
        sample = functools.partial(lambda sample, *args, temperature, **rest: sample(*args, **rest), sample)
    found = contrasts(sample, groups=[group])
    assert rejections(found), f"nothing beyond {LIMIT}: {found}"


@pytest.mark.parametrize("group", sorted({group for _, group in FLAWS.values()}))
def test_the_same_sampler_without_a_flaw_is_not(group):
    found = contrasts(sampler(exact_noise), groups=[group])
    assert not rejections(found), found
