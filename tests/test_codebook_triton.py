"""The Triton kernel that samples and computes losses without logits in memory: interpreted, compiled, and on a GPU.

Small integers make every product and sum exact, so codes must be those of the reference, ties included. Cases that are
interpreted run in a process of their own, see test_triton_interpreter.py, which also says why there is no bfloat16 among
them. Those that are compiled for sm_80, sm_90 and sm_100 do not run: they prove no spills, shared memory within the
limit, and tensor cores.

N rows, K codes, I size of hidden.
"""

import contextlib
import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cuda_rows
import pytest
import torch
from test_codebook_cuda import EPS, assert_exact, assert_near, needs_gpu, on_gpu

import dalle_fast.nn.functional as F
from dalle_fast.ops import choice, on_triton
from dalle_fast.ops.choice import choose
from dalle_fast.ops.codebook import cuda, noise, op, reference
from dalle_fast.ops.codebook import triton as streaming

triton = pytest.importorskip("triton", reason="the package triton is not installed")
import triton.language as tl
from faster_interpreter import make_faster

from dalle_fast.ops.codebook import noise_triton, streaming_triton, tiles_triton
from dalle_fast.ops.codebook.tiles_triton import Tiles

# Bytes: with the registers that it gives out, Triton 3.6 has a few too few for the largest tiles of some architectures.
MOST_SPILLED = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 40
INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))
if INTERPRETED:
    make_faster()
HALVES = (torch.float16, torch.bfloat16)
FILES = [__file__, str(Path(__file__).with_name("test_codebook_triton_gradients.py"))]
CASES = 52  # that are interpreted; a change of a parameter list changes it, knowingly
SIZES = [
    (1, 1, 16),
    (3, 2, 16),
    (17, 63, 48),
    (64, 64, 64),
    (65, 65, 80),
    (5, 1000, 32),
    (130, 257, 144),
    (2, 130, 512),
]
# Of one range and of several; by addresses and by descriptors.
TILES = [
    Tiles(32, 64, 16, 4, 2, flat=False, described=False, splits=1),
    Tiles(64, 128, 64, 4, 2, flat=True, described=True, splits=3),
    Tiles(128, 256, 32, 8, 3, flat=True, described=False),
]
interpreted = pytest.mark.skipif(not INTERPRETED, reason="a case of test_in_the_interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted here, not compiled")


def make_case(N, K, I, dtype, *, bias=True, per_row=False):
    generator = torch.Generator().manual_seed(N + 1000 * K + I)
    reach = max(1, round(6 / math.sqrt(I)))
    case = SimpleNamespace(
        hidden=torch.randint(-reach, reach + 1, (N, I), generator=generator).to(dtype),
        weight=torch.randint(-1, 2, (K, I), generator=generator).to(dtype),
        bias=torch.randint(-1, 2, (K,), generator=generator).float() if bias else None,
        seed=torch.randint(-(2**63), 2**63 - 1, (N if per_row else 1,), generator=generator),
        per_row=per_row,
        target=torch.randint(0, K, (N,), generator=generator),
    )
    case.logits = (case.hidden.double() @ case.weight.double().T).float()
    return case


def true_loss(case):
    z = case.logits.double() if case.bias is None else case.logits.double() + case.bias
    return torch.nn.functional.cross_entropy(z, case.target, reduction="none")


def sample(case, temperature, tiles=None):
    seed = None if temperature is None else case.seed
    options = {"seed_per_row": case.per_row, "tiles": tiles}
    return streaming_triton.sample_streaming(case.hidden, case.weight, case.bias, seed, temperature, **options)


def loss_of(case, target, tiles=None):
    return streaming_triton.cross_entropy_streaming(case.hidden, case.weight, case.bias, target, -100, tiles=tiles)


def expected_codes(case, temperature):
    return reference.sample(case.hidden, case.weight, case.bias, temperature, case.seed, case.per_row)


# -- interpreted -------------------------------------------------------------------------------------------------------


@compiled
@pytest.mark.skipif(on_triton.loop_bounds_broken(), reason="the interpreter of Triton 3.6 needs numpy before 2.4")
def test_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *FILES, "--noconftest", "-q", "-p", "no:cacheprovider"],
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        timeout=600,
    )
    passed = re.search(r"(\d+) passed", run.stdout)
    assert (run.returncode, passed and int(passed[1])) == (0, CASES), f"{run.stdout}\n{run.stderr}"


@triton.jit
def _words_kernel(seed_ptr, row_ptr, words_ptr, BLOCK: tl.constexpr):
    key_low, key_high = noise_triton.low_high(tl.load(seed_ptr) + tl.zeros([BLOCK], tl.int64))
    row_low, row_high = noise_triton.low_high(tl.load(row_ptr) + tl.zeros([BLOCK], tl.int64))
    counter = tl.arange(0, BLOCK)
    words = noise_triton.philox(counter.to(tl.uint32), row_low, row_high, key_low, key_high)
    for n in tl.static_range(4):
        code = counter // 16 * 64 + n * 16 + counter % 16
        tl.store(words_ptr + code, words[n].to(tl.int64))


@triton.jit
def _gumbel_kernel(words_ptr, out_ptr, count, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(words_ptr + n, mask=n < count, other=0).to(tl.uint32)
    tl.store(out_ptr + n, noise_triton.gumbel(word), mask=n < count)


@interpreted
@pytest.mark.parametrize("seed, row", [(0, 0), (1, 2**40 + 3), (-(2**63), 2**63 - 1), (2**63 - 1, 1), (-1, 5)])
def test_words_are_those_of_the_definition(seed, row):
    seed, row = torch.tensor([seed]), torch.tensor([row])
    words = torch.zeros(1024, dtype=torch.int64)
    _words_kernel[1,](seed, row, words, 256)
    assert_exact(words, noise.noise_words(seed, row, 1024)[0])


@interpreted
def test_noise_is_right_to_a_few_units_in_the_last_place():
    edges = torch.cat([torch.arange(0, 5000), torch.arange(2**32 - 5000, 2**32), 2**31 + torch.arange(-2500, 2500)])
    words = torch.cat([edges, torch.randint(0, 2**32, (100_000,), generator=torch.Generator().manual_seed(0))])
    actual = torch.empty(len(words))
    _gumbel_kernel[triton.cdiv(len(words), 4096),](words, actual, len(words), 4096)
    assert actual.isfinite().all()
    exact = noise.gumbel_of_words(words, torch.float64)
    # Near g = 0 both logarithms' roundings stay: there the unit is that of 1.
    units = (actual.double() - exact).abs() / (EPS * exact.abs().clamp(min=1))
    assert units.max() < 3


@interpreted
@pytest.mark.parametrize("N, K, I", SIZES)
def test_codes_are_those_of_the_reference(N, K, I):
    for tiles, (temperature, options) in itertools.product(
        TILES, ((None, {}), (0.25, {"bias": False, "per_row": True}), (1.0, {}))
    ):
        case = make_case(N, K, I, torch.float16, **options)
        temperature = None if temperature is None else torch.tensor([temperature])
        assert_exact(sample(case, temperature, tiles), expected_codes(case, temperature))


@interpreted
def test_the_first_of_equals_wins():
    """Also where both are in one class of codes, in one tile, or in different ranges."""
    for tiles, pair in itertools.product(TILES, ((0, 1), (5, 21), (37, 53), (20, 84), (7, 135), (3, 259), (258, 259))):
        case = make_case(2, 300, 16, torch.float16)
        case.hidden[:] = 0
        case.bias[:] = 0
        assert sample(case, None, tiles).tolist() == [0] * 2
        case.bias[list(pair)] = 1
        assert sample(case, None, tiles).tolist() == [pair[0]] * 2


@interpreted
@pytest.mark.parametrize("N, K, I", SIZES)
def test_losses(N, K, I):
    for tiles, bias in itertools.product(TILES, (True, False)):
        case = make_case(N, K, I, torch.float16, bias=bias)
        exact = true_loss(case)
        assert_near("loss", loss_of(case, case.target, tiles), exact, 1 + exact, 4)


@interpreted
def test_rows_and_targets_that_are_bad_stay_alone():
    for tiles in TILES:
        case = make_case(8, 300, 16, torch.float16)
        clean, codes = loss_of(case, case.target, tiles), sample(case, None, tiles)
        case.hidden[2] = math.nan
        case.hidden[3, 0] = math.inf
        target = case.target.clone()
        target[4:] = torch.tensor([-100, 300, -1, 2**32 + 3])
        loss = loss_of(case, target, tiles)
        assert_exact(loss[:2], clean[:2])
        assert loss[2:4].isnan().all() and loss[4] == 0 and loss[5:].isnan().all()
        good = [0, 1, 4, 5, 6, 7]
        assert_exact(sample(case, None, tiles)[good], codes[good])
        for temperature in (None, torch.ones(1)):
            codes = sample(case, temperature, tiles)
            assert ((codes >= 0) & (codes < 300)).all()


@interpreted
def test_codes_that_are_forbidden():
    for tiles in TILES:
        case = make_case(3, 290, 16, torch.float16)
        case.bias[:] = -math.inf
        assert sample(case, torch.ones(1), tiles).tolist() == [0] * 3
        case.bias[260] = 1
        case.target[:] = 260
        assert sample(case, torch.ones(1), tiles).tolist() == [260] * 3
        assert_exact(loss_of(case, case.target, tiles), torch.zeros(3))
        assert (loss_of(case, case.target - 1, tiles) == math.inf).all()


@interpreted
def test_a_row_does_not_depend_on_the_others():
    for tiles in TILES:
        case, temperature = make_case(140, 200, 16, torch.float16), torch.ones(1)
        together = sample(case, temperature, tiles)
        case.hidden = case.hidden[:19]
        assert_exact(sample(case, temperature, tiles), together[:19])


@interpreted
def test_no_rows():
    case = make_case(0, 2, 16, torch.float16)
    assert sample(case, None).shape == (0,) and loss_of(case, case.target).shape == (0,)


# -- who serves, and how it is cut -------------------------------------------------------------------------------------


@interpreted
def test_it_is_an_implementation_that_can_be_asked_for():
    case = make_case(70, 100, 32, torch.float16)
    product, target = (case.hidden, case.weight, case.bias.half()), case.target
    for name, options in (("codebook_argmax", {}), ("codebook_sample", {"seed": 7})):
        codes = [getattr(F, name)(*product, **options, impl=impl) for impl in ("triton", "reference")]
        assert_exact(*codes)
    exact = true_loss(case)
    for reduction in ("none", "sum", "mean"):
        loss = F.codebook_cross_entropy(*product, target, reduction=reduction, impl="triton")
        torch.testing.assert_close(loss.double(), getattr(exact, reduction, lambda: exact)(), rtol=1e-5, atol=0)


def kernels_take(I, dtype=torch.bfloat16, columns=None):
    hidden, weight = (torch.zeros(2, columns or I, dtype=dtype)[:, :I] for _ in range(2))
    return {"hidden": hidden, "weight": weight}


@compiled
def test_what_it_takes(monkeypatch):
    assert "hidden is on cpu" in streaming.why_not(kernels_take(16))[0]
    monkeypatch.setattr(on_triton, "why_not", lambda *_: [])

    def takes(*arguments, **options):
        return not streaming.why_not(kernels_take(*arguments, **options))

    assert takes(16) and takes(4096) and takes(48, torch.float16)
    assert not any(takes(I) for I in (0, 8, 24, 4112))
    assert not takes(16, torch.float32) and not takes(16, columns=32)
    row = {"hidden": torch.zeros(2, 16).half(), "weight": torch.zeros(40).half().as_strided((1, 16), (24, 1))}
    assert row["weight"].is_contiguous() and streaming.why_not(row)


@compiled
def test_whom_auto_chooses_on_a_gpu(monkeypatch):
    monkeypatch.setattr(on_triton, "why_not", lambda *_: [])
    monkeypatch.setattr(cuda, "why_not", lambda *_: [])

    def chosen(operation, dtype, **more):
        tensors = kernels_take(64, dtype) | more
        return choose((operation, ""), "auto", "cuda", op._implementation, op.AUTO[operation], tensors)

    for dtype in HALVES:
        for operation in op.AUTO:
            first = operation in ("codebook_argmax", "codebook_cross_entropy")
            assert chosen(operation, dtype) is (streaming if first else cuda)
            # Also where CUDA C++ was not compiled, but for what Triton has not.
            with monkeypatch.context() as without:
                without.setattr(cuda, "why_not", lambda *_: ["there is none"])
                left_out = operation in ("gumbel_softmax", "codebook_sample of logits")
                choice._warn_once.cache_clear()
                with pytest.warns(UserWarning, match="reference") if left_out else contextlib.nullcontext():
                    assert chosen(operation, dtype) is (reference if left_out else streaming)
    for operation in op.IMPLS:
        assert chosen(operation, torch.float32) is cuda


@compiled
def test_losses_with_gradients_are_an_operation_of_their_own(monkeypatch):
    asked = []
    monkeypatch.setattr(op, "choose", lambda operation, *_: asked.append(operation[0]))
    for row_weight in (None, torch.ones(1)):
        op._serving("codebook_cross_entropy", "auto", hidden=torch.zeros(1, 1), row_weight=row_weight)
    assert asked == ["codebook_cross_entropy", "codebook_cross_entropy with gradients"]


@compiled
def test_ranges_fill_the_processors_and_none_is_empty():
    assert tiles_triton.best_splits(64, 32, 132) == 2  # 8,192 rows and codes on an H100 or H200
    assert tiles_triton.best_splits(1, 32, 132) == 32
    assert tiles_triton.best_splits(132, 32, 132) == 1
    for row_tiles, code_tiles, processors in itertools.product((1, 7, 64, 133, 1000), (1, 5, 32, 33), (1, 4, 132)):
        S = tiles_triton.best_splits(row_tiles, code_tiles, processors)
        assert 1 <= S <= code_tiles and (S - 1) * -(-code_tiles // S) < code_tiles


# -- compiled ----------------------------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize(
    "arch, task",
    # A search is a sample without noise, which has the fewest registers to spare; a seed for every row leaves a sample few.
    [*itertools.product((80, 90, 100, 120), ("sample", "loss")), (90, "argmax")],
)
def test_compiles_well(monkeypatch, tmp_path, arch, task):
    from test_triton_compile import SHARED_LIMIT, TENSOR_CORE, TargetOnly, kernel_usage

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(triton.runtime.driver, "_active", TargetOnly(arch))
    monkeypatch.setattr(streaming_triton, "capability_of", lambda tensor: divmod(arch, 10))
    kernels = {}

    def stop_before_launch(name, run):
        def compile_only(*args, grid, warmup, **kwargs):
            kernels[name] = run(*args, grid=grid, warmup=True, **kwargs)

        return compile_only

    for name in ("_streaming_kernel", "_merge_codes_kernel", "_merge_losses_kernel"):
        kernel = getattr(streaming_triton, name)
        monkeypatch.setattr(kernel, "run", stop_before_launch(name, kernel.run))
    case = make_case(300, 1000, 512, torch.bfloat16, per_row=True)
    if task == "loss":
        loss_of(case, case.target)
    else:
        sample(case, torch.ones(1) if task == "sample" else None)
    assert len(kernels) == 2
    most = 240 if MOST_SPILLED and (arch, task) == (90, "sample") else MOST_SPILLED
    for name, kernel in kernels.items():
        registers, local, shared, code = kernel_usage(kernel, tmp_path)
        print(f"sm_{arch} {task:6} {name:20} {registers:3} registers {shared / 1024:5.1f} KiB shared {local} spilled")
        assert local <= most and shared <= SHARED_LIMIT[arch] << 10, name
        assert name != "_streaming_kernel" or re.search(TENSOR_CORE[arch], code)


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@needs_gpu
@compiled
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("N, K, I", [*SIZES, (1000, 8192, 512), (300, 8192, 2048)])
def test_codes_and_losses_on_a_gpu(N, K, I, dtype):
    for options in ({}, {"bias": False, "per_row": True}):
        case = make_case(N, K, I, dtype, **options)
        exact, case = true_loss(case), on_gpu(case)
        product = case.hidden, case.weight, None if case.bias is None else case.bias.to(dtype)
        codes = [F.codebook_argmax(*product, impl=impl) for impl in ("cuda", "triton", "auto")]
        assert_exact(codes[1], codes[0])
        assert_exact(codes[2], codes[0])
        for tiles in (None, *TILES[:2]):
            for temperature in (None, torch.ones(1, device="cuda")):
                seed = None if temperature is None else case.seed
                expected = torch.empty(N, dtype=torch.int64, device="cuda")
                cuda_rows.sample_rows(case.logits, case.bias, seed, 0, temperature, expected, seed_per_row=case.per_row)
                assert_exact(sample(case, temperature, tiles), expected)
            assert_near("loss", loss_of(case, case.target, tiles).cpu(), exact, 1 + exact, 4)
