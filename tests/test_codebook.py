"""The codebook operation is what float64 says it is: for every size, stride, temperature, and for rows that are broken.

N rows, K codes, I size of hidden (Din), D size of an embedding.
"""

import itertools
import math

import pytest
import torch

from dalle_fast.nn import functional as F
from dalle_fast.ops.codebook import cpu, cuda
from dalle_fast.ops.codebook.noise import gumbel_noise
from dalle_fast.ops.codebook.op import logits_of, sample_of_logits, truncated
from dalle_fast.ops.codebook.truncation import truncated as by_sorting
from dalle_fast.testing import (
    assert_as_exact_as_eager,
    codebook_noise,
    codebook_oracle,
    codebook_terms,
    eager_codebook,
    nan_poisoned,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SEED = 2**40 + 12345
# (N, K, I, D): one code, around the tile of 64 codes, several tiles, no row, one row, several chunks.
SIZES = [
    (7, 1, 3, 24),
    (300, 2, 1, 1),
    (7, 63, 50, 24),
    (1, 64, 3, 128),
    (300, 65, 50, 24),
    (7, 100, 512, 128),
    (0, 100, 3, 24),
    (1, 1000, 50, 1),
    (40, 1000, 512, 24),
    (7, 8192, 50, 128),
]
INPUTS = ("hidden", "weight", "bias", "codebook")


def smallest_chunks(monkeypatch):
    """From here on chunks have 16 rows, on every device."""
    for rows, name in ((cpu, "CHUNK_BYTES"), (cuda, "FORWARD_BYTES"), (cuda, "BACKWARD_BYTES")):
        monkeypatch.setattr(rows, name, 1)


def inputs(N, K, I, D, dtype=torch.float32, device="cpu", *, bias=True, spread=1.0, seed=0):
    """hidden, weight, bias and codebook that make logits with a standard deviation of about 2 * `spread`."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((N, I), 1.0), ((K, I), spread * math.sqrt(3 / I)), ((K,), spread), ((K, D), 1.0)
    made = [(torch.randn(shape, generator=generator) * scale).to(device, dtype) for shape, scale in sizes]
    if not bias:
        made[2] = None
    return made


def float32_eager(tensors, *rest):
    """Eager embedding and kl with logits in float32 as every implementation has them: the yardstick for all dtypes."""
    return eager_codebook(*(None if x is None else x.float() for x in tensors), *rest)


def check_codes(codes, exact, sizes, K):
    """Every code is the largest of `exact` noisy logits, but for rounding of terms as large as `sizes`."""
    assert codes.dtype == torch.int64 and ((codes >= 0) & (codes < K)).all()
    behind = exact.amax(-1) - exact.gather(-1, codes[:, None])[:, 0]
    allowed = 4 * torch.finfo(torch.float32).eps * sizes.amax(-1)
    assert (behind <= allowed).all(), f"a code is {float(behind.max()):.3g} behind the largest"
    if len(codes) >= 40 and exact.shape[1] > 1:  # ties are rare in these inputs
        assert (codes == exact.argmax(-1)).float().mean() > 0.98


def check(serve, tensors, tau=1.0, *, seed=SEED):
    """Compare embedding, kl and codes, soft and hard, with the oracle's; returns the soft output."""
    hidden, weight, _, codebook = tensors
    N, K = hidden.shape[0], weight.shape[0]
    noise = codebook_noise(seed, N, K).to(hidden.device)
    with nan_poisoned():
        out = serve.gumbel_codebook(*tensors, tau, seed=seed)
        hard = serve.gumbel_codebook(*tensors, tau, seed=seed, hard=True)
    exact, exact_kl, _ = codebook_oracle(*tensors, tau, noise)
    assert out.embedding.shape == exact.shape and out.embedding.dtype == hidden.dtype
    assert out.kl.dtype == torch.float32 and out.kl.shape == (N,)
    of_embedding, of_kl, sizes = codebook_terms(*tensors, tau, noise)
    if N:
        eager, eager_kl, _ = float32_eager(tensors, tau, noise.float())
        assert_as_exact_as_eager("embedding", out.embedding, eager.to(hidden.dtype), exact, terms=of_embedding)
        assert_as_exact_as_eager("kl", out.kl, eager_kl, exact_kl, terms=of_kl)
        noisy = torch.nn.functional.linear(*(None if x is None else x.double() for x in tensors[:3])) + noise
        check_codes(out.codes, noisy, sizes, K)
        assert (out.kl >= -5e-6).all()
    assert torch.equal(hard.codes, out.codes) and torch.equal(hard.kl, out.kl)
    assert torch.equal(hard.embedding, codebook[hard.codes])
    return out


# -- forward -----------------------------------------------------------------------------------------------------------


def test_cpu_kernels_serve_here(recwarn):
    tensors = inputs(50, 100, 16, 8)
    assert cpu.why_not(dict(zip(INPUTS, tensors, strict=True))) == []
    auto, named = (F.gumbel_codebook(*tensors, 0.5, seed=1, impl=impl) for impl in ("auto", "cpu"))
    reference = F.gumbel_codebook(*tensors, 0.5, seed=1, impl="reference")
    assert torch.equal(auto.embedding, named.embedding)
    assert not torch.equal(auto.embedding, reference.embedding)  # so the two differ in who computes
    assert not recwarn.list


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_size(serve, sizes, dtype):
    for bias in (True, False):
        check(serve, inputs(*sizes, dtype, serve.device, bias=bias))


def test_many_rows_of_8192_codes(serve):
    """Enough rows for several chunks, as they are in use."""
    assert 1100 > max(cpu.chunk_rows(8192), cuda.chunk_rows(4 * 8192, gradients=False))
    check(serve, inputs(1100, 8192, 3, 24, device=serve.device), 0.7)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_argmax_and_sample(serve, sizes):
    N, K = sizes[:2]
    for dtype in DTYPES:
        hidden, weight, bias, codebook = inputs(*sizes, dtype, serve.device)
        noise = codebook_noise(SEED, N, K).to(serve.device)
        terms = codebook_terms(hidden, weight, bias, codebook, 1.0, noise)[2]
        for b in (bias, None):
            logits = torch.nn.functional.linear(*(None if x is None else x.double() for x in (hidden, weight, b)))
            with nan_poisoned():
                argmax = serve.codebook_argmax(hidden, weight, b)
                cold = serve.codebook_sample(hidden, weight, b, temperature=0, seed=SEED)
            check_codes(argmax, logits, terms, K)
            assert torch.equal(cold, argmax)
            assert torch.equal(serve.codebook_sample(hidden, weight, b, temperature=torch.zeros(())), argmax)
            for temperature in (1.0, 0.3, 4):
                with nan_poisoned():
                    codes = serve.codebook_sample(hidden, weight, b, temperature=temperature, seed=SEED)
                check_codes(codes, logits + temperature * noise, terms * max(1, temperature), K)
        sampled = serve.codebook_sample(hidden, weight, bias, seed=SEED)
        assert torch.equal(sampled, serve.gumbel_codebook(hidden, weight, bias, codebook, 0.5, seed=SEED).codes)


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_cross_entropy(serve, sizes):
    N, K = sizes[:2]
    target = torch.randint(K, (N,), generator=torch.Generator().manual_seed(1)).to(serve.device)
    target[1:2] = -100
    for dtype in DTYPES:
        hidden, weight, bias, codebook = inputs(*sizes, dtype, serve.device)
        for b in (bias, None):
            wide = [None if x is None else x.double() for x in (hidden, weight, b)]
            exact = torch.nn.functional.cross_entropy(torch.nn.functional.linear(*wide), target, reduction="none")
            eager_logits = torch.nn.functional.linear(*(None if x is None else x.float() for x in (hidden, weight, b)))
            eager = torch.nn.functional.cross_entropy(eager_logits, target, reduction="none")
            with nan_poisoned():
                loss = serve.codebook_cross_entropy(hidden, weight, b, target, reduction="none")
            assert loss.shape == (N,) and loss.dtype == torch.float32
            if N:
                terms = codebook_terms(hidden, weight, b, codebook, 1.0, torch.zeros_like(exact)[:, None])[2].amax(-1)
                assert_as_exact_as_eager("loss", loss, eager, exact, terms=terms)
            assert (loss[target == -100] == 0).all()


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [1, 2, 63, 64, 65, 100, 1000, 8192])
def test_gumbel_softmax(serve, K, dtype):
    logits = inputs(7, K, 3, 1, dtype)[0] @ inputs(7, K, 3, 1, dtype)[1].T
    logits = logits.to(serve.device)
    noise = codebook_noise(SEED, 7, K).to(serve.device)
    for tau in (1.0, 0.25):
        with nan_poisoned():
            soft = serve.gumbel_softmax(logits, tau, seed=SEED)
            hard = serve.gumbel_softmax(logits, tau, True, seed=SEED)
        exact = torch.softmax((logits.double() + noise) / tau, -1)
        eager = torch.softmax((logits.float() + noise.float()) / tau, -1).to(dtype)
        sizes = logits.double().abs() + noise.abs()
        ratio = torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
        terms = exact * (1 + ratio * (sizes + (exact * sizes).sum(-1, keepdim=True)) / tau)
        smallest = torch.finfo(dtype).smallest_normal  # below it float16 has fewer digits, and the CPU's exp2 ends
        assert_as_exact_as_eager("soft", soft, eager, exact, terms=terms + smallest)
        assert soft.dtype == hard.dtype == dtype
        assert torch.equal(hard != 0, hard == hard.amax(-1, keepdim=True)) and (hard.count_nonzero(-1) == 1).all()
        assert ((hard.amax(-1) - 1).abs() <= 2 * torch.finfo(dtype).eps).all()
        check_codes(hard.argmax(-1), logits.double() + noise, sizes, K)


def test_gumbel_softmax_says_as_torch_does_that_eps_has_no_effect():
    for softmax in (torch.nn.functional.gumbel_softmax, F.gumbel_softmax):
        with pytest.warns(UserWarning) as said:
            softmax(torch.zeros(2, 3), eps=1e-5)
        assert [str(x.message) for x in said] == ["`eps` parameter is deprecated and has no effect."]
        assert said[0].filename == __file__


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_gumbel_softmax_along_any_dimension(serve, dim):
    logits = inputs(3, 5 * 7, 4, 1)[1].T.reshape(4, 5, 7).to(serve.device)
    soft = serve.gumbel_softmax(logits, 0.5, seed=3, dim=dim)
    rows = logits.movedim(dim, -1)
    expected = serve.gumbel_softmax(rows.reshape(-1, rows.shape[-1]), 0.5, seed=3)
    assert torch.equal(soft.movedim(dim, -1).reshape(expected.shape), expected) and soft.shape == logits.shape
    assert serve.gumbel_softmax(logits[:, :0], seed=3, dim=2).shape == (4, 0, 7)


def test_hidden_without_features(serve):
    """Din = 0: the logits are the bias."""
    hidden, weight, bias, codebook = inputs(7, 100, 1, 5, device=serve.device)
    out = serve.gumbel_codebook(hidden[:, :0], weight[:, :0], bias, codebook, 0.5, seed=SEED)
    expected = serve.gumbel_codebook(hidden * 0, weight, bias, codebook, 0.5, seed=SEED)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    assert (serve.codebook_argmax(hidden[:, :0], weight[:, :0], bias) == bias.argmax()).all()
    assert serve.gumbel_codebook(hidden, weight, bias, codebook[:, :0], 0.5).embedding.shape == (7, 0)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0, 4)], ids=str)
def test_leading_shapes(serve, leading):
    hidden, weight, bias, codebook = inputs(math.prod(leading), 100, 5, 24, device=serve.device)
    flat = serve.gumbel_codebook(hidden, weight, bias, codebook, 0.5, seed=SEED)
    shaped = hidden.reshape(*leading, 5)
    out = serve.gumbel_codebook(shaped, weight, bias, codebook, 0.5, seed=SEED)
    assert out.embedding.shape == (*leading, 24) and out.kl.shape == out.codes.shape == leading
    for a, b in zip(out, flat, strict=True):
        assert torch.equal(a.reshape(b.shape), b)
    seeds = torch.arange(math.prod(leading), device=serve.device).reshape(leading)
    assert serve.codebook_sample(shaped, weight, bias, seed=seeds).shape == leading
    assert serve.codebook_argmax(shaped, weight).shape == leading
    target = torch.zeros(leading, dtype=torch.int64, device=serve.device)
    assert serve.codebook_cross_entropy(shaped, weight, bias, target, reduction="none").shape == leading


def strided(x, how):
    """`x` (rows, columns) or (rows,), or something of its shape, with unusual strides."""
    if how == "transposed":
        return x.T.contiguous().T if x.dim() == 2 else x.flip(0).contiguous().flip(0)
    if how == "last sliced":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    if how == "rows sliced":
        return torch.stack([x, torch.full_like(x, torch.nan)], 1)[:, 0]
    if how == "misaligned":
        return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)
    if how == "expanded rows":
        return x[:1].expand(x.shape)
    if how == "expanded columns":
        return x[..., :1].expand(x.shape) if x.dim() == 2 else x[:1].expand(x.shape)
    assert how == "zero strides"
    return x.flatten()[0].expand(x.shape)


HOW = (
    "transposed",
    "last sliced",
    "rows sliced",
    "misaligned",
    "expanded rows",
    "expanded columns",
    "zero strides",
)


@pytest.mark.parametrize("how", HOW)
def test_every_stride(serve, how):
    for dtype in DTYPES:
        plain = inputs(37, 130, 20, 12, dtype, serve.device)
        for changed in ((0,), (1,), (2,), (3,), (0, 1, 2, 3)):
            check(serve, [strided(x, how) if n in changed else x for n, x in enumerate(plain)], 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_equal_the_whole(serve, monkeypatch, dtype):
    """Chunks of 16 rows, the last of one row: codes as in one chunk; the rest to rounding, as products go."""
    if serve.impl == "reference":
        pytest.skip("the reference has no chunks")
    tensors = inputs(49, 100, 20, 24, dtype, serve.device)
    target = torch.arange(49, device=serve.device)
    seeds = torch.arange(49, device=serve.device) * 7

    def everything():
        loss = serve.codebook_cross_entropy(*tensors[:3], target, reduction="none")
        codes = [serve.codebook_sample(*tensors[:3], seed=seed) for seed in (SEED, seeds)]
        return [
            *serve.gumbel_codebook(*tensors, 0.5, seed=seeds)[2:],
            *codes,
            serve.codebook_argmax(*tensors[:3]),
        ], loss

    whole, whole_loss = everything()
    smallest_chunks(monkeypatch)
    parts, parts_loss = everything()
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    torch.testing.assert_close(parts_loss, whole_loss, rtol=1e-5, atol=1e-5)
    check(serve, tensors, 0.5)
    check(serve, tensors, 0.5, seed=seeds)


# -- temperatures and magnitudes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [4.0, 1.0, 0.5, 1 / 16, 1e-3, 1e-30])
def test_every_tau(serve, tau):
    for dtype in DTYPES:
        tensors = inputs(40, 100, 20, 24, dtype, serve.device)
        out = check(serve, tensors, tau)
        for as_tensor in (torch.tensor(tau), torch.tensor(tau, dtype=torch.float64)):
            assert torch.equal(serve.gumbel_codebook(*tensors, as_tensor, seed=SEED).embedding, out.embedding)
        assert torch.equal(
            serve.gumbel_codebook(*tensors, torch.tensor(tau, device=serve.device), seed=SEED).embedding, out.embedding
        )
        if tau == 1e-30:
            assert torch.equal(out.embedding, tensors[3][out.codes])


@pytest.mark.parametrize("tau", [1e-45, 1e-38, 1e30, 1e38, 1e300])
def test_extreme_tau(serve, tau):
    """What has no inverse in float32, or is no float32: one hot or uniform, never NaN."""
    hidden, weight, bias, codebook = inputs(5, 100, 20, 24, device=serve.device)
    bias[3] = -torch.inf
    out = serve.gumbel_codebook(hidden, weight, bias, codebook, tau, seed=SEED)
    if tau < 1:
        assert torch.equal(out.embedding, codebook[out.codes])
    else:
        assert out.embedding.isfinite().all()
        uniform = torch.cat([codebook[:3], codebook[4:]]).mean(0).expand_as(out.embedding)
        torch.testing.assert_close(out.embedding, uniform, rtol=1e-4, atol=1e-5)
    soft = serve.gumbel_softmax(hidden @ weight.T + bias, tau, seed=SEED)
    assert soft.isfinite().all()
    torch.testing.assert_close(soft.sum(-1), torch.ones(5, device=serve.device))
    codes = serve.codebook_sample(hidden, weight, bias, temperature=tau, seed=SEED)
    assert (codes != 3).all()


@pytest.mark.parametrize("tau", [4.0, 1.0, 1 / 16, 1e-3, 1e-30])
@pytest.mark.parametrize("spread", [30.0, 1200.0])
def test_large_logits(serve, tau, spread):
    """Logits up to 1e4 in magnitude; in half precision too, where hidden and weight can make them."""
    for dtype in DTYPES:
        tensors = inputs(40, 100, 20, 24, dtype, serve.device, spread=spread)
        out = check(serve, tensors, tau)
        assert out.embedding.isfinite().all() and out.kl.isfinite().all()
        loss = serve.codebook_cross_entropy(*tensors[:3], out.codes, reduction="none")
        assert loss.isfinite().all() and (loss >= 0).all()
    logits = torch.nn.functional.linear(*inputs(40, 100, 20, 24, spread=spread)[:3])
    assert spread < 1000 or 5e3 < logits.abs().max() < 2e4


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [3, 64, 65, 200])
def test_codes_ruled_out_by_the_bias(serve, K, dtype):
    hidden, weight, bias, codebook = inputs(40, K, 20, 24, dtype, serve.device)
    bias[::2] = -torch.inf
    for tau in (1.0, 1 / 16, 1e-30):
        out = check(serve, [hidden, weight, bias, codebook], tau)
        assert (out.codes % 2 == 1).all() and out.embedding.isfinite().all() and out.kl.isfinite().all()
    for codes in (
        serve.codebook_argmax(hidden, weight, bias),
        serve.codebook_sample(hidden, weight, bias, seed=1),
        serve.codebook_sample(hidden, weight, bias, temperature=50.0, seed=1),
    ):
        assert (codes % 2 == 1).all()
    loss = serve.codebook_cross_entropy(hidden, weight, bias, out.codes, reduction="none")
    assert loss.isfinite().all()
    loss = serve.codebook_cross_entropy(hidden, weight, bias, out.codes - 1, reduction="none")
    assert (loss == torch.inf).all()
    odd = hidden, weight[1::2], bias[1::2]
    exact = codebook_oracle(*odd, codebook[1::2], 1.0, torch.zeros(1, K // 2, device=serve.device))[1]
    torch.testing.assert_close(out.kl.double(), exact + math.log(K / (K // 2)), rtol=1e-5, atol=1e-5)


# -- KL --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [1, 2, 65, 1000, 8192])
def test_kl_is_never_below_rounding(serve, K):
    generator = torch.Generator().manual_seed(0)
    for scale in (0.0, 1e-6, 1e-3, 0.1, 10.0, 1e4):
        weight = torch.zeros(K, 5, device=serve.device)
        for shift in (0.0, 1e4):
            bias = (torch.randn(K, generator=generator) * scale + shift).to(serve.device)
            hidden = torch.zeros(5, 5, device=serve.device)
            kl = serve.gumbel_codebook(hidden, weight, bias, bias[:, None], 1.0, seed=0).kl
            assert (kl >= -5e-6).all() and (kl <= math.log(K) + 1e-5).all()
            if scale == 0:
                assert (kl.abs() <= 5e-6).all()


def test_kl_of_one_certain_code_is_log_of_the_number_of_codes(serve):
    for K in (2, 65, 8192):
        bias = torch.zeros(K, device=serve.device)
        bias[K // 2] = 1e4
        zeros = torch.zeros(3, 1, device=serve.device), torch.zeros(K, 1, device=serve.device)
        kl = serve.gumbel_codebook(*zeros, bias, zeros[1], 1.0, seed=0).kl
        torch.testing.assert_close(kl, torch.full_like(kl, math.log(K)))


def test_kl_of_a_row_does_not_depend_on_its_batch(serve):
    tensors = inputs(300, 1000, 50, 8, device=serve.device)
    whole = serve.gumbel_codebook(*tensors, 1.0, seed=0).kl
    for rows in (slice(0, 1), slice(0, 7), slice(123, 200), slice(299, 300)):
        part = serve.gumbel_codebook(tensors[0][rows], *tensors[1:], 1.0, seed=5).kl
        torch.testing.assert_close(part, whole[rows], rtol=0, atol=5e-6)


# -- broken rows -----------------------------------------------------------------------------------------------------


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("K", [1, 63, 65, 200])
def test_a_broken_row_stays_alone(serve, K, what, dtype):
    hidden, weight, bias, codebook = inputs(23, K, 5, 24, dtype, serve.device)
    others = [n for n in range(23) if n not in (0, 9, 22)]
    soft = torch.nn.functional.linear(hidden, weight, bias)
    target = torch.arange(23, device=serve.device) % K

    def everything(hidden, soft):
        out = serve.gumbel_codebook(hidden, weight, bias, codebook, 0.5, seed=SEED)
        hard = serve.gumbel_codebook(hidden, weight, bias, codebook, 0.5, seed=SEED, hard=True)
        loss = serve.codebook_cross_entropy(hidden, weight, bias, target, reduction="none")
        sample, argmax = (
            serve.codebook_sample(hidden, weight, bias, seed=1),
            serve.codebook_argmax(hidden, weight, bias),
        )
        codes = [out.codes, hard.codes, sample, argmax]
        return codes, [out.embedding, out.kl, hard.kl, loss, serve.gumbel_softmax(soft, 0.5, seed=SEED)]

    clean_codes, clean_values = everything(hidden, soft)
    hidden, soft = hidden.clone(), soft.clone()
    hidden[0], hidden[9], hidden[22, 2] = what, what, what
    soft[0], soft[9], soft[22, K // 2] = what, what, what
    codes, values = everything(hidden, soft)
    for a, b in zip(codes, clean_codes, strict=True):
        assert torch.equal(a[others], b[others]) and ((a >= 0) & (a < K)).all()
    for n, (a, b) in enumerate(zip(values, clean_values, strict=True)):
        assert torch.equal(a[others], b[others])
        if n == 4 and what == -torch.inf and K > 1:  # a code that is ruled out breaks no softmax
            assert a[[0, 9]].isnan().all() and a[22].isfinite().all() and float(a[22, K // 2]) < 1e-30
        elif n == 3:  # -log p of an infinite logit is NaN or infinite, as torch's
            assert not a[[0, 9, 22]].isfinite().any()
        else:
            assert a[[0, 9, 22]].isnan().all(), (n, a[[0, 9, 22]])


@pytest.mark.parametrize("what", [torch.inf, -torch.inf], ids=str)
def test_every_logit_of_a_row_infinite(serve, what):
    """The same infinity in all codes: there is no largest one to subtract."""
    for K in (1, 64, 70):
        hidden, weight = torch.ones(3, 1, device=serve.device), torch.ones(K, 1, device=serve.device)
        hidden[1] = what
        out = serve.gumbel_codebook(hidden, weight, None, weight, 0.5, seed=0)
        assert out.embedding[1].isnan().all() and out.kl[1].isnan() and 0 <= out.codes[1] < K
        torch.testing.assert_close(out.embedding[[0, 2]], torch.ones(2, 1, device=serve.device))
        assert 0 <= serve.codebook_argmax(hidden, weight)[1] < K
        target = torch.zeros(3, dtype=torch.int64, device=serve.device)
        assert serve.codebook_cross_entropy(hidden, weight, None, target, reduction="none")[1].isnan()
        assert serve.gumbel_softmax(hidden * weight.T, seed=0)[1].isnan().all()


# -- the first of equals ---------------------------------------------------------------------------------------------


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("K", [1, 2, 63, 64, 65, 100, 200])
def test_argmax_is_the_first_of_equals(serve, K):
    """Row (i, j) has its largest logit at the codes i and j, for every pair."""
    i, j = torch.cartesian_prod(torch.arange(K), torch.arange(K)).T
    hidden = torch.zeros(K * K, K)
    hidden[torch.arange(K * K), i], hidden[torch.arange(K * K), j] = 1, 1
    codes = serve.codebook_argmax(hidden.to(serve.device), torch.eye(K, device=serve.device))
    assert torch.equal(codes.cpu(), torch.minimum(i, j))
    assert (serve.codebook_argmax(hidden[:5, :1].to(serve.device) * 0, torch.zeros(K, 1).to(serve.device)) == 0).all()


def test_code_range(serve):
    """The codes of a range as if the others did not exist, numbered as before."""
    hidden, weight, bias, _ = inputs(50, 200, 20, 8, device=serve.device)
    for start, stop in ((0, 200), (0, 1), (199, 200), (13, 150), (64, 128)):
        part = hidden, weight[start:stop], bias[start:stop]
        options = {"code_range": (start, stop)}
        codes = serve.codebook_argmax(hidden, weight, bias, **options)
        assert torch.equal(codes, serve.codebook_argmax(*part) + start)
        codes = serve.codebook_sample(hidden, weight, bias, seed=4, **options)
        assert torch.equal(codes, serve.codebook_sample(*part, seed=4) + start)
        loss = serve.codebook_cross_entropy(hidden, weight, bias, codes, **options)
        assert torch.equal(loss, serve.codebook_cross_entropy(*part, codes - start))
    for dtype in (torch.float16, torch.bfloat16):  # a range of the weight is a view that starts anywhere
        part = hidden.to(dtype), weight.to(dtype)
        codes = serve.codebook_argmax(*part, code_range=(13, 150))
        assert torch.equal(codes, serve.codebook_argmax(part[0], part[1][13:150].clone()) + 13)


# -- the same bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_every_time_and_with_any_number_of_threads(serve, assert_same_bits_with_any_threads, dtype):
    tensors = inputs(300, 500, 50, 24, dtype, serve.device)
    target = torch.arange(300, device=serve.device)

    def everything():
        out = serve.gumbel_codebook(*tensors, 0.5, seed=SEED)
        loss = serve.codebook_cross_entropy(*tensors[:3], target, reduction="none")
        sampled = serve.codebook_sample(*tensors[:3], seed=SEED)
        return [*out, loss, sampled, serve.gumbel_softmax(tensors[1], 0.5, seed=SEED)]

    assert all(torch.equal(a, b) for a, b in zip(everything(), everything(), strict=True))
    if serve.impl == "cpu":
        assert_same_bits_with_any_threads(everything, lambda: tensors[0] @ tensors[1].T)


def test_arguments_are_not_written(serve):
    tensors = inputs(40, 100, 20, 24, device=serve.device)
    tau, seed = torch.tensor(0.5, device=serve.device), torch.tensor(3, device=serve.device)
    target = torch.arange(40, device=serve.device)
    before = [x.clone() for x in (*tensors, tau, seed, target)]
    serve.gumbel_codebook(*tensors, tau, seed=seed)
    serve.codebook_sample(*tensors[:3], temperature=tau, seed=seed)
    serve.codebook_argmax(*tensors[:3])
    serve.codebook_cross_entropy(*tensors[:3], target)
    serve.gumbel_softmax(tensors[1], seed=seed)
    assert all(torch.equal(a, b) for a, b in zip(before, (*tensors, tau, seed, target), strict=True))


# -- logits that someone chooses from ----------------------------------------------------------------------------------


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 100, 33), (70, 130, 64), (3, 8192, 40)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_are_drawn_of_logits_as_of_their_factors(serve, dtype, sizes):
    """Of few and of many rows; and of none but those that are left, which is where top-k and top-p come from."""
    N, K, I = sizes
    hidden, weight, *_ = (x.to(serve.device) for x in inputs(N, K, I, 1, dtype))
    seeds = torch.arange(N, device=serve.device) * 977 - 5
    logits = logits_of(hidden, weight, impl=serve.impl)
    exact = hidden.double() @ weight.double().T
    assert logits.dtype == torch.float32 and logits.shape == (N, K)
    assert ((logits - exact).abs() <= 1e-6 * (hidden.double().abs() @ weight.double().abs().T) + 1e-30).all()
    noise = gumbel_noise(seeds, seeds.new_zeros(1), K)
    codes = sample_of_logits(logits, seeds, impl=serve.impl)
    check_codes(codes.cpu(), (exact + noise).cpu(), (exact.abs() + noise.abs()).cpu(), K)
    assert (codes == serve.codebook_sample(hidden, weight, seed=seeds)).float().mean() > 0.98
    left = (
        torch.arange(K, device=serve.device) % 7 == 3 if K > 3 else torch.ones(K, dtype=torch.bool, device=serve.device)
    )
    some = sample_of_logits(logits.masked_fill(~left, -torch.inf), seeds, impl=serve.impl)
    assert left[some].all()
    noisy = (exact + noise).masked_fill(~left, -1e30)
    check_codes(some.cpu(), noisy.cpu(), (exact.abs() + noise.abs()).cpu(), K)


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("K", [1, 2, 63, 64, 130, 1000, 8192])
def test_what_may_be_drawn(serve, K):
    """The same codes as by sorting, but where a probability's rounding decides; of equal ones the first, where we choose."""
    torch.manual_seed(K)
    for top_k, top_p, temperature in itertools.product(
        (None, 1, max(1, K // 3), K), (None, 1e-9, 0.5, 0.95, 1.0), (0.3, 2.0)
    ):
        logits = torch.randn(5, K, device=serve.device) * torch.tensor(
            [[0.1], [1], [4], [30], [1e4]], device=serve.device
        )
        logits[2, : K // 2] = -torch.inf  # forbidden by somebody before
        kept = truncated(logits.clone(), temperature, top_k, top_p, impl=serve.impl)
        expected = by_sorting(logits.double(), temperature, top_k, None)
        p = expected.softmax(-1)
        ordered, order = p.sort(descending=True)
        before = torch.empty_like(p).scatter(1, order, ordered.cumsum(-1) - ordered)
        limit = 2.0 if top_p is None or top_p == 1 else top_p
        stays, goes = (before < limit - 1e-5) & (expected > -torch.inf), before > limit + 1e-5
        stays.scatter_(1, order[:, :1], expected.amax(-1, keepdim=True) > -torch.inf)
        assert torch.isfinite(kept[stays]).all() and (kept[goes | (expected == -torch.inf)] == -torch.inf).all()
        finite = kept > -torch.inf
        torch.testing.assert_close(kept[finite].double(), expected[finite], rtol=1e-6, atol=1e-6)


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("K", [7, 64, 200])
def test_of_equal_codes_as_many_may_be_drawn_as_are_needed(serve, K):
    logits = torch.zeros(3, K, device=serve.device)
    logits[1, 5], logits[2] = 1.0, -torch.inf
    for top_k in (1, 3, K):
        kept = truncated(logits.clone(), 1.0, top_k, None, impl=serve.impl).isfinite()
        assert kept.sum(-1).tolist() == [top_k, top_k, 0] and kept[1, 5]
    kept = truncated(logits.clone(), 1.0, None, 0.5, impl=serve.impl).isfinite().sum(-1).tolist()
    assert kept[0] == -(-K // 2) and kept[2] == 0
    if serve.impl == "cpu":
        first = truncated(logits.clone(), 1.0, 3, None, impl=serve.impl).isfinite()
        assert first[0].nonzero()[:, 0].tolist() == [0, 1, 2] and first[1].nonzero()[:, 0].tolist() == [0, 1, 5]


NOT_ALL = [(9, None), (None, 0.8), (9, 0.8), (70, None), (None, 1.0)]


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("top_k, top_p", NOT_ALL)
def test_a_logit_that_is_nan_is_forbidden_and_the_others_are_as_without_it(serve, top_k, top_p):
    torch.manual_seed(0)
    logits = torch.randn(4, 70, device=serve.device)
    logits[2] = torch.arange(70, device=serve.device) * -0.1
    places = [0, 1, 2, 2], [3, int(logits[1].argmax()), 0, 60]
    logits[places] = -torch.inf
    without = truncated(logits.clone(), 0.7, top_k, top_p, impl=serve.impl)
    logits[places] = torch.nan
    kept = truncated(logits, 0.7, top_k, top_p, impl=serve.impl)
    assert torch.equal(kept, without) and (kept > -torch.inf).any(-1).all()


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("top_k, top_p", NOT_ALL)
def test_a_row_that_is_not_finite_is_the_only_one_that_it_changes(serve, top_k, top_p):
    logits = torch.randn(5, 70, device=serve.device)
    clean = truncated(logits.clone(), 0.7, top_k, top_p, impl=serve.impl)
    logits[1], logits[2, [7, 9]], logits[3] = torch.nan, torch.tensor([torch.inf, torch.nan]).to(logits), torch.inf
    kept = truncated(logits, 0.7, top_k, top_p, impl=serve.impl)
    assert torch.equal(kept[[0, 4]], clean[[0, 4]])
    codes = sample_of_logits(kept, torch.arange(5, device=serve.device), impl=serve.impl)
    assert ((codes >= 0) & (codes < 70)).all() and codes[2] == 7
