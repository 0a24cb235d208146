"""Triton's Gumbel-softmax codebook and all gradients, where no logits are in memory: interpreted, compiled, on a GPU.

The truth is `reference` in float64 on the same 16-bit numbers and the same noise. test_codebook_triton.py interprets
the cases of this file too, in its process.

N rows, K codes, I size of hidden, D size of an embedding.
"""

import functools
import math
import re
from types import SimpleNamespace

import pytest
import torch
from test_codebook_cuda import needs_gpu, on_gpu
from test_codebook_triton import HALVES, MOST_SPILLED, SIZES, compiled, interpreted

import dalle_fast.nn.functional as F
from dalle_fast import _extension
from dalle_fast.ops.codebook import op, reference
from dalle_fast.ops.codebook import triton as implementation

triton = pytest.importorskip("triton", reason="the package triton is not installed")

from dalle_fast.ops.codebook import gradients_triton, gumbel_triton, streaming_triton
from dalle_fast.ops.codebook.tiles_triton import Tiles

ALL = (True,) * 4
EMBEDDINGS = (16, 48, 128, 256)
# Of one range and of several; by addresses and by descriptors.
TILES = [
    Tiles(32, 64, 16, 4, 2, flat=False, described=False, splits=1),
    Tiles(64, 128, 64, 4, 2, flat=True, described=True, splits=3),
]


def make_case(N, K, I, D, dtype=torch.float16, *, bias=True, per_row=False, scale=2.0):
    generator = torch.Generator().manual_seed(N + 1000 * K + I)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator).to(dtype)

    return SimpleNamespace(
        hidden=normal(N, I),
        weight=(scale / math.sqrt(I) * normal(K, I, dtype=torch.float32)).to(dtype),
        bias=normal(K) if bias else None,
        codebook=normal(K, D),
        tau=torch.tensor([0.7]),
        seed=torch.randint(-(2**63), 2**63 - 1, (N if per_row else 1,), generator=generator),
        per_row=per_row,
        grad_embedding=normal(N, D),
        grad_kl=normal(N, dtype=torch.float32),
        target=torch.randint(0, K, (N,), generator=generator),
        row_weight=torch.rand(N, generator=generator),
    )


def exactly(case):
    """The same numbers in float64."""
    wide = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in vars(case).items()
    }
    return SimpleNamespace(**wide)


def forward(case, serving=implementation, hard=False):
    return serving.gumbel_codebook(
        case.hidden, case.weight, case.bias, case.codebook, case.tau, case.seed, case.per_row, hard
    )


def backward(case, results, serving=implementation, hard=False, needs=ALL):
    _, kl, codes, stats = results
    needs = (*needs[:2], needs[2] and case.bias is not None, needs[3])
    return serving.gumbel_codebook_backward(
        case.grad_embedding, case.grad_kl, case.hidden, case.weight, case.bias, case.codebook, case.tau, case.seed,
        kl, codes, stats, case.per_row, hard, needs,
    )  # fmt: skip


def loss_and_gradients(case, serving=implementation, needs=ALL):
    needs = (*needs[:2], needs[2] and case.bias is not None)
    return serving.cross_entropy(case.hidden, case.weight, case.bias, case.target, -100, case.row_weight, needs)


def assert_as_exact(actual, exact, dtype, what):
    """Numbers of 16 bits, and sums of such: an error of their units, of the tensor's largest.

    And where all cancels, as with one code, float32's of what cancelled.
    """
    if exact is None:
        assert actual is None, what
        return
    assert actual.shape == exact.shape, what
    if exact.numel():
        error, largest = (actual.double() - exact).abs().max(), exact.abs().max()
        assert error <= 2 * torch.finfo(dtype).eps * largest + 1e-5, (what, float(error), float(largest))


def check_forward(case, dtype, hard=False):
    results, exact = forward(case, hard=hard), forward(exactly(case), reference, hard)
    soft = forward(exactly(case), reference)[0]
    embedding, kl, codes, stats = results
    assert embedding.dtype == dtype and kl.dtype == stats.dtype == torch.float32
    assert torch.equal(codes, exact[2])
    assert_as_exact(embedding, exact[0], dtype, "embedding")
    assert ((kl.double() - exact[1]).abs() <= 4e-6 * (1 + exact[1])).all()
    assert torch.allclose(stats[:, :4].double(), exact[3], rtol=3e-5, atol=1e-5)
    # Weights are rounded to 16 bits before they are multiplied, the sum is not.
    assert_as_exact(stats[:, 4:], soft, dtype, "the soft embedding")
    return results, exact


@pytest.fixture
def by_tiles(monkeypatch):
    """run(): once for every way to cut a call, in chunks of 128 rows and poisoned memory."""
    monkeypatch.setattr(gradients_triton, "CHUNK_BYTES", 1)
    empty = torch.Tensor.new_empty

    def poisoned(self, *size, **options):
        memory = empty(self, *size, **options)
        return memory.fill_(torch.nan if memory.is_floating_point() else -1)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)

    def by_tiles(run):
        for tiles in TILES:
            monkeypatch.setattr(gumbel_triton, "_tiles", lambda *_, tiles=tiles: tiles)
            monkeypatch.setattr(gradients_triton, "_tiles", lambda *_, tiles=tiles, **__: tiles)
            monkeypatch.setattr(streaming_triton, "tiles_for", lambda *_, tiles=tiles, **__: tiles)
            monkeypatch.setattr(gradients_triton, "_product_tiles", lambda *_, tiles=tiles: tiles)
            run()

    return by_tiles


# -- interpreted -------------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("N, K, I", SIZES)
def test_forward_and_backward(N, K, I, by_tiles):
    def run():
        for hard, options in ((False, {}), (True, {"bias": False, "per_row": True})):
            case = make_case(N, K, I, EMBEDDINGS[(N + K) % 4], **options)
            results, exact = check_forward(case, torch.float16, hard)
            gradients = backward(case, results, hard=hard)
            expected = backward(exactly(case), exact, reference, hard)
            for name, actual, truth in zip(("hidden", "weight", "bias", "codebook"), gradients, expected):
                assert_as_exact(actual, truth, torch.float16, name)

    by_tiles(run)


@interpreted
@pytest.mark.parametrize("N, K, I", SIZES)
def test_losses_and_their_gradients(N, K, I, by_tiles):
    def run():
        for options in ({}, {"bias": False}):
            case = make_case(N, K, I, 16, **options)
            case.target[::3] = -100
            actual, exact = loss_and_gradients(case), loss_and_gradients(exactly(case), reference)
            assert ((actual[0].double() - exact[0]).abs() <= 4e-6 * (1 + exact[0])).all()
            for name, gradient, truth in zip(("hidden", "weight", "bias"), actual[1:], exact[1:]):
                assert_as_exact(gradient, truth, torch.float16, name)

    by_tiles(run)


@interpreted
def test_what_is_not_needed_is_not_made(by_tiles):
    case = make_case(130, 70, 16, 16)
    whole = backward(case, forward(case))
    losses = loss_and_gradients(case)[1:]
    for n in range(4):
        needs = tuple(n == i for i in range(4))
        for i, gradient in enumerate(backward(case, forward(case), needs=needs)):
            assert gradient is None if i != n else torch.equal(gradient, whole[n])
    for n in range(3):
        for i, gradient in enumerate(loss_and_gradients(case, needs=tuple(n == i for i in range(3)))[1:]):
            assert gradient is None if i != n else torch.equal(gradient, losses[n])


@interpreted
def test_cold_rows_have_no_gradient(by_tiles):
    """y of a row that is sure is 1 in one code: y dy cancels, and what is left must not be a rounding over tau."""

    def run():
        case = make_case(20, 150, 32, 16, scale=40.0)
        case.grad_kl[:] = 0
        for tau in (1 / 16, 1e-3, 1e-30):
            case.tau = torch.tensor([tau])
            results, exact = check_forward(case, torch.float16)
            gradients, expected = backward(case, results), backward(exactly(case), exact, reference)
            assert gradients[0].isfinite().all()
            # A row's gradient is at most |dy| / tau where nothing cancels; float32's share of it stays.
            share = (
                64 * torch.finfo(torch.float32).eps / tau * case.grad_embedding.double().abs().amax(-1, keepdim=True)
            )
            allowed = 2 * torch.finfo(torch.float16).eps * expected[0].abs().amax(-1, keepdim=True) + share
            assert ((gradients[0].double() - expected[0]).abs() <= allowed + 1e-6).all(), tau

    by_tiles(run)


@interpreted
def test_large_logits(by_tiles):
    def run():
        case = make_case(9, 130, 16, 16, scale=3000.0)
        for tau in (4.0, 1 / 16):
            case.tau = torch.tensor([tau])
            results, _ = check_forward(case, torch.float16)
            assert all(gradient.isfinite().all() for gradient in backward(case, results))
            assert results[1].min() >= -5e-6

    by_tiles(run)


@interpreted
def test_rows_that_are_bad_stay_alone(by_tiles):
    def run():
        case = make_case(8, 150, 16, 16)
        clean = forward(case)
        of_hidden = backward(case, clean)[0]
        case.hidden[2] = math.nan
        case.hidden[5, 0] = math.inf
        good = [0, 1, 3, 4, 6, 7]
        results = forward(case)
        assert results[0][[2, 5]].isnan().all() and results[1][[2, 5]].isnan().all()
        assert ((results[2] >= 0) & (results[2] < 150)).all()
        for actual, expected in zip(results, clean, strict=True):
            assert torch.equal(actual[good], expected[good])
        gradient = backward(case, results)[0]
        assert torch.equal(gradient[good], of_hidden[good]) and gradient[[2, 5]].isnan().all()

        case = make_case(8, 150, 16, 16)
        clean = loss_and_gradients(case)
        case.hidden[1] = math.nan
        case.target[1:5] = torch.tensor([-100, 150, -1, 2**32 + 3])
        loss, of_hidden, *_ = loss_and_gradients(case)
        assert torch.equal(of_hidden[[0, 5, 6, 7]], clean[1][[0, 5, 6, 7]])
        assert loss[1] == 0 and (of_hidden[1] == 0).all()
        assert loss[2:5].isnan().all() and of_hidden[2:5].isnan().all()

    by_tiles(run)


@interpreted
def test_codes_that_are_forbidden(by_tiles):
    def run():
        case = make_case(5, 200, 16, 16)
        case.bias[10:190] = -math.inf
        results, exact = check_forward(case, torch.float16)
        assert ((results[2] < 10) | (results[2] >= 190)).all()
        for actual, truth in zip(backward(case, results), backward(exactly(case), exact, reference), strict=True):
            assert_as_exact(actual, truth, torch.float16, "gradient")

    by_tiles(run)


@interpreted
def test_a_row_does_not_depend_on_the_others():
    case = make_case(140, 100, 16, 16)
    together = forward(case)
    gradient = backward(case, together)[0]
    case.hidden, case.grad_embedding, case.grad_kl = case.hidden[:19], case.grad_embedding[:19], case.grad_kl[:19]
    alone = forward(case)
    assert torch.equal(alone[2], together[2][:19])  # the rest to rounding: few rows are cut into more ranges
    for actual, expected in zip((*alone, backward(case, alone)[0]), (*together, gradient), strict=True):
        assert_as_exact(actual, expected[:19].double(), torch.float16, "a value of a row")


@interpreted
def test_no_rows():
    case = make_case(0, 70, 16, 32)
    results = forward(case)
    assert [tuple(x.shape) for x in results] == [(0, 32), (0,), (0,), (0, 36)]
    shapes = [tuple(x.shape) for x in backward(case, results)]
    assert shapes == [(0, 16), (70, 16), (70,), (70, 32)]
    loss, *gradients = loss_and_gradients(case)
    assert loss.shape == (0,) and all((gradient == 0).all() for gradient in gradients)


@interpreted
def test_it_can_be_asked_for():
    case = make_case(70, 100, 32, 48)
    leaves = [x.clone().requires_grad_() for x in (case.hidden, case.weight, case.bias, case.codebook)]

    def gradients(impl, hard):
        out = F.gumbel_codebook(*leaves, 0.7, hard=hard, seed=5, impl=impl)
        loss = (out.embedding * case.grad_embedding).float().sum() + (out.kl * case.grad_kl).sum()
        return torch.autograd.grad(loss, leaves)

    for hard in (False, True):
        for actual, expected in zip(gradients("triton", hard), gradients("reference", hard), strict=True):
            assert_as_exact(actual, expected.double(), torch.float16, "gradient")
    for reduction in ("none", "mean", "sum"):
        losses = [
            F.codebook_cross_entropy(*leaves[:3], case.target, reduction=reduction, impl=impl).sum()
            for impl in ("triton", "reference")
        ]
        of_triton, expected = (torch.autograd.grad(loss, leaves[:3]) for loss in losses)
        for actual, truth in zip(of_triton, expected, strict=True):
            assert_as_exact(actual, truth.double(), torch.float16, reduction)


# -- who serves --------------------------------------------------------------------------------------------------------


@compiled
def test_what_is_kept_of_a_row_is_known_before_who_serves(monkeypatch):
    """And only "triton" has the embedding there, which costs memory."""
    hidden, wide, codebook = torch.zeros(2, 16).half(), torch.zeros(2, 16), torch.zeros(3, 48).half()
    on_a_gpu = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    assert op._kept_columns(hidden, codebook, "triton") == 48
    assert op._kept_columns(wide, codebook, "triton") == 0
    assert [op._kept_columns(hidden, codebook, impl) for impl in ("auto", "cpu", "reference")] == [0] * 3
    for missing in (None, "no CUDA"):
        monkeypatch.setattr(_extension, "why_no_cuda", lambda missing=missing: missing)
        assert op._kept_columns(on_a_gpu, codebook, "auto") == (48 if missing else 0)
        assert op._kept_columns(on_a_gpu, codebook, "cuda") == 0
    monkeypatch.setattr(_extension, "why_no_cuda", lambda: None)
    monkeypatch.setitem(op.AUTO, "gumbel_codebook", {"cuda": ("triton", "cuda")})
    assert op._kept_columns(on_a_gpu, codebook, "auto") == 48


@compiled
def test_the_reference_serves_in_its_place(monkeypatch):
    """Where columns are kept for "triton" and it refuses the call."""
    monkeypatch.setattr(op, "_kept_columns", lambda hidden, codebook, impl: codebook.shape[1])
    case = make_case(3, 5, 8, 4)
    out = torch.ops.dalle_fast.gumbel_codebook(
        case.hidden, case.weight, case.bias, case.codebook, case.tau, case.seed, False, False, "reference"
    )
    assert out[3].shape == (3, 8) and out[3][:, 4:].isnan().all() and out[3][:, :4].isfinite().all()


# -- compiled ----------------------------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("arch, D", [(80, 128), (90, 128), (100, 128), (120, 128), (90, 256)])
def test_compiles_well(monkeypatch, tmp_path, arch, D):
    from test_triton_compile import SHARED_LIMIT, TENSOR_CORE, TargetOnly, kernel_usage

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(triton.runtime.driver, "_active", TargetOnly(arch))
    kernels = []

    def compile_only(run, name, *args, grid, warmup, **options):
        kernels.append((name, run(*args, grid=grid, warmup=True, **options)))

    for module in (gumbel_triton, gradients_triton, streaming_triton):
        monkeypatch.setattr(module, "capability_of", lambda tensor: divmod(arch, 10))
        for name, kernel in vars(module).items():
            if name.endswith("_kernel"):
                monkeypatch.setattr(kernel, "run", functools.partial(compile_only, kernel.run, name))
    case = make_case(300, 1000, 512, D, torch.bfloat16, per_row=True)  # which takes more registers than one seed
    backward(case, forward(case))
    loss_and_gradients(case)
    assert len({name for name, _ in kernels}) == 8
    for name, kernel in kernels:
        registers, local, shared, code = kernel_usage(kernel, tmp_path)
        print(f"sm_{arch} D {D:3} {name:26} {registers:3} registers {shared / 1024:5.1f} KiB shared {local} spilled")
        assert local <= MOST_SPILLED and shared <= SHARED_LIMIT[arch] << 10, name
        assert "merge" in name or re.search(TENSOR_CORE[arch], code), name


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@needs_gpu
@compiled
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "N, K, I, D", [*((*sizes, 48) for sizes in SIZES), (1000, 8192, 512, 128), (300, 8192, 2048, 256)]
)
def test_gradients_on_a_gpu(N, K, I, D, dtype):
    for hard, options in ((False, {}), (True, {"bias": False, "per_row": True})):
        case = make_case(N, K, I, D, dtype, **options)
        exact = forward(exactly(case), reference, hard)
        expected = backward(exactly(case), exact, reference, hard)
        loss, *of_loss = loss_and_gradients(exactly(case), reference)
        case = on_gpu(case)
        results = forward(case, hard=hard)
        gradients = backward(case, results, hard=hard)
        actual_loss, *actual_of_loss = loss_and_gradients(case)
        assert ((results[1].cpu().double() - exact[1]).abs() <= 1e-5 * (1 + exact[1])).all()
        assert ((actual_loss.cpu().double() - loss).abs() <= 1e-5 * (1 + loss)).all()
        for actual, truth in zip((*gradients, *actual_of_loss), (*expected, *of_loss), strict=True):
            assert_as_exact(None if actual is None else actual.cpu(), truth, dtype, "gradient")
        again = backward(case, forward(case, hard=hard), hard=hard)
        assert all(x is None or torch.equal(x, y) for x, y in zip(gradients, again, strict=True))


@needs_gpu
@compiled
@pytest.mark.parametrize("what", ["gumbel_codebook", "cross_entropy"])
def test_extra_memory_on_a_gpu(what):
    """Forward and backward at 8,192 rows and codes, Din = 512: below 40 MB, as test_codebook_op.py has it of "cuda"."""
    from test_codebook_op import extra_bytes

    assert extra_bytes(what, "triton", "cuda", "bfloat16", 512) < 40e6
