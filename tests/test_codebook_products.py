"""The CPU's own matrix products, and what is read off tiles of logits that never become rows in memory.

Small integers make every product and sum exact, so that results must agree to the bit with dense arithmetic.

M rows, J columns, N rows of hidden, K codes, I depth.
"""

import itertools
import subprocess
import sys

import pytest
import torch
from test_codebook import DTYPES, HOW, SEED, check, inputs, smallest_chunks, strided
from test_codebook_grad import check as check_gradients
from test_codebook_grad import check_cross_entropy

from dalle_fast import _extension
from dalle_fast.nn import functional as F
from dalle_fast.ops import linear
from dalle_fast.ops.codebook import cpu
from dalle_fast.testing import nan_poisoned

pytestmark = pytest.mark.every_instruction_set

# (M, J, I): nothing, one, around the tiles of 14 x 32, 6 x 16 and 32 x 32 x 32, around the 256 columns and 512 words at
# once.
SIZES = [
    (0, 5, 3),
    (5, 0, 3),
    (3, 4, 0),
    (1, 1, 1),
    (13, 31, 15),
    (14, 32, 16),
    (15, 33, 17),
    (6, 16, 31),
    (7, 17, 33),
    (29, 255, 5),
    (31, 31, 31),
    (32, 64, 32),
    (33, 65, 34),
    (70, 96, 63),
    (43, 257, 2),
    (200, 300, 20),
    (34, 1100, 3),
    (33, 300, 700),
    (5, 40, 511),
    (5, 40, 513),
    (15, 20, 1023),
    (15, 20, 1025),
]
TILE_ROWS, TILE_CODES = 1024, 256  # kTileRows and kTileCodes in csrc/cpu/codebook.cpp


@pytest.fixture(autouse=True)
def ours(monkeypatch):
    """Whatever is fastest with this instruction set."""
    monkeypatch.setattr(cpu, "PRODUCTS", dict.fromkeys(cpu.PRODUCTS, "ours"))


@pytest.fixture
def vendor(monkeypatch, ours):
    monkeypatch.setattr(cpu, "PRODUCTS", dict.fromkeys(cpu.PRODUCTS, "vendor"))


def integers(shape, dtype, seed):
    """-2 to 2: sums of 1,025 products are exact."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- products ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_product_of_every_size_and_dtype(sizes):
    M, J, I = sizes
    for of_a, of_b in itertools.product(DTYPES, DTYPES):
        a, b = integers((M, I), of_a, 0), integers((J, I), of_b, 1)
        exact = a.float() @ b.float().T
        with nan_poisoned():
            assert torch.equal(cpu.product(a, b), exact)
            wide = torch.full((M, J + 3), torch.nan)
            cpu.product(a, b, out=wide[:, 1 : J + 1])
        assert torch.equal(wide[:, 1 : J + 1], exact)
        assert wide[:, 0].isnan().all() and wide[:, J + 1 :].isnan().all()
        total = torch.ones(M, J)
        cpu.accumulate(total, a.T, b.T)
        assert torch.equal(total, exact + 1)


def test_factors_of_two_depths_are_refused():
    a, b = torch.zeros(3, 5), torch.zeros(4, 6)
    with pytest.raises(ValueError, match="as many columns, got 5 and 6"):
        cpu.product(a, b)


@pytest.mark.parametrize(
    "how", [how for how in HOW if how not in ("expanded rows", "expanded columns", "zero strides")]
)
@pytest.mark.parametrize("sizes", [(33, 65, 34), (40, 50, 513), (20, 70, 1100)], ids=str)
def test_products_are_as_exact_as_torchs(sizes, how):
    """Also where AMX takes them as sums of products of bfloat16: none is missing, nor in a wrong place."""
    M, J, I = sizes
    generator = torch.Generator().manual_seed(0)
    for of_a, of_b in itertools.product(DTYPES, DTYPES):
        shapes = ((M, of_a), (J, of_b))
        a, b = (strided(torch.randn(size, I, generator=generator).to(dtype), how) for size, dtype in shapes)
        exact = a.double() @ b.double().T
        errors = [(out.double() - exact).square().mean().sqrt() for out in (cpu.product(a, b), a.float() @ b.float().T)]
        # Beside bfloat16 a float32 counts to 16 bits, as AMX takes it: at worst 2^-17 of it is lost, of each term.
        less = 2**-17 * I**0.5 if {of_a, of_b} == {torch.float32, torch.bfloat16} else 0
        assert errors[0] <= 1.5 * errors[1] + less, (of_a, of_b, errors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_float32_operand_counts_to_16_bits(dtype):
    """Whatever it is multiplied with. So does a sum whose terms cancel."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(40, 700, generator=generator), torch.randn(50, 700, generator=generator).to(dtype)
    b[0] = 1  # sums of a, which nearly cancel
    a[0, 0] -= a[0].sum()
    exact, terms = a.double() @ b.double().T, a.double().abs() @ b.double().abs().T
    for out, of in ((cpu.product(a, b), exact), (cpu.product(b, a), exact.T)):
        error = (out.double() - of).abs()
        assert (error <= (2**-16 + 32 * torch.finfo(torch.float32).eps) * (terms if of is exact else terms.T)).all()


@pytest.mark.parametrize("of_b", DTYPES, ids=str)
@pytest.mark.parametrize("of_a", [torch.float32, torch.bfloat16], ids=str)
def test_products_of_extreme_numbers(of_a, of_b):
    """The largest and the smallest stay what they are. Of infinity AMX may make NaN, never a number."""
    largest, smallest = torch.finfo(of_a).max, torch.finfo(of_a).smallest_normal
    extreme = torch.tensor([largest, -largest, largest / 2, smallest, -smallest, 0, torch.inf, -torch.inf, torch.nan])
    a, one = torch.zeros(9, 40), torch.zeros(1, 40)
    a[:, 33], one[:, 33] = extreme, 1
    for out in (cpu.product(a.to(of_a), one.to(of_b)), cpu.product(one.to(of_b), a.to(of_a)).T):
        torch.testing.assert_close(out[:6, 0], extreme[:6], rtol=2**-16 if of_a != of_b else 1e-6, atol=0)
        assert not out[6:].isfinite().any()


@pytest.mark.parametrize("how", HOW)
def test_product_of_every_stride(how):
    for dtype, (M, J, I) in itertools.product(DTYPES, ((20, 37, 67), (33, 50, 16))):
        a, b = integers((M, I), dtype, 0), integers((J, I), dtype, 1)
        for one, other in ((strided(a, how), b), (a, strided(b, how)), (strided(a, how), strided(b, how))):
            assert torch.equal(cpu.product(one, other), one.float() @ other.float().T)


@pytest.mark.parametrize("of_a", DTYPES, ids=str)
@pytest.mark.parametrize("of_b", DTYPES, ids=str)
def test_what_is_broken_stays_in_its_row_and_column(of_a, of_b):
    a, b = integers((31, 20), of_a, 0), integers((45, 20), of_b, 1)
    a[3, 7], b[40, 19] = torch.nan, torch.inf
    out = cpu.product(a, b)
    assert out[3].isnan().all() and not out[:, 40].isfinite().any()
    fine = torch.ones(31, 45, dtype=torch.bool)
    fine[3], fine[:, 40] = False, False
    assert torch.equal(out[fine], (a.float() @ b.float().T)[fine])

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, 20, generator=generator).to(dtype) for size, dtype in ((31, of_a), (45, of_b)))
    clean = cpu.product(a, b)
    a[3, 7], b[40, 19] = torch.finfo(of_a).max, torch.inf
    assert torch.equal(cpu.product(a, b)[fine], clean[fine])


@pytest.mark.parametrize("of_a", DTYPES, ids=str)
@pytest.mark.parametrize("of_b", DTYPES, ids=str)
def test_an_element_depends_on_its_two_lanes_alone(threads, of_a, of_b):
    """Not on the number of threads, and not on what else is multiplied."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, 700, generator=generator).to(dtype) for size, dtype in ((333, of_a), (290, of_b)))
    whole = cpu.product(a, b)
    for count in (1, 2, 3, 7):
        threads(count)
        assert torch.equal(cpu.product(a, b), whole)
    for rows, columns in (
        (slice(5, 6), slice(0, 290)),
        (slice(20, 90), slice(33, 61)),
        (slice(332, 333), slice(289, 290)),
    ):
        assert torch.equal(cpu.product(a[rows], b[columns]), whole[rows, columns])


@pytest.mark.parametrize("who", ["ours", "vendor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_rows_are_drawn_with_the_weight_where_it_lies(monkeypatch, dtype, who):
    """Where its rows lie so that it can be; all others, and more rows, as before."""
    monkeypatch.setattr(cpu, "PRODUCTS", dict.fromkeys(cpu.PRODUCTS, who))
    monkeypatch.setattr(linear, "_rows", lambda: (range(1, 5),) * 3)
    served, real = [], cpu.linear_product
    monkeypatch.setattr(cpu, "linear_product", lambda *arguments: served.append(arguments) or real(*arguments))
    hidden, weight, bias, _ = inputs(9, 300, 40, 1, dtype=dtype)
    wide = torch.full((300, 50), torch.nan, dtype=dtype)
    wide[:, 7:47] = weight
    layouts = {"rows": weight, "parts of rows": wide[:, 7:47], "columns": weight.T.contiguous().T}
    for name, given in layouts.items():
        for R in (1, 4, 5, 9):
            served.clear()
            exact = hidden[:R].double() @ weight.double().T + bias.double()
            assert torch.equal(F.codebook_argmax(hidden[:R], given, bias, impl="cpu"), exact.argmax(-1))
            assert bool(served) == (R <= 4 and name != "columns")


GUARDED = """
import itertools, torch
from dalle_fast.ops.codebook import cpu
from dalle_fast.verify import guard

cpu.PRODUCTS = dict.fromkeys(cpu.PRODUCTS, "ours")
for at_end in (True, False):
    guarded = guard.guarding(at_end=at_end)
    for dtype, (M, J, I) in itertools.product((torch.float32, torch.float16, torch.bfloat16), SIZES):
        a, b = (torch.ones(lanes, I, dtype=dtype) for lanes in (M, J))
        for x, y in itertools.product((guarded(a), guarded(a.T).T), (guarded(b), guarded(b.T).T)):
            assert (cpu.product(x, y, out=guarded(torch.empty(M, J))) == I).all()
        total = cpu.Sum(guarded(torch.empty(M, J, dtype=dtype)), I)
        total.add(guarded(a.float().T), guarded(b.T))
        assert (total.result() == I).all()
        guard._kept.clear()
print("all")
"""


def test_products_touch_nothing_but_their_operands():
    """Each lies against a page that cannot be read: a process of its own, which it would end."""
    sizes = [(1, 1, 1), (3, 5, 7), (15, 33, 17), (17, 31, 33), (29, 70, 64), (5, 300, 2)]
    done = subprocess.run(
        [sys.executable, "-c", GUARDED.replace("SIZES", repr(sizes))], check=False, capture_output=True, text=True
    )
    if "NotRun" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0 and done.stdout == "all\n", f"ended with {done.returncode}: {done.stderr[-2000:]}"


# -- sums over chunks -----------------------------------------------------------------------------------------------------


def kept(floats):
    """The 24 bits in which a sum of these numbers is kept, as floats."""
    total = cpu.Sum(torch.empty(len(floats), 1, dtype=torch.float16), 2)
    total.add(floats[None], torch.ones(1, 1, dtype=torch.float16))  # the first of 2 rows
    upper, lower = total._result.view(torch.int16).int(), total._lower.int()
    return (upper << 16 | lower << 8).view(torch.float32)[:, 0]


def test_kept_sums_are_rounded_to_nearest():
    bits = torch.randint(-(2**31), 2**31, (100_003,), generator=torch.Generator().manual_seed(0))
    bits[:1024] = 0x3F800000 + (bits[:1024] & 0x7FFE00) + torch.arange(1024) % 512  # ties, to both sides
    floats = bits.int().view(torch.float32)
    numbers = floats[(floats.abs() > 1e-20) & (floats.abs() < 3e38)]  # what is much smaller is 0 to AMX
    out = kept(numbers)
    spacing = 2.0 ** (numbers.frexp().exponent - 16).double()
    off = (out.double() - numbers.double()).abs() / spacing
    assert (off <= 0.5).all()
    ties = off == 0.5
    assert ties.sum() > 100 and (out[ties].view(torch.int32) >> 8 & 1 == 0).all()


def test_kept_sums_that_are_no_numbers():
    assert torch.equal(kept(torch.zeros(3)).view(torch.int32), torch.zeros(3, dtype=torch.int32))
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    assert kept(nans).isnan().all()
    infinite = kept(torch.tensor([torch.inf, -torch.inf]))
    if _extension.native().instruction_set() == "avx512_amx":  # a part of it may be infinity times 0
        assert not infinite.isfinite().any()
    else:
        assert infinite.tolist() == [torch.inf, -torch.inf]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_sum_over_many_chunks_errs_by_its_last_rounding(dtype):
    """100 chunks: sums that were rounded to 16 bits after each would be off by several times as much."""
    generator = torch.Generator().manual_seed(0)
    like = torch.empty(37, 50, dtype=dtype)
    a, b = torch.randn(100, 4, 37, generator=generator), torch.randn(100, 4, 50, generator=generator).to(dtype)
    with nan_poisoned():
        total = cpu.Sum(like, 400)
        for x, y in zip(a, b, strict=True):
            total.add(x, y)
        out = total.result()
    assert out.dtype == dtype and out.shape == like.shape and out.is_contiguous()
    exact = torch.einsum("crj,cri->ji", a.double(), b.double())
    rounded = exact.to(dtype).double()
    allowed = 1.1 * (rounded - exact).square().mean().sqrt()
    assert (out.double() - exact).square().mean().sqrt() <= allowed


@pytest.mark.parametrize("how", ["ours", "vendor"])
@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (1, 1), (130, 33), (35, 1100)], ids=str)
def test_sums_of_every_size(monkeypatch, how, sizes):
    """Of no product, of one, and of several, one of nothing, the last of more than one block of the depth."""
    monkeypatch.setattr(cpu, "PRODUCTS", dict.fromkeys(cpu.PRODUCTS, how))
    for dtype, of_a, rows in itertools.product(
        DTYPES, (torch.float32, torch.bfloat16), ((), (0,), (3,), (3, 0, 1), (2, 1100))
    ):
        with nan_poisoned():
            total, exact = cpu.Sum(torch.empty(sizes, dtype=dtype), sum(rows)), torch.zeros(sizes)
        for seed, R in enumerate(rows):
            a, b = integers((R, sizes[0]), of_a, seed), integers((R, sizes[1]), dtype, seed + 9)
            with nan_poisoned():
                total.add(a, b)
            exact += a.float().T @ b.float()
        assert torch.equal(total.result(), exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_of_columns(dtype):
    for R, K in ((0, 3), (1, 1), (37, 70), (300, 530)):
        x = cpu.results(torch.full((R, K), torch.nan), dtype).copy_(integers((R, K), dtype, 0))
        total = torch.ones(K)
        cpu.add_columns(total, x)
        assert torch.equal(total, x.float().sum(0) + 1)


# -- results of 16 bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K", [1, 63, 64, 200])
def test_gradients_of_logits_are_rounded_once(K, dtype):
    """Kernels that leave 16 bits in place of the logits: what they leave in float32, rounded."""
    R, generator = 5, torch.Generator().manual_seed(0)
    logits, grad_weights = torch.randn(2, R, K, generator=generator) * 3
    bias, grad_kl, row_weight = torch.randn(K, generator=generator), torch.randn(R, generator=generator), torch.rand(R)
    seed, tau = torch.tensor([7]), torch.tensor([0.7])
    stats, kl, codes = torch.empty(R, 4), torch.empty(R), torch.empty(R, dtype=torch.int64)
    noise = bias, seed, 3, tau
    cpu.gumbel_forward(logits.clone(), *noise, False, stats, kl, codes, seed_per_row=False)
    target = torch.arange(R) % K
    target[1] = -100

    def in_place(dtype):
        x, y, z = logits.clone(), grad_weights.clone(), logits.clone()
        cpu.gumbel_backward(x, *noise, stats, kl, grad_kl, y, dtype, True, seed_per_row=False)
        cpu.cross_entropy_rows(z, bias, target, -100, row_weight, dtype, torch.empty(R))
        return [cpu.results(floats, dtype) for floats in (x, y, z)]

    for rounded, exact in zip(in_place(dtype), in_place(torch.float32), strict=True):
        assert rounded.dtype == dtype and torch.equal(rounded, exact.to(dtype))


# -- tiles of logits -----------------------------------------------------------------------------------------------------


def make_case(N, K, I, dtype, bias):
    made = integers((N, I), dtype, 0), integers((K, I), dtype, 1), integers((K,), dtype, 2) if bias else None
    return made, torch.randint(K, (N,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1), (7, 63, 3), (3, 255, 2), (15, 256, 4), (5, 257, 0), (2, 1000, 33), (TILE_ROWS + 5, 300, 2)],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True])
def test_tiles_say_what_rows_say(monkeypatch, threads, sizes, bias):
    """Exact logits, most of them equal to others: codes to the bit, the first of equals included."""
    threads(3)
    for dtype in DTYPES:
        tensors, target = make_case(*sizes, dtype, bias)
        target[: len(target) // 2 : 3] = -100
        seeds = torch.arange(len(target)) + 7

        def everything():
            codes = [F.codebook_argmax(*tensors), *(F.codebook_sample(*tensors, seed=seed) for seed in (SEED, seeds))]  # noqa: B023
            loss = F.codebook_cross_entropy(*tensors, target, reduction="none")  # noqa: B023
            return codes, loss

        with nan_poisoned():
            codes, loss = everything()
        monkeypatch.setattr(cpu, "_by_tiles", lambda: False)
        expected, expected_loss = everything()
        monkeypatch.undo()
        monkeypatch.setattr(cpu, "PRODUCTS", dict.fromkeys(cpu.PRODUCTS, "ours"))
        assert all(torch.equal(a, b) for a, b in zip(codes, expected, strict=True))
        torch.testing.assert_close(loss, expected_loss, rtol=2e-6, atol=2e-6)


def test_equals_in_different_tiles():
    weight = torch.zeros(3 * TILE_CODES, 1)
    for codes in ((255, 256), (300, 700), (5, 767), (512, 513), (63, 64), (447, 448, 500)):  # of a tile's blocks, too
        weight[:] = -1
        weight[list(codes)] = 1
        assert F.codebook_argmax(torch.ones(3, 1), weight).tolist() == [min(codes)] * 3
    assert F.codebook_argmax(torch.ones(3, 1), weight * 0).tolist() == [0] * 3


def test_tiles_without_a_code_that_counts():
    """A whole tile forbidden, and all of them: never NaN by itself, never a code outside [0, K)."""
    hidden, weight, bias, _ = inputs(9, 2 * TILE_CODES + 10, 5, 1)
    bias[:TILE_CODES] = -torch.inf
    rest = slice(TILE_CODES, None)
    for seed in (None, SEED):
        options = {} if seed is None else {"seed": seed}
        codes = (F.codebook_argmax if seed is None else F.codebook_sample)(hidden, weight, bias, **options)
        assert (codes >= TILE_CODES).all()
    target = torch.arange(9) + TILE_CODES
    loss = F.codebook_cross_entropy(hidden, weight, bias, target, reduction="none")
    expected = F.codebook_cross_entropy(hidden, weight[rest], bias[rest], target - TILE_CODES, reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert (F.codebook_cross_entropy(hidden, weight, bias, target * 0, reduction="none") == torch.inf).all()
    bias[:] = -torch.inf
    assert (F.codebook_argmax(hidden, weight, bias) == 0).all()
    hidden[4] = torch.nan
    assert (F.codebook_sample(hidden, weight, seed=1)[4] == 0) and F.codebook_argmax(hidden, weight)[4] == 0


def test_a_row_does_not_depend_on_its_batch(threads):
    """Codes, samples and losses to the bit: of one row, of some, of more than a tile has, with any number of threads."""
    hidden, weight, bias, _ = inputs(TILE_ROWS + 40, 600, 50, 1)
    seeds, target = torch.arange(len(hidden)), torch.arange(len(hidden)) % 600

    def of(rows):
        product = hidden[rows], weight, bias
        loss = F.codebook_cross_entropy(*product, target[rows], reduction="none")
        return F.codebook_argmax(*product), F.codebook_sample(*product, seed=seeds[rows]), loss

    whole = of(slice(None))
    for count in (1, 2, 5):
        threads(count)
        for rows in (slice(None), slice(0, 1), slice(13, 30), slice(TILE_ROWS - 3, TILE_ROWS + 3)):
            assert all(torch.equal(a, b[rows]) for a, b in zip(of(rows), whole, strict=True))


# -- the vendor's products -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", [None, "transposed", "last sliced", "zero strides"])
def test_the_vendors_products_serve_as_well(vendor, monkeypatch, how, dtype):
    """Operands converted by parts, logits in memory, by chunks of rows."""
    monkeypatch.setattr(cpu, "CONVERTED_BYTES", 1000)
    smallest_chunks(monkeypatch)
    tensors = [strided(x, how) if how else x for x in inputs(37, 130, 20, 12, dtype)]
    check(_OnCPU, tensors, 0.5)
    check_gradients(_OnCPU, inputs(37, 130, 20, 12, dtype), 0.5)
    check_cross_entropy(_OnCPU, inputs(37, 130, 20, 12, dtype)[:3], torch.arange(37))
    product = tensors[:3]
    logits = torch.nn.functional.linear(*(x.double() for x in product))
    behind = logits.amax(-1) - logits.gather(-1, F.codebook_argmax(*product)[:, None])[:, 0]
    assert (behind < 1e-4).all()
    assert torch.equal(F.codebook_sample(*product, temperature=0), F.codebook_argmax(*product))


class _OnCPU:
    """What the checks of other files take for an implementation."""

    impl, device = "cpu", "cpu"
    gumbel_codebook = staticmethod(F.gumbel_codebook)
    codebook_cross_entropy = staticmethod(F.codebook_cross_entropy)
