"""The noise of the codebook operation: a pure function of (seed, row, code), the same in every implementation.

Its definition, in plain torch. Philox4x32-10 (Salmon et al. 2011) makes the 32-bit words; its key is the seed, its
counter (which 4 codes, row low, row high, 0). The 4 words of a counter serve 4 codes that lie 16 apart: that of code k
is word k % 64 // 16 of counter 16 * (k // 64) + k % 16. A word becomes

    u = (word + 1/2) * 2^-32 in float32, at most 1 - 2^-24            g = -log(-log1p(-u))

which is finite for every word. `csrc/philox.h` and `csrc/gumbel.h` are the ports.

R rows, K codes.
"""

from __future__ import annotations

import torch

NOISE_BLOCK = 64  # codes that 16 counters serve
NOISE_LANES = 16
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox4x32_10(counter, key):
    """The 4 output words of counters of 4 words under keys of 2; all int64 tensors with values below 2^32.

    Args:
        counter, key: sequences of 4 and 2 tensors that broadcast.

    Returns:
        A list of 4 tensors.
    """
    a, b, c, d = counter
    low, high = key
    for _ in range(10):
        p_high, p_low = _product(a, _MULTIPLIERS[0])
        q_high, q_low = _product(c, _MULTIPLIERS[1])
        a, b, c, d = q_high ^ b ^ low, q_low, p_high ^ d ^ high, p_low
        low, high = (low + _WEYL[0]) & _MASK, (high + _WEYL[1]) & _MASK
    return [a, b, c, d]


def _product(x, m):
    """High and low 32 bits of x * m, by halves, as an int64 cannot hold the whole."""
    return ((x >> 16) * m + ((x & 0xFFFF) * m >> 16)) >> 16, (x * m) & _MASK


def noise_words(seed, row, num_codes):
    """The 32-bit word of every code.

    Args:
        seed, row: int64 tensors (R,) or (1,); all 64 bits count.
        num_codes: K.

    Returns:
        int64 (R, K), values from 0 to 2^32 - 1.
    """
    num_blocks = -(-num_codes // NOISE_BLOCK)
    counter = torch.arange(num_blocks * NOISE_LANES, device=row.device)
    seed, row = seed[:, None], row[:, None]
    counters = (counter, row & _MASK, row >> 32 & _MASK, torch.zeros_like(counter))
    words = philox4x32_10(counters, (seed & _MASK, seed >> 32 & _MASK))
    by_block = torch.stack([word.unflatten(-1, (num_blocks, NOISE_LANES)) for word in words], -2)
    return by_block.flatten(-3)[:, :num_codes]


def gumbel_of_words(words, dtype):
    """The noise that 32-bit words become, in float32 or float64; the uniform variate itself is float32 in both."""
    uniform = (words.float() * 2**-32 + 2**-33).clamp(max=1 - 2**-24)
    return -torch.log(-torch.log1p(-uniform.double())).to(dtype)


def gumbel_noise(seed, row, num_codes, dtype=torch.float32):
    """Standard Gumbel noise (R, K) of seeds and rows as in `noise_words`."""
    return gumbel_of_words(noise_words(seed, row, num_codes), dtype)


def rows_of(seed, seed_per_row, first_row, count):
    """(seed, row) for `noise_words` of `count` rows: rows are numbered unless every row has a seed of its own."""
    if seed_per_row:
        return seed, torch.zeros(1, dtype=torch.int64, device=seed.device)
    return seed, torch.arange(first_row, first_row + count, device=seed.device)
