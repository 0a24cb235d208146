"""The codebook operation is a citizen of torch: opcheck, torch.compile, autocast, checkpoints; the module over it; memory.

N rows, K codes, I size of hidden (Din), D size of an embedding.
"""

import concurrent.futures
import copy
import os
import pickle
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from test_codebook import SEED, inputs
from test_codebook_grad import leaves_of
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import grad
from torch.utils.checkpoint import checkpoint

import dalle_fast.nn as fnn
from dalle_fast import _extension
from dalle_fast.nn import functional as F
from dalle_fast.ops import choice
from dalle_fast.ops.codebook import cpu
from dalle_fast.testing import codebook_noise

OPS = torch.ops.dalle_fast
N, K, I, D = 20, 70, 6, 5


def arguments(device, dtype=torch.float32, requires_grad=False):
    """hidden, weight, bias, codebook, tau, seed, target, as the operations take them; the first with odd strides."""
    hidden, weight, bias, codebook = inputs(N, K, I, D, dtype, device)
    tensors = [hidden.T.contiguous().T, weight.T.contiguous().T, bias, codebook]
    tensors = [x.detach().requires_grad_(requires_grad) for x in tensors]
    tau, seed = torch.full((1,), 0.5, device=device), torch.tensor([SEED], device=device)
    return *tensors, tau, seed, torch.arange(N, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(serve, dtype, requires_grad):
    """Every forward operation: schema, fakes (with exact strides), autograd registration, tracing."""
    hidden, weight, bias, codebook, tau, seed, target = arguments(serve.device, dtype, requires_grad)
    seeds = torch.arange(N, device=serve.device)
    check, impl = torch.library.opcheck, serve.impl
    check(OPS.codebook_sample.default, (hidden, weight, bias, tau, seeds, True, impl))
    check(OPS.codebook_sample.default, (hidden, weight, None, None, None, False, impl))
    check(OPS.gumbel_softmax.default, (hidden, tau, seed, impl))
    check(OPS.codebook_cross_entropy.default, (hidden, weight, bias, target, -1, impl))
    check(OPS.gumbel_codebook.default, (hidden, weight, bias, codebook, tau, seed, False, False, impl))
    check(OPS.gumbel_codebook.default, (hidden, weight, None, codebook, tau, seeds, True, True, impl))
    # Tracing takes the derivative of every output, and the gradients among them have none.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for needs in ([requires_grad] * 3, [False, requires_grad, False]):
        rest = target, tau, -1, needs, impl
        check(OPS.codebook_cross_entropy_reduced.default, (hidden, weight, bias, *rest), test_utils=tests)


def test_shapes_that_do_not_fit_are_refused_past_the_public_functions(serve):
    """A program of AOTInductor hands on any shape, and native code would read beyond a tensor."""
    hidden, weight, bias, codebook, tau, seed, target = arguments(serve.device)
    impl, seeds = serve.impl, torch.arange(N - 1, device=serve.device)
    product, of_loss, of_reduced = (hidden, weight, bias), (-1, impl), (tau, -1, [True] * 3, impl)
    wrong = [
        (OPS.gumbel_codebook, *product, codebook[1:], tau, seed, False, False, impl),
        (OPS.gumbel_codebook, *product, codebook, tau, seeds, True, False, impl),
        (OPS.codebook_sample, *product, tau, seeds, True, impl),
        (OPS.codebook_cross_entropy, *product, target[1:], *of_loss),
        (OPS.codebook_cross_entropy_reduced, *product, target[1:], *of_reduced),
    ]
    for product in (
        (hidden[:, 1:], weight, bias),
        (hidden, weight[1:], bias),
        (hidden, weight, bias[1:]),
        (hidden[0], weight, bias),
    ):
        wrong += [
            (OPS.gumbel_codebook, *product, codebook, tau, seed, False, False, impl),
            (OPS.codebook_sample, *product, tau, seed, False, impl),
            (OPS.codebook_cross_entropy, *product, target, *of_loss),
            (OPS.codebook_cross_entropy_reduced, *product, target, *of_reduced),
        ]
    for operation, *given in wrong:
        with pytest.raises(ValueError, match=" must have "):
            operation(*given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_backward(serve, dtype):
    hidden, weight, bias, codebook, tau, seed, target = arguments(serve.device, dtype)
    row_weight = torch.rand(N, device=serve.device)
    for needs in ([True] * 3, [False, True, False]):
        rest = target, row_weight, -1, needs, serve.impl
        torch.library.opcheck(OPS.codebook_cross_entropy_backward.default, (hidden, weight, bias, *rest))
        torch.library.opcheck(OPS.codebook_cross_entropy_reduced.default, (hidden, weight, bias, *rest))
    for b, hard in ((bias, False), (None, True)):
        inputs = hidden, weight, b, codebook, tau, seed
        embedding, kl, codes, stats = OPS.gumbel_codebook(*inputs, False, hard, serve.impl)
        for grad_kl, needs in ((None, [True, True, b is not None, True]), (kl.clone(), [False, True, False, False])):
            rest = kl, codes, stats, False, hard, needs, serve.impl
            torch.library.opcheck(OPS.gumbel_codebook_backward.default, (embedding.clone(), grad_kl, *inputs, *rest))


def test_fakes_have_the_strides_of_the_real(serve):
    from torch._subclasses.fake_tensor import FakeTensorMode

    hidden, weight, bias, codebook, tau, seed, target = arguments(serve.device)
    needs, impl = [True] * 4, serve.impl

    def everything(hidden, weight, bias, codebook, tau, seed, target):
        out = OPS.gumbel_codebook(hidden, weight, bias, codebook, tau, seed, False, False, impl)
        rest = (hidden, weight, bias, codebook, tau, seed, *out[1:], False, False, needs, impl)
        out += OPS.gumbel_codebook_backward(out[0], out[1], *rest)
        out += OPS.codebook_cross_entropy_reduced(hidden, weight, bias, target, tau, -1, needs[:3], impl)
        return (*out, OPS.codebook_cross_entropy(hidden, weight, bias, target, -1, impl), *OPS.gumbel_softmax(
            hidden, tau, seed, impl
        ))  # fmt: skip

    real = everything(hidden, weight, bias, codebook, tau, seed, target)
    with FakeTensorMode() as mode:
        tensors = [mode.from_tensor(x) for x in (hidden, weight, bias, codebook, tau, seed, target)]
        fake = everything(*tensors)
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


def test_meta_tensors():
    tensors = [x.to("meta") for x in inputs(6, K, I, D)]
    out = F.gumbel_codebook(tensors[0].view(2, 3, I), *tensors[1:], 0.5, seed=1)
    assert out.embedding.is_meta and out.embedding.shape == (2, 3, D) and out.codes.shape == (2, 3)
    assert F.codebook_sample(*tensors[:3], seed=1).shape == (6,)
    target = torch.zeros(6, dtype=torch.int64, device="meta")
    assert F.codebook_cross_entropy(*tensors[:3], target).shape == ()
    for tau in (0.5, torch.tensor(0.5), torch.tensor(0.5, device="meta")):
        soft = F.gumbel_softmax(tensors[0], tau, seed=1)
        assert soft.is_meta and soft.shape == (6, I)


# -- torch.compile -------------------------------------------------------------------------------------------------------


def model(hidden, weight, bias, codebook, tau, seed, target):
    """All of it: a loss, and codes."""
    out = F.gumbel_codebook(hidden * 2, weight, bias, codebook, tau, seed=seed)
    loss = F.codebook_cross_entropy(hidden, weight, bias, target) + out.embedding.sin().sum() + 0.1 * out.kl.mean()
    loss = loss + F.codebook_cross_entropy(hidden, weight, None, target, reduction="none").square().sum()
    loss = loss + F.gumbel_softmax(hidden, 0.5, seed=seed).square().sum()
    with torch.no_grad():
        codes = F.codebook_sample(hidden, weight, bias, seed=seed), F.codebook_argmax(hidden, weight)
    return loss, out.codes, *codes


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph(serve, backend):
    if serve.impl == "reference":
        pytest.skip("compiled functions name no implementation: auto serves")
    torch._dynamo.reset()
    *leaves, _, seed, target = arguments(serve.device, requires_grad=True)
    tau, seed = torch.tensor(0.5, device=serve.device), seed[0]
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    expected, actual = (f(*leaves, tau, seed, target) for f in (model, compiled))
    torch.testing.assert_close(actual, expected)
    for a, b in zip(grad(actual[0], leaves), grad(expected[0], leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_one_graph_for_every_tau_seed_and_batch():
    """A schedule of tau and a new seed at every step compile nothing again."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(F.gumbel_codebook, backend=counter, fullgraph=True, dynamic=True)
    _, *tensors = inputs(N, K, I, D)
    for step in range(10):
        hidden = inputs(N + step, K, I, D)[0]
        tau, seed = torch.tensor(1.0 - 0.05 * step), torch.tensor(step)
        actual, expected = (f(hidden, *tensors, tau, seed=seed) for f in (compiled, F.gumbel_codebook))
        assert torch.equal(actual.embedding, expected.embedding) and torch.equal(actual.codes, expected.codes)
    assert counter.frame_count == 1


@pytest.mark.parametrize("values", [[1 / (1 + 0.1 * i) for i in range(12)], range(1, 13)], ids=["floats", "integers"])
def test_numbers_that_change_are_compiled_twice(values):
    """A schedule's numbers too: from the second value on they are open in the graph, through AOTAutograd."""
    hidden, weight, bias, codebook = inputs(N, K, I, D)
    module = fnn.GumbelCodebook(I, K, D)

    def through_the_module(tau):
        module.tau = tau
        return module(hidden, seed=1).embedding

    for function in (
        lambda tau: F.gumbel_codebook(hidden, weight, bias, codebook, tau, seed=1).embedding,
        lambda tau: F.codebook_sample(hidden, weight, bias, temperature=tau, seed=1),
        lambda tau: F.gumbel_softmax(hidden, tau, seed=1),
        through_the_module,
    ):
        assert compilations(function, [(value,) for value in values]) == 2


def test_a_schedule_compiles_a_dvae_twice():
    model, images = fnn.DiscreteVAE("tiny"), torch.rand(1, 3, 32, 32)
    schedule = [(1 / (1 + 0.1 * i), 0.1 * i) for i in range(1, 11)]
    assert compilations(lambda tau, beta: model(images, tau=tau, beta=beta, seed=1).loss, schedule) == 2


def compilations(function, calls):
    """How often it is compiled over `calls`, with AOTAutograd, which closes numbers that Dynamo had left open."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for call in calls:
        torch.testing.assert_close(compiled(*call), function(*call), rtol=1e-6, atol=0)
    return counter.frame_count


def test_gumbel_softmax_takes_tau_as_a_tensor(serve):
    """Compiled too, with a gradient; one that broadcasts or needs a gradient is refused."""
    torch._dynamo.reset()
    logits = inputs(N, K, I, D, device=serve.device)[0].requires_grad_()

    def soft(tau):
        return F.gumbel_softmax(logits, tau, seed=1, impl=serve.impl)

    compiled = torch.compile(soft, backend="aot_eager", fullgraph=True)
    expected = soft(0.5)
    for device in ("cpu", serve.device):
        tau = torch.tensor(0.5, device=device)
        for found in (soft(tau), compiled(tau)):
            assert torch.equal(found, expected)
            assert torch.equal(*(grad(x.square().sum(), logits, retain_graph=True)[0] for x in (found, expected)))
    for function in (soft, compiled):
        with pytest.raises(ValueError, match="tau must be positive and finite, got 0.0"):
            function(torch.tensor(0.0))
    with pytest.raises(TypeError, match=r"tau must be a number or a floating-point tensor.*shape \(20, 1\)"):
        soft(torch.ones(N, 1))
    with pytest.raises(ValueError, match="tau must not require a gradient"):
        soft(torch.tensor(0.5, requires_grad=True))


def test_seed_none_when_compiled():
    torch._dynamo.reset()
    zeros = torch.zeros(50, 1), torch.zeros(1000, 1)
    compiled = torch.compile(lambda: F.codebook_sample(*zeros), backend="aot_eager", fullgraph=True)
    assert (compiled() == compiled()).float().mean() < 0.1


# -- what a program may have set, and how often it goes backward --------------------------------------------------------

TRAIN = """
import torch
import dalle_fast.nn.functional as F

hidden, weight, bias, codebook = torch.randn(64, 16), torch.randn(300, 16), torch.randn(300), torch.randn(300, 8)
with torch.inference_mode():
    F.codebook_argmax(hidden, weight, bias)
    F.gumbel_codebook(hidden, weight, bias, codebook, 1.0, seed=1)
for default in (torch.bfloat16, torch.float64, torch.float32):
    torch.set_default_dtype(default)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias, codebook)]
    for hard in (False, True):
        soft = F.gumbel_codebook(*leaves, 1.0, seed=1, hard=hard)
        (soft.embedding.sum() + soft.kl.sum()).backward()
    F.codebook_cross_entropy(*leaves[:3], torch.arange(64)).backward()
    grads = [x.grad for x in leaves]
    assert all(x.dtype == torch.float32 for x in grads)
    first = grads if default == torch.bfloat16 else first
    assert all(map(torch.equal, first, grads)), default
"""


@pytest.mark.parametrize("isa", _extension.native().instruction_sets() if not _extension.why_missing() else [])
def test_defaults_and_inference_mode_change_nothing(isa):
    """In a process of its own: with another default dtype memory was written past its end."""
    environment = {**os.environ, "DALLE_FAST_ISA": isa}
    run = subprocess.run([sys.executable, "-c", TRAIN], env=environment, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr.decode()


def in_another_thread(function):
    """What it returns in a thread that has done nothing yet."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_memory_to_work_in_is_a_threads_own_and_stays_until_it_is_too_small():
    def addresses():
        return [cpu.scratch(size).data_ptr() for size in (1000, 10, 1000)]

    mine = addresses()
    theirs = in_another_thread(addresses)
    assert len(set(mine)) == len(set(theirs)) == 1 and mine != theirs
    grown = in_another_thread(lambda: [len(cpu.scratch(size)) for size in (10, 1000)])
    assert grown == [10, 1000]


def test_memory_from_inference_mode_can_be_written_later():
    def write():
        with torch.inference_mode():
            cpu.scratch(10)
        return cpu.scratch(10).zero_().is_inference()

    assert not in_another_thread(write)


def test_memory_that_is_too_small_is_gone_before_there_is_larger(monkeypatch):
    def grow():
        cpu.scratch(10)
        small, empty, gone = weakref.ref(cpu._kept.rows), torch.empty, []
        monkeypatch.setattr(
            torch, "empty", lambda *args, **options: gone.append(small() is None) or empty(*args, **options)
        )
        cpu.scratch(1000)
        return gone

    assert in_another_thread(grow) == [True]


@pytest.mark.parametrize("num_codes", [1, 70, 8192, 100_003, 10_000_000])
def test_a_chunk_has_whole_groups_of_rows_within_its_memory(num_codes):
    rows = cpu.chunk_rows(num_codes)
    assert rows % cpu.MIN_ROWS == 0 and rows > 0
    assert rows == cpu.MIN_ROWS or 4 * num_codes * rows <= cpu.CHUNK_BYTES < 4 * num_codes * (rows + cpu.MIN_ROWS)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_that_were_given_away_are_not_needed_again(serve, reduction):
    hidden, weight, bias, *_, target = arguments(serve.device, requires_grad=True)
    loss = F.codebook_cross_entropy(hidden, weight, bias, target, reduction=reduction, impl=serve.impl).sum()
    first = grad(loss, (hidden, weight, bias), retain_graph=True)
    copies = [x.clone() for x in first]
    for x in first:
        x.data.zero_()
    assert all(map(torch.equal, copies, grad(loss, (hidden, weight, bias))))


def test_forward_mode_is_refused(serve):
    hidden, weight, bias, codebook, _, _, target = arguments(serve.device)
    for function in (
        lambda x: F.codebook_cross_entropy(x, weight, bias, target, impl=serve.impl),
        lambda x: F.gumbel_codebook(x, weight, bias, codebook, 1.0, impl=serve.impl).kl,
        lambda x: F.gumbel_softmax(x, impl=serve.impl),
    ):
        with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
            torch.func.jvp(function, (hidden,), (torch.ones_like(hidden),))


def losses(serve, weight, bias, codebook, target):
    """Functions of hidden to be differentiated, the last of its logits."""
    return [
        lambda x: serve.codebook_cross_entropy(x, weight, bias, target),
        lambda x: serve.codebook_cross_entropy(x, weight, bias, target, reduction="none").square().sum(),
        lambda x: serve.gumbel_codebook(x, weight, bias, codebook, 0.5, seed=1).embedding.square().sum(),
        lambda x: serve.gumbel_softmax(x, 0.5, seed=1).square().sum(),
    ]


def test_transforms_that_differentiate_are_refused(serve):
    """torch's message would be about how it makes a function of an operation."""
    hidden, weight, bias, codebook, _, _, target = arguments(serve.device)
    functions = losses(serve, weight, bias, codebook, target)
    for function in functions:
        for transformed in (
            torch.func.grad(function),
            torch.func.jacrev(function),
            torch.func.grad(lambda x: torch.func.vmap(function)(torch.stack([x, x])).sum()),  # noqa: B023
        ):
            with pytest.raises(NotImplementedError, match="dalle_fast.*differentiated by autograd.*not by torch.func"):
                transformed(hidden)
    # What does not go through the operation is no reason, nor is a parameter that the transform does not know.
    weight.requires_grad_()
    with torch.no_grad():
        codes = serve.codebook_argmax(hidden, weight)

    def of_another_path(x):
        kept = [function(x.detach()) for function in functions]
        assert torch.equal(serve.codebook_argmax(x, weight), codes)
        return x.sum() + sum(kept)

    assert torch.equal(torch.func.grad(of_another_path)(hidden), torch.ones_like(hidden))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(serve):
    """Sample after sample, which torch warns of: values, and gradients that are wanted outside of it."""
    hidden, weight, bias, codebook, _, _, target = arguments(serve.device)
    functions = losses(serve, weight, bias, codebook, target)
    x = torch.stack([hidden, hidden.flip(0)]).requires_grad_()
    for function in functions:
        found, expected = torch.func.vmap(function)(x), torch.stack([function(each) for each in x])
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(grad(loss.sum(), x)[0] for loss in (found, expected)))

    def loss(hidden, target):
        return serve.codebook_cross_entropy(hidden, weight, bias, target)

    targets = torch.stack([target, target.flip(0)])
    expected = torch.stack([loss(*each) for each in zip(x, targets, strict=True)])
    torch.testing.assert_close(torch.func.vmap(loss)(x, targets), expected)
    beside = x.detach().movedim(0, 1), targets.movedim(0, 1).contiguous()  # in memory a sample's targets lie apart
    torch.testing.assert_close(torch.func.vmap(loss, in_dims=1)(*beside), expected)
    if serve.device == "cpu":
        with pytest.raises(ValueError, match="target must hold codes"):
            torch.func.vmap(loss)(x, targets + K)
    soft = torch.func.vmap(lambda tau: serve.gumbel_softmax(hidden, tau, seed=1))(torch.tensor([0.5, 2.0]))
    assert torch.equal(soft[1], serve.gumbel_softmax(hidden, 2.0, seed=1))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_gradients(serve):
    hidden, weight, bias, *_, target = arguments(serve.device)
    hidden.requires_grad_()
    loss = serve.codebook_cross_entropy(hidden, weight, bias, target)
    of_loss = grad(loss, hidden, retain_graph=True)[0]
    twice = grad(loss, hidden, torch.tensor([1.0, 3.0], device=serve.device), is_grads_batched=True)[0]
    torch.testing.assert_close(twice, torch.stack([of_loss, 3 * of_loss]))


def test_a_hard_row_that_is_not_finite_has_no_code(serve):
    hidden, weight, bias, codebook, *_ = arguments(serve.device)
    hidden[1, 0], hidden[3, 2] = torch.nan, torch.inf
    out = F.gumbel_codebook(hidden, weight, bias, codebook, 1.0, hard=True, seed=1, impl=serve.impl)
    bad = ~hidden.isfinite().all(1)
    assert torch.equal(out.embedding.isnan().all(1), bad) and torch.equal(out.embedding.isnan().any(1), bad)


# -- autocast, checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(serve, dtype):
    leaves = leaves_of(inputs(N, K, I, D, device=serve.device))
    half = [x.to(dtype) for x in leaves]
    target = torch.arange(N, device=serve.device)
    expected = serve.gumbel_codebook(*half, 0.5, seed=SEED)
    with torch.autocast(serve.device, dtype):
        out = serve.gumbel_codebook(*leaves, 0.5, seed=SEED)
        mixed = serve.gumbel_codebook(half[0], *leaves[1:], 0.5, seed=SEED)
        loss = serve.codebook_cross_entropy(*leaves[:3], target)
        codes = serve.codebook_sample(*leaves[:3], seed=SEED), serve.codebook_argmax(*leaves[:3])
    assert out.embedding.dtype == dtype and out.kl.dtype == loss.dtype == torch.float32
    for one in (out, mixed):
        assert all(torch.equal(a, b) for a, b in zip(one, expected, strict=True))
    assert torch.equal(loss, serve.codebook_cross_entropy(*half[:3], target))
    assert torch.equal(codes[0], serve.codebook_sample(*half[:3], seed=SEED))
    assert torch.equal(codes[1], serve.codebook_argmax(*half[:3]))
    found = grad(out.embedding.sum() + out.kl.sum() + loss, leaves)
    assert all(x.dtype == torch.float32 and x.isfinite().all() and x.any() for x in found)
    with torch.autocast(serve.device, dtype, enabled=False):
        assert serve.gumbel_codebook(*leaves, 0.5).embedding.dtype == torch.float32


def test_autocast_leaves_float64_alone():
    tensors = inputs(N, K, I, D, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.gumbel_codebook(*tensors, 0.5, impl="reference").embedding.dtype == torch.float64


def test_checkpoint(serve):
    """With a seed; and without, where the generator's state is restored."""
    leaves = leaves_of(inputs(N, K, I, D, device=serve.device))
    for seed in (SEED, None):

        def loss(*tensors):
            return serve.gumbel_codebook(*tensors, 0.5, seed=seed).embedding.square().sum()  # noqa: B023

        torch.manual_seed(0)
        expected = grad(loss(*leaves), leaves)
        for reentrant in (False, True):
            torch.manual_seed(0)
            again = checkpoint(loss, *leaves, use_reentrant=reentrant)
            if reentrant:
                for leaf in leaves:
                    leaf.grad = None
                again.backward()
                found = [x.grad for x in leaves]
            else:
                found = grad(again, leaves)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_codes_carry_no_graph(serve):
    """Sampling with parameters that require gradients, outside of no_grad: nothing is recorded."""
    hidden, weight, bias, _ = leaves_of(inputs(N, K, I, D, device=serve.device))
    for codes in (serve.codebook_sample(hidden, weight, bias, seed=1), serve.codebook_argmax(hidden, weight, bias)):
        assert codes.grad_fn is None and not codes.requires_grad


# -- the module ----------------------------------------------------------------------------------------------------------


def test_module_replaces_convolution_softmax_einsum(monkeypatch):
    """The usual three lines, with torch's noise replaced by ours: the same embedding, KL and gradients."""
    torch.manual_seed(0)
    convolution, embedding = torch.nn.Conv2d(I, K, 1), torch.nn.Embedding(K, D)
    module = fnn.GumbelCodebook(I, K, D, tau=0.7)
    module.load_state_dict({**convolution.state_dict(), "codebook": embedding.weight})
    hidden = torch.randn(2, I, 3, 4)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for hard in (False, True):
            module.hard = hard
            x, y = (hidden.contiguous(memory_format=memory_format).requires_grad_() for _ in range(2))
            out = module(x, seed=SEED)
            noise = codebook_noise(SEED, 24, K).float().view(2, 3, 4, K).permute(0, 3, 1, 2)
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "exponential_", lambda x: x.copy_((-noise).exp()))  # noqa: B023
                logits = convolution(y)
                soft = torch.nn.functional.gumbel_softmax(logits, tau=0.7, dim=1, hard=hard)
            expected = torch.einsum("bnhw,nd->bdhw", soft, embedding.weight)
            log_p = torch.log_softmax(logits, 1)
            kl = torch.nn.functional.kl_div(log_p.new_tensor([1 / K]).log(), log_p, None, None, "none", log_target=True)
            assert out.embedding.shape == (2, D, 3, 4) and out.kl.shape == out.codes.shape == (2, 3, 4)
            torch.testing.assert_close(out.embedding, expected)
            torch.testing.assert_close(out.kl, kl.sum(1))
            assert torch.equal(out.codes, soft.argmax(1))
            weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
            ours = (module.weight, module.bias, module.codebook, x)
            theirs = (convolution.weight, convolution.bias, embedding.weight, y)
            found = grad((out.embedding * weights).sum() + 0.3 * out.kl.sum(), ours)
            wanted = grad((expected * weights).sum() + 0.3 * kl.sum(), theirs)
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b.reshape(a.shape), rtol=1e-4, atol=1e-5)


def test_module_encodes_and_decodes():
    module = fnn.GumbelCodebook(I, K, D)
    hidden = torch.randn(2, I, 3, 4)
    codes = module.encode(hidden)
    assert torch.equal(codes, torch.nn.functional.conv2d(hidden, module.weight[..., None, None], module.bias).argmax(1))
    decoded = module.decode(codes)
    assert decoded.shape == (2, D, 3, 4) and torch.equal(decoded[1, :, 2, 3], module.codebook[codes[1, 2, 3]])
    for shape in ((5, I), (5, I, 7), (0, I, 2, 2), (1, I, 2, 2, 2)):
        out = module(torch.randn(shape))
        assert out.embedding.shape == (shape[0], D, *shape[2:]) and out.codes.shape == (shape[0], *shape[2:])


@pytest.mark.parametrize(
    ("hidden", "error", "message"),
    [
        (torch.zeros(I), ValueError, r"hidden must have shape \(B, 6, ...\), got \(6,\)"),
        (torch.zeros(2, I + 1, 3), ValueError, r"hidden must have shape \(B, 6, ...\), got \(2, 7, 3\)"),
        (
            torch.zeros(2, I, 3).double(),
            TypeError,
            "hidden must have the module's dtype torch.float32, or autocast, got torch.float64",
        ),
        (torch.zeros(2, I, 3).bfloat16(), TypeError, "hidden must have .* torch.float32, or .* got torch.bfloat16"),
        (torch.zeros(2, I, 3).to("meta"), ValueError, "hidden must be on the module's device cpu, got meta"),
        (torch.zeros(2, I, 3).long(), TypeError, "hidden must be float32, .*, got torch.int64"),
        ([1], TypeError, "hidden must be a tensor, got list"),
    ],
)
def test_module_blames_hidden(hidden, error, message):
    """Not its own weight, which the user did not give."""
    module = fnn.GumbelCodebook(I, K, D)
    for function in (module, module.encode):
        with pytest.raises(error, match=message):
            function(hidden)


@pytest.mark.parametrize(
    ("codes", "error", "message"),
    [
        (torch.tensor([0, K]), ValueError, f"codes must be from 0 to {K - 1}, .*, got values from 0 to {K}"),
        (torch.tensor([0.0]), TypeError, "codes must be an int64 tensor, got torch.float32"),
    ],
)
def test_module_blames_codes(codes, error, message):
    with pytest.raises(error, match=message):
        fnn.GumbelCodebook(I, K, D).decode(codes)


def test_module_under_autocast_takes_mixed_dtypes():
    module, hidden = fnn.GumbelCodebook(I, K, D), torch.randn(2, I, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module.encode(hidden.bfloat16()), module.encode(hidden))
        with pytest.raises(TypeError, match="hidden must have .*, got torch.float64"):
            module(hidden.double())


def test_module_checks_tau_and_impl_where_it_is_made():
    for tau in (-1, 0.0, float("inf"), torch.tensor(-1.0)):
        with pytest.raises(ValueError, match="tau must be positive and finite, got"):
            fnn.GumbelCodebook(I, K, D, tau=tau)
    for tau in ("1", None, torch.ones(2)):
        with pytest.raises(TypeError, match="tau must be a number or a"):
            fnn.GumbelCodebook(I, K, D, tau=tau)
    for make in (lambda: fnn.GumbelCodebook(I, K, D, impl="foo"), lambda: fnn.DiscreteVAE("tiny", impl="foo")):
        with pytest.raises(ValueError, match="impl must be one of auto, reference, cpu, triton, cuda, got 'foo'"):
            make()
    for tau in (2, np.float32(0.5), torch.tensor(0.5), torch.tensor(0.5, device="meta")):
        assert fnn.GumbelCodebook(I, K, D, tau=tau).tau is tau


def test_module_copies_pickles_and_says_what_it_is():
    module = fnn.GumbelCodebook(I, K, D, tau=0.25, hard=True, bias=False)
    hidden = torch.randn(2, I, 3, 4)
    expected = module(hidden, seed=1)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(again(hidden, seed=1).embedding, expected.embedding) and again.hard and again.tau == 0.25
    assert repr(module) == f"GumbelCodebook({I}, {K}, {D}, tau=0.25, hard=True, bias=False)"
    assert set(module.state_dict()) == {"weight", "codebook"}
    other = fnn.GumbelCodebook(I, K, D, bias=False)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.codebook, module.codebook)
    for sizes in ((0, K, D), (I, 0, D), (I, K, 0)):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            fnn.GumbelCodebook(*sizes)
    for size in (4.0, True, "4", None):
        with pytest.raises(TypeError, match=f"in_channels must be an integer, got {size!r}"):
            fnn.GumbelCodebook(size, K, D)
    assert fnn.GumbelCodebook(*np.array([I, K, D])).codebook.shape == (K, D)
    half = fnn.GumbelCodebook(I, K, D, dtype=torch.bfloat16)
    assert half(hidden.bfloat16()).embedding.dtype == torch.bfloat16


def test_module_follows_a_schedule_of_tau():
    module = fnn.GumbelCodebook(I, K, D)
    hidden = torch.randn(2, I, 3, 4)
    seen = []
    for tau in (1.0, 0.5, torch.tensor(0.5), torch.tensor(0.1)):
        module.tau = tau
        seen.append(module(hidden, seed=3).embedding)
    assert torch.equal(seen[1], seen[2]) and not torch.equal(seen[0], seen[1]) and not torch.equal(seen[2], seen[3])


# -- memory --------------------------------------------------------------------------------------------------------------

MEASURE = """
import sys
import measuring
import torch
from dalle_fast.nn import functional as F

what, impl, device, dtype = sys.argv[1:5]
dtype = getattr(torch, dtype)
I, D, N, K = map(int, sys.argv[5:])
measure = measuring.cuda_extra_bytes if device == "cuda" else measuring.cpu_extra_bytes

def call(N, K):
    torch.manual_seed(0)
    options = {"device": device, "dtype": dtype, "requires_grad": True}
    hidden, weight, codebook = (torch.randn(s, **options) for s in ((N, I), (K, I), (K, D)))
    bias = torch.zeros(K, **options)
    target = torch.zeros(N, dtype=torch.int64, device=device)
    of_embedding = torch.ones(N, D, device=device, dtype=dtype)
    of_kl = torch.ones(N, device=device)

    def forward_backward():
        if what == "gumbel_codebook":
            out = F.gumbel_codebook(hidden, weight, bias, codebook, 1.0, seed=0, impl=impl)
            leaves = hidden, weight, bias, codebook
            return [*out, *torch.autograd.grad(out[:2], leaves, (of_embedding, of_kl))]
        if what == "cross_entropy":
            loss = F.codebook_cross_entropy(hidden, weight, bias, target, impl=impl)
            return torch.autograd.grad(loss, (hidden, weight, bias))
        return F.codebook_sample(hidden, weight, bias, seed=0, impl=impl)

    return forward_backward

call(16, 128)()  # threads, libraries and their buffers
print(measure(call(N, K)))
"""


@pytest.mark.parametrize(
    "what, dtype, din",
    [
        ("gumbel_codebook", "float32", 64),
        ("gumbel_codebook", "float32", 2048),
        ("gumbel_codebook", "bfloat16", 512),
        ("gumbel_codebook", "bfloat16", 2048),
        ("cross_entropy", "float32", 64),
        ("cross_entropy", "bfloat16", 2048),
        ("sample", "float32", 64),
    ],
)
def test_extra_memory(serve, what, dtype, din):
    """Forward and backward at 8,192 rows and codes: below 40 MB, where one tensor (N, K) would be 268 MB in float32."""
    if serve.impl == "reference":
        pytest.skip("the reference is dense")
    if serve.impl == "cpu" and dtype == "bfloat16" and cpu.PRODUCTS[_extension.native().instruction_set()] == "vendor":
        pytest.skip("float32 copies of what torch multiplies take more than 40 MB here")
    if serve.impl == "cuda" and dtype != "float32" and din > 512:
        pytest.skip("on GPUs the gradient of weight is added up in float32 outside of its own memory: 67 MB")
    assert extra_bytes(what, serve.impl, serve.device, dtype, din) < 40e6


def extra_bytes(what, impl, device, dtype, din):
    """Beside results of 8,192 rows and codes, in a process of its own; skips where it cannot be measured."""
    benchmarks = str(Path(__file__).resolve().parents[1] / "benchmarks")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([benchmarks, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", MEASURE, what, impl, device, dtype, *map(str, (din, 128, 8192, 8192))]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=600)
    if "NotRun" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


# -- who serves ----------------------------------------------------------------------------------------------------------


def test_auto_warns_once_where_only_the_reference_serves():
    choice._warn_once.cache_clear()
    tensors = inputs(N, K, I, D, torch.float64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = F.gumbel_codebook(*tensors, 0.5, seed=1)
        F.gumbel_codebook(*tensors, 0.5, seed=1)
        F.codebook_argmax(*tensors[:3])
    assert [warning.category for warning in caught] == [UserWarning] * 2
    for warning, name in zip(caught, ("gumbel_codebook", "codebook_argmax"), strict=True):
        message = str(warning.message)
        assert name in message and "dense reference" in message and "float64" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice._warn_once.cache_clear()
        again = F.gumbel_codebook(*tensors, 0.5, seed=1, impl="reference")
    assert torch.equal(again.embedding, out.embedding)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_on_a_gpu_is_cuda():
    tensors = inputs(N, K, I, D, device="cuda")
    a, b = (F.gumbel_codebook(*tensors, 0.5, seed=1, impl=impl) for impl in ("auto", "cuda"))
    assert torch.equal(a.embedding, b.embedding)
