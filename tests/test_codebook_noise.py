"""Noise is a pure function of (seed, row, code): published words, finite for all of them, the same in every kernel.

N rows, K codes.
"""

import itertools

import cuda_rows
import numpy as np
import pytest
import torch

from dalle_fast import _extension
from dalle_fast.nn import functional as F
from dalle_fast.ops.codebook import cpu, noise

# Random123's kat_vectors for philox4x32 of 10 rounds: counter, key, words.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
SEEDS = [0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 12345, 2**63 - 1]


def numbers(text):
    return [int(x, 16) for x in text.split()]


def scalar_words(seed, row, codes):
    """The definition once more, one code at a time, by the C++ Philox."""
    philox, found = _extension.native().philox4x32_10, []
    for code in codes:
        counter = [16 * (code // 64) + code % 16, row & 0xFFFFFFFF, row >> 32, 0]
        found.append(int(philox(counter, [seed & 0xFFFFFFFF, seed >> 32])[code % 64 // 16]))
    return found


def exact_noise(words):
    """-log(-log1p(-u)) in float64, of u in float32."""
    u = np.minimum(words.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33), np.float32(1 - 2**-24))
    return -np.log(-np.log1p(-u.astype(np.float64)))


# -- words ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counter,key,expected", KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    assert _extension.native().philox4x32_10(numbers(counter), numbers(key)).tolist() == numbers(expected)
    words = noise.philox4x32_10([torch.tensor(x) for x in numbers(counter)], [torch.tensor(x) for x in numbers(key)])
    assert [int(x) for x in words] == numbers(expected)


def test_python_and_native_words_agree():
    generator = torch.Generator().manual_seed(0)
    for counter_and_key in torch.randint(2**32, (300, 6), generator=generator).tolist():
        native = _extension.native().philox4x32_10(counter_and_key[:4], counter_and_key[4:]).tolist()
        words = noise.philox4x32_10(*(torch.tensor(x).split(1) for x in (counter_and_key[:4], counter_and_key[4:])))
        assert [int(x) for x in words] == native


@pytest.mark.parametrize("row", [0, 1, 7, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 2**62])
def test_which_word_is_a_codes(row):
    """Every bit of seed and row counts, and the word of a code is the one that the definition says."""
    codes = [*range(0, 130, 3), 8191, 100_000]
    for seed in SEEDS:
        words = noise.noise_words(torch.tensor([seed]), torch.tensor([row]), 100_001)[0]
        assert words[codes].tolist() == scalar_words(seed, row, codes)


def test_no_two_share_a_counter():
    """(seed, row, code) -> (key, counter, word) never takes a value twice."""
    seen = set()
    codes = torch.arange(8200)
    places = torch.stack([codes // 64 * 16 + codes % 16, codes % 64 // 16], -1).tolist()
    assert len(set(map(tuple, places))) == 8200
    for seed, row, code in itertools.product(SEEDS, (0, 1, 5, 2**32, 2**32 + 5), range(200)):
        seen.add((seed & 0xFFFFFFFF, seed >> 32, *places[code][:1], row & 0xFFFFFFFF, row >> 32, places[code][1]))
    assert len(seen) == len(SEEDS) * 5 * 200
    # What the words show of it: distinct, but for the chance that 32 bits leave.
    words = torch.cat([noise.noise_words(torch.tensor([seed]), torch.arange(20), 2000).flatten() for seed in SEEDS])
    expected = len(words) ** 2 / 2**33
    assert len(words) - len(words.unique()) < expected + 5 * expected**0.5


# -- noise of a word -----------------------------------------------------------------------------------------------------


def test_noise_of_a_slice_of_all_words():
    """Finite, as exact as float32 is, and falling from the first word to the last."""
    near_powers = [2**n + d for n in range(33) for d in (-1, 0, 1)]
    slices = [range(2**16), range(2**32 - 2**16, 2**32), range(0, 2**32, 2**12), (x for x in near_powers if x < 2**32)]
    words = np.unique(np.concatenate([np.fromiter(x, np.int64) for x in slices])).astype(np.uint32)
    exact = exact_noise(words)
    native = _extension.native().gumbel_noise(words).astype(np.float64)
    python = noise.gumbel_of_words(torch.from_numpy(words.astype(np.int64)), torch.float32).double().numpy()
    wide = noise.gumbel_of_words(torch.from_numpy(words.astype(np.int64)), torch.float64).numpy()
    assert np.isfinite(native).all() and np.isfinite(python).all()
    ulp = 2.0**-23 * np.maximum(1, np.abs(exact))
    assert (np.abs(native - exact) <= 2 * ulp).all() and (np.abs(python - exact) <= 0.5 * ulp).all()
    assert (np.abs(wide - exact) <= 1e-14).all()
    assert (np.diff(python) <= 0).all() and (np.diff(native) <= 2 * ulp[1:]).all()
    assert 22.8 < native[0] < 23 and -2.82 < native[-1] < -2.8  # 33 bits are left at the one end, 24 at the other


def test_uniform_is_in_the_middle_of_its_interval():
    """u, and so the noise, has no bias at either end: its mean over the words of an interval is the interval's."""
    for start in (0, 2**20, 2**31):
        words = torch.arange(start, start + 2**16)
        u = -torch.expm1(-torch.exp(-noise.gumbel_of_words(words, torch.float64)))
        expected = (start + 2**15) * 2.0**-32
        assert abs(float(u.mean()) / expected - 1) < 1e-6


# -- noise in the kernels ------------------------------------------------------------------------------------------------


def probe(serve, K, seed, count=None):
    """The noise that a kernel uses, bit by bit: row n has every code but n ruled out, and stats hold the largest."""
    hidden = torch.eye(K, device=serve.device)
    weight = (torch.eye(K, device=serve.device) - 1) * 1e30
    per_row = isinstance(seed, torch.Tensor)
    seed = seed if per_row else torch.tensor([seed], device=serve.device)
    tau = torch.ones(1, device=serve.device)
    stats = torch.ops.dalle_fast.gumbel_codebook(hidden, weight, None, hidden, tau, seed, per_row, False, serve.impl)[3]
    return stats[:, 2].cpu()


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("K", [1, 63, 65, 200])
def test_kernels_noise_is_the_definitions(serve, K):
    """Row and code n under one seed; and row 0, code n under a seed for each row."""
    for seed in SEEDS:
        n = torch.arange(K)
        per_row = torch.full((K,), seed, device=serve.device)
        words = noise.noise_words(torch.tensor([seed]), n, K)[n, n], noise.noise_words(per_row[:1].cpu(), n[:1], K)[0]
        for found, word in zip((probe(serve, K, seed), probe(serve, K, per_row)), words, strict=True):
            scalar = torch.from_numpy(_extension.native().gumbel_noise(word.numpy().astype(np.uint32)))
            ulp = 2.0**-23 * scalar.abs().clamp(min=1)
            # The row kernels have a GPU's logarithms, see csrc/gumbel.h: 6.0 is the most that PTX lets them differ.
            assert ((found - scalar).abs() <= (6.5 if serve.impl == "cuda" else 2) * ulp).all()


@pytest.mark.every_instruction_set
def test_kernels_noise_on_a_million_words(serve):
    """Logits of 0: differences of tau * log y are differences of noise."""
    N, K, tau = 128, 8192, 4.0
    soft = serve.gumbel_softmax(torch.zeros(N, K, device=serve.device), tau, seed=77).cpu().double()
    found = tau * soft.log()
    exact = noise.gumbel_noise(torch.tensor([77]), torch.arange(N), K, torch.float64)
    difference = (found - found.mean(-1, keepdim=True)) - (exact - exact.mean(-1, keepdim=True))
    assert difference.abs().max() < 1e-5


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("first_row", [0, 100, 2**32 - 3, 2**40])
@pytest.mark.parametrize("per_row", [False, True])
def test_rows_are_numbered_from_the_chunks_first(serve, first_row, per_row):
    if serve.impl == "reference":
        pytest.skip("the reference has no chunks")
    rows = cuda_rows if serve.impl == "cuda" else cpu
    N, K = 50, 300
    seed = torch.arange(N) + 2**50 if per_row else torch.tensor([2**50])
    codes = torch.empty(N, dtype=torch.int64, device=serve.device)
    rows.sample_rows(
        torch.zeros(N, K, device=serve.device), None, seed.to(serve.device), first_row,
        torch.ones(1, device=serve.device), codes, seed_per_row=per_row,
    )  # fmt: skip
    row = torch.zeros(1, dtype=torch.int64) if per_row else first_row + torch.arange(N)
    assert torch.equal(codes.cpu(), noise.gumbel_noise(seed, row, K).argmax(-1))


def test_all_implementations_draw_the_same_codes(serve):
    """Bit for bit, as the words are the same and no two of these noisy logits lie within rounding."""
    hidden = torch.zeros(3000, 1)
    weight, bias = torch.zeros(1000, 1), torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for seed in (5, torch.arange(3000) * 3):
        expected = F.codebook_sample(hidden, weight, bias, seed=seed, impl="reference")
        on_device = [x.to(serve.device) for x in (hidden, weight, bias)]
        seed = seed.to(serve.device) if isinstance(seed, torch.Tensor) else seed
        assert torch.equal(serve.codebook_sample(*on_device, seed=seed).cpu(), expected)


# -- seeds ---------------------------------------------------------------------------------------------------------------


def draws(serve, seed, N=100, K=2000):
    zeros = torch.zeros(N, 1, device=serve.device), torch.zeros(K, 1, device=serve.device)
    if isinstance(seed, torch.Tensor):
        seed = seed.to(serve.device)
    return serve.codebook_sample(*zeros, seed=seed).cpu()


def test_seed_as_number_and_as_tensor(serve):
    for seed in SEEDS:
        assert torch.equal(draws(serve, seed), draws(serve, torch.tensor(seed)))
    assert torch.equal(draws(serve, torch.tensor(-1))[:1], draws(serve, torch.full((100,), -1))[:1])  # all 64 bits
    assert not torch.equal(draws(serve, torch.tensor(-1)), draws(serve, 2**63 - 1))


def test_every_bit_of_the_seed_counts(serve):
    """64 seeds that differ in one bit, and 0: no two have noise in common."""
    seeds = torch.cat([torch.zeros(1, dtype=torch.int64), torch.ones(64, dtype=torch.int64) << torch.arange(64)])
    drawn = torch.stack([draws(serve, seed) for seed in seeds])
    same = (drawn[:, None] == drawn).float().mean(-1)
    assert (same.triu(1) < 0.06).all()  # 1 in 2,000 by chance


@pytest.mark.every_instruction_set
def test_a_rows_code_does_not_depend_on_its_batch(serve):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=generator).to(serve.device) for shape in ((300, 6), (500, 6)))
    per_row = torch.randint(2**62, (300,), generator=generator).to(serve.device)
    whole, numbered = (serve.codebook_sample(hidden, weight, seed=seed) for seed in (per_row, 9))
    for rows in (slice(0, 1), slice(0, 150), slice(150, 300), slice(299, 300), slice(3, 300, 7)):
        assert torch.equal(serve.codebook_sample(hidden[rows], weight, seed=per_row[rows]), whole[rows])
    order = torch.randperm(300, generator=generator).to(serve.device)
    assert torch.equal(serve.codebook_sample(hidden[order], weight, seed=per_row[order]), whole[order])
    for count in (1, 17, 150):  # one seed for all: rows in order
        assert torch.equal(serve.codebook_sample(hidden[:count], weight, seed=9), numbered[:count])
    shaped = serve.codebook_sample(hidden.view(3, 100, 6), weight, seed=per_row.view(3, 100))
    assert torch.equal(shaped.flatten(), whole)
    codebook = torch.zeros(500, 1, device=serve.device)
    assert torch.equal(serve.gumbel_codebook(hidden, weight, None, codebook, 1.0, seed=per_row).codes, whole)


def test_seed_none_follows_torchs_generator(serve):
    torch.manual_seed(3)
    first, second = draws(serve, None), draws(serve, None)
    torch.manual_seed(3)
    assert torch.equal(draws(serve, None), first) and torch.equal(draws(serve, None), second)
    assert (first == second).float().mean() < 0.06


def test_seed_none_differs_between_ranks(serve, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    drawn = []
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)  # noqa: B023
        torch.manual_seed(3)
        drawn.append(draws(serve, None))
    assert (drawn[0] == drawn[1]).float().mean() < 0.06


def test_noise_seed():
    edges = [(0, 1, 2**20 - 1), (0, 1, 2**32 - 1), (0, 1, 2**11 - 1)]
    triples = list(itertools.product(*edges)) + list(itertools.product(range(5), range(2, 7), range(2, 7)))
    seeds = {F.noise_seed(seed, step=step, rank=rank) for seed, step, rank in triples}
    assert len(seeds) == len(triples) and min(seeds) == 0 and max(seeds) == 2**63 - 1
    assert F.noise_seed(7) == F.noise_seed(7, step=0, rank=0)
    assert F.noise_seed(np.int32(7), step=np.int32(5), rank=np.int8(3)) == F.noise_seed(7, step=5, rank=3)
    for arguments in ({"seed": -1}, {"seed": 2**20}, {"step": -1}, {"step": 2**32}, {"rank": -1}, {"rank": 2**11}):
        (name, value) = next(iter(arguments.items()))
        with pytest.raises(ValueError, match=f"{name} must be from 0 to .*, got {value}"):
            F.noise_seed(**{"seed": 0, **arguments})
    for arguments in ({"seed": 1.0}, {"seed": True}, {"step": None}, {"rank": "0"}):
        (name, value) = next(iter(arguments.items()))
        with pytest.raises(TypeError, match=f"{name} must be an integer, got {value!r}"):
            F.noise_seed(**{"seed": 0, **arguments})


def test_noise_seed_is_a_seed(serve):
    assert not torch.equal(draws(serve, F.noise_seed(0, step=1)), draws(serve, F.noise_seed(0, rank=1)))
    assert len(draws(serve, F.noise_seed(2**20 - 1, step=2**32 - 1, rank=2**11 - 1))) == 100
