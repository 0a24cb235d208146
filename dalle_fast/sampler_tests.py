"""Statistical tests of samplers by argmax of noisy logits: contrasts that are standard normal where a sampler is exact.

A sampler is a function `sample(logits, num_rows, *, temperature=1.0, seed=0)` that returns codes (N,) on the CPU. logits
are (K,), the same for all rows, or (N, K); seed is an integer or a tensor (N,) of one for each row. Its noise must be a
function of (seed, row, code), or of (seed, code) where every row has a seed.

Goodness of fit alone has little power against the mistakes that kernels make. The contrasts look where those show: at
neighbouring codes, threads, Philox words, tiles, rows and seeds, at ties (which the first code wins), at the tail, and at
the grid on which differences of noise lie.

N rows, K codes.
"""

from __future__ import annotations

import functools
import math

import torch

from dalle_fast.nn.functional import codebook_sample

__all__ = [
    "FLAWS",
    "GROUPS",
    "LIMIT",
    "codebook_sampler",
    "contrasts",
    "flawed_sampler",
    "rejections",
    "unflawed_sampler",
]

LIMIT = 5.0  # beyond it once in two million exact samplers, and contrast


def codebook_sampler(impl, device):
    """The sampler that `codebook_sample` is with this implementation on this device."""

    def sample(logits, num_rows, *, temperature=1.0, seed=0):
        if logits.dim() == 1:
            hidden, weight, bias = torch.zeros(num_rows, 1), torch.zeros(len(logits), 1), logits.to(device)
        else:
            hidden, weight, bias = torch.eye(num_rows), logits.T, None
        if isinstance(seed, torch.Tensor):
            seed = seed.to(device)
        options = {"temperature": temperature, "seed": seed, "impl": impl}
        return codebook_sample(hidden.to(device), weight.to(device), bias, **options).cpu()

    return sample


def contrasts(sample, *, size=1.0, groups=None):
    """The contrasts of a sampler: a dictionary from names to numbers that are standard normal where it is exact.

    Args:
        sample: see this module's description.
        size: how many rows, against the number that gives the contrasts their power.
        groups: names of GROUPS; None means all.
    """
    found = {}
    for name in GROUPS if groups is None else groups:
        found |= {f"{name}: {contrast}": z for contrast, z in GROUPS[name](sample, size).items()}
    return found


def rejections(found):
    """Those of `contrasts` that an exact sampler does not give."""
    return {name: z for name, z in found.items() if not abs(z) < LIMIT}


# -- statistics --------------------------------------------------------------------------------------------------------


def _chi_square(counts, expected):
    """Pearson's statistic as a normal one (Wilson and Hilferty 1931). What is expected less than 10 times is merged."""
    counts, expected = counts.double(), expected.double()
    rare = expected < 10
    if rare.any():
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    freedom = len(counts) - 1
    statistic = float(((counts - expected).square() / expected).sum())
    variance = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - variance)) / math.sqrt(variance)


def _uniform(bins, num_bins):
    return _chi_square(torch.bincount(bins, minlength=num_bins), torch.full((num_bins,), len(bins) / num_bins))


def _share(hits, probability):
    """How far the number of hits (a boolean tensor) is from what is expected."""
    expected = hits.numel() * probability
    return float((hits.sum() - expected) / math.sqrt(expected * (1 - probability)))


def _correlation(a, b):
    a, b = (x.double() - x.double().mean() for x in (a, b))
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()) * math.sqrt(len(a))


def _rows(count, size):
    return max(1024, int(count * size))


# -- contrasts ---------------------------------------------------------------------------------------------------------


def _equal_logits(sample, size, *, K, N):
    """Equal logits: every code as often as any other, and each group of codes that something in a kernel belongs to."""
    N = _rows(N, size)
    codes = sample(torch.zeros(K), N, seed=1)
    first, last = int((codes < K // 8).sum()), int((codes >= K - K // 8).sum())
    center, deviation = (K - 1) / 2, math.sqrt((K * K - 1) / 12)
    bins = min(K, 256, N // 32)
    return {
        "parity": _share(codes % 2 == 0, 0.5),
        "code modulo 32": _uniform(codes % 32, 32),
        "code modulo 64": _uniform(codes % 64, 64),
        "Philox word": _uniform(codes // 16 % 4, 4),
        "first and last eighth": (first - last) / math.sqrt(first + last),
        "mean code": float((codes.double() - center).sum()) / (deviation * math.sqrt(N)),
        "chi-square": _uniform(codes * bins // K, bins),
    }


def _neighbours(sample, size):
    """Rows and seeds that lie beside each other have nothing in common."""
    K, N = 128, _rows(1 << 16, size)
    logits = torch.zeros(K)
    codes, other = sample(logits, N, seed=2), sample(logits, N, seed=3)
    found = {}
    for lag in (1, 2, 4, 16):
        found[f"same code {lag} rows on"] = _share(codes[lag:] == codes[:-lag], 1 / K)
        found[f"correlation {lag} rows on"] = _correlation(codes[lag:], codes[:-lag])
    found["same code with the next seed"] = _share(codes == other, 1 / K)
    found["correlation with the next seed"] = _correlation(codes, other)
    found["same code one row on, with the next seed"] = _share(codes[1:] == other[:-1], 1 / K)
    return found


def _seeds_per_row(sample, size):
    """A seed for each row, counted up: as good as rows of one seed."""
    K, N = 128, _rows(1 << 16, size)
    found = {}
    for name, step in (("counted", 1), ("in the high word", 1 << 32)):
        codes = sample(torch.zeros(K), N, seed=torch.arange(N) * step)
        found[f"{name}: chi-square"] = _uniform(codes, K)
        found[f"{name}: same code one row on"] = _share(codes[1:] == codes[:-1], 1 / K)
        found[f"{name}: correlation one row on"] = _correlation(codes[1:], codes[:-1])
    return found


def _temperatures(sample, size):
    """Unequal logits: the probabilities that they have at each temperature."""
    K, N = 100, _rows(1 << 17, size)
    logits = torch.linspace(-3, 3, K)[torch.randperm(K, generator=torch.Generator().manual_seed(0))]
    found = {}
    for temperature in (0.25, 0.5, 1.0, 2.0):
        codes = sample(logits, N, temperature=temperature, seed=4)
        p = torch.softmax(logits.double() / temperature, -1)
        found[f"{temperature}: chi-square"] = _chi_square(torch.bincount(codes, minlength=K), p * N)
        mean, square = (p * logits).sum(), (p * logits.square()).sum()
        found[f"{temperature}: mean logit"] = float(
            (logits[codes].double().mean() - mean) / (square - mean**2).sqrt() * math.sqrt(N)
        )
    return found


def _rare(sample, size):
    """Codes of probability 3e-6 and 4e-7: how often any of 1,023 is drawn."""
    K, found = 1024, {}
    for low, N in ((-12.75, 1 << 14), (-14.75, 1 << 16)):
        N = _rows(N, size)
        logits = torch.full((K,), low)
        logits[K // 2] = 0
        p = (K - 1) * math.exp(low) / (1 + (K - 1) * math.exp(low))
        found[f"logit {low}"] = _share(sample(logits, N, seed=5) != K // 2, p)
    return found


def _margin(sample, logits, first, second, seed, *, reach, steps=26):
    """The noise of code first[n] minus that of code second[n] in row n, to 2 * reach * 2^-steps, by bisection.

    logits (N, K): very low but at these two codes, where they count.
    """
    n = torch.arange(len(first))
    low, high = torch.full((len(n),), -reach, dtype=torch.float64), torch.full((len(n),), reach, dtype=torch.float64)
    for _ in range(steps):
        middle = (low + high) / 2
        shifted = logits.clone()
        shifted[n, first], shifted[n, second] = -middle.float(), 0.0
        wins = sample(shifted, len(n), seed=seed) == first
        low, high = middle.where(wins, low), high.where(wins, middle)
    return (low + high) / 2


def _margins(sample, size):
    """The difference of the noise of two codes: logistic, and not on a grid as that of half-precision noise is."""
    N = _rows(1 << 10, size)
    seed = torch.arange(N) + (1 << 40)
    zeros = torch.zeros(N, dtype=torch.int64)
    margin = _margin(sample, torch.zeros(N, 2), zeros, zeros + 1, seed, reach=32.0)
    found = {"logistic": _uniform((torch.sigmoid(margin) * 32).long().clamp(max=31), 32)}
    for bits in (4, 6, 8, 10, 12):
        steps = margin * 2**bits
        found[f"grid of 2^-{bits}"] = _share((steps - steps.round()).abs() < 1 / 16, 1 / 8)
    return found


@functools.cache
def _fractions(step, count):
    """The margins that two uniform variates from `step` * (1, 2, ..., count) can have, odd ones only for half steps."""
    u = torch.arange(1, count + 1, dtype=torch.float64) * step
    if step == 2.0**-25:
        u = u[::2]
    level = torch.log(-torch.log1p(-u))
    margins = (level[None, :] - level[:, None]).flatten()
    return margins[margins >= 0].unique()


def _tails(sample, size):
    """The two largest of a row's noise, where both are very large: the quotient of their uniform variates is uniform.

    With variates of 24 bits these are small multiples of one number, and the quotient is a fraction of small integers.
    """
    K, peers, excluded = 8192, 256, -1e30
    N = _rows(1 << 13, size)
    logits = torch.zeros(K)
    logits[:peers] = 6.0  # the largest of these is about as large as the noise of u = 2^-17
    seed = torch.arange(N) + (1 << 41)
    first = sample(logits, N, seed=seed)
    seed, first = seed[first >= peers], first[first >= peers]
    n = torch.arange(len(seed))
    rows = logits.expand(len(n), K).clone()
    rows[n, first] = excluded
    second = sample(rows, len(n), seed=seed)
    seed, first, second = (x[second >= peers] for x in (seed, first, second))
    found, tolerance = {}, 2e-6  # twice the rounding of such noise
    rows = torch.full((len(seed), K), excluded)
    margin = _margin(sample, rows, first, second, seed, reach=16.0, steps=25)
    found["quotient of the two smallest variates"] = float(
        (torch.exp(-margin) - 0.5).mean() * math.sqrt(12 * len(margin))
    )
    for name, step, count in (("24 bits", 2.0**-24, 256), ("24 bits and a half", 2.0**-25, 512)):
        fractions = _fractions(step, count)
        # How likely a quotient, uniform from 0 to 1, comes as near to one of them.
        low, high = (fractions - tolerance).clamp(min=0), fractions + tolerance
        high[:-1] = torch.minimum(high[:-1], low[1:])
        probability = float((torch.exp(-low) - torch.exp(-high)).sum())
        at = torch.searchsorted(fractions, margin).clamp(1, len(fractions) - 1)
        distance = torch.minimum((margin - fractions[at]).abs(), (margin - fractions[at - 1]).abs())
        found[f"variates of {name}"] = _share(distance < tolerance, probability)
    return found


GROUPS = {
    "128 equal logits": functools.partial(_equal_logits, K=128, N=1 << 19),
    "8,192 equal logits": functools.partial(_equal_logits, K=8192, N=1 << 14),
    "neighbours": _neighbours,
    "a seed for each row": _seeds_per_row,
    "temperature": _temperatures,
    "rare codes": _rare,
    "margins": _margins,
    "tails": _tails,
}


# -- samplers with a flaw ----------------------------------------------------------------------------------------------


def _mixed(x):
    """A hash of 64 bits (the finalizer of MurmurHash3), so that noise is a function of (seed, row, code) here too."""
    for factor in (-0x00AE502812AA7333, -0x3B314601E57A13AD):
        x = (x ^ (x >> 33 & 0x7FFFFFFF)) * factor
    return x ^ (x >> 33 & 0x7FFFFFFF)


def _words_of(seed, row, num_codes):
    """(N, K) random numbers of 32 bits."""
    return _mixed(_mixed(seed * 0x9E3779B9 + (row << 32))[:, None] + torch.arange(num_codes)) >> 16 & 0xFFFFFFFF


def _gumbel(words):
    return -torch.log(-torch.log1p(-(words.float() * 2**-32 + 2**-33).clamp(max=1 - 2**-24)))


def _exact_noise(seed, row, num_codes):
    return _gumbel(_words_of(seed, row, num_codes))


def _in_dtype(dtype, seed, row, num_codes):
    return _exact_noise(seed, row, num_codes).to(dtype).float()


def _of_24_bits(seed, row, num_codes):
    u = (_words_of(seed, row, num_codes) >> 8).float() * 2**-24 + 2**-25
    return -torch.log(-torch.log1p(-u))


def _of_24_bits_from_0(seed, row, num_codes):
    u = (_words_of(seed, row, num_codes) >> 8).float() * 2**-24
    return -torch.log(-torch.log1p(-u.clamp(min=1e-10)))


def _more_of_even_codes(seed, row, num_codes):
    noise = _exact_noise(seed, row, num_codes)
    noise[:, ::2] += 0.0198  # log 1.02
    return noise


def _off_by_one_at_a_tiles_edge(seed, row, num_codes):
    noise = _exact_noise(seed, row, num_codes + 1)
    noise[:, 63:num_codes:64] = noise[:, 64 : num_codes + 1 : 64]
    return noise[:, :num_codes]


def _shared_by_neighbouring_rows(seed, row, num_codes):
    return _exact_noise(seed, row // 2 * 2, num_codes)


def _shared_by_words(seed, row, num_codes):
    """A Philox counter whose four words are all its first: codes 16 apart draw the same."""
    code = torch.arange(num_codes)
    return _exact_noise(seed, row, num_codes)[:, code // 64 * 64 + code % 16]


def _row_added_to_the_seed(seed, row, num_codes):
    return _exact_noise(seed + row, row * 0, num_codes)


def _ignores_the_high_word(seed, row, num_codes):
    return _exact_noise(seed & 0xFFFFFFFF, row, num_codes)


def sampler_of(noise):
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
    "bfloat16 noise": (functools.partial(_in_dtype, torch.bfloat16), "128 equal logits"),
    "bfloat16 noise, its grid": (functools.partial(_in_dtype, torch.bfloat16), "margins"),
    "float16 noise": (functools.partial(_in_dtype, torch.float16), "margins"),
    "24-bit noise": (_of_24_bits, "tails"),
    "24-bit noise from 0": (_of_24_bits_from_0, "tails"),
    "2% more of even codes": (_more_of_even_codes, "128 equal logits"),
    "off by one at a tile's edge": (_off_by_one_at_a_tiles_edge, "128 equal logits"),
    "noise shared by neighbouring rows": (_shared_by_neighbouring_rows, "neighbours"),
    "row added to the seed": (_row_added_to_the_seed, "neighbours"),
    "only the seed's low word": (_ignores_the_high_word, "a seed for each row"),
    "one word for four codes": (_shared_by_words, "128 equal logits"),
    "temperature left out": (_exact_noise, "temperature"),
    "noise cut off at 11": (lambda seed, row, K: _exact_noise(seed, row, K).clamp(max=11), "rare codes"),
}


def flawed_sampler(flaw):
    """A sampler with this one of FLAWS, and the group of contrasts that is to reject it."""
    noise, group = FLAWS[flaw]
    sample = sampler_of(noise)
    if flaw == "temperature left out":
        sample = functools.partial(lambda sample, *args, temperature, **rest: sample(*args, **rest), sample)
    return sample, group


def unflawed_sampler():
    """The sampler that those of FLAWS would be without their flaws."""
    return sampler_of(_exact_noise)
