"""A call goes past torch's dispatcher where nothing looks on, and only there.

B batch, H heads, S sequence, D head size.
"""

import ast
import contextlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dalle_fast.masks import row_mask
from dalle_fast.nn.checks import bounds
from dalle_fast.nn.functional import sparse_attention, sparse_attention_decode
from dalle_fast.ops import calls
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


def test_who_will_see_lse_is_told(qkv, monkeypatch):
    """The caller, the backward pass alone, or nobody."""
    told, forward = [], cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda *args, lse: told.append(lse) or forward(*args, lse=lse))
    for want in (False, True):
        qkv = [x.requires_grad_(want) for x in qkv]
        sparse_attention(*qkv, MASK, scale=0.3)
        sparse_attention(*qkv, MASK, return_lse=True)
    with _Operations():
        sparse_attention(*qkv, MASK)
    assert told == ["none", "exact", "rounded", "exact", "rounded"]


# -- torch's private names ---------------------------------------------------------------------------------------------

# Those that calls.py asks for. Elsewhere there are operations of torch's that have no public name.
OF_CALLS = {
    "torch._C",
    "torch._C.DispatchKey",
    "torch._C.DispatchKeySet",
    "torch._C.DispatchKey.Undefined",
    "torch._C._AutoDispatchBelowAutograd",
    "torch._C._are_functorch_transforms_active",
    "torch._C._autograd",
    "torch._C._dispatch_keys",
    "torch._C._dispatch_tls_local_include_set",
    "torch._C._functorch",
    "torch._C._is_any_autocast_enabled",
    "torch._functorch.autograd_function.enable_single_level_autograd_function",
    "torch.autograd.forward_ad._current_level",
    "torch.autograd.forward_ad._set_fwd_grad_enabled",
    "torch.autograd.function._SingleLevelFunction",
    "torch.autograd.profiler._is_profiler_enabled",
    "torch.nn.modules.module._has_any_global_hook",
}
ELSEWHERE = {"dalle_fast/ops/codebook/op.py": {"torch._softmax_backward_data"}}


def private_names(source):
    """The private ones among the names of torch that a program's text uses, getattr's included."""
    tree, homes, names = ast.parse(source), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            homes.update(
                {a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names}
            )
            names.update(a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            homes.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
            names.update(f"{node.module}.{alias.name}" for alias in node.names)

    def name_of(node):
        if isinstance(node, ast.Name):
            return homes.get(node.id)
        if isinstance(node, ast.Attribute) and (home := name_of(node.value)):
            return f"{home}.{node.attr}"
        return None

    names.update(filter(None, (name_of(node) for node in ast.walk(tree))))
    for node in ast.walk(tree):
        match node:
            case ast.Call(args=[owner, ast.Constant(value=name), *_]) if home := name_of(owner):
                names.add(f"{home}.{name}")
    return {name for name in names if re.fullmatch(r"torch\.(.+\.)?_[^_].*", name)}


def test_private_names_are_found():
    text = """
import torch, torch.nn as nn, torch._a
from torch import _C
from torch.autograd import forward_ad as f
torch._C.x, nn._b.c, f._d, getattr(torch.nn, "_e", None), torch.__version__, torch.nn.x, other._y
"""
    assert private_names(text) == {
        "torch._a", "torch._C", "torch._C.x", "torch.nn._b", "torch.nn._b.c", "torch.autograd.forward_ad._d", "torch.nn._e"
    }  # fmt: skip


def test_private_names_of_torch_are_in_one_place():
    root = Path(calls.__file__).parents[2]
    used = {str(p.relative_to(root)): private_names(p.read_text()) for p in (root / "dalle_fast").rglob("*.py")}
    assert used.pop("dalle_fast/ops/calls.py") == OF_CALLS
    assert {path: names for path, names in used.items() if names} == ELSEWHERE


def _calls_without(monkeypatch, owner, name):
    """calls.py as it is under a torch that has no such name."""
    with monkeypatch.context() as patch:
        patch.delattr(owner, name)
        spec = importlib.util.spec_from_file_location("calls_without", calls.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "owner, name",
    [
        (torch._C, "DispatchKeySet"),
        (torch._C, "_dispatch_keys"),
        (torch._C, "_dispatch_tls_local_include_set"),
        (torch.autograd.forward_ad, "_current_level"),
        (torch.autograd.profiler, "_is_profiler_enabled"),
    ],
)
def test_without_a_private_name_no_call_is_plain(monkeypatch, owner, name):
    module, x = _calls_without(monkeypatch, owner, name), torch.zeros(2)
    assert is_plain((x,)) and not module.is_plain((x,))
    assert module.is_forward_mode() == (name == "_current_level") and not module.has_tangent((x, None))
    with forward_ad.dual_level():
        assert module.has_tangent((x, forward_ad.make_dual(x, x)))


@pytest.mark.parametrize(
    "owner, name, answers",
    [
        (torch._C, "_are_functorch_transforms_active", {"has_transforms": True, "is_transformed": True}),
        (torch._C, "_is_any_autocast_enabled", {"is_any_autocast_on": True}),
        (torch._C, "_functorch", {"has_transforms": False}),
        (torch._C._functorch, "is_legacy_batchedtensor", {}),
        (torch._C, "_autograd", {"is_graph_kept": True}),
        (torch.nn.modules.module, "_has_any_global_hook", {"has_global_hooks": True}),
        (torch.autograd.function, "_SingleLevelFunction", {}),
        (torch._C, "_AutoDispatchBelowAutograd", {}),
    ],
)
def test_without_a_private_name_the_answer_is_safe(monkeypatch, owner, name, answers):
    module, x = _calls_without(monkeypatch, owner, name), torch.zeros(2)
    assert {question: getattr(module, question)() for question in answers} == answers
    assert module.has_values(x) == ("has_transforms" not in answers or not answers["has_transforms"])
    assert module.autocast_dtype(x) is None and not module.is_differentiated_by_transform(x)
    assert issubclass(module.SingleLevelFunction, torch.autograd.function._SingleLevelFunction)


@pytest.mark.parametrize("answer", [calls.has_values, lambda x: bounds(x) is not None])
def test_what_another_computes_with_is_not_looked_at(answer):
    """Neither by modules nor by operations: one rule."""
    x, answers = torch.zeros(2), []

    def function(x):
        answers.append(answer(x))
        return x * x

    function(x), function(torch.nn.Parameter(x)), function(x.as_subclass(_Subclass))
    torch.vmap(function)(x[None]), torch.func.grad(lambda x: function(x).sum())(x)
    assert answers == [True, True, False, False, False]
    y = function(x := x.clone().requires_grad_())
    x.register_hook(lambda grad: answers.append(answer(grad)))
    torch.autograd.grad(y, x, torch.ones(3, 2), is_grads_batched=True)
    assert answers[5:] == [True, False]
