"""`F.scaled_dot_product_attention` is torch's, and takes an AttentionMask where torch takes a matrix."""

import inspect
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as torch_F

import dalle_fast.nn.functional as F
from dalle_fast.masks import column_mask, conv_mask, row_mask

MASK = conv_mask(5, (3, 7), 3)
S, D = MASK.seq_len, 16


def assert_same(query, key, value, **options):
    dense = MASK.to_dense(seq_len=query.shape[-2])
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    actual = F.scaled_dot_product_attention(*leaves, attn_mask=MASK, **options)
    expected = torch_F.scaled_dot_product_attention(*leaves, attn_mask=dense, **options)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)
    incoming = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for a, b in zip(torch.autograd.grad(actual, leaves, incoming), torch.autograd.grad(expected, leaves, incoming)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_signature_is_torchs():
    names = ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]
    parameters = inspect.signature(F.scaled_dot_product_attention).parameters
    assert list(parameters) == names
    assert [p.default for p in parameters.values()][3:] == [None, 0.0, False, None, False]


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3), (2, 2, 1, 3), (0, 3), (2, 0, 3)])
def test_any_leading_dimensions(make, leading):
    assert_same(*make((*leading, S, D)))
    assert_same(*(x[..., :9, :] for x in make((*leading, S, D))), scale=0.3)


@pytest.mark.parametrize("scale", [torch.tensor(0.3), torch.tensor(1), 0.0, -1.0, 1], ids=repr)
def test_scales_that_torch_takes(make, scale):
    assert_same(*make((2, 3, S, D)), scale=scale)


def test_leading_dimensions_broadcast(make):
    q = make((2, 3, S, D), count=1)[0]
    k, v = make((1, 3, S, D), seed=1, count=2)
    assert_same(q, k, v)
    assert_same(make((2, 4, 3, S, D), count=1)[0], *make((4, 1, S, D), seed=1, count=2))


@pytest.mark.parametrize("leading", [(), (1,), (2,), (2, 2)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (6, 1), (4, 4)])
def test_grouped_heads(make, leading, heads, kv_heads):
    q = make((*leading, heads, S, D), count=1)[0]
    k, v = make((*leading, kv_heads, S, D), seed=1, count=2)
    assert_same(q, k, v, enable_gqa=True)


def test_grouped_heads_are_not_copied(make, monkeypatch):
    """Key heads reach the operation with stride 0 over their group, and packed ones no larger than they were."""
    seen = []
    original = F.attention.sparse_attention

    def spy(query, key, value, *args, **options):
        seen.extend((key, value))
        return original(query, key, value, *args, **options)

    monkeypatch.setattr(F.attention, "sparse_attention", spy)
    q, (k, v) = make((2, 6, S, D), count=1)[0], make((2, 2, S, D), seed=1, count=2)
    packed = make((2, S, 2, 2, D), seed=2, count=1)[0].permute(2, 0, 3, 1, 4)
    for keys in ((k, v), packed.unbind()):
        seen.clear()
        F.scaled_dot_product_attention(q, *keys, MASK, enable_gqa=True)
        assert len(seen) == 2
        for x in seen:
            assert x.shape[1] == 3 and x.stride(1) == 0
            assert x.untyped_storage().nbytes() <= packed.numel() * 4
    assert seen[0].untyped_storage().nbytes() <= packed.numel() * 4  # packed: copied once at most, never per group
    seen.clear()
    F.scaled_dot_product_attention(q, k.contiguous(), v, MASK, enable_gqa=True)
    assert seen[0].data_ptr() == k.data_ptr() and seen[1].data_ptr() == v.data_ptr()


def test_everything_else_goes_to_torch(make, monkeypatch):
    calls = []
    monkeypatch.setattr(F, "_torch_sdpa", lambda *a, **k: calls.append((a, k)) or "torch's")
    q, k, v = make((2, 3, S, D))
    dense = MASK.to_dense()
    assert F.scaled_dot_product_attention(q, k, v, dense, 0.25, False, scale=0.5, enable_gqa=True) == "torch's"
    assert F.scaled_dot_product_attention(q, k, v, is_causal=True) == "torch's"

    def named(args, keywords):
        signature = inspect.signature(F.scaled_dot_product_attention)
        bound = signature.bind(*args, **keywords)
        bound.apply_defaults()
        return list(bound.arguments.values())

    first, second = (named(*call) for call in calls)
    assert all(a is b for a, b in zip(first[:4], (q, k, v, dense))) and first[4:] == [0.25, False, 0.5, True]
    assert all(a is b for a, b in zip(second[:4], (q, k, v, None))) and second[4:] == [0.0, True, None, False]


def test_torch_paths_still_compute(make):
    q, k, v = make((2, 3, S, D))
    for options in ({"is_causal": True}, {"attn_mask": MASK.to_dense()}, {"scale": 0.2}, {}):
        torch.testing.assert_close(
            F.scaled_dot_product_attention(q, k, v, **options), torch_F.scaled_dot_product_attention(q, k, v, **options)
        )
    assert F.scaled_dot_product_attention(q, k[:, :, :4], v[:, :, :4]).shape == q.shape


def test_it_may_take_the_place_of_torchs():
    """In a process of its own, as torch.compile looks functions up once, before or after the change."""
    script = """
        import torch

        import dalle_fast.nn.functional as F
        from dalle_fast.masks import row_mask

        torchs = torch.nn.functional.scaled_dot_product_attention
        torch.nn.functional.scaled_dot_product_attention = F.scaled_dot_product_attention
        mask = row_mask(2, (2, 2))
        x = torch.randn(2, 3, mask.seq_len, 8)
        attend = lambda x, mask: torch.nn.functional.scaled_dot_product_attention(x, x, x, mask)
        for call in (attend, torch.compile(attend, backend="aot_eager", fullgraph=True)):
            torch.testing.assert_close(call(x, None), torchs(x, x, x))
            torch.testing.assert_close(call(x, mask), torchs(x, x, x, mask.to_dense()))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_graph_break(make):
    q, k, v = make((2, 3, S, D))
    for mask in (None, MASK.to_dense(), MASK):
        call = torch.compile(F.scaled_dot_product_attention, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(call(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout_p": 0.1}, "dropout_p must be 0 with an AttentionMask, got 0.1"),
        ({"is_causal": True}, "is_causal must be False with an AttentionMask"),
        ({"scale": float("nan")}, "scale must be finite, got nan"),
    ],
)
def test_bad_options(make, options, message):
    with pytest.raises(ValueError, match=message):
        F.scaled_dot_product_attention(*make((2, 3, S, D)), MASK, **options)


@pytest.mark.parametrize(
    "scale",
    [torch.ones(2), torch.ones(1), torch.tensor(True), torch.tensor(1j), torch.ones((), device="meta"), "1", True]
    + [torch.tensor(0.5, requires_grad=True)],
    ids=repr,
)
def test_a_scale_of_another_kind(make, scale):
    with pytest.raises(TypeError, match="scale must be a number"):
        F.scaled_dot_product_attention(*make((2, 3, S, D)), MASK, scale=scale)


@pytest.mark.parametrize(
    ("name", "expected"), [("dropout_p", "a number"), ("is_causal", "a bool"), ("enable_gqa", "a bool")]
)
def test_options_of_another_kind(make, name, expected):
    for value in (torch.zeros(2), None, "no"):
        with pytest.raises(TypeError, match=f"{name} must be {expected}, got {type(value).__name__}"):
            F.scaled_dot_product_attention(*make((2, 3, S, D)), MASK, **{name: value})


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_tensors_of_another_kind(make, name):
    good = dict(zip(("query", "key", "value"), make((2, 3, S, D)), strict=True))
    for bad, message in (
        (good[name].to_sparse(), "must be a dense .*, got layout torch.sparse_coo"),
        (torch.nested.nested_tensor(list(good[name])), "must be a dense .*, got a nested tensor"),
        (good[name].long(), "must be float32, .*, got torch.int64"),
    ):
        with pytest.raises(TypeError, match=f"{name} {message}"):
            F.scaled_dot_product_attention(**{**good, name: bad}, attn_mask=MASK)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ([(2, 2, 3, S, 8), (2, 2, 3, S, 8), (2, 2, 3, S, 4)], {}, r"value .* \(..., 26, 8\).* got \(2, 2, 3, 26, 4\)"),
        ([(6, S, 8), (6, 25, 8), (6, S, 8)], {}, r"key .* \(..., 26, 8\).* got \(6, 25, 8\)"),
        ([(2, 6, S, 8), (2, 2, 9, 8), (2, 2, 9, 8)], {"enable_gqa": True}, r"key .* got \(2, 2, 9, 8\)"),
        ([(2, 6, S, 8), (3, 2, S, 8), (3, 2, S, 8)], {"enable_gqa": True}, r"broadcast, .* \(3, 2, 26, 8\)"),
        (
            [(2, 6, S, 8), (3, S, 8), (6, S, 8)],
            {},
            r"broadcast, got shapes \(2, 6, 26, 8\), \(3, 26, 8\), \(6, 26, 8\)",
        ),
    ],
)
def test_shapes_are_reported_as_passed(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        F.scaled_dot_product_attention(*map(torch.zeros, shapes), MASK, **options)


def test_bad_shapes(make):
    q, k, v = make((2, 6, S, D))
    with pytest.raises(ValueError, match=r"must broadcast"):
        F.scaled_dot_product_attention(q, k[:, :3], v, MASK)
    with pytest.raises(ValueError, match=r"enable_gqa.*6, 4"):
        F.scaled_dot_product_attention(q, k[:, :4], v[:, :4], MASK, enable_gqa=True)
    with pytest.raises(ValueError, match=r"key must have"):
        F.scaled_dot_product_attention(q, k[:, :, :-1], v[:, :, :-1], MASK)
    with pytest.raises(ValueError, match=r"query must have at least 2 dimensions"):
        F.scaled_dot_product_attention(q[0, 0, 0], k, v, MASK)
    with pytest.raises(TypeError, match="query must be a tensor, got NoneType"):
        F.scaled_dot_product_attention(None, k, v, MASK)
    for mask in (row_mask(4, (3, 7)), column_mask(1, 2)):
        with pytest.raises(ValueError, match="query must have at most the mask's"):
            F.scaled_dot_product_attention(q, k, v, mask)


def test_traced_by_fx(make):
    """Proxies stand for tensors; the mask becomes a node of the graph."""

    class Model(torch.nn.Module):
        def forward(self, query, key, value):
            out = F.sparse_attention(query, key, value, MASK, scale=0.5)
            return F.scaled_dot_product_attention(out, key, value, MASK) + out

    q, k, v = make((2, 3, S, D))
    traced = torch.fx.symbolic_trace(Model())
    assert {F.sparse_attention, F.scaled_dot_product_attention} <= {node.target for node in traced.graph.nodes}
    assert torch.equal(traced(q, k, v), Model()(q, k, v))


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_what_stands_for_a_tensor_is_asked(make, name):
    class Standing:
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return function, len(args), kwargs

    tensors = {**dict(zip(("query", "key", "value"), make((2, 3, S, D)), strict=True)), name: Standing()}
    asked = F.sparse_attention(**tensors, mask=MASK, return_lse=True)
    assert asked[0] is F.sparse_attention and asked[2]["return_lse"] is True
    assert F.scaled_dot_product_attention(**tensors, attn_mask=MASK)[:2] == (F.scaled_dot_product_attention, 8)
