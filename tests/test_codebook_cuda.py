"""The CUDA row kernels of the codebook operation: compiled for the host on any machine, and on a GPU if there is one.

Compiled for the host (tests/simt: fibers for threads, with sanitizers) the whole `csrc/cuda/codebook.cu` runs, with its
launchers. Noise is checked by itself; given it, maxima and codes must be exact and the rest as good as float32 allows.

R rows, K codes.
"""

import math
import struct
from types import SimpleNamespace

import cuda_rows
import pytest
import torch
from cuda_rows import results
from simt_host import Same, serve_on_host  # noqa: F401 (a fixture)

from dalle_fast import _extension
from dalle_fast.ops.codebook import cuda, noise

EPS = torch.finfo(torch.float32).eps
DTYPES = cuda.DTYPES
# Also for codes that are loaded one by one and 4 at a time; the last two are too long to be kept in shared memory.
SIZES = (1, 2, 63, 64, 65, 100, 1000, 8192, 8193, 10241, 10244)
HUGE_ROW = (1 << 40) + (1 << 32) - 2  # with 3 rows the low half of the row's number runs over


@pytest.fixture(scope="module")
def host(serve_on_host):  # noqa: F811
    """host(numbers, *buffers): what is in the buffers after the call."""
    return serve_on_host("codebook")


def poison(*shape, dtype=torch.float32):
    """What nobody wrote: NaN, or the integer of the same bytes."""
    size = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
    return torch.full((size,), 0xFF, dtype=torch.uint8).view(dtype).view(shape)


# -- noise ------------------------------------------------------------------------------------------------------------

# From Random123, kat_vectors: philox4x32 10; counter, key, words.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words_of(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_the_known_answers_of_random123(host, counter, key, words):
    given = torch.tensor(words_of(key) + words_of(counter)).to(torch.uint32)
    assert host([0], given, poison(4, dtype=torch.uint32))[1].tolist() == words_of(words)
    counter, key = ([torch.tensor(word) for word in words_of(text)] for text in (counter, key))
    assert [int(word) for word in noise.philox4x32_10(counter, key)] == words_of(words)


@pytest.mark.parametrize("seed, row", [(0, 0), (1, HUGE_ROW), (-(2**63), 2**63 - 1), (2**63 - 1, 1), (-1, 5)])
def test_the_words_of_a_row_are_those_of_the_definition(host, seed, row):
    seed = torch.tensor([seed])
    words = host([7, row, 1000], seed, poison(1000, dtype=torch.uint32))[1].to(torch.int64)
    torch.testing.assert_close(words, noise.noise_words(seed, torch.tensor([row]), 1000)[0], rtol=0, atol=0)


def host_noise_of_words(host, words):
    count = words.numel()
    return host([1, count], words.to(torch.uint32), poison(count))[1].view(words.shape)


def test_noise_is_right_to_a_few_units_in_the_last_place(host):
    edges = torch.cat([torch.arange(0, 5000), torch.arange(2**32 - 5000, 2**32), 2**31 + torch.arange(-2500, 2500)])
    words = torch.cat([edges, torch.randint(0, 2**32, (100_000,), generator=torch.Generator().manual_seed(0))])
    actual, exact = host_noise_of_words(host, words), noise.gumbel_of_words(words, torch.float64)
    assert actual.isfinite().all()
    # Near g = 0 both logarithms' roundings stay: there the unit is that of 1.
    units = (actual.double() - exact).abs() / (EPS * exact.abs().clamp(min=1))
    assert units.max() < 3


# -- what the kernels should give -------------------------------------------------------------------------------------


def make_case(R, K, *, seed=0, bias=True, per_row=False, first_row=0, tau=1.0, scale=2.0):
    generator = torch.Generator().manual_seed(1000 * K + 10 * R + seed)
    return SimpleNamespace(
        R=R,
        K=K,
        logits=torch.randn(R, K, generator=generator) * scale,
        bias=torch.randn(K, generator=generator) * scale if bias else None,
        seed=torch.randint(-(2**63), 2**63 - 1, (R if per_row else 1,), generator=generator),
        per_row=per_row,
        first_row=first_row,
        tau=torch.tensor([tau]),
        grad_weights=torch.randn(R, K, generator=generator),
        grad_kl=torch.randn(R, generator=generator),
        target=torch.randint(0, K, (R,), generator=generator),
        row_weight=torch.rand(R, generator=generator),
    )


def words_of_case(case):
    return noise.noise_words(*noise.rows_of(case.seed, case.per_row, case.first_row, case.R), case.K)


def truth(case, noise):
    """Everything in float64, but for logit + bias and the sum of that and noise: these are defined as float32."""
    z = case.logits.float() if case.bias is None else case.logits.float() + case.bias
    t = z + noise
    out = SimpleNamespace(max_logit=z.amax(-1), max_noisy=t.amax(-1), codes=t.argmax(-1))
    out.z, out.t, z, t, tau = z, t, z.double(), t.double(), case.tau.double()
    delta, delta_noisy = z - z.amax(-1, keepdim=True), t - t.amax(-1, keepdim=True)
    e, out.weights = delta.exp(), (delta_noisy / tau).exp()
    out.sum, out.sum_noisy = e.sum(-1), out.weights.sum(-1)
    out.p, out.y = e / out.sum[:, None], out.weights / out.sum_noisy[:, None]
    log_p = (delta - out.sum.log()[:, None]).clamp(min=-1e300)  # 0 * -inf would be NaN
    out.log_p_k = log_p + math.log(case.K)
    out.kl = (out.p * out.log_p_k).sum(-1)
    out.exponent = (delta_noisy / tau).clamp(min=-200)  # smaller ones all give 0
    return out


def true_gradient(case, true, grad_kl, dtype):
    dy = case.grad_weights.to(dtype).double()
    dot = (true.y * dy).sum(-1, keepdim=True)
    grad = true.y * (dy - dot) / case.tau.double()
    # What rounding dot and the exponents leaves; y may be subnormal.
    size = (
        (true.y + torch.finfo(torch.float32).smallest_normal)
        * (dy.abs() + (true.y * dy.abs()).sum(-1, keepdim=True))
        * (1 - true.exponent)
        / case.tau.double()
    )
    if grad_kl is not None:
        kl_term = (grad_kl.double()[:, None] * true.p) * (true.log_p_k - true.kl[:, None])
        grad = grad + kl_term
        size = size + (grad_kl.double()[:, None] * true.p).abs() * (1 + true.log_p_k.abs() + true.kl.abs()[:, None])
    return grad, size


def assert_near(name, actual, exact, size, units, least=0.0):
    """abs(actual - exact) <= units of float32's last place of `size`, plus rounding to actual's dtype, plus `least`."""
    finfo = torch.finfo(actual.dtype)
    allowed = units * EPS * size + finfo.smallest_normal * finfo.eps * 1.01 + least
    if actual.dtype != torch.float32:
        allowed = allowed + finfo.eps / 2 * exact.abs() * 1.01
    error = (actual.double() - exact).abs()
    wrong = ~(error <= allowed)  # also true of NaN
    worst = float((error / allowed).nan_to_num(math.inf).max())
    assert not wrong.any(), (
        f"{name}: {int(wrong.sum())} of {wrong.numel()} wrong, the worst by {worst:.3g} of what is allowed; "
        f"at {wrong.nonzero()[0].tolist()}: {actual[wrong][0]} instead of {exact[wrong][0]}"
    )


def assert_exact(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


# -- calls ------------------------------------------------------------------------------------------------------------


def host_forward(host, case, dtype, want_weights=True):
    weights = Same(0) if want_weights else None
    numbers = [2, case.R, case.K, case.per_row, case.first_row, DTYPES[dtype]]
    out = host(
        numbers, case.logits, case.bias, case.seed, case.tau, weights,
        poison(case.R, 4), poison(case.R), poison(case.R, dtype=torch.int64),
    )  # fmt: skip
    stats, kl, codes = out[-3:]
    return SimpleNamespace(weights=results(out[0], dtype) if want_weights else None, stats=stats, kl=kl, codes=codes)


def host_backward(host, case, dtype, stats, kl, grad_kl, want_weights=True):
    numbers = [3, case.R, case.K, case.per_row, case.first_row, DTYPES[dtype]]
    out = host(
        numbers, case.logits, case.bias, case.seed, case.tau, stats, kl, grad_kl, case.grad_weights.to(dtype),
        Same(7) if want_weights else None, Same(0),
    )  # fmt: skip
    return results(out[0], dtype), out[-1] if want_weights else None


def host_sample(host, case, temperature):
    numbers = [4, case.R, case.K, case.per_row, case.first_row]
    temperature = None if temperature is None else torch.tensor([temperature])
    seed = None if temperature is None else case.seed
    return host(numbers, case.logits, case.bias, seed, temperature, poison(case.R, dtype=torch.int64))[-1]


def host_cross_entropy(host, case, dtype, row_weight, ignore_index=-100, target=None):
    grad = None if row_weight is None else Same(0)
    per_row = row_weight is not None and len(row_weight) > 1
    target = case.target if target is None else target
    numbers = [5, case.R, case.K, ignore_index, per_row, DTYPES[dtype]]
    out = host(numbers, case.logits, case.bias, target, poison(case.R), row_weight, grad)
    loss = out[2 + (case.bias is not None)]
    return loss, None if row_weight is None else results(out[0], dtype)


def host_gumbel_softmax(host, case, dtype, want_codes=True):
    (tau_bits,) = struct.unpack("<i", struct.pack("<f", case.tau.item()))
    numbers = [6, case.R, case.K, DTYPES[dtype], case.per_row, case.first_row, tau_bits]
    codes = poison(case.R, dtype=torch.int64) if want_codes else None
    out = host(numbers, case.logits.to(dtype), poison(case.R, case.K, dtype=dtype), case.seed, codes)
    return out[1], out[3] if want_codes else None


# -- compiled for the host --------------------------------------------------------------------------------------------

CASES = [(R, K, dtype) for K in SIZES for R, dtype in zip((3, 1, 3), DTYPES, strict=True)]
VARIANTS = {
    "no bias": {"bias": False},
    "seed per row": {"per_row": True},
    "one row with its seed": {"R": 1, "per_row": True},
    "many rows before": {"first_row": HUGE_ROW},
    "tau 4": {"tau": 4.0},
    "tau 1/16": {"tau": 1 / 16},
    "tau 1/64": {"tau": 1 / 64},
    "tau 1e-30": {"tau": 1e-30},
    "tau 1e-39": {"tau": 1e-39},  # 1 / tau is inf
    "large logits": {"scale": 3e3},
    "large logits, tau 1/64": {"scale": 3e3, "tau": 1 / 64},
    "small differences": {"scale": 1e-3},
    "no differences": {"scale": 0.0},
}


def check_forward_and_backward(host, case, dtype):
    true = truth(case, host_noise_of_words(host, words_of_case(case)))
    out = host_forward(host, case, dtype)
    assert_exact(out.stats[:, 0], true.max_logit)
    assert_exact(out.stats[:, 2], true.max_noisy)
    assert_exact(out.codes, true.codes)
    assert_near("sum", out.stats[:, 1], true.sum, true.sum, 8)
    assert_near("kl", out.kl, true.kl, 1 + (true.p * true.log_p_k.abs()).sum(-1) + true.sum.log() + math.log(case.K), 4)
    assert (out.kl >= -5e-6).all()
    assert_near("weights", out.weights, true.weights, true.weights * (1 - true.exponent), 4)
    assert_near("sum_noisy", out.stats[:, 3], true.sum_noisy, true.sum_noisy, 16)
    alone = host_forward(host, case, dtype, want_weights=False)
    for name in ("stats", "kl", "codes"):
        assert_exact(getattr(alone, name), getattr(out, name))

    for grad_kl in (case.grad_kl, None):
        exact, size = true_gradient(case, true, grad_kl, dtype)
        grad, y = host_backward(host, case, dtype, out.stats, out.kl, grad_kl)
        assert_near("y", y, true.y, true.y * (1 - true.exponent), 24)
        assert_near("grad_logits", grad, exact, size, 24)
        assert_exact(host_backward(host, case, dtype, out.stats, out.kl, grad_kl, want_weights=False)[0], grad)


@pytest.mark.parametrize("R, K, dtype", CASES)
def test_forward_and_backward_on_the_host(host, R, K, dtype):
    check_forward_and_backward(host, make_case(R, K), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_forward_and_backward_on_the_host(host, variant, dtype):
    check_forward_and_backward(host, make_case(**{"R": 3, "K": 1100, **VARIANTS[variant]}), dtype)


@pytest.mark.parametrize("K", SIZES)
def test_samples_on_the_host(host, K):
    for options in ({}, {"per_row": True, "bias": False}, {"first_row": HUGE_ROW, "scale": 3e3}):
        case = make_case(3, K, **options)
        g, z = host_noise_of_words(host, words_of_case(case)), truth(case, 0).z
        for temperature in (1.0, 0.5, 0.0, 1e-30):
            assert_exact(host_sample(host, case, temperature), (z + temperature * g).argmax(-1))
        assert_exact(host_sample(host, case, None), z.argmax(-1))


@pytest.mark.parametrize("K", SIZES)
def test_the_first_of_equals_wins_on_the_host(host, K):
    case = make_case(3, K, bias=False)
    case.logits = torch.zeros(3, K)
    case.logits[1, K // 2 :] = 1
    case.logits[2, K - 1] = 1
    assert host_sample(host, case, None).tolist() == [0, K // 2, K - 1]


@pytest.mark.parametrize("R, K, dtype", CASES)
def test_cross_entropy_on_the_host(host, R, K, dtype):
    for options in ({}, {"bias": False, "scale": 3e3}):
        case = make_case(R, K, **options)
        true = truth(case, 0)
        exact = math.log(K) - true.log_p_k.gather(-1, case.target[:, None])[:, 0]
        onehot = torch.nn.functional.one_hot(case.target, K)
        for row_weight in (None, case.row_weight, case.row_weight[:1]):
            loss, grad = host_cross_entropy(host, case, dtype, row_weight)
            assert_near("loss", loss, exact, 1 + exact, 4)
            if row_weight is not None:
                weight = row_weight.double()[:, None]
                exponent = (true.z - true.max_logit[:, None]).double().clamp(min=-200)
                assert_near(
                    "grad_logits", grad, weight * (true.p - onehot), weight * (true.p * (1 - exponent) + onehot), 16
                )


@pytest.mark.parametrize("K", [1, 100, 1000])
def test_targets_that_are_ignored_or_no_code_on_the_host(host, K):
    case = make_case(6, K)
    case.logits[:2] = math.nan
    target = torch.tensor([-100, 7 - 107, K, -1, 2**40, 0])
    loss, grad = host_cross_entropy(host, case, torch.float32, case.row_weight, target=target)
    assert_exact(loss[:2], torch.zeros(2))
    assert_exact(grad[:2], torch.zeros(2, K))
    assert loss[2:5].isnan().all() and grad[2:5].isnan().all()
    case.target = target.clamp(0, K - 1)
    expected_loss, expected_grad = host_cross_entropy(host, case, torch.float32, case.row_weight)
    assert_exact(loss[5:], expected_loss[5:])
    assert_exact(grad[5:], expected_grad[5:])
    # ignore_index may be a code, and then that code is ignored.
    assert_exact(host_cross_entropy(host, case, torch.float32, None, ignore_index=0)[0][5:], torch.zeros(1))


@pytest.mark.parametrize("K, dtype", [(K, dtype) for K in (1, 63, 64, 100, 1000) for dtype in DTYPES])
def test_sums_of_columns_on_the_host(host, K, dtype):
    for R, count in ((0, 3), (1, 3), (16, 1), (37, 1), (37, 2), (100, 3)):
        floats, totals = poison(R, K), poison(count, K)
        results(floats, dtype).copy_(torch.randn(R, K))
        columns = results(floats, dtype).double()
        if R:
            totals = host([8, R, K, DTYPES[dtype], count, False], floats, totals)[-1]
            for n in range(count):
                mine = columns[torch.arange(R) // 16 % count == n]
                assert_near("total", totals[n], mine.sum(0), mine.abs().sum(0), 8)
        else:
            totals = torch.randn(count, K)
        more = host([8, R, K, DTYPES[dtype], count, True], floats, totals)[-1]
        assert_near("more", more.sum(0), totals.double().sum(0) + columns.sum(0), 1 + 2 * columns.abs().sum(0), 8)
        exact, size = more.double().sum(0), more.double().abs().sum(0)
        assert_near("sum", host([9, count, K, DTYPES[dtype]], more, poison(K, dtype=dtype))[-1], exact, size, 4)


@pytest.mark.parametrize("R, D, dtype", [(R, D, dtype) for R, D in ((1, 1), (9, 32), (17, 100)) for dtype in DTYPES])
def test_divided_embeddings_on_the_host(host, R, D, dtype):
    sums, stats = torch.randn(R, D), poison(R, 4)
    stats[:, 3] = 1 + torch.rand(R)
    exact = sums.double() / stats[:, 3:].double()
    embeddings = host([10, R, D, DTYPES[dtype]], sums, stats, poison(R, D, dtype=dtype))[-1]
    assert_near("embeddings", embeddings, exact, exact.abs(), 1)


@pytest.mark.parametrize("R, K, dtype", CASES)
def test_gumbel_softmax_on_the_host(host, R, K, dtype):
    for options in ({}, {"tau": 1 / 64, "per_row": True}, {"tau": 1e-30, "first_row": HUGE_ROW}, {"scale": 3e3}):
        case = make_case(R, K, bias=False, **options)
        case.logits = case.logits.to(dtype)
        true = truth(case, host_noise_of_words(host, words_of_case(case)))
        out, codes = host_gumbel_softmax(host, case, dtype)
        assert_near("out", out, true.y, true.y * (1 - true.exponent), 24)
        assert_exact(codes, true.codes)
        assert_exact(host_gumbel_softmax(host, case, dtype, want_codes=False)[0], out)


@pytest.mark.parametrize("K", [2, 65, 1000, 10241])
def test_codes_that_are_forbidden_on_the_host(host, K):
    """Logits of -inf, also for all the codes that some threads have."""
    case = make_case(3, K)
    case.logits[0, 1:] = -math.inf
    case.logits[1, : K - 1] = -math.inf
    case.logits[2, K // 2 :] = -math.inf
    case.target = torch.tensor([0, K - 1, 0])
    check_forward_and_backward(host, case, torch.float32)
    loss, grad = host_cross_entropy(host, case, torch.float32, case.row_weight)
    assert loss.isfinite().all() and grad.isfinite().all()
    case.target = torch.tensor([1, 0, K - 1])
    assert_exact(host_cross_entropy(host, case, torch.float32, None)[0], torch.full((3,), math.inf))


ALL = slice(None)
BAD = [
    (bad, K, codes) for bad in (math.nan, math.inf) for K, codes in ((1, ALL), (1000, [999]), (1000, ALL), (10241, [5]))
]


@pytest.mark.parametrize("bad, K, codes", [*BAD, (-math.inf, 1, ALL), (-math.inf, 1000, ALL)])
def test_a_bad_row_stays_alone_on_the_host(host, bad, K, codes):
    clean, case = make_case(3, K), make_case(3, K)
    case.logits[1, codes] = bad
    for call in (
        lambda c: vars(host_forward(host, c, torch.bfloat16)),
        lambda c: dict(enumerate(host_cross_entropy(host, c, torch.bfloat16, c.row_weight))),
        lambda c: dict(enumerate(host_gumbel_softmax(host, c, torch.float32))),
        lambda c: {"codes": host_sample(host, c, 1.0)},
        lambda c: {"codes": host_sample(host, c, None)},
    ):
        expected, actual = call(clean), call(case)
        for name in expected:
            assert_exact(actual[name][[0, 2]], expected[name][[0, 2]])
            if actual[name].dtype == torch.int64:
                assert 0 <= actual[name][1] < K
    out = host_forward(host, case, torch.float32)
    assert out.kl[1].isnan()
    grad, _ = host_backward(host, case, torch.float32, out.stats, out.kl, case.grad_kl)
    assert grad[1].isnan().any() and grad[[0, 2]].isfinite().all()
    assert host_cross_entropy(host, case, torch.float32, None)[0][1].isnan()
    assert host_gumbel_softmax(host, case, torch.float32)[0][1].isnan().any()


def test_sizes_that_are_refused_on_the_host(host):
    case = make_case(1, 1)
    for R, K, message in (
        (-1, 5, "R must be"),
        (2**31, 5, "R must be"),
        (1, 0, "K must be"),
        (1, 2**30 + 1, "K must be"),
    ):
        case.R, case.K = R, K
        numbers = [4, R, K, 0, 0]
        with pytest.raises(RuntimeError, match=message):
            host(numbers, case.logits, None, case.seed, None, poison(1, dtype=torch.int64))
    assert_exact(
        host([4, 0, 7, 0, 0], torch.empty(0, 7), None, None, None, torch.empty(0, dtype=torch.int64))[0],
        torch.empty(0, 7),
    )


# -- on a GPU ---------------------------------------------------------------------------------------------------------


def why_no_gpu():
    if missing := _extension.why_missing():
        return missing
    if reason := _extension.native().build_info()["why_no_cuda"]:
        return f"the native module was built without CUDA: {reason}"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


needs_gpu = pytest.mark.skipif(why_no_gpu() is not None, reason=str(why_no_gpu()))


def on_gpu(case):
    return SimpleNamespace(**{n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in vars(case).items()})


def gpu_forward(case, dtype):
    logits = case.logits.clone()
    out = SimpleNamespace(
        weights=results(logits, dtype),
        stats=logits.new_empty(case.R, 4),
        kl=logits.new_empty(case.R),
        codes=case.target.new_empty(case.R),
    )
    cuda_rows.gumbel_forward(
        logits, case.bias, case.seed, case.first_row, case.tau, dtype, True, out.stats, out.kl, out.codes,
        seed_per_row=case.per_row,
    )  # fmt: skip
    return out


def gpu_sample(case, temperature):
    codes = case.target.new_empty(case.R)
    seed = None if temperature is None else case.seed
    cuda_rows.sample_rows(case.logits, case.bias, seed, case.first_row, temperature, codes, seed_per_row=case.per_row)
    return codes


def gpu_cross_entropy(case, dtype, row_weight):
    logits, loss = case.logits.clone(), case.logits.new_empty(case.R)
    cuda_rows.cross_entropy_rows(logits, case.bias, case.target, -100, row_weight, dtype, loss)
    return loss, None if row_weight is None else results(logits, dtype)


# There products and sums are fused and noise differs in its last places: so the noisy logits, by `units` of theirs, and
# what depends on them by that over tau. Exponentials below 2^-126 are 0, so what they are multiplied with is lost.
FLUSHED = 2.0**-118


@needs_gpu
@pytest.mark.parametrize("R, K, dtype", CASES)
def test_forward_and_backward_on_a_gpu(R, K, dtype):
    for options in ({}, {"per_row": True, "bias": False, "tau": 1 / 16}, {"first_row": HUGE_ROW, "tau": 4.0}):
        case = make_case(R, K, **options)
        g = noise.gumbel_of_words(words_of_case(case), torch.float64)
        true = truth(case, g.float())
        blur = 1 + (8 * (1 + true.t.abs().max()) / case.tau).item()
        case = on_gpu(case)
        out = gpu_forward(case, dtype)
        stats, codes = out.stats.cpu(), out.codes.cpu()
        assert_exact(stats[:, 0], true.max_logit)
        assert_near("max_noisy", stats[:, 2], true.max_noisy.double(), 1 + true.max_noisy.abs().double(), 8)
        assert_exact(codes, true.codes)
        assert_near("sum", stats[:, 1], true.sum, true.sum, 8)
        kl_size = 1 + (true.p * true.log_p_k.abs()).sum(-1) + true.sum.log() + math.log(K)
        assert_near("kl", out.kl.cpu(), true.kl, kl_size, 4)
        assert_near("weights", out.weights.cpu(), true.weights, true.weights * (blur - true.exponent), 4, FLUSHED)
        assert_near("sum_noisy", stats[:, 3], true.sum_noisy, true.sum_noisy * blur, 16)
        for grad_kl in (case.grad_kl, None):
            logits, y = case.logits.clone(), case.grad_weights.to(dtype, copy=True)
            cuda_rows.gumbel_backward(
                logits, case.bias, case.seed, case.first_row, case.tau, out.stats, out.kl, grad_kl, y,
                seed_per_row=case.per_row,
            )  # fmt: skip
            grad = results(logits, dtype)
            cpu_case = SimpleNamespace(grad_weights=case.grad_weights.cpu(), tau=case.tau.cpu())
            exact, size = true_gradient(cpu_case, true, None if grad_kl is None else grad_kl.cpu(), dtype)
            assert_near("y", y.cpu(), true.y, true.y * (blur - true.exponent), 24, FLUSHED)
            assert_near("grad_logits", grad.cpu(), exact, size * blur, 24, FLUSHED)


@needs_gpu
@pytest.mark.parametrize("K", SIZES)
def test_samples_on_a_gpu(K):
    for options in ({}, {"per_row": True, "bias": False}, {"first_row": HUGE_ROW}):
        case = make_case(200, K, **options)
        z = truth(case, 0).z.double()
        noisy = z + noise.gumbel_of_words(words_of_case(case), torch.float64)
        case = on_gpu(case)
        for temperature, expected in ((torch.ones(1, device="cuda"), noisy), (None, z)):
            codes = gpu_sample(case, temperature).cpu()
            assert (expected.gather(-1, codes[:, None])[:, 0] >= expected.amax(-1) - 1e-5).all()


@needs_gpu
@pytest.mark.parametrize("R, K, dtype", CASES)
def test_cross_entropy_on_a_gpu(R, K, dtype):
    case = make_case(R, K)
    true = truth(case, 0)
    exact = math.log(K) - true.log_p_k.gather(-1, case.target[:, None])[:, 0]
    onehot = torch.nn.functional.one_hot(case.target, K)
    gpu = on_gpu(case)
    for row_weight in (None, case.row_weight, case.row_weight[:1]):
        weight_there = None if row_weight is None else row_weight.cuda()
        loss, grad = gpu_cross_entropy(gpu, dtype, weight_there)
        assert_near("loss", loss.cpu(), exact, 1 + exact, 4)
        if row_weight is not None:
            weight = row_weight.double()[:, None]
            exponent = (true.z - true.max_logit[:, None]).double().clamp(min=-200)
            size = weight * (true.p * (1 - exponent) + onehot)
            assert_near("grad_logits", grad.cpu(), weight * (true.p - onehot), size, 16)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", SIZES)
def test_sums_of_columns_on_a_gpu(K, dtype):
    columns = results(torch.empty(200, K, device="cuda"), dtype)
    columns.copy_(torch.randn(200, K))
    exact, size = 2 * columns.double().sum(0), 2 * columns.double().abs().sum(0)

    def twice_the_sums():
        totals = torch.full((cuda.BIAS_TOTALS, K), math.nan, device="cuda")
        for begun in (False, True):
            cuda_rows.add_columns(totals, columns, begun)
        return cuda_rows.sum_totals(totals, dtype)

    assert_near("sums", twice_the_sums(), exact, size, 8)
    assert_exact(twice_the_sums(), twice_the_sums())


@needs_gpu
@pytest.mark.parametrize("R, K, dtype", CASES)
def test_gumbel_softmax_on_a_gpu(R, K, dtype):
    for tau in (1.0, 1 / 16):
        case = make_case(R, K, bias=False, tau=tau)
        case.logits = case.logits.to(dtype)
        true = truth(case, noise.gumbel_of_words(words_of_case(case), torch.float32))
        blur = 1 + (8 * (1 + true.t.abs().max()) / case.tau).item()
        out, codes = cuda.gumbel_softmax(case.logits.cuda(), tau, case.seed.cuda())
        assert_near("out", out.cpu(), true.y, true.y * (blur - true.exponent), 24, FLUSHED)
        assert_exact(codes.cpu(), true.codes)


@needs_gpu
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("codes", [ALL, [999]])
def test_a_bad_row_stays_alone_on_a_gpu(bad, codes):
    case = make_case(3, 1000)
    clean = gpu_forward(on_gpu(case), torch.bfloat16)
    case.logits[1, codes] = bad
    out = gpu_forward(on_gpu(case), torch.bfloat16)
    assert out.kl[1].isnan() and 0 <= out.codes[1] < 1000
    for name, expected in vars(clean).items():
        assert_exact(getattr(out, name)[[0, 2]], expected[[0, 2]])


@needs_gpu
def test_targets_that_are_no_code_on_a_gpu():
    case = on_gpu(make_case(4, 1000))
    case.target = torch.tensor([-100, 1000, -1, 5], device="cuda")
    loss, grad = gpu_cross_entropy(case, torch.float32, case.row_weight)
    assert loss[0] == 0 and loss[1:3].isnan().all() and loss[3].isfinite()
    assert (grad[0] == 0).all() and grad[1:3].isnan().all() and grad[3].isfinite().all()


@needs_gpu
def test_a_cuda_graph_replays_with_other_seeds_and_another_tau():
    """Capturing fails if anything waits for the device."""
    case = on_gpu(make_case(8, 1000))
    one = torch.ones(1, device="cuda")

    def calls():
        out = gpu_forward(case, torch.bfloat16)
        return *vars(out).values(), gpu_sample(case, one)

    calls()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = calls()
    for seed, tau in ((1, 0.5), (2, 2.0)):
        case.seed.fill_(seed)
        case.tau.fill_(tau)
        graph.replay()
        for actual, expected in zip(captured, calls(), strict=True):
            assert_exact(actual, expected)


def a_pass_of_each_kind(dtype, device):
    """Calls of all that goes by chunks, in a few of them, and the tensors that the kernels read their numbers from."""
    generator = torch.Generator().manual_seed(0)
    sizes = (2100, 24), (8192, 24), (8192,), (8192, 12), (2100, 12)
    tensors = [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]
    hidden, weight, bias, codebook, grad_embedding = tensors
    tau, seed = torch.full((1,), 0.7, device=device), torch.full((1,), 5, device=device)
    target, row_weight = torch.arange(2100, device=device), torch.full((1,), 0.1, device=device)
    inputs = hidden, weight, bias, codebook, tau, seed

    def calls():
        results = []
        for hard in (False, True):
            embedding, kl, codes, stats = cuda.gumbel_codebook(*inputs, False, hard)
            rest = kl, codes, stats, False, hard, (True,) * 4
            gradients = cuda.gumbel_codebook_backward(grad_embedding, kl, *inputs, *rest)
            results += [embedding, kl, codes, stats, *gradients]
        results.append(cuda.sample(hidden, weight, bias, tau, seed, False))
        return *results, *cuda.cross_entropy(hidden, weight, bias, target, -100, row_weight, (True,) * 3)

    return calls, tau, seed


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cuda_graph_holds_all_chunks_on_a_gpu(dtype):
    """And every result has the same bits again."""
    calls, tau, seed = a_pass_of_each_kind(dtype, "cuda")
    calls()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = calls()
    for number, value in ((1, 0.5), (2, 2.0)):
        seed.fill_(number)
        tau.fill_(value)
        graph.replay()
        for actual, expected in zip(captured, calls(), strict=True):
            assert_exact(actual, expected)


@needs_gpu
@pytest.mark.parametrize("allow_tf32", [False, True])
def test_torchs_handle_is_as_it_was_on_a_gpu(monkeypatch, allow_tf32):
    """A product of torch's has the same bits before and after, whatever was set for ours."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", allow_tf32)
    a, b = torch.randn(512, 4096, device="cuda"), torch.randn(4096, 512, device="cuda")
    halves = a.bfloat16(), b.bfloat16()
    before = a @ b, halves[0] @ halves[1]
    calls, *_ = a_pass_of_each_kind(torch.bfloat16, "cuda")
    calls()
    for actual, expected in zip((a @ b, halves[0] @ halves[1]), before, strict=True):
        assert_exact(actual, expected)


# -- who can be served ------------------------------------------------------------------------------------------------


def test_matrices_whose_rows_lie_too_far_apart_for_blas_are_copied():
    def matrix(*strides):
        return torch.empty(1, device="meta").as_strided((2, 8), strides)

    near = matrix(2**31 - 1, 1)
    assert cuda._for_blas(near) is near
    for far in (matrix(2**31, 1), matrix(1, 2**32)):
        assert cuda._for_blas(far).stride() == (8, 1)


def test_rows_of_a_chunk():
    for row_bytes, gradients, rows in (
        (6 * 8192, True, 512),  # gumbel_codebook_backward in 16 bits
        (8 * 8192, True, 384),
        (4 * 8192, True, 768),
        (4 * 8192, False, 1024),
        (4 * 100_000, False, 80),
        (4 << 28, False, 16),
    ):
        assert cuda.chunk_rows(row_bytes, gradients=gradients) == rows


def test_every_reason_why_it_cannot_serve():
    hidden, table = torch.zeros(2, cuda.MAX_DIN + 1, dtype=torch.float64), torch.zeros(3, cuda.MAX_D + 1)
    reasons = " | ".join(cuda.why_not({"hidden": hidden, "bias": None, "codebook": table}))
    for reason in (
        "needs CUDA tensors, got hidden on cpu",
        "hidden of torch.float64",
        "Din is at most",
        "D is at most",
    ):
        assert reason in reasons


def test_a_torch_for_rocm_is_a_reason(monkeypatch):
    """Its GPUs are "cuda" too, and their compute capability is not below 8.0."""
    monkeypatch.setattr(torch.version, "hip", "7.1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    tensor = SimpleNamespace(
        device=torch.device("cuda", 0), dtype=torch.float32, shape=(1, 8), is_floating_point=lambda: True
    )
    assert "its kernels are for NVIDIA GPUs, and this torch is built for ROCm" in cuda.why_not({"hidden": tensor})


def test_an_older_driver_is_a_reason(monkeypatch):
    monkeypatch.setattr(_extension, "why_no_cuda", lambda: "the driver is older")
    assert "the driver is older" in cuda.why_not({"hidden": torch.zeros(1, 8)})


@pytest.mark.skipif(
    _extension.why_missing() is not None or _extension.native().build_info()["cuda"] is None,
    reason="the native module has no CUDA kernels",
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, so launches succeed")
@pytest.mark.parametrize("dtype", DTYPES)
def test_launches_without_a_driver_are_runtime_errors(monkeypatch, dtype):
    """What Python passes reaches the launchers: all of them get as far as CUDA."""
    monkeypatch.setattr(cuda, "_stream", lambda: 0)
    monkeypatch.setattr(cuda_rows, "_stream", lambda: 0)
    case, stats, kl = make_case(2, 70), torch.zeros(2, 4), torch.zeros(2)
    seeds = {"seed_per_row": False}
    for name, call in {
        "gumbel_forward": lambda: gpu_forward(case, dtype),
        "gumbel_backward": lambda: cuda_rows.gumbel_backward(
            case.logits, case.bias, case.seed, 0, case.tau, stats, kl, None, case.grad_weights.to(dtype), **seeds
        ),
        "sample": lambda: gpu_sample(case, case.tau),
        "cross_entropy": lambda: gpu_cross_entropy(case, dtype, case.row_weight),
        "add_columns": lambda: cuda_rows.add_columns(torch.zeros(2, 70), results(case.logits, dtype), True),
        "sum_totals": lambda: cuda_rows.sum_totals(torch.zeros(2, 70), dtype),
        "gumbel_softmax": lambda: cuda.gumbel_softmax(case.logits.to(dtype), 1.0, case.seed),
    }.items():
        with pytest.raises(RuntimeError, match=f"launching {name}_kernel: cudaError"):
            call()


@pytest.mark.skipif(
    _extension.why_missing() is not None or _extension.native().build_info()["cuda"] is None,
    reason="the native module has no CUDA kernels",
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, and a handle of 0 is torch's to check")
def test_a_pass_asks_torchs_cublas(monkeypatch):
    """Which is found where torch has brought it, and has something against the handle 0."""
    monkeypatch.setattr(cuda, "_stream", lambda: 0)
    monkeypatch.setattr(cuda, "_blas", lambda: 0)
    reason = "returned cublasStatus_t 1" if torch.version.cuda else "no cublas[A-Za-z]* in this process"
    for call in (cuda.sample, lambda *args: cuda.gumbel_codebook(*args[:3], args[1], *args[3:], False)):
        with pytest.raises(RuntimeError, match=reason):
            call(torch.ones(2, 3), torch.ones(70, 3), None, torch.ones(1), torch.ones(1, dtype=torch.int64), False)
