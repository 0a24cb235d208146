"""The noise of the codebook operation in Triton: the port of `noise.py`, `csrc/philox.h` and `csrc/gumbel.h`."""

from __future__ import annotations

import triton
import triton.language as tl

NOISE_BLOCK = tl.constexpr(64)  # as in noise.py: the codes that 16 counters of 4 words serve
LANES = tl.constexpr(16)


@triton.jit
def philox(counter, row_low, row_high, key_low, key_high):
    """The 4 words of every counter; uint32 blocks that broadcast."""
    a = counter
    b = row_low
    c = row_high
    d = tl.zeros_like(counter)
    for _ in tl.static_range(10):
        # Both halves of a product are one instruction.
        p = a.to(tl.uint64) * 0xD2511F53
        q = c.to(tl.uint64) * 0xCD9E8D57
        a = (q >> 32).to(tl.uint32) ^ b ^ key_low
        b = q.to(tl.uint32)
        c = (p >> 32).to(tl.uint32) ^ d ^ key_high
        d = p.to(tl.uint32)
        key_low = tl.add(key_low, 0x9E3779B9, sanitize_overflow=False)
        key_high = tl.add(key_high, 0xBB67AE85, sanitize_overflow=False)
    return a, b, c, d


@triton.jit
def _split(x):
    """(exponent * 2^23, fraction) of positive normal numbers, 1 + fraction from sqrt(1/2) to sqrt(2)."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) & -0x800000
    return exponent, (bits - exponent).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def _log_of(exponent, f):
    p = f * 7.0376836292e-2 - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    e = exponent.to(tl.float32)
    larger: tl.constexpr = 0.693359375 / 8388608
    smaller: tl.constexpr = -2.12194440e-4 / 8388608
    return e * larger + (f + (e * smaller + (p * f - 0.5) * (f * f)))


@triton.jit
def gumbel(word):
    """Standard Gumbel noise of uint32 words."""
    u = tl.minimum(word.to(tl.float32) * (1.0 / 4294967296) + (0.5 / 4294967296), 1.0 - 1.0 / 16777216)
    exponent, fraction = _split(1.0 - u)
    exponent, fraction = _split(-_log_of(exponent, tl.where(exponent == 0, -u, fraction)))
    return -_log_of(exponent, fraction)


@triton.jit
def low_high(x):
    return x.to(tl.uint32), (x >> 32).to(tl.uint32)


@triton.jit
def noise_keys(seed_ptr, row, N, PER_ROW: tl.constexpr):
    """(row low, row high, key low, key high), each (rows, 1): a row that has a seed of its own is number 0."""
    if PER_ROW:
        seed = tl.load(seed_ptr + row, mask=row < N, other=0)
        row_low = tl.zeros_like(row).to(tl.uint32)
    else:
        seed = tl.load(seed_ptr) + tl.zeros_like(row)
        row_low = row.to(tl.uint32)
    key_low, key_high = low_high(seed)
    return row_low[:, None], tl.zeros_like(row_low)[:, None], key_low[:, None], key_high[:, None]


@triton.jit
def noise_of_block(block, keys):
    """Noise of codes 64 * block on, as 4 neighbours of LANES codes each."""
    row_low, row_high, key_low, key_high = keys
    zero = (block >> 30).to(
        tl.uint32
    )  # as no compiler knows: else it keeps every row's keys of all rounds in registers
    key_low ^= zero
    key_high ^= zero
    counter = (block * LANES + tl.arange(0, LANES)).to(tl.uint32)[None, :] + tl.zeros_like(row_low)
    w0, w1, w2, w3 = philox(counter, row_low, row_high, key_low, key_high)
    return gumbel(w0), gumbel(w1), gumbel(w2), gumbel(w3)


@triton.jit
def plus_noise(z, block, keys):
    """Logits z plus noise; the first code is 64 * block, and there are 64 or a power of two times as many."""
    left, right = halves(z)
    if z.shape[1] > NOISE_BLOCK:
        left = plus_noise(left, block, keys)
        right = plus_noise(right, block + z.shape[1] // 2 // NOISE_BLOCK, keys)
    else:
        z0, z1 = halves(left)
        z2, z3 = halves(right)
        g0, g1, g2, g3 = noise_of_block(block, keys)
        left, right = _joined(z0 + g0, z1 + g1), _joined(z2 + g2, z3 + g3)
    return _joined(left, right)


@triton.jit
def halves(x):
    """The left and the right half of the columns; both are in a thread's registers already."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def _joined(left, right):
    """What `halves` made of it."""
    return tl.reshape(tl.permute(tl.join(left, right), [0, 2, 1]), [left.shape[0], 2 * left.shape[1]])
