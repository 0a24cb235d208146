"""Sparse attention is a citizen of torch: opcheck, torch.compile, export, autocast, torch.func, checkpointing.

B batch, H heads, S sequence, D head size, T text.
"""

import warnings

import pytest
import torch
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import dalle_fast.nn as fnn
from dalle_fast.masks import column_mask, row_mask
from dalle_fast.nn.functional import sparse_attention
from dalle_fast.ops import choice
from dalle_fast.ops.attention import reference
from dalle_fast.ops.attention.op import canonical_lengths
from dalle_fast.testing import attention_oracle

MASK = row_mask(5, (3, 7))
B, H, S, D = 2, 3, MASK.seq_len, 16
FORWARD = torch.ops.dalle_fast.sparse_attention.default
BACKWARD = torch.ops.dalle_fast.sparse_attention_backward.default


def with_lse(rest):
    """The forward operation's last arguments, from those that it shares with the backward one."""
    return *rest[:-1], True, rest[-1]


def packed(make, dtype=torch.float32, device="cpu"):
    return make((B, S, 3, H, D), dtype, device, count=1)[0].permute(2, 0, 3, 1, 4).unbind()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(server, make, dtype, requires_grad):
    """Both operations, on packed strides: schema, fakes (with exact strides), autograd registration, tracing.

    Tracing with gradients takes two seconds a call: the dtypes other than float32 have one, which has all tensors.
    """
    lengths = torch.tensor([2, 5], device=server.device)
    rest = [list(MASK.encode()), 0.3, server.impl]
    untraced = {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")}
    few = untraced if requires_grad and dtype != torch.float32 else {}
    for text_lengths in (None, lengths):
        qkv = [x.detach().requires_grad_(requires_grad) for x in packed(make, dtype, server.device)]
        torch.library.opcheck(
            FORWARD, (*qkv, text_lengths, *with_lse(rest)), **({} if text_lengths is lengths else few)
        )
        with torch.no_grad():
            out, lse = FORWARD(*qkv, text_lengths, *with_lse(rest))
        grad_out = (
            make((S, B, D, H), dtype, server.device, count=1)[0].permute(1, 3, 0, 2).requires_grad_(requires_grad)
        )
        for grad_lse in (None, torch.ones_like(lse)):
            torch.library.opcheck(BACKWARD, (grad_out, grad_lse, *qkv, out, lse, text_lengths, *rest), **few)


def test_fakes_have_the_strides_of_the_real(server, make):
    from torch._subclasses.fake_tensor import FakeTensorMode

    qkv = packed(make, device=server.device)
    rest = (None, MASK.encode(), 0.3, server.impl)
    real = FORWARD(*qkv, *with_lse(rest))
    real += BACKWARD(qkv[0], None, *qkv, *real, *rest)
    with FakeTensorMode() as mode:
        qkv = [mode.from_tensor(x) for x in qkv]
        fake = FORWARD(*qkv, *with_lse(rest))
        fake += BACKWARD(qkv[0], None, *qkv, *fake, *rest)
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


def test_meta_tensors(make):
    out, lse = sparse_attention(*make((B, H, S, D), device="meta"), MASK, return_lse=True)
    assert out.is_meta and out.shape == (B, H, S, D) and lse.shape == (B, H, S)


def test_shapes_that_do_not_fit_are_refused_past_the_public_function(server, make):
    """A program of AOTInductor hands on any shape, and native code would read beyond a tensor."""
    q, k, v = packed(make, device=server.device)
    rest = (MASK.encode(), 0.3, server.impl)
    out, lse = FORWARD(q, k, v, None, *with_lse(rest))
    half, short, lengths = k.to(torch.bfloat16), k[:, :, 1:], torch.tensor([2], device=server.device)
    long = torch.cat([q, q], 2)
    for wrong in (
        (q, short, v, None),
        (q, k, v[:1], None),
        (q, half, v, None),
        (q, k, v, lengths),
        (long,) * 3 + (None,),
    ):
        with pytest.raises((ValueError, TypeError), match=" must have "):
            FORWARD(*wrong, *with_lse(rest))
    good = dict(grad_out=q, grad_lse=lse, query=q, key=k, value=v, out=out, lse=lse, text_lengths=None)
    for name, wrong in (
        ("key", short),
        ("grad_out", q[:1]),
        ("out", half),
        ("lse", lse[:1]),
        ("grad_lse", lse[..., 1:]),
    ):
        with pytest.raises((ValueError, TypeError), match=f"^{name} must have "):
            BACKWARD(*{**good, name: wrong}.values(), *rest)


# -- torch.compile ---------------------------------------------------------------------------------------------------


def attend(query, key, value, lengths):
    out, lse = sparse_attention(query * 2, key, value, MASK, text_lengths=lengths, return_lse=True)
    return out.sin().sum() + lse[..., 5:].sum()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph(server, make, backend):
    torch._dynamo.reset()
    lengths = torch.tensor([2, 5], device=server.device)
    leaves = [x.detach().requires_grad_() for x in packed(make, device=server.device)]
    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    expected, actual = attend(*leaves, lengths), compiled(*leaves, lengths)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_graph_holds_one_operation(make):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compile(attend, backend=backend, fullgraph=True)(*packed(make), None)
    targets = [node.target for node in graphs[0].graph.nodes if "sparse_attention" in str(node.target)]
    assert len(graphs) == 1 and len(targets) == 1


def test_dynamic_batch_and_length_compile_once(make):
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend=(counter := CompileCounter()), dynamic=True)
    for size, length in ((2, 26), (3, 20), (5, 11)):
        q, k, v = make((size, H, length, D))
        torch.testing.assert_close(compiled(q, k, v, None), attend(q, k, v, None))
    assert counter.frame_count == 1


@pytest.mark.parametrize("scales", [(0.1, 0.2, 0.3), (1, 2, 3)])
def test_a_scale_that_changes_is_compiled(make, scales):
    """From its second value on it is a number that the graph leaves open."""
    torch._dynamo.reset()
    query, key, value = packed(make)
    compiled = torch.compile(sparse_attention, backend="aot_eager", fullgraph=True)
    for scale in scales:
        assert torch.equal(
            compiled(query, key, value, MASK, scale=scale), sparse_attention(query, key, value, MASK, scale=scale)
        )


def test_text_lengths_are_checked_when_compiled(make):
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match="text_lengths must be from 0"):
        compiled(*packed(make), torch.tensor([1, 6]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_off_the_cpu_text_lengths_take_no_launch(dtype):
    """Who computes clamps them: an operation of torch's here would be a kernel of every layer and token."""
    lengths = torch.zeros(3, dtype=dtype, device="meta")
    assert canonical_lengths(lengths, 5) is lengths
    for other in (torch.zeros(3, dtype=torch.uint8, device="meta"), torch.zeros(6, dtype=dtype, device="meta")[::2]):
        assert canonical_lengths(other, 300).dtype in (torch.int32, torch.int64)
        assert canonical_lengths(other, 300).is_contiguous()


def test_the_reference_clamps_text_lengths(make):
    """It looks at them as they are, as on a GPU nobody has before."""
    query, key, value = packed(make)
    outs = [reference.forward(query, key, value, torch.tensor(lengths), MASK, 0.3)[0] for lengths in ([-1, 9], [0, 5])]
    assert torch.equal(*outs)
    text, image = [x[:, :, :5] for x in (key, value)], [make((B, H, MASK.cache_slots, D), count=1)[0]] * 2
    steps = [
        reference.decode(query[:, :, 8], *text, *image, torch.tensor(3), torch.tensor(lengths), MASK, 0.3)
        for lengths in ([-1, 9], [0, 5])
    ]
    assert torch.equal(*steps)


def test_export(make):
    class Module(torch.nn.Module):
        def forward(self, query, key, value):
            return sparse_attention(query, key, value, MASK)

    qkv = make((B, H, S, D))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Module(), tuple(qkv), dynamic_shapes=({0: batch},) * 3)
    assert torch.equal(program.module()(*qkv), sparse_attention(*qkv, MASK))
    larger = make((5, H, S, D), seed=1)
    assert torch.equal(program.module()(*larger), sparse_attention(*larger, MASK))


# -- autocast, torch.func, checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(server, make, dtype):
    qkv = make((B, H, S, D), device=server.device)
    expected = server(*(x.to(dtype) for x in qkv), MASK)
    leaves = [x.requires_grad_() for x in qkv]
    with torch.autocast(server.device, dtype):
        out = server(*leaves, MASK)
        mixed = server(leaves[0].to(dtype), *leaves[1:], MASK)
    assert out.dtype == dtype and torch.equal(out, expected) and torch.equal(mixed, expected)
    out.sum().backward()
    assert all(x.grad.dtype == torch.float32 and x.grad.isfinite().all() for x in leaves)
    with torch.autocast(server.device, dtype, enabled=False):
        assert server(*qkv, MASK).dtype == torch.float32


def test_autocast_leaves_float64_alone(make):
    qkv = make((B, H, S, D), torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = sparse_attention(*qkv, MASK, impl="reference")
    torch.testing.assert_close(out, attention_oracle(*qkv, MASK)[0])


def test_func_grad_and_vmap(server, make):
    def loss(q, k, v):
        return server(q, k, v, MASK).square().sum()

    qkv = make((B, H, S, D), device=server.device)
    leaves = [x.clone().requires_grad_() for x in qkv]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(torch.func.grad(loss, (0, 1, 2))(*qkv), expected):
        torch.testing.assert_close(a, b)
    stacked = make((4, B, H, S, D), device=server.device, seed=1)
    together = torch.func.vmap(lambda q, k: server(q, k, qkv[2], MASK), in_dims=(0, 1))(
        stacked[0], stacked[1].movedim(0, 1)
    )
    for n in range(4):
        torch.testing.assert_close(together[n], server(stacked[0][n], stacked[1][n], qkv[2], MASK))
    per_sample = torch.func.vmap(torch.func.grad(lambda q, k, v: loss(q[None], k[None], v[None])))(*qkv)
    torch.testing.assert_close(per_sample, expected[0])


def test_many_gradients_of_one_sample(server, make):
    """Only grad_out is batched, so that all else has a batch stride of 0."""
    query, key, value = make((1, H, S, D), device=server.device)

    def jacobian(impl):
        def function(q):
            return sparse_attention(q, key, value, MASK, impl=impl).sum((0, 2))

        return torch.func.jacrev(function)(query)

    torch.testing.assert_close(jacobian(server.impl), jacobian("reference"))


def test_func_second_derivative(make):
    x = make((1, 1, 3, 2), torch.float64, count=1)[0]

    def loss(x):
        return sparse_attention(x, x, x, row_mask(1, (1, 2)), impl="reference").pow(2).sum()

    expected = torch.autograd.functional.hessian(loss, x)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(loss))(x), expected)
    torch.testing.assert_close(torch.func.hessian(loss)(x), expected)


def test_forward_mode_is_refused_not_wrong(make):
    """A kernel without a forward-mode derivative must not return a zero one."""
    q, k, v = make((1, 2, S, D))
    with pytest.raises(NotImplementedError, match="forward-mode.*impl='cpu'"):
        torch.func.jvp(lambda x: sparse_attention(x, k, v, MASK, impl="cpu"), (q,), (q,))


def test_checkpoint(server, make):
    leaves = [x.requires_grad_() for x in make((B, H, S, D), device=server.device)]
    expected = torch.autograd.grad(server(*leaves, MASK).square().sum(), leaves)
    again = checkpoint(lambda *x: server(*x, MASK).square().sum(), *leaves, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again, leaves), expected):
        assert torch.equal(a, b)


def test_compiled_autograd(make):
    """A backward pass compiled apart from an eager forward pass; what it was compiled for is not another mask's."""
    torch._dynamo.reset()
    for mask in (MASK, column_mask(5, (3, 7)), MASK):
        leaves = [x.requires_grad_() for x in make((B, H, 26, D))]
        expected = torch.autograd.grad(sparse_attention(*leaves, mask).square().sum(), leaves)
        with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
            sparse_attention(*leaves, mask).square().sum().backward()
        for x, gradient in zip(leaves, expected, strict=True):
            assert torch.equal(x.grad, gradient)


def test_heads_in_place_of_the_sequence_are_warned_of(make):
    """As where (batch, sequence, heads, head size) is given, as other libraries take it."""
    wrong = make((1, S, H, D))[0]
    with pytest.warns(UserWarning, match=rf"{H} positions of {S} heads, .* use transpose\(1, 2\)") as caught:
        out = sparse_attention(wrong, wrong, wrong, MASK)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(torch.compile(sparse_attention, fullgraph=True, backend="eager")(*[wrong] * 3, MASK), out)


# -- who serves --------------------------------------------------------------------------------------------------------


def test_auto_warns_once_where_only_the_reference_serves(make):
    choice._warn_once.cache_clear()
    qkv = make((1, 1, S, D), torch.float64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = sparse_attention(*qkv, MASK)
        sparse_attention(*qkv, MASK)
        sparse_attention(*qkv, column_mask(5, (3, 7)))
    assert [warning.category for warning in caught] == [UserWarning]
    assert "dense reference" in str(caught[0].message) and "float64" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice._warn_once.cache_clear()
        assert torch.equal(sparse_attention(*qkv, MASK, impl="reference"), out)


def test_the_warning_names_the_callers_line(make):
    """Through the operation, a module's layers and a compiled graph, all of them torch's frames or the package's."""
    torch._dynamo.reset()
    qkv = make((1, 1, S, D), torch.float64)
    module = torch.nn.Sequential(fnn.GumbelCodebook(3, 4, 5)).double()
    hidden = torch.zeros(2, 3, dtype=torch.float64)

    def attend():
        return sparse_attention(*qkv, MASK)

    for function in (attend, torch.compile(attend, backend="aot_eager"), lambda: module(hidden)):
        choice._warn_once.cache_clear()
        with pytest.warns(UserWarning, match="dense reference") as caught:
            function()
        assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_on_a_gpu_is_triton(make):
    qkv = make((B, H, S, D), device="cuda")
    assert torch.equal(sparse_attention(*qkv, MASK), sparse_attention(*qkv, MASK, impl="triton"))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**7)
        late = [x * 2 for x in qkv]  # on this stream: an operation on another one would read too early
        out = sparse_attention(*late, MASK)
    stream.synchronize()
    torch.testing.assert_close(out, attention_oracle(*(x * 2 for x in qkv), MASK)[0].float(), rtol=1e-3, atol=1e-4)
