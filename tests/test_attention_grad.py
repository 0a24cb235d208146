"""Gradients are what float64 says they are, the same bits every time, and zero where nothing was seen.

B batch, H heads, S sequence, D head size, T text.
"""

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck

from dalle_fast.masks import column_mask, conv_mask, row_mask
from dalle_fast.nn.functional import sparse_attention
from dalle_fast.testing import (
    SMALL_MASKS,
    attention_gradients,
    attention_oracle,
    check_attention_gradients,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROW = row_mask(5, (3, 7))


def check(server, qkv, mask, *, with_lse=True, seed=5, **options):
    """Compare the gradients with the oracle's; returns them."""
    q = qkv[0]
    generator = torch.Generator().manual_seed(seed)
    grad_out = torch.randn(q.shape, generator=generator).to(q)
    grad_lse = torch.randn(q.shape[:3], generator=generator).to(q.device) if with_lse else None
    return check_attention_gradients(server, qkv, mask, grad_out, grad_lse, **options)


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", SMALL_MASKS, ids=repr)
def test_every_mask(server, make, mask, dtype):
    T = mask.text_len
    qkv = make((3, 2, mask.seq_len, 24), dtype, server.device)
    check(server, qkv, mask, with_lse=False)
    check(server, qkv, mask)
    lengths = torch.tensor([0, T, T // 2], device=server.device)
    grads = check(server, qkv, mask, text_lengths=lengths, scale=0.4)
    _, grad_key, grad_value = grads
    assert (grads[0][0, :, :T] == 0).all() and (grad_key[0, :, :T] == 0).all() and (grad_value[0, :, :T] == 0).all()


@pytest.mark.parametrize("mask", SMALL_MASKS[::2], ids=repr)
def test_every_prefix(server, make, mask):
    T, (_, W), S = mask.text_len, mask.grid, mask.seq_len
    qkv = make((2, 1, S, 16), device=server.device)
    for end in sorted({0, 1, T, T + 1, T + W + 1, S - 1}):
        check(server, [x[:, :, :end] for x in qkv], mask)


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("D", [1, 15, 16, 40, 64, 72, 100, 128])
def test_every_head_size(server, make, D):
    if server.impl == "triton" and D < 16:
        pytest.skip("the Triton kernels take head sizes from 16")
    for mask in (row_mask(5, (3, 7)), column_mask(19, (6, 4)), conv_mask(5, (3, 7), 3)):
        for dtype in DTYPES:
            check(server, make((1, 2, mask.seq_len, D), dtype, server.device), mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_text_and_wide_grids(server, make, dtype):
    """More than one tile, panel and row group of every kernel in each direction."""
    for mask in (row_mask(150, (4, 40)), column_mask(70, (9, 35)), conv_mask(130, (12, 20), 7)):
        check(server, make((1, 1, mask.seq_len, 64), dtype, server.device), mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", [row_mask(20, (20, 16)), conv_mask(40, (24, 12), 3)], ids=repr)
def test_more_keys_than_are_kept_at_a_time(server, make, mask, dtype):
    check(server, make((1, torch.get_num_threads(), mask.seq_len, 32), dtype, server.device), mask)  # a head a thread


def test_without_lse(server, make):
    """What the backward pass takes need not be exact if nobody else sees it: the gradients are still right."""
    mask = row_mask(150, (4, 40))
    qkv = make((1, 2, mask.seq_len, 64), torch.bfloat16, server.device)
    (grad_out,) = make(qkv[0].shape, torch.bfloat16, server.device, count=1)

    def attend(*args, return_lse, **options):
        return server(*args, **options), server(*args, return_lse=True, **options)[1]

    check_attention_gradients(attend, qkv, mask, grad_out)


@pytest.mark.every_instruction_set
def test_every_stride(server, make):
    """Packed and odd strides of inputs, and of the gradient that comes in."""
    B, H, S, D = 2, 3, ROW.seq_len, 16
    for dtype in DTYPES:
        packed = make((B, S, 3, H, D), dtype, server.device, count=1)[0].permute(2, 0, 3, 1, 4).unbind()
        check(server, packed, ROW)
        check(server, [x.expand(B, H, S, D) for x in make((B, 1, S, D), dtype, server.device)], ROW)
        check(server, make((3, B, H, S, 2 * D), dtype, server.device, count=1)[0][..., ::2].unbind(), ROW)

        leaves = [x.detach().requires_grad_() for x in packed]
        out, lse = server(*leaves, ROW, return_lse=True)
        wide = make((S, B, D, H), dtype, server.device, seed=3, count=1)[0].permute(1, 3, 0, 2)
        for incoming in (wide, torch.ones((), dtype=dtype, device=server.device).expand(B, H, S, D)):
            plain = grad(out, leaves, incoming.contiguous(), retain_graph=True)
            odd = grad(out, leaves, incoming, retain_graph=True)
            assert all(torch.equal(a, b) for a, b in zip(plain, odd))
        incoming = torch.ones((), device=server.device).expand(B, H, S)
        plain = grad(lse, leaves, incoming.contiguous(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(plain, grad(lse, leaves, incoming)))


@pytest.mark.parametrize("shape", [(0, 2, 26, 16), (2, 0, 26, 16), (2, 3, 0, 16)])
def test_empty(server, make, shape):
    leaves = [x.requires_grad_() for x in make(shape, device=server.device)]
    out, lse = server(*leaves, ROW, return_lse=True)
    (out.sum() + lse.sum()).backward()
    assert all(x.grad.shape == shape for x in leaves)


def test_only_what_is_asked_for(server, make):
    qkv = make((1, 2, ROW.seq_len, 16), device=server.device)
    every = attention_gradients(lambda *x: server(*x, ROW, return_lse=True), qkv, torch.ones_like(qkv[0]), None)
    for n in range(3):
        leaves = [x.clone().requires_grad_(m == n) for m, x in enumerate(qkv)]
        server(*leaves, ROW).sum().backward()
        assert torch.equal(leaves[n].grad, every[n])
        assert all(x.grad is None for m, x in enumerate(leaves) if m != n)


def test_only_lse(server, make):
    """The gradient of lse alone: that of value is zero."""
    leaves = [x.requires_grad_() for x in make((1, 2, ROW.seq_len, 16), device=server.device)]
    grads = grad(server(*leaves, ROW, return_lse=True)[1].sum(), leaves, allow_unused=True)
    exact = grad(attention_oracle(*leaves, ROW)[1].sum(), leaves[:2])
    assert grads[2] is None or (grads[2] == 0).all()
    for a, b in zip(grads, exact):
        torch.testing.assert_close(a, b)


def test_nothing_is_kept_without_gradients(server, make):
    qkv = make((1, 2, ROW.seq_len, 16), device=server.device)
    assert server(*qkv, ROW).grad_fn is None
    leaves = [x.requires_grad_() for x in qkv]
    assert server(*leaves, ROW).grad_fn is not None
    with torch.no_grad():
        assert not server(*leaves, ROW).requires_grad
    with torch.inference_mode():
        assert not server(*leaves, ROW).requires_grad


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_one_sample_never_reaches_another(server, make, poison):
    for dtype in DTYPES:
        qkv = make((3, 2, ROW.seq_len, 24), dtype, server.device)
        grad_out, grad_lse = torch.ones_like(qkv[0]), torch.ones(3, 2, ROW.seq_len, device=server.device)
        lengths = torch.tensor([0, 5, 2], device=server.device)

        def attention(*x):
            return server(*x, ROW, return_lse=True, text_lengths=lengths)  # noqa: B023

        clean = attention_gradients(attention, qkv, grad_out, grad_lse)
        for at in range(4):  # query, key, value, grad_out
            bad = [x.clone() for x in (*qkv, grad_out)]
            bad[at][1] = poison
            dirty = attention_gradients(attention, bad[:3], bad[3], grad_lse)
            for a, b in zip(clean, dirty):
                assert torch.equal(a[[0, 2]], b[[0, 2]])
            assert not all(x[1].isfinite().all() for x in dirty)


def test_blind_queries_have_no_gradient_whatever_comes_in(server, make):
    """Queries that see no key: zeros and no NaN, even where the incoming gradient is infinite or NaN."""
    qkv = make((1, 2, ROW.seq_len, 16), device=server.device)
    lengths = torch.zeros(1, dtype=torch.long, device=server.device)

    def attention(*x):
        return server(*x, ROW, return_lse=True, text_lengths=lengths)

    plain = torch.ones_like(qkv[0])
    expected = attention_gradients(attention, qkv, plain, None)
    for poison in (torch.nan, torch.inf):
        leaves = [x.detach().requires_grad_() for x in qkv]
        out, lse = attention(*leaves)
        strange = plain.clone()
        strange[:, :, :5] = poison
        strange_lse = torch.zeros_like(lse)
        strange_lse[:, :, :5] = poison
        for a, b in zip(expected, grad((out, lse), leaves, (strange, strange_lse))):
            assert torch.equal(a, b)


@pytest.mark.parametrize("mask", SMALL_MASKS[::3], ids=repr)
def test_same_bits_whatever_the_batch_and_threads(server, make, threads, mask):
    for dtype in DTYPES:
        qkv = make((3, 4, mask.seq_len, 40), dtype, server.device)
        grad_out, grad_lse = make(qkv[0].shape, dtype, server.device, seed=1)[0], torch.ones(3, 4, mask.seq_len)
        lengths = torch.tensor([0, mask.text_len, 1 % (mask.text_len + 1)], device=server.device)

        def run(i, j):
            part = [x[i, j] for x in qkv]  # noqa: B023
            return attention_gradients(
                lambda *x: server(*x, mask, text_lengths=lengths[i], return_lse=True),  # noqa: B023
                part,
                grad_out[i, j],  # noqa: B023
                grad_lse[i, j].to(server.device),  # noqa: B023
            )

        everything = slice(None), slice(None)
        whole = run(*everything)
        for count in (1, 2, 3):
            if server.impl == "cpu":
                threads(count)
            assert all(torch.equal(a, b) for a, b in zip(whole, run(*everything))), count
        if server.impl == "reference":
            continue  # a dense product may choose another order for another size
        for i, j in ((slice(0, 1), slice(3, 4)), (slice(2, 3), slice(0, 1)), (slice(1, 3), slice(1, 3))):
            assert all(torch.equal(a, w[i, j]) for a, w in zip(run(i, j), whole)), (i, j)


@pytest.mark.parametrize("mask", [row_mask(2, (2, 3)), column_mask(1, (2, 2)), conv_mask(2, (2, 3), 3)], ids=repr)
def test_numerical_derivatives(make, mask):
    """float64: first and second derivatives of out and lse, with and without hidden text."""
    inputs = [x.requires_grad_() for x in make((1, 1, mask.seq_len, 2), torch.float64)]
    for lengths in (None, torch.tensor([1])):

        def attention(*x):
            return sparse_attention(*x, mask, return_lse=True, text_lengths=lengths, impl="reference")  # noqa: B023

        assert gradcheck(attention, inputs)
        assert gradgradcheck(attention, inputs)

    def blind(*x):
        out, lse = sparse_attention(*x, mask, return_lse=True, text_lengths=torch.tensor([0]), impl="reference")
        return out, lse[..., mask.text_len :]  # -inf has no numerical derivative

    assert gradcheck(blind, inputs)


def test_second_derivative(server, make):
    """A gradient penalty: right whoever served the first derivative."""
    inputs = [x.requires_grad_() for x in make((1, 2, ROW.seq_len, 16), device=server.device)]

    def penalty(attention):
        out, lse = attention(*inputs)
        first = grad(out.square().sum() + lse.sum(), inputs, create_graph=True)
        return grad(sum(x.square().sum() for x in first), inputs)

    actual = penalty(lambda *x: server(*x, ROW, return_lse=True))
    for a, b in zip(actual, penalty(lambda *x: attention_oracle(*x, ROW))):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
