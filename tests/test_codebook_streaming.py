"""The CUDA kernels that sample and compute losses without logits in memory: compiled for the host, and on a GPU.

Small integers make every product and sum exact, so codes must agree with the row kernels', ties included. On the host
the tensor cores' product is written down from its definition (tests/simt/codebook_streaming.cpp).

N rows, K codes, I size of hidden.
"""

import math
from types import SimpleNamespace

import cuda_rows
import pytest
import torch
from simt_host import serve_on_host  # noqa: F401 (a fixture)
from test_codebook_cuda import DTYPES, HUGE_ROW, assert_exact, assert_near, needs_gpu, on_gpu, poison

from dalle_fast.ops.codebook import cuda

SIZES = [
    (1, 1, 8),
    (3, 2, 16),
    (17, 63, 24),
    (64, 64, 64),
    (65, 65, 72),
    (5, 1000, 40),
    (130, 65, 128),
    (2, 130, 512),
]
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def row_kernels(serve_on_host):  # noqa: F811
    return serve_on_host("codebook")


@pytest.fixture(scope="module")
def streaming(serve_on_host):  # noqa: F811
    return serve_on_host("codebook_streaming")


def make_case(N, K, I, dtype, *, bias=True, per_row=False, first_row=0):
    generator = torch.Generator().manual_seed(N + 1000 * K + I)
    reach = max(1, round(6 / math.sqrt(I)))
    case = SimpleNamespace(
        hidden=torch.randint(-reach, reach + 1, (N, I), generator=generator).to(dtype),
        weight=torch.randint(-1, 2, (K, I), generator=generator).to(dtype),
        bias=torch.randint(-1, 2, (K,), generator=generator).float() if bias else None,
        seed=torch.randint(-(2**63), 2**63 - 1, (N if per_row else 1,), generator=generator),
        per_row=per_row,
        first_row=first_row,
        target=torch.randint(0, K, (N,), generator=generator),
    )
    case.logits = (case.hidden.double() @ case.weight.double().T).float()
    return case


def call_sample(streaming, case, dtype, temperature):
    sizes = (*case.hidden.shape, case.weight.shape[0])
    numbers = [0, sizes[0], sizes[2], sizes[1], DTYPES[dtype], case.per_row, case.first_row]
    seed = None if temperature is None else case.seed
    codes = poison(sizes[0], dtype=torch.int64)
    return streaming(numbers, case.hidden, case.weight, case.bias, seed, temperature, codes)[-1]


def call_loss(streaming, case, dtype, target, ignore_index=-100):
    (N, I), K = case.hidden.shape, case.weight.shape[0]
    numbers = [1, N, K, I, DTYPES[dtype], ignore_index]
    return streaming(numbers, case.hidden, case.weight, case.bias, target, poison(N))[-1]


def sample_of_rows(row_kernels, case, temperature):
    """The same by the row kernels of tests/simt/codebook.cpp."""
    numbers = [4, *case.logits.shape, case.per_row, case.first_row]
    seed = None if temperature is None else case.seed
    codes = poison(case.logits.shape[0], dtype=torch.int64)
    return row_kernels(numbers, case.logits, case.bias, seed, temperature, codes)[-1]


def true_loss(case):
    z = case.logits.double() if case.bias is None else case.logits.double() + case.bias
    return torch.nn.functional.cross_entropy(z, case.target, reduction="none")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("N, K, I", SIZES)
def test_codes_are_those_of_the_row_kernels_on_the_host(streaming, row_kernels, N, K, I, dtype):
    for temperature, options in (
        (None, {}),
        (0.25, {"bias": False, "per_row": True}),
        (1.0, {"first_row": HUGE_ROW}),
    ):
        case = make_case(N, K, I, dtype, **options)
        temperature = None if temperature is None else torch.tensor([temperature])
        expected = sample_of_rows(row_kernels, case, temperature)
        assert_exact(call_sample(streaming, case, dtype, temperature), expected)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("N, K, I", SIZES)
def test_losses_on_the_host(streaming, N, K, I, dtype):
    for bias in (True, False):
        case = make_case(N, K, I, dtype, bias=bias)
        exact = true_loss(case)
        assert_near("loss", call_loss(streaming, case, dtype, case.target), exact, 1 + exact, 4)


def test_rows_and_targets_that_are_bad_stay_alone_on_the_host(streaming):
    case = make_case(7, 100, 16, torch.bfloat16)
    clean = call_loss(streaming, case, torch.bfloat16, case.target)
    case.hidden[2] = math.nan
    case.hidden[3, 0] = math.inf
    target = case.target.clone()
    target[4:] = torch.tensor([-100, 100, -1])
    loss = call_loss(streaming, case, torch.bfloat16, target)
    assert_exact(loss[:2], clean[:2])
    assert loss[2:4].isnan().all() and loss[4] == 0 and loss[5:].isnan().all()
    codes = call_sample(streaming, case, torch.bfloat16, torch.tensor([1.0]))
    assert ((codes >= 0) & (codes < 100)).all()


def test_codes_that_are_forbidden_on_the_host(streaming):
    case = make_case(3, 130, 8, torch.bfloat16)
    case.bias[:] = -math.inf
    case.bias[128] = 1
    case.target[:] = 128
    assert call_sample(streaming, case, torch.bfloat16, torch.tensor([1.0])).tolist() == [128] * 3
    assert_exact(call_loss(streaming, case, torch.bfloat16, case.target), torch.zeros(3))
    assert (call_loss(streaming, case, torch.bfloat16, case.target - 1) == math.inf).all()


def test_sizes_that_are_refused_on_the_host(streaming):
    for I in (4, 12, 520):
        with pytest.raises(RuntimeError, match="Din must be a multiple of 8 up to 512"):
            call_sample(streaming, make_case(1, 2, I, torch.bfloat16), torch.bfloat16, None)
    with pytest.raises(RuntimeError, match="only float16 and bfloat16"):
        call_sample(streaming, make_case(1, 2, 8, torch.float32), torch.float32, None)
    assert call_sample(streaming, make_case(0, 2, 8, torch.float16), torch.float16, None).numel() == 0


@needs_gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("N, K, I", [*SIZES, (1000, 8192, 512)])
def test_codes_and_losses_on_a_gpu(monkeypatch, N, K, I, dtype):
    for operation in cuda.SMALL_DIN:
        monkeypatch.setitem(cuda.SMALL_DIN, operation, "streaming")
    for options in ({}, {"bias": False, "per_row": True}):
        case = make_case(N, K, I, dtype, **options)
        exact, case = true_loss(case), on_gpu(case)
        assert cuda.can_stream(case.hidden, case.weight)
        for temperature in (None, torch.ones(1, device="cuda")):
            seed = None if temperature is None else case.seed
            common = {"seed_per_row": case.per_row}
            expected = torch.empty(N, dtype=torch.int64, device="cuda")
            cuda_rows.sample(case.logits, case.bias, seed, 0, temperature, expected, **common)
            actual = cuda.sample_streaming(case.hidden, case.weight, case.bias, seed, temperature, **common)
            assert_exact(actual, expected)
        loss = cuda.cross_entropy_streaming(case.hidden, case.weight, case.bias, case.target, -100)
        assert_near("loss", loss.cpu(), exact, 1 + exact, 4)
