"""`F.linear`: torch's results, rows that do not depend on each other, and who serves which call.

R rows, K in, N out.
"""

import contextlib
import copy
import itertools
import math
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from dalle_fast.nn import functional as F
from dalle_fast.nn.transformer import Linear
from dalle_fast.ops import linear as linear_ops
from dalle_fast.testing import assert_as_exact_as_eager, nan_poisoned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 40)  # around the blocks of 32, 16, 8, 4 and 2
# (N, K): nothing, one, around vectors of 4, 8 and 16 and tiles of 2, 3, 4 and 16, enough weights for all threads.
SIZES = [(0, 3), (3, 0), (1, 1), (5, 3), (12, 4), (13, 15), (11, 16), (24, 33), (300, 257), (67, 64), (32, 40)]


@pytest.fixture
def counted(monkeypatch):
    """The calls that our kernel serves."""
    calls, real = [], linear_ops._linear_op
    monkeypatch.setattr(linear_ops, "_linear_op", lambda *arguments: calls.append(arguments) or real(*arguments))
    return calls


def operands(R, N, K, dtype=torch.float32):
    """-2 to 2: sums are exact, and so must results be."""
    generator = torch.Generator().manual_seed(0)
    shapes = (R, K), (N, K), (N,)
    return [torch.randint(-2, 3, shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_size_and_dtype_is_exact(sizes):
    for dtype in DTYPES:
        for R in ROWS:
            x, weight, bias = operands(R, *sizes, dtype)
            exact = x.double() @ weight.double().T
            with nan_poisoned():
                out, with_bias = F.linear(x, weight, impl="cpu"), F.linear(x, weight, bias, impl="cpu")
            assert out.dtype == with_bias.dtype == dtype
            assert torch.equal(out, exact.to(dtype)) and torch.equal(with_bias, (exact + bias).to(dtype))


@pytest.mark.every_instruction_set
def test_any_leading_dimensions_and_strides():
    x, weight, bias = operands(6, 10, 32)
    expected = torch.nn.functional.linear(x, weight, bias)
    assert torch.equal(F.linear(x.view(2, 3, 32), weight, bias, impl="cpu"), expected.view(2, 3, 10))
    assert torch.equal(F.linear(x[0], weight, bias, impl="cpu"), expected[0])
    wide = torch.full((10, 40), torch.nan)
    wide[:, 3:35] = weight
    assert torch.equal(F.linear(x.T.contiguous().T, wide[:, 3:35], bias, impl="cpu"), expected)


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(make, threads, dtype):
    """Bit for bit, so that an image does not depend on its batch, whatever the threads."""
    x, weight, bias = (make(shape, dtype, count=1)[0] for shape in ((ROWS[-1], 1100), (401, 1100), (401,)))

    def linear(x):
        return F.linear(x, weight, bias, activation="gelu", impl="cpu")

    threads(1)
    alone = torch.cat([linear(row[None]) for row in x])
    for count in (1, 2, 3):
        threads(count)
        for R in ROWS:
            assert torch.equal(linear(x[:R]), alone[:R])


@pytest.mark.every_instruction_set
def test_errors_are_those_of_float32_sums(make):
    """At most twice torch's error in the same dtype, plus the result's rounding."""
    for dtype in DTYPES:
        (x,), (weight,) = make((8, 2048), dtype, count=1), make((96, 2048), dtype, seed=1, count=1)
        (bias,) = make((96,), dtype, seed=2, count=1)
        exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        ours, theirs = (
            (F.linear(x, weight, bias, impl=impl).double() - exact).abs().max() for impl in ("cpu", "reference")
        )
        assert ours <= 2 * theirs + torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinity_and_nan_stay_in_their_row(dtype):
    x, weight, _ = operands(9, 12, 40, dtype)
    expected = torch.nn.functional.linear(x, weight)
    x[2, 3], x[5, 39] = torch.nan, torch.inf
    out = F.linear(x, weight, impl="cpu")
    assert out[2].isnan().all() and not out[5].isfinite()[weight[:, 39] != 0].any()
    others = [r for r in range(9) if r not in (2, 5)]
    assert torch.equal(out[others], expected[others])


GUARDED = """
import itertools, torch
from dalle_fast import _extension
from dalle_fast.ops.linear import DTYPES
from dalle_fast.verify import guard

for at_end in (True, False):
    guarded = guard.guarding(at_end=at_end)
    for dtype, R, (N, K) in itertools.product(DTYPES, (1, 5, 17, 40), SIZES):
        x, weight = guarded(torch.ones(R, K)), guarded(torch.ones(N, K, dtype=dtype))
        bias, out = guarded(torch.ones(N, dtype=dtype)), guarded(torch.empty(R, N))
        addresses = [tensor.data_ptr() for tensor in (x, weight, bias, out)]
        _extension.native().linear((R, N, K), DTYPES[dtype], addresses, K, False, 2)
        assert (out == K + 1).all()
        guard._kept.clear()
print("all")
"""


@pytest.mark.every_instruction_set
def test_it_touches_nothing_but_its_operands():
    done = subprocess.run(
        [sys.executable, "-c", GUARDED.replace("SIZES", repr(SIZES))], check=False, capture_output=True, text=True
    )
    if "NotRun" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0 and done.stdout == "all\n", f"ended with {done.returncode}: {done.stderr[-2000:]}"


class Subclass(torch.Tensor):
    """A weight that has linear layers of its own, as quantized ones do."""


@pytest.mark.every_instruction_set
def test_few_rows_are_ours_and_all_else_is_torchs(counted, monkeypatch):
    monkeypatch.setattr(linear_ops, "_rows", lambda: (range(1, 7), range(1, 3), range(1, 3)))
    most = 6
    x, weight, bias = torch.randn(most + 1, 16), torch.randn(8, 16), torch.randn(8)
    few = x[:most]
    F.linear(few, weight, bias)
    assert len(counted) == 1
    parameter = torch.nn.Parameter(weight)
    with torch.no_grad():
        F.linear(few, parameter, bias)
    assert len(counted) == 2
    calls = {
        "many rows": lambda: F.linear(x, weight, bias),
        "many for 16 bits": lambda: F.linear(few[:3].bfloat16(), weight.bfloat16(), bias.bfloat16()),
        "reference": lambda: F.linear(few, weight, bias, impl="reference"),
        "a gradient": lambda: F.linear(few, parameter, bias),
        "float64": lambda: F.linear(few.double(), weight.double(), bias.double()),
        "weights with strides": lambda: F.linear(few, weight.T.contiguous().T, bias),
        "a transformation": lambda: torch.func.jvp(lambda y: F.linear(y, weight, bias), (few,), (few,))[1],
        "vmap": lambda: torch.func.vmap(lambda y: F.linear(y, weight, bias))(few),
        "meta": lambda: F.linear(few.to("meta"), weight.to("meta"), bias.to("meta")),
        "a sparse weight": lambda: F.linear(few, weight.to_sparse_csr(), bias),
        "a subclass": lambda: F.linear(few, weight.as_subclass(Subclass), bias),
    }
    for call in calls.values():
        call()
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(few, weight, bias).dtype == torch.bfloat16
    assert len(counted) == 2
    for parameter in (weight, bias):  # torch's own error
        with pytest.raises(RuntimeError):
            F.linear(few, parameter[1:] if parameter is bias else parameter[:, 1:], bias)


@pytest.mark.every_instruction_set
@pytest.mark.parametrize(
    "change, message",
    [
        ({"dtype": torch.float64}, "one dtype, float32, float16 or bfloat16, got torch.float64"),
        ({"weight": torch.ones(3, 5)}, r"x \(..., K\) and weight \(N, K\), got \(2, 4\) and \(3, 5\)"),
        ({"weight": torch.ones(4, 3).T}, "weights whose rows lie side by side"),
        ({"bias": torch.ones(2)}, r"a contiguous bias \(3,\), got \(2,\)"),
        ({"weight": torch.ones(3, 4, requires_grad=True)}, "a gradient is needed"),
        ({"impl": "cuda"}, "impl must be one of auto, reference, cpu, triton, got 'cuda'"),
    ],
)
def test_what_cannot_be_served_is_named(change, message):
    arguments = {"x": torch.ones(2, 4), "weight": torch.ones(3, 4), "bias": torch.ones(3), "impl": "cpu", **change}
    if dtype := arguments.pop("dtype", None):
        arguments |= {name: arguments[name].to(dtype) for name in ("x", "weight", "bias")}
    with pytest.raises(ValueError, match=message):
        F.linear(**arguments)


# -- Triton; what it computes is in test_triton_interpreter.py and, on a GPU, below ------------------------------------


def test_what_triton_cannot_serve_is_named():
    x, weight = torch.ones(65, 4), torch.ones(3, 5, requires_grad=True)
    with pytest.raises(ValueError) as error, torch.autocast("cpu", torch.bfloat16):
        F.linear(x, weight, torch.ones(2), impl="triton")
    for part in (
        "Triton kernels need CUDA tensors",
        "1 to 64 rows, got 65",
        "one dtype, float16 or bfloat16, got torch.float32",
        "autocast is on",
        "got (65, 4) and (3, 5)",
        "a contiguous bias (3,), got (2,)",
        "a gradient is needed",
    ):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="one device, got cpu, meta"):
        F.linear(x[:1].half(), torch.ones(3, 4, dtype=torch.half, device="meta"), impl="triton")


def test_only_large_aligned_weights_are_worth_a_kernel():
    x, weight, bias = (torch.zeros(*shape, dtype=torch.bfloat16) for shape in ((3, 1024), (1024, 1024), (1024,)))
    assert linear_ops._is_worth_it(x, weight, bias) and linear_ops._is_worth_it(x, weight, None)
    assert linear_ops._is_worth_it(x[0], weight, bias)
    not_worth_it = {
        "a small weight": (x, weight[:1008], bias[:1008]),
        "few columns": (x[:, :496], weight.repeat(4, 1)[:, :496], None),
        "odd rows": (x, torch.cat([weight, weight[:8]]), None),
        "odd columns": (x[:, :1016], torch.cat([weight, weight])[:, :1016], None),
        "an odd address": (x, torch.cat([weight.flatten(), weight[0]])[1:-1023].view(1024, 1024), bias),
        "odd strides": (x, torch.cat([weight, weight[:, :1]], 1)[:, :1024], bias),
        "no matrix": (x, weight[0], None),
    }
    for name, arguments in not_worth_it.items():
        assert not linear_ops._is_worth_it(*arguments), name


def test_the_order_of_a_sum_depends_on_the_weight_alone():
    """And every cut has a program for most multiprocessors, and none has two of a split one; splits of 512 columns at
    least, counters enough, and shared memory."""
    tiles_for = pytest.importorskip("dalle_fast.ops.linear_triton", reason="needs the package triton").tiles_for
    for N, K, multiprocessors in itertools.product((1, 512, 2048, 6144, 8192, 65536), (1, 512, 2048, 8192), (108, 132)):
        cuts = [tiles_for(M, N, K, multiprocessors, 99 << 10) for M in range(1, 65)]
        assert len({(cut.block_k, cut.splits) for cut in cuts}) == 1
        for M, cut in enumerate(cuts, 1):
            tiles = -(-N // cut.block_n)
            assert cut.block_m >= M and (cut.splits == 1 or (tiles <= 512 and K >= 512 * cut.splits))
            assert cut.splits == 1 or tiles * cut.splits <= multiprocessors
            assert 2 * tiles * cut.splits > multiprocessors or K < 1024 * cut.splits
            assert 2 * cut.stages * cut.block_k * (cut.block_n + cut.block_m) < 99 << 10


def test_captured_calls_have_counters_of_their_own(monkeypatch):
    """A graph may be replayed beside another and beside calls on any stream."""
    module = pytest.importorskip("dalle_fast.ops.linear_triton", reason="needs the package triton")
    device, capturing = torch.device("cuda", 0), [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(module, "_of_graphs", {})
    assert not module.can_be_captured(device)
    module._of_graphs[device] = [torch.zeros(128), 0]
    assert module.can_be_captured(device)
    monkeypatch.setattr(module, "_of_stream", {(device, stream): torch.zeros(module.COUNTERS) for stream in (0, 7)})
    places = []
    for stream, captured in ((0, False), (7, False), (0, True), (0, True), (7, True), (0, False)):
        capturing[0] = captured
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _, of=stream: SimpleNamespace(cuda_stream=of))
        places.append(module._counters(device, 32).data_ptr())
    assert len(set(places)) == 5 and places[0] == places[-1]
    with pytest.raises(ValueError, match="at most 512 tiles of the weight's rows are counted, got 513"):
        module._counters(device, 513)
    # Those of a graph are never another's, however many there are: then zeros are made in the graph.
    monkeypatch.setattr(torch, "zeros", lambda *shape, dtype, device: torch.full(shape, 0, dtype=dtype))
    capturing[0] = True
    kept = [module._counters(device, 16) for _ in range(3)]
    assert len({*places, *(counters.data_ptr() for counters in kept)}) == 8
    assert [len(counters) for counters in kept] == [32, 16, 16] and not any(counters.any() for counters in kept)


def test_a_graph_that_brings_counters_takes_no_others(monkeypatch):
    """While they last; and no graph that another thread captures meanwhile takes them."""
    module = pytest.importorskip("dalle_fast.ops.linear_triton", reason="needs the package triton")
    device, zeros = torch.device("cuda", 0), torch.zeros
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *shape, dtype, device: zeros(*shape, dtype=dtype))
    monkeypatch.setattr(module, "_of_graphs", {device: [zeros(128, dtype=torch.int32), 0]})
    monkeypatch.setattr(module, "GRAPH_COUNTERS", 96)

    def first(tensor):
        return tensor.untyped_storage().data_ptr()

    shared = first(module._of_graphs[device][0])
    with linear_ops.counters_of_graph(device) as own:
        assert not own.any()
        taken = [module._counters(device, count) for count in (40, 32)]
        assert [first(counters) for counters in taken] == [first(own)] * 2 and module._of_graphs[device][1] == 0
        assert [counters.data_ptr() - own.data_ptr() for counters in taken] == [0, 4 * 64]
        assert first(module._counters(device, 1)) == shared
        others = []
        thread = threading.Thread(target=lambda: others.append(module._counters(device, 1)))
        thread.start()
        thread.join()
        assert first(others[0]) == shared
    with linear_ops.counters_of_graph(device) as next_own:
        assert first(module._counters(device, 32)) == first(next_own) != first(own)
    assert first(module._counters(device, 1)) == shared and module._of_graphs[device][1] == 96


def test_threads_that_come_first_together_share_the_counters(monkeypatch):
    """A graph that one of them has captured writes to them, whatever the other makes."""
    module = pytest.importorskip("dalle_fast.ops.linear_triton", reason="needs the package triton")
    device, zeros = torch.device("cuda", 0), torch.zeros
    together = threading.Barrier(2)
    monkeypatch.setattr(module, "_of_graphs", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch, "zeros", lambda *shape, dtype, device: zeros(*shape, dtype=dtype))

    def synchronize():
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(0.5)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(synchronize=synchronize))
    found = []

    def first_call():
        module._prepare(device)
        found.append(module._of_graphs[device][0].data_ptr())

    threads = [threading.Thread(target=first_call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and set(found) == {module._of_graphs[device][0].data_ptr()}


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
LAYERS = ((2048, 2048), (6144, 2048), (8192, 2048), (2048, 8192))  # (N, K)


def on_gpu(R, N, K, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(R)
    x, weight, bias = (torch.randn(s, generator=generator, device="cuda") for s in ((R, K), (N, K), (N,)))
    return x.to(dtype), (weight / K**0.5).to(dtype), bias.to(dtype)


@needs_gpu
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("sizes", [(5, 7), (129, 1001), *LAYERS], ids=str)
def test_on_a_gpu_it_is_as_exact_as_torch_and_bits_repeat(sizes, activation):
    for R in (1, 8, 33, 64):
        x, weight, bias = on_gpu(R, *sizes)
        exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        exact = torch.nn.functional.gelu(exact) if activation else exact
        with nan_poisoned():
            ours, *again = (F.linear(x, weight, bias, activation=activation, impl="triton") for _ in range(20))
        theirs = F.linear(x, weight, bias, activation=activation, impl="reference")
        assert_as_exact_as_eager("out", ours, theirs, exact, terms=exact.abs())
        assert all(torch.equal(ours, other) for other in again)
        for r in (0, R - 1):
            assert torch.equal(F.linear(x[r], weight, bias, activation=activation, impl="triton"), ours[r])


@needs_gpu
def test_on_a_gpu_few_rows_are_ours(counted):
    x, weight, bias = on_gpu(64, 2048, 2048)
    F.linear(x, weight, bias)
    assert [arguments[-1] for arguments in counted] == ["triton"]
    F.linear(torch.cat([x, x]), weight, bias)
    F.linear(x.float(), weight.float(), bias.float())
    F.linear(x[:, 1:], weight[:, 1:], bias)
    assert len(counted) == 1


@needs_gpu
def test_on_a_gpu_graphs_and_streams_run_side_by_side():
    """All of them split their sums, so that a counter in common would show."""
    layers = [on_gpu(8, 2048, 8192) for _ in range(4)]
    expected = [F.linear(*layer, impl="triton") for layer in layers]
    graphs, outs = [torch.cuda.CUDAGraph() for _ in layers[:2]], []
    for graph, layer in zip(graphs, layers, strict=False):
        with torch.cuda.graph(graph):
            outs.append([F.linear(*layer, impl="triton") for _ in range(3)])
    streams = [torch.cuda.Stream() for _ in layers]
    torch.cuda.synchronize()
    eager = []
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        for layer, stream in zip(layers[2:], streams[2:], strict=True):
            with torch.cuda.stream(stream):
                eager.append(F.linear(*layer, impl="triton"))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected[n]) for n, of_graph in enumerate(outs) for out in of_graph)
    assert all(torch.equal(out, expected[2 + n % 2]) for n, out in enumerate(eager))


def test_it_is_a_good_torch_operation():
    x, weight, bias = operands(3, 5, 20)
    for arguments in ((x, weight, bias), (x, weight, None), (x.view(3, 1, 20), weight, bias)):
        torch.library.opcheck(torch.ops.dalle_fast.linear.default, (*arguments, None, "cpu"))
    torch.library.opcheck(torch.ops.dalle_fast.linear.default, (x, weight, bias, "gelu", "cpu"))


@pytest.mark.every_instruction_set
def test_gelu_is_of_the_result(make):
    """Torch's in the reference; on a CPU ours, of the float32 sum."""
    x, weight, bias = make((3, 33), count=1)[0], make((50, 33), seed=1, count=1)[0], make((50,), seed=2, count=1)[0]
    reference, gelu = torch.nn.functional.linear(x, weight, bias), torch.nn.functional.gelu
    assert torch.equal(F.linear(x, weight, bias, activation="gelu", impl="reference"), gelu(reference))
    for dtype in DTYPES:
        low = [tensor.to(dtype) for tensor in (x, weight, bias)]
        exact = gelu(torch.nn.functional.linear(*(tensor.double() for tensor in low)))
        eager = F.linear(*low, activation="gelu", impl="reference")
        assert_as_exact_as_eager("gelu", F.linear(*low, activation="gelu", impl="cpu"), eager, exact)
    weight.requires_grad_()
    grads = [
        torch.autograd.grad(out.sum(), weight)[0]
        for out in (
            F.linear(x, weight, bias, activation="gelu"),
            torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias)),
        )
    ]
    assert torch.equal(*grads)
    with pytest.raises(ValueError, match="activation must be None or 'gelu', got 'relu'"):
        F.linear(x, weight, bias, activation="relu")


@pytest.mark.every_instruction_set
def test_gelu_keeps_its_digits_everywhere():
    """Also where 1 + erf would cancel. What exp makes of an exponent's rounding grows with the exponent."""
    x = torch.cat(
        [torch.linspace(-12, 12, 4001), torch.tensor([0.0, 1e-30, -1e-30, 1e10, -1e10, torch.inf, -torch.inf])]
    )
    out = F.linear(x[:, None], torch.ones(1, 1), activation="gelu", impl="cpu")[:, 0].tolist()
    for argument, actual in zip(x.tolist(), out, strict=True):
        phi = math.erfc(-argument / math.sqrt(2)) / 2
        exact = argument * phi if phi else 0.0
        assert actual == exact or abs(actual - exact) <= 6e-7 * (1 + argument**2) * abs(exact) + 1e-29
    assert F.linear(torch.tensor([[torch.nan]]), torch.ones(1, 1), activation="gelu", impl="cpu").isnan().all()


def test_the_layer_is_torchs_with_another_way(counted, monkeypatch):
    """The same parameters and weights; `impl` chooses."""
    monkeypatch.setattr(linear_ops, "_rows", lambda: (range(1, 7), range(1, 3), range(1, 3)))
    torch.manual_seed(0)
    theirs = torch.nn.Linear(64, 40)
    torch.manual_seed(0)
    ours = Linear(64, 40, "auto")
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, torch.nn.Linear)
    plain = copy.deepcopy(ours)
    plain.impl = "reference"
    x = torch.randn(1, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
        assert len(counted) == 1
        assert torch.equal(plain(x), theirs(x)) and len(counted) == 1
