"""A call goes past torch's dispatcher where nothing looks on, and only there.

B batch, H heads, S sequence, D head size.
"""

import contextlib

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dalle_fast.masks import row_mask
from dalle_fast.nn.functional import sparse_attention, sparse_attention_decode
from dalle_fast.ops.attention import cpu
from dalle_fast.ops.calls import is_plain

MASK = row_mask(5, (3, 7))
B, H, S, D = 2, 3, MASK.seq_len, 16
OPERATION = "dalle_fast.sparse_attention.default"


@pytest.fixture
def qkv(make):
    return make((B, H, S, D), torch.float32, "cpu", count=3)


class _Seeing:
    """A mode that lists what is called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def _see(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class _Functions(_Seeing, TorchFunctionMode):
    __torch_function__ = _Seeing._see


class _Operations(_Seeing, TorchDispatchMode):
    __torch_dispatch__ = _Seeing._see


class _Subclass(torch.Tensor):
    pass


def test_plain():
    x = torch.zeros(2)
    with torch.inference_mode():
        inferred = torch.zeros(2)
        assert is_plain((x, inferred))
    with torch.no_grad(), torch.autocast("cpu"):
        assert is_plain((x, inferred))
    assert is_plain((x.bfloat16(), x.double()[::2], torch.nn.Parameter(x), x.clone().requires_grad_() * 2, inferred))
    assert is_plain(())


@pytest.mark.parametrize(
    "special",
    [
        lambda x: torch._neg_view(x),
        lambda x: torch._efficientzerotensor(2),
        lambda x: x.as_subclass(_Subclass),
        lambda x: x.to("meta"),
        lambda x: x.to_sparse(),
        lambda x: torch.zeros(2, dtype=torch.complex64).conj(),
        lambda x: FakeTensorMode().from_tensor(x),
        lambda x: torch._to_functional_tensor(x),
    ],
    ids=["negative", "zero", "subclass", "meta", "sparse", "conjugate", "fake", "functional"],
)
def test_special_tensors_are_not_plain(special):
    x = torch.ones(2)
    assert is_plain((x,))
    assert not is_plain((x, special(x)))


@pytest.mark.parametrize(
    "context", [_Functions, _Operations, FakeTensorMode, torch.autograd.profiler.profile, forward_ad.dual_level]
)
def test_nothing_is_plain_where_something_looks_on(context):
    x = torch.zeros(2)
    with context():
        assert not is_plain((x,))
    assert is_plain((x,))


def test_nothing_is_plain_in_a_transform_or_a_trace():
    answers = []

    def function(x):
        answers.append(is_plain((x,)))
        return x.sum()

    x = torch.zeros(2)
    torch.func.grad(function)(x)
    torch.vmap(function)(x[None])
    torch.func.functionalize(function)(x)
    torch.jit.trace(function, x, check_trace=False)
    assert answers == [False] * 4
    assert torch.compile(lambda x: x + is_plain((x,)), fullgraph=True, backend="eager")(x).sum() == 0


@pytest.mark.parametrize("requires_grad", [False, True])
def test_modes_see_attention(qkv, requires_grad):
    qkv = [x.requires_grad_(requires_grad) for x in qkv]
    expected = sparse_attention(*qkv, MASK)
    for mode in (_Functions(), _Operations()):
        with mode:
            assert torch.equal(sparse_attention(*qkv, MASK), expected)
        assert mode.seen.count(OPERATION) == 1


def test_traces_hold_attention(qkv):
    def attend(*qkv):
        return sparse_attention(*qkv, MASK)

    graphs = [make_fx(attend, tracing_mode=mode)(*qkv).graph for mode in ("real", "fake", "symbolic")]
    for graph in graphs:
        assert [str(node.target) for node in graph.nodes].count(OPERATION) == 1


def test_profiler_sees_attention(qkv):
    with torch.profiler.profile() as profile:
        sparse_attention(*qkv, MASK)
    assert "dalle_fast::sparse_attention" in [event.key for event in profile.key_averages()]


def test_lazy_signs_are_heeded(qkv):
    query, key, value = qkv
    expected = sparse_attention(-query, key, -value, MASK)
    assert torch.equal(sparse_attention(torch._neg_view(query), key, torch._neg_view(value), MASK), expected)


def test_ordinary_calls_are_plain(qkv, monkeypatch):
    """Else the tests above say little."""
    from dalle_fast.ops.attention import op

    asked = []
    monkeypatch.setattr(op, "is_plain", lambda tensors: asked.append(is_plain(tensors)) or asked[-1])
    sparse_attention(*qkv, MASK)
    with torch.inference_mode():
        sparse_attention(*qkv, MASK)
    assert asked == [True, True]


# -- the shortest way of attention on a CPU ----------------------------------------------------------------------------

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _at_once(qkv, mask=MASK):
    return cpu.forward_at_once(*qkv, mask)


def _at_length(qkv, mask=MASK):
    """The longer way: the shortest is for those who name no scale."""
    return sparse_attention(*qkv, mask, scale=qkv[0].shape[-1] ** -0.5)


@pytest.fixture
def exchange():
    if cpu._EXCHANGE is None:
        pytest.skip(f"torch {torch.__version__} has no __dlpack_c_exchange_api__: every call goes the longer way")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "laid_out",
    [
        lambda x: x,
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.mT.contiguous().mT,
        lambda x: x.repeat_interleave(2, 1)[:, 1::2],
        lambda x: x[:1, :1].expand(x.shape),
        lambda x: x[:0],
    ],
    ids=["contiguous", "by token", "by element", "every other head", "expanded", "none"],
)
def test_shortest_way_gives_what_the_longer_one_gives(exchange, make, dtype, laid_out):
    qkv = [laid_out(x) for x in make((B, H, S, D), dtype, "cpu", count=3)]
    out = _at_once(qkv)
    assert torch.equal(out, _at_length(qkv)) and torch.equal(out, sparse_attention(*qkv, MASK))
    assert out.is_contiguous() and out.dtype == dtype and not out.requires_grad
    assert all(out.data_ptr() != x.data_ptr() for x in qkv) or not out.numel()


def test_shortest_way_scales_alike_for_every_head_size(exchange, make):
    for head_size in range(1, cpu.MAX_HEAD_DIM + 1):
        qkv = make((1, 1, S, head_size), torch.float32, "cpu", count=3)
        assert torch.equal(_at_once(qkv), _at_length(qkv)), head_size


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.double(),
        lambda x: x.long(),
        lambda x: x[0],
        lambda x: x[:, :, :-1],
        lambda x: x[..., :-1],
        lambda x: x[:, :1],
        lambda x: x.bfloat16(),
        lambda x: x.to("meta"),
        lambda x: x.to_sparse(),
    ],
    ids=["double", "integers", "three dimensions", "prefix", "head size", "heads", "dtype", "device", "sparse"],
)
@pytest.mark.parametrize("which", [(0,), (1,), (2,)])
def test_shortest_way_leaves_other_calls_to_the_longer_one(exchange, qkv, other, which):
    assert _at_once(qkv) is not None
    assert _at_once([other(x) if i in which else x for i, x in enumerate(qkv)]) is None


@pytest.mark.parametrize("other", [torch.Tensor.double, lambda x: x[0], lambda x: x[:, :, :-1]])
def test_shortest_way_leaves_these_of_all_three_to_the_longer_one(exchange, qkv, other):
    assert _at_once([other(x) for x in qkv]) is None


def test_ordinary_calls_go_the_shortest_way(exchange, qkv, monkeypatch):
    went, forward_at_once = [], cpu.forward_at_once
    monkeypatch.setattr(cpu, "forward_at_once", lambda *args: went.append(forward_at_once(*args)) or went[-1])
    for impl in ("auto", "cpu"):
        assert sparse_attention(*qkv, MASK, impl=impl) is went[-1] is not None
    assert len(went) == 2
    sparse_attention(*qkv, MASK, impl="reference")
    sparse_attention(*qkv, MASK, return_lse=True)
    sparse_attention(*qkv, MASK, text_lengths=torch.full((B,), 2))
    with torch.autocast("cpu"):
        sparse_attention(*qkv, MASK)
    sparse_attention(qkv[0].requires_grad_(), *qkv[1:], MASK)
    assert len(went) == 2


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_a_step_of_decoding_is_the_same_on_both_ways(make, impl):
    """With every argument; an implementation that cannot serve refuses on both."""
    query, text, image = (make(shape, count=2) for shape in ((6, H, D), (2, H, 5, D), (6, H, MASK.cache_slots, D)))
    options = {"text_lengths": torch.tensor([2, 4]), "scale": 0.3}
    out = sparse_attention_decode(query[0], *text, *image, MASK, 12, impl=impl, **options)
    with _Operations() as mode:
        again = sparse_attention_decode(query[0], *text, *image, MASK, 12, impl=impl, **options)
    assert torch.equal(out, again) and "dalle_fast.sparse_attention_decode.default" in mode.seen
    doubles = [x.double() for x in (query[0], *text, *image)]
    for mode in (contextlib.nullcontext(), _Operations()):
        with mode, pytest.raises(ValueError, match="impl='cpu' cannot serve this call: it computes in float32"):
            sparse_attention_decode(*doubles, MASK, 12, impl="cpu", **options)
