"""Gradients of the codebook operation are what float64 says they are, and the same bits every time.

N rows, K codes, I size of hidden (Din), D size of an embedding.
"""

import itertools

import pytest
import torch
from test_codebook import DTYPES, HOW, SEED, SIZES, inputs, smallest_chunks, strided
from torch.autograd import grad, gradcheck

from dalle_fast.nn import functional as F
from dalle_fast.testing import (
    assert_as_exact_as_eager,
    codebook_gradient_terms,
    codebook_noise,
    codebook_oracle,
    eager_codebook,
    nan_poisoned,
)

NAMES = ("grad_hidden", "grad_weight", "grad_bias", "grad_codebook")


def leaves_of(tensors, dtype=None):
    """The tensors that are there, as leaves that require a gradient; strides kept where the dtype is."""
    return [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]


def gradients(function, tensors, *cotangents, dtype=None):
    """Gradients of the sum of output * cotangent (None: not used) in every tensor; None for a tensor that is None."""
    leaves = leaves_of(tensors, dtype)
    outputs = function(*leaves)
    used = [(o, c.to(o.dtype)) for o, c in zip(outputs, cotangents, strict=False) if c is not None]
    found = iter(
        grad([o for o, _ in used], [x for x in leaves if x is not None], [c for _, c in used], allow_unused=True)
    )
    return [None if x is None else next(found) for x in leaves]


def cotangents(N, D, like):
    """Random and far from uniform, for embedding (N, D) and kl (N,)."""
    generator = torch.Generator().manual_seed(5)
    of_embedding = torch.randn(N, D, generator=generator) * torch.rand(N, 1, generator=generator) * 2
    of_kl = torch.randn(N, generator=generator)
    return of_embedding.to(like), of_kl.to(like.device)


def check(serve, tensors, tau=1.0, *, hard=False, embedding=True, kl=True, seed=SEED):
    """Compare the gradients with the oracle's; returns them."""
    hidden, weight, _, codebook = tensors
    N, K, D = hidden.shape[0], weight.shape[0], codebook.shape[1]
    of_embedding, of_kl = cotangents(N, D, hidden)
    used = of_embedding if embedding else None, of_kl if kl else None
    noise = codebook_noise(seed, N, K).to(hidden.device)
    with nan_poisoned():
        actual = gradients(lambda *x: serve.gumbel_codebook(*x, tau, seed=seed, hard=hard), tensors, *used)
    exact = gradients(lambda *x: codebook_oracle(*x, tau, noise, hard=hard), tensors, *used, dtype=torch.float64)
    in_float32 = gradients(
        lambda *x: eager_codebook(*x, tau, noise.float(), hard=hard), tensors, *used, dtype=torch.float32
    )
    terms = codebook_gradient_terms(*tensors, tau, noise, of_embedding * embedding, of_kl if kl else None, hard=hard)
    for name, a, e, x, t in zip(NAMES, actual, in_float32, exact, terms, strict=True):
        if x is None:  # no bias, or a codebook that only kl does not depend on
            assert a is None or (a == 0).all(), name
            continue
        assert a.dtype == hidden.dtype and a.shape == x.shape
        if x.numel():
            assert_as_exact_as_eager(name, a, e.to(a.dtype), x, terms=t)
    return actual


# -- the reference, by finite differences --------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1.0, 0.4])
def test_gradcheck_of_the_reference(tau):
    leaves = leaves_of(inputs(3, 5, 4, 2, torch.float64))
    assert gradcheck(lambda *x: F.gumbel_codebook(*x, tau, seed=SEED, impl="reference")[:2], leaves)
    target = torch.tensor([1, -100, 4])
    for reduction in ("none", "mean", "sum"):
        options = {"reduction": reduction, "impl": "reference"}
        assert gradcheck(lambda *x: F.codebook_cross_entropy(*x, target, **options), leaves[:3])  # noqa: B023
    assert gradcheck(lambda x: F.gumbel_softmax(x, tau, seed=SEED, dim=0, impl="reference"), leaves[:1])


def test_float64_is_float64():
    """The reference in float64 is the oracle, to its digits."""
    tensors = inputs(20, 100, 10, 7, torch.float64)
    noise = codebook_noise(SEED, 20, 100)
    out = F.gumbel_codebook(*tensors, 0.3, seed=SEED, impl="reference")
    exact = codebook_oracle(*tensors, 0.3, noise)
    assert out.embedding.dtype == out.kl.dtype == torch.float64
    torch.testing.assert_close(out.embedding, exact[0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(out.kl, exact[1], rtol=1e-11, atol=1e-11)
    assert torch.equal(out.codes, exact[2])


# -- all implementations -------------------------------------------------------------------------------------------------


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_size(serve, sizes, dtype):
    tensors = inputs(*sizes, dtype, serve.device)
    check(serve, tensors)
    check(serve, [*tensors[:2], None, tensors[3]])
    check(serve, tensors, 0.5, hard=True)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kl_alone_and_embedding_alone(serve, dtype, hard):
    tensors = inputs(40, 130, 20, 12, dtype, serve.device)
    both = check(serve, tensors, 0.5, hard=hard)
    alone = check(serve, tensors, 0.5, hard=hard, kl=False), check(serve, tensors, 0.5, hard=hard, embedding=False)
    assert not torch.equal(alone[0][0], both[0]) and not torch.equal(alone[1][0], both[0])


@pytest.mark.parametrize("tau", [4.0, 0.5, 1 / 16, 1e-3, 1e-30])
def test_every_tau(serve, tau):
    for dtype in DTYPES:
        for spread in (1.0, 30.0, 1200.0):
            for found in check(serve, inputs(40, 100, 20, 24, dtype, serve.device, spread=spread), tau):
                assert found.isfinite().all()


@pytest.mark.parametrize("how", HOW)
def test_every_stride(serve, how):
    for dtype in DTYPES:
        plain = inputs(37, 130, 20, 12, dtype, serve.device)
        for changed in ((0,), (1,), (2,), (3,), (0, 1, 2, 3)):
            check(serve, [strided(x, how) if n in changed else x for n, x in enumerate(plain)], 0.5)


def test_every_stride_of_what_comes_in(serve):
    tensors = inputs(37, 130, 20, 12, device=serve.device)
    leaves = leaves_of(tensors)
    out = serve.gumbel_codebook(*leaves, 0.5, seed=SEED)
    random = cotangents(37, 12, tensors[0])
    for of_embedding, of_kl in (
        [strided(x, "transposed") for x in random],
        [strided(x, "last sliced") for x in random],
        [x.flatten()[0].expand(x.shape) for x in random],
    ):
        incoming = of_embedding, of_kl
        odd = grad(out[:2], leaves, incoming, retain_graph=True)
        plain = grad(out[:2], leaves, [x.contiguous() for x in incoming], retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(odd, plain, strict=True))
    target = torch.arange(37, device=serve.device)
    loss = serve.codebook_cross_entropy(*leaves[:3], target, reduction="none")
    odd = grad(loss, leaves[:3], torch.ones((), device=serve.device).expand(37), retain_graph=True)
    plain = grad(loss, leaves[:3], torch.ones(37, device=serve.device))
    assert all(torch.equal(a, b) for a, b in zip(odd, plain, strict=True))


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_chunks(serve, monkeypatch, dtype, hard):
    """The numbers of rows, what is added up over chunks, and one seed for each row."""
    smallest_chunks(monkeypatch)
    tensors = inputs(49, 100, 20, 24, dtype, serve.device)
    check(serve, tensors, 0.5, hard=hard)
    check(serve, tensors, 0.5, hard=hard, seed=torch.arange(49, device=serve.device) * 7)
    check_cross_entropy(serve, tensors[:3], torch.arange(49, device=serve.device))


@pytest.mark.parametrize("shape", [(0, 5), (0, 4, 5), (3, 0, 5)], ids=str)
def test_no_rows(serve, shape):
    for dtype in DTYPES:
        hidden, weight, bias, codebook = leaves_of(inputs(1, 7, 5, 3, dtype, serve.device))
        hidden = torch.zeros(shape, dtype=dtype, device=serve.device, requires_grad=True)
        out = serve.gumbel_codebook(hidden, weight, bias, codebook, 0.5)
        found = grad(out.embedding.sum() + out.kl.sum(), (hidden, weight, bias, codebook))
        assert found[0].shape == shape and all((x == 0).all() for x in found)
        target = torch.zeros(shape[:-1], dtype=torch.int64, device=serve.device)
        loss = serve.codebook_cross_entropy(hidden, weight, bias, target, reduction="sum")
        assert loss == 0 and all((x == 0).all() for x in grad(loss, (hidden, weight, bias)))
        assert serve.codebook_cross_entropy(hidden, weight, bias, target).isnan()  # as torch's


@pytest.mark.parametrize("impl_hard", [False, True])
def test_only_what_is_asked_for(serve, impl_hard):
    """Every subset of the inputs requiring a gradient: the same bits as with all, and nothing else."""
    tensors = inputs(40, 100, 20, 24, device=serve.device)
    incoming = cotangents(40, 24, tensors[0])
    every = gradients(lambda *x: serve.gumbel_codebook(*x, 0.5, seed=SEED, hard=impl_hard), tensors, *incoming)
    for wanted in itertools.product([False, True], repeat=4):
        leaves = [x.clone().requires_grad_(w) for x, w in zip(tensors, wanted, strict=True)]
        out = serve.gumbel_codebook(*leaves, 0.5, seed=SEED, hard=impl_hard)
        assert out.embedding.requires_grad == any(wanted) and not out.codes.requires_grad
        if any(wanted):
            torch.autograd.backward([out.embedding, out.kl], incoming)
        for leaf, w, expected in zip(leaves, wanted, every, strict=True):
            assert torch.equal(leaf.grad, expected) if w else leaf.grad is None
    target = torch.arange(40, device=serve.device)
    for reduction in ("mean", "none"):
        every = gradients(
            lambda *x: [serve.codebook_cross_entropy(*x, target, reduction=reduction)],  # noqa: B023
            tensors[:3],
            torch.ones((), device=serve.device) if reduction == "mean" else torch.ones(40, device=serve.device),
        )
        for wanted in itertools.product([False, True], repeat=3):
            leaves = [x.clone().requires_grad_(w) for x, w in zip(tensors, wanted, strict=False)]
            loss = serve.codebook_cross_entropy(*leaves, target, reduction=reduction)
            assert loss.requires_grad == any(wanted)
            if any(wanted):
                loss.sum().backward()
            for leaf, w, expected in zip(leaves, wanted, every, strict=True):
                assert torch.equal(leaf.grad, expected) if w else leaf.grad is None


def test_no_grad_mode(serve):
    leaves = leaves_of(inputs(5, 10, 4, 3, device=serve.device))
    with torch.no_grad():
        assert not serve.gumbel_codebook(*leaves, 0.5).embedding.requires_grad
        target = torch.zeros(5, dtype=torch.int64, device=serve.device)
        assert not serve.codebook_cross_entropy(*leaves[:3], target).requires_grad


def test_same_bits_every_time_and_with_any_number_of_threads(serve, assert_same_bits_with_any_threads):
    tensors = inputs(300, 500, 50, 24, device=serve.device)
    incoming = cotangents(300, 24, tensors[0])
    target = torch.arange(300, device=serve.device)

    def everything():
        found = gradients(lambda *x: serve.gumbel_codebook(*x, 0.5, seed=SEED), tensors, *incoming)
        loss = gradients(lambda *x: [serve.codebook_cross_entropy(*x, target)], tensors[:3], incoming[1][0])
        return [*found, *loss]

    assert all(torch.equal(a, b) for a, b in zip(everything(), everything(), strict=True))
    if serve.impl == "cpu":
        assert_same_bits_with_any_threads(everything, lambda: tensors[0] @ tensors[1].T)


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hard", [False, True])
def test_codes_ruled_out_by_the_bias(serve, dtype, hard):
    for K in (3, 65, 200):
        tensors = inputs(40, K, 20, 24, dtype, serve.device)
        tensors[2][::2] = -torch.inf
        found = check(serve, tensors, 0.5, hard=hard)
        assert all(x.isfinite().all() for x in found)
        assert (found[1][::2].float().abs() < 1e-30).all() and (found[2][::2].float().abs() < 1e-30).all()


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_broken_row_leaves_the_others_gradients(serve, what):
    for K in (1, 63, 65, 200):
        hidden, *rest = inputs(23, K, 5, 24, device=serve.device)
        incoming = cotangents(23, 24, hidden)
        target = torch.arange(23, device=serve.device) % K
        others = [n for n in range(23) if n not in (0, 9, 22)]
        broken = hidden.clone()
        broken[0], broken[9], broken[22, 2] = what, what, what
        found = []
        for h in (hidden, broken):
            of_hidden = gradients(lambda *x: serve.gumbel_codebook(*x, 0.5, seed=SEED), [h, *rest], *incoming)[0]
            loss = gradients(
                lambda *x: [serve.codebook_cross_entropy(*x, target, reduction="none")],  # noqa: B023
                [h, *rest[:2]],
                incoming[1],
            )[0]
            found.append((of_hidden, loss))
        for clean, dirty in zip(*found, strict=True):
            assert torch.equal(clean[others], dirty[others])
            assert dirty[[0, 9]].isnan().all() and dirty[22].isnan().all()


def test_used_twice(serve):
    """A graph that is kept gives the same bits again, and a loss that is used twice gives the sum."""
    leaves = leaves_of(inputs(40, 100, 20, 24, device=serve.device))
    target = torch.arange(40, device=serve.device)
    losses = [
        serve.codebook_cross_entropy(*leaves[:3], target),
        serve.codebook_cross_entropy(*leaves[:3], target, reduction="none").mean(),
        serve.gumbel_codebook(*leaves, 0.5, seed=SEED).embedding.square().mean(),
        serve.gumbel_softmax(leaves[0], 0.5, seed=SEED).square().mean(),
    ]
    for loss in losses:
        once = grad(loss, leaves, retain_graph=True, allow_unused=True)
        again = grad(loss, leaves, retain_graph=True, allow_unused=True)
        four = grad(loss + 3 * loss, leaves, retain_graph=True, allow_unused=True)
        for a, b, c in zip(once, again, four, strict=True):
            assert a is None or (torch.equal(a, b) and torch.equal(4 * a, c))


def test_no_second_derivative(serve):
    """It is refused, not silently left out."""
    target = torch.arange(5, device=serve.device)

    def losses(hidden, weight, bias, codebook):
        yield serve.gumbel_codebook(hidden, weight, bias, codebook, 0.5, seed=SEED).embedding.square().sum()
        yield serve.gumbel_codebook(hidden, weight, bias, codebook, 0.5, seed=SEED).kl.sum()
        for reduction in ("none", "mean", "sum"):
            for power in (1, 2):  # each a graph of its own: on a GPU a part of it may be gone when another refuses
                yield serve.codebook_cross_entropy(hidden, weight, bias, target, reduction=reduction).pow(power).sum()

    for wanted in range(3):
        leaves = leaves_of(inputs(5, 10, 4, 3, device=serve.device))
        for n, leaf in enumerate(leaves):
            leaf.requires_grad_(n == wanted)
        for loss in losses(*leaves):
            (first,) = grad(loss, leaves[wanted], create_graph=True)
            with pytest.raises(NotImplementedError, match="no second derivative"):
                (first.square().sum() + loss).backward()


# -- cross-entropy ---------------------------------------------------------------------------------------------------------


def check_cross_entropy(serve, tensors, target, *, scale=1.7, **options):
    """Compare loss * scale and its gradients with torch's in float64."""

    def torch_loss(hidden, weight, bias):
        start, stop = options.get("code_range", (0, len(weight)))
        logits = torch.nn.functional.linear(hidden, weight[start:stop], None if bias is None else bias[start:stop])
        rest = {name: value for name, value in options.items() if name != "code_range"}
        ignored = target == options.get("ignore_index", -100)
        shifted = (target - start).where(~ignored, options.get("ignore_index", -100))
        if start and "ignore_index" in options:
            rest["ignore_index"], shifted = -100, shifted.where(~ignored, -100)
        return [scale * torch.nn.functional.cross_entropy(logits, shifted, **rest)]

    hidden, weight, bias = tensors
    incoming = torch.ones((), device=serve.device)
    if options.get("reduction") == "none":
        incoming = cotangents(len(target), 1, hidden)[1]
    with nan_poisoned():
        actual = gradients(lambda *x: [scale * serve.codebook_cross_entropy(*x, target, **options)], tensors, incoming)
    exact = gradients(torch_loss, tensors, incoming, dtype=torch.float64)
    in_float32 = gradients(torch_loss, tensors, incoming, dtype=torch.float32)
    h, w = hidden.detach().double(), weight.detach().double()
    b = torch.zeros(len(w), dtype=h.dtype, device=h.device) if bias is None else bias.detach().double()
    sizes = h.abs() @ w.abs().T + b.abs() + 1
    p = torch.softmax(h @ w.T + b, -1)
    start, stop = options.get("code_range", (0, len(weight)))
    inside = torch.zeros(len(w), dtype=torch.bool, device=h.device)
    inside[start:stop] = True
    p = torch.softmax((h @ w.T + b).masked_fill(~inside, -torch.inf), -1)
    ratio = torch.finfo(torch.float32).eps / torch.finfo(hidden.dtype).eps
    dz = p * (1 + ratio * (sizes + (p * sizes).sum(-1, keepdim=True)))
    counted = target != options.get("ignore_index", -100)
    dz[torch.arange(len(h)), target.where(counted, 0)] += 1
    factor = scale * incoming.double().abs() * counted
    if options.get("reduction", "mean") == "mean":
        factor = factor / counted.sum()
    dz = dz * factor[:, None]
    terms = dz @ w.abs(), dz.T @ h.abs(), dz.sum(0)
    for name, a, e, x, t in zip(NAMES, actual, in_float32, exact, terms, strict=False):
        if x is not None:
            assert a.dtype == hidden.dtype
            assert_as_exact_as_eager(name, a, e.to(a.dtype), x, terms=t)
    exact_loss, loss = torch_loss(h, w, b)[0], scale * serve.codebook_cross_entropy(*tensors, target, **options)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-5, atol=1e-5)
    return actual


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_cross_entropy(serve, reduction, dtype):
    for N, K, I, _ in ((7, 63, 50, 1), (300, 65, 50, 1), (40, 1000, 512, 1), (1, 2, 3, 1), (7, 1, 3, 1)):
        hidden, weight, bias, _ = inputs(N, K, I, 1, dtype, serve.device)
        target = torch.randint(K, (N,), generator=torch.Generator().manual_seed(1)).to(serve.device)
        check_cross_entropy(serve, [hidden, weight, bias], target, reduction=reduction)
        check_cross_entropy(serve, [hidden, weight, None], target, reduction=reduction)
        if N == 1 or K == 1:
            continue
        target[::3] = -100
        found = check_cross_entropy(serve, [hidden, weight, bias], target, reduction=reduction)
        assert (found[0][::3] == 0).all()
        target[::3] = K // 2  # a code as ignore_index, as padding tokens are
        check_cross_entropy(serve, [hidden, weight, bias], target, reduction=reduction, ignore_index=K // 2)


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_cross_entropy_of_a_range(serve, reduction):
    """Codes outside of it get no gradient; a target that equals ignore_index only after the shift is counted."""
    tensors = inputs(60, 200, 20, 1, device=serve.device)[:3]
    for start, stop in ((0, 200), (30, 110), (64, 128), (199, 200)):
        target = start + torch.arange(60, device=serve.device) % (stop - start)
        options = {"reduction": reduction, "code_range": (start, stop)}
        found = check_cross_entropy(serve, tensors, target, **options)
        outside = torch.ones(200, dtype=torch.bool, device=serve.device)
        outside[start:stop] = False
        assert (found[1][outside] == 0).all() and (found[2][outside] == 0).all()
        check_cross_entropy(serve, tensors, target, **options, ignore_index=0)
        target[::2] = 5
        check_cross_entropy(serve, tensors, target, **options, ignore_index=5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_factor_keeps_float16_gradients_in_range(serve, reduction):
    """Without it a mean's gradients are too small, where a model is sure and right, and a sum's too large where not."""
    N, K, I = 4096, 64, 16
    hidden, weight, bias, _ = inputs(N, K, I, 1, torch.float16, serve.device)
    if reduction == "mean":
        hidden = hidden * 6
        target = (hidden.float() @ weight.float().mT + bias).argmax(-1)
    else:
        hidden, target = hidden.abs() * 64, torch.ones(N, dtype=torch.int64, device=serve.device)
    factor = 2.0**15 if reduction == "mean" else 1 / N
    found = check_cross_entropy(serve, [hidden, weight, bias], target, reduction=reduction, scale=factor)
    assert all(x.isfinite().all() for x in found[:3]) and (found[0] != 0).float().mean() > 0.9


def test_cross_entropy_all_ignored(serve):
    """As torch's: 0 summed, NaN on average, and no gradient in either case."""
    leaves = leaves_of(inputs(5, 100, 20, 1, device=serve.device)[:3])
    target = torch.full((5,), -100, device=serve.device)
    loss = serve.codebook_cross_entropy(*leaves, target, reduction="sum")
    assert loss == 0 and all((x == 0).all() for x in grad(loss, leaves))
    assert (serve.codebook_cross_entropy(*leaves, target, reduction="none") == 0).all()
    loss = serve.codebook_cross_entropy(*leaves, target)
    assert loss.isnan() and all((x == 0).all() for x in grad(loss, leaves))


# -- gumbel_softmax --------------------------------------------------------------------------------------------------------


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gumbel_softmax(serve, dtype, hard):
    for K, tau in ((1, 1.0), (2, 0.5), (65, 1.0), (1000, 0.25)):
        logits = (torch.randn(7, K, generator=torch.Generator().manual_seed(0)) * 2).to(serve.device, dtype)
        incoming = torch.randn(7, K, generator=torch.Generator().manual_seed(1)).to(logits)
        noise = codebook_noise(SEED, 7, K).to(serve.device)
        exact = gradients(lambda x: [torch.softmax((x + noise) / tau, -1)], [logits], incoming, dtype=torch.float64)[0]  # noqa: B023
        eager = gradients(
            lambda x: [torch.softmax((x + noise.float()) / tau, -1)],  # noqa: B023
            [logits],
            incoming,
            dtype=torch.float32,
        )[0]
        actual = gradients(lambda x: [serve.gumbel_softmax(x, tau, hard, seed=SEED)], [logits], incoming)[0]  # noqa: B023
        y, g = torch.softmax((logits.double() + noise) / tau, -1), incoming.double().abs()
        ratio = torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
        sizes = ratio * (logits.double().abs() + noise.abs()) / tau
        # The gradient is made from what was returned, rounded to the dtype.
        terms = y * (g + (y * g).sum(-1, keepdim=True)) / tau * (2 + sizes + (y * sizes).sum(-1, keepdim=True))
        smallest = torch.finfo(dtype).smallest_normal * (g + 1) / tau
        assert actual.dtype == dtype
        assert_as_exact_as_eager("grad_logits", actual, eager.to(dtype), exact, terms=terms + smallest)


def test_gumbel_softmax_is_torchs(monkeypatch):
    """With torch's own noise replaced by ours, torch's function gives the same, values and gradients."""
    logits = (torch.randn(4, 9, 3, generator=torch.Generator().manual_seed(0)) * 2).requires_grad_()
    noise = codebook_noise(SEED, 12, 9).float().view(4, 3, 9).movedim(-1, 1)
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda x: x.copy_((-noise).exp()))
    for hard in (False, True):
        ours = F.gumbel_softmax(logits, 0.3, hard, dim=1, seed=SEED)
        theirs = torch.nn.functional.gumbel_softmax(logits, 0.3, hard, dim=1)
        torch.testing.assert_close(ours, theirs)
        weights = torch.arange(logits.numel()).view(logits.shape) / 10
        a, b = (grad((x * weights).sum(), logits)[0] for x in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert ours.stride(1) == 1


@pytest.mark.parametrize("hard", [False, True])
def test_second_derivative_of_gumbel_softmax(serve, hard):
    logits = (torch.randn(4, 9, generator=torch.Generator().manual_seed(0)) * 2).to(serve.device).requires_grad_()
    noise = codebook_noise(SEED, 4, 9).float().to(serve.device)
    weights = torch.linspace(-1, 1, 36, device=serve.device).view(4, 9)

    def eager():
        soft = torch.softmax((logits + noise) / 0.7, -1)
        return torch.nn.functional.one_hot(soft.argmax(-1), 9) - soft.detach() + soft if hard else soft

    seconds = []
    for y in (serve.gumbel_softmax(logits, 0.7, hard, seed=SEED), eager()):
        first = grad((y * weights).square().sum(), logits, create_graph=True)[0]
        seconds.append(grad((first * weights).sum(), logits)[0])
    torch.testing.assert_close(*seconds, rtol=1e-4, atol=1e-6)


def test_backward_has_the_forwards_noise(serve):
    """At a small temperature the gradient in the codebook is one hot, at the sampled code, for any seed and row."""
    N, K = 200, 700
    zeros = torch.zeros(N, 1, device=serve.device), torch.zeros(K, 1, device=serve.device)
    codebook = torch.zeros(K, 1, device=serve.device, requires_grad=True)
    per_row = torch.randint(2**62, (N,), generator=torch.Generator().manual_seed(0)).to(serve.device)
    for seed in (0, 1, SEED, 2**63 - 1, per_row):
        out = serve.gumbel_codebook(*zeros, None, codebook, 1e-9, seed=seed)
        (found,) = grad(out.embedding.sum(), codebook)
        torch.testing.assert_close(found[:, 0], torch.bincount(out.codes, minlength=K).float(), rtol=0, atol=1e-30)


def test_at_a_vanishing_tau_only_the_codebook_has_gradients(serve, make):
    """There the softmax is one-hot, and what an exponential leaves instead of 0 must not come back through 1 / tau."""
    hidden, weight, codebook = (x.requires_grad_() for x in make((200, 8), device=serve.device))
    embedding = serve.gumbel_codebook(hidden[:5], weight, None, codebook, 1e-37, seed=1).embedding
    grads = torch.autograd.grad(embedding.sum(), (hidden, weight, codebook))
    assert not grads[0].any() and not grads[1].any()
    torch.testing.assert_close(grads[2].sum(), torch.tensor(40.0, device=serve.device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_code_of_many_rows_has_the_sum_of_their_gradients(serve, dtype):
    """Of 2,000 ones: added up in 16 bits they would stop at 256, or be off."""
    hidden, weight = torch.ones(2000, 8, device=serve.device, dtype=dtype), torch.zeros(3, 8, device=serve.device)
    weight[1] = 100
    codebook = torch.randn(3, 5, device=serve.device).to(dtype).requires_grad_()
    out = serve.gumbel_codebook(hidden, weight.to(dtype), None, codebook, 1.0, hard=True, seed=0)
    assert (out.codes == 1).all()
    (grad,) = torch.autograd.grad(out.embedding, codebook, torch.ones_like(out.embedding))
    assert torch.equal(grad, torch.tensor([[0.0], [2000], [0]], device=serve.device).expand(3, 5).to(dtype))
