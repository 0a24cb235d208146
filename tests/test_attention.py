"""Attention is what float64 says it is: for every mask, prefix, text length, stride, head size and instruction set.

B batch, H heads, S sequence, D head size, T text.
"""

import math
import os

import pytest
import torch

from dalle_fast import _extension
from dalle_fast.masks import causal_mask, column_mask, conv_mask, row_mask
from dalle_fast.nn.functional import sparse_attention
from dalle_fast.ops.attention import cpu
from dalle_fast.testing import (
    SMALL_MASKS,
    assert_as_exact_as_eager,
    check_attention,
    nan_poisoned,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROW = row_mask(5, (3, 7))


def cpu_attention(*args, **options):
    return sparse_attention(*args, **options, impl="cpu")


def check(server, q, k, v, mask, *, scale=None, text_lengths=None):
    """Compare out and lse with the oracle's; returns them."""
    return check_attention(server, q, k, v, mask, scale=scale, text_lengths=text_lengths)


def test_poison_works():
    """The tests of this file would see memory that nobody wrote."""
    with nan_poisoned():
        assert torch.empty(7).isnan().all() and torch.empty((2, 3), dtype=torch.bfloat16).isnan().all()
    with pytest.raises(AssertionError, match="elements beyond the tolerance"):
        assert_as_exact_as_eager("x", torch.tensor([1.0, torch.nan]), torch.ones(2), torch.ones(2))
    with pytest.raises(AssertionError, match="where the exact result is not finite"):
        assert_as_exact_as_eager("x", torch.zeros(2), torch.ones(2), torch.tensor([1.0, -torch.inf]))


def test_cpu_kernels_serve_here(make, recwarn):
    q, k, v = make((1, 2, ROW.seq_len, 16))
    assert cpu.why_not(q, k, v, ROW) == []
    auto, named = sparse_attention(q, k, v, ROW), sparse_attention(q, k, v, ROW, impl="cpu")
    assert torch.equal(auto, named)
    assert not torch.equal(auto, sparse_attention(q, k, v, ROW, impl="reference"))  # so the two differ in who computes
    assert not recwarn.list


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", SMALL_MASKS, ids=repr)
def test_every_mask(server, make, mask, dtype):
    T = mask.text_len
    q, k, v = make((3, 2, mask.seq_len, 24), dtype, server.device)
    check(server, q, k, v, mask)
    lengths = torch.tensor([0, T, T // 2], device=server.device)
    hidden, hidden_lse = check(server, q, k, v, mask, text_lengths=lengths, scale=0.4)
    assert (hidden[0, :, :T] == 0).all() and (hidden_lse[0, :, :T] == -torch.inf).all()
    assert torch.equal(check(server, q, k, v, mask, scale=0.4)[0][1], hidden[1])  # T valid keys: nothing is hidden


@pytest.mark.parametrize("mask", SMALL_MASKS, ids=repr)
def test_every_prefix(server, make, mask):
    T, (_, W), S = mask.text_len, mask.grid, mask.seq_len
    q, k, v = make((2, 1, S, 16), device=server.device)
    for end in sorted({0, 1, T - 1, T, T + 1, T + W, T + W + 1, S - 1, S} - {-1}):
        out, lse = check(server, q[:, :, :end], k[:, :, :end], v[:, :, :end], mask)
        assert out.shape == (2, 1, end, 16) and lse.shape == (2, 1, end)


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("D", [1, 2, 15, 16, 17, 40, 64, 72, 100, 127, 128])
def test_every_head_size(make, D, server):
    if server.impl == "triton" and D < 16:
        pytest.skip("the Triton kernels take head sizes from 16")
    for mask in (row_mask(5, (3, 7)), column_mask(19, (6, 4)), conv_mask(5, (3, 7), 3)):
        for dtype in DTYPES:
            check(server, *make((1, 2, mask.seq_len, D), dtype, server.device), mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_text_and_wide_grids(server, make, dtype):
    """More than one tile, panel and row group of every kernel in each direction."""
    for mask in (row_mask(150, (4, 40)), column_mask(70, (9, 35)), conv_mask(130, (12, 20), 7), causal_mask(90, 13)):
        check(server, *make((1, 1, mask.seq_len, 64), dtype, server.device), mask)


@pytest.mark.parametrize("shape", [(0, 2, 26, 16), (2, 0, 26, 16), (2, 3, 0, 16), (0, 0, 0, 16)])
def test_empty(server, make, shape):
    out, lse = server(*make(shape, device=server.device), ROW, return_lse=True)
    assert out.shape == shape and lse.shape == shape[:3]
    lengths = torch.full(shape[:1], 3, device=server.device)
    assert server(*make(shape, device=server.device), ROW, text_lengths=lengths).shape == shape


def strided(make, server, name, dtype=torch.float32):
    """query, key and value of shape (2, 3, 26, 16) with unusual strides."""
    B, H, S, D = 2, 3, ROW.seq_len, 16

    def tensor(*shape, seed=0):
        return make(shape, dtype, server.device, seed=seed, count=1)[0]

    if name == "packed":  # one projection, (B, S, 3, H, D)
        return tensor(B, S, 3, H, D).permute(2, 0, 3, 1, 4).unbind()
    if name == "packed by head":
        return tensor(B, S, H, 3, D).permute(3, 0, 2, 1, 4).unbind()
    if name == "sequence first":
        return tensor(S, B, 3, H, D).permute(2, 1, 3, 0, 4).unbind()
    if name == "last stride":
        return tensor(3, B, H, S, 2 * D)[..., ::2].unbind()
    if name == "head size first":
        return tensor(3, B, D, H, S).permute(0, 1, 3, 4, 2).unbind()
    if name == "expanded heads":
        return [tensor(B, 1, S, D, seed=seed).expand(B, H, S, D) for seed in range(3)]
    if name == "expanded all":
        return [tensor(1, seed=seed).expand(B, H, S, D) for seed in range(3)]
    if name == "misaligned":
        return [tensor(B * H * S * D + 1, seed=seed)[1:].view(B, H, S, D) for seed in range(3)]
    assert name == "all different"
    q, k, v = strided(make, server, "packed")[0], strided(make, server, "last stride")[1], tensor(B, H, S, D, seed=9)
    return q, k, v


STRIDES = (
    "packed",
    "packed by head",
    "sequence first",
    "last stride",
    "head size first",
    "expanded heads",
    "expanded all",
    "misaligned",
    "all different",
)


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("name", STRIDES)
def test_every_stride(server, make, name):
    for dtype in DTYPES:
        q, k, v = (x.to(dtype) if name == "all different" else x for x in strided(make, server, name, dtype))
        out, lse = check(server, q, k, v, ROW)
        same, same_lse = server(*(x.contiguous() for x in (q, k, v)), ROW, return_lse=True)
        if server.device == "cpu":  # strides do not change what is added up, nor in which order
            assert torch.equal(out, same) and torch.equal(lse, same_lse)


@pytest.mark.parametrize("mask", [row_mask(70, (5, 32)), column_mask(7, (4, 8)), column_mask(32, (32, 4))], ids=repr)
@pytest.mark.parametrize("D", [32, 64, 128])
def test_wherever_queries_lie(server, make, mask, D):
    """Queries side by side and on cache lines, as AMX can load them; nearly so; and in an order that begins and ends alike."""
    S, dtype = mask.seq_len, torch.bfloat16
    q, k, v = make((2, 2, S, D), dtype, server.device)
    out, lse = check(server, q, k, v, mask)
    for stride, offset in ((D + 32, 0), (256, 32), (288, 0), (D, 1), (D, 16), (D + 2, 0), (1024, 0)):
        memory = torch.full((4 * S * stride + offset,), torch.nan, dtype=dtype, device=server.device)
        lying = memory[offset:].view(2, 2, S, stride)[..., :D].copy_(q)
        again, again_lse = server(lying, k, v, mask, return_lse=True)
        if server.device == "cpu":
            assert torch.equal(again, out) and torch.equal(again_lse, lse), (stride, offset)
        else:
            check(server, lying, k, v, mask)


@pytest.mark.parametrize("mask", SMALL_MASKS, ids=repr)
def test_causal_and_masked_bit_by_bit(server, make, mask):
    """Sample n has the key and value of token n changed: exactly the queries that see token n change, no other bit."""
    S = mask.seq_len
    q, k, v = (x.expand(S, 2, S, 16) for x in make((1, 2, S, 16), device=server.device))
    new_k, new_v = make((2, S, 16), device=server.device, seed=1, count=2)
    every, n = torch.arange(S, device=server.device), slice(None)
    base = server(q, k, v, mask)
    k, v = k.clone(), v.clone()
    k[every, n, every], v[every, n, every] = new_k.transpose(0, 1), new_v.transpose(0, 1)
    changed = (server(q, k, v, mask) != base).any(-1)  # (token, head, query)
    dense = mask.to_dense(server.device)
    assert torch.equal(changed[:, 0], dense.mT) and torch.equal(changed[:, 1], dense.mT)


@pytest.mark.parametrize("mask", SMALL_MASKS[1::4], ids=repr)
def test_a_query_is_read_by_its_own_row_only(server, make, mask):
    S = mask.seq_len
    q, k, v = (x.expand(S, 1, S, 16) for x in make((1, 1, S, 16), device=server.device))
    base = server(q, k, v, mask, return_lse=True)[1]
    q = q.clone()
    every = torch.arange(S, device=server.device)
    q[every, 0, every] = make((S, 16), device=server.device, seed=1, count=1)[0]
    changed = server(q, k, v, mask, return_lse=True)[1] != base
    assert torch.equal(changed[:, 0], torch.eye(S, dtype=torch.bool, device=server.device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_one_sample_never_reaches_another(server, make, dtype, poison):
    q, k, v = make((3, 2, ROW.seq_len, 24), dtype, server.device)
    lengths = torch.tensor([3, 5, 2], device=server.device)
    for options in ({}, {"text_lengths": lengths}):
        clean = server(q, k, v, ROW, **options, return_lse=True)
        bad = [x.clone() for x in (q, k, v)]
        for x in bad:
            x[1] = poison
        dirty = server(*bad, ROW, **options, return_lse=True)
        for a, b in zip(clean, dirty):
            assert torch.equal(a[[0, 2]], b[[0, 2]])
        assert not dirty[0][1].isfinite().all()


@pytest.mark.parametrize("mask", SMALL_MASKS[::3], ids=repr)
def test_same_bits_whatever_the_batch_and_threads(server, make, threads, mask):
    for dtype in DTYPES:
        q, k, v = make((3, 4, mask.seq_len, 40), dtype, server.device)
        lengths = torch.tensor([0, mask.text_len, 1 % (mask.text_len + 1)], device=server.device)
        whole = server(q, k, v, mask, text_lengths=lengths, return_lse=True)
        for count in (1, 2, 3):
            if server.impl == "cpu":
                threads(count)
            again = server(q, k, v, mask, text_lengths=lengths, return_lse=True)
            assert all(torch.equal(a, b) for a, b in zip(whole, again)), count
        if server.impl == "reference":
            continue  # a dense product may choose another order for another size
        for b in range(3):
            for h in (0, 3):
                i, j = slice(b, b + 1), slice(h, h + 1)
                alone = server(q[i, j], k[i, j], v[i, j], mask, text_lengths=lengths[i], return_lse=True)
                assert all(torch.equal(a, w[i, j]) for a, w in zip(alone, whole)), (b, h)


@pytest.mark.parametrize("scale", [0.0, -0.7, 1e-30, 30.0, 1000.0])
def test_any_scale(server, make, scale):
    q, k, v = make((1, 2, ROW.seq_len, 16), device=server.device)
    _, lse = check(server, q, k, v, ROW, scale=scale)
    if scale == 0.0:
        count = ROW.to_dense(server.device).sum(-1)
        torch.testing.assert_close(lse, count.float().log().expand_as(lse))


def test_large_logits_do_not_overflow(server, make):
    q, k, v = make((1, 2, ROW.seq_len, 64), device=server.device)
    for dtype, size in ((torch.float32, 1e4), (torch.float16, 1e2), (torch.bfloat16, 1e4)):
        q_, k_ = (q * size).to(dtype), (k * size).to(dtype)
        out, lse = server(q_, k_, v.to(dtype), ROW, return_lse=True)
        assert out.isfinite().all() and lse.isfinite().all()
        assert (out.float().abs().amax() <= v.to(dtype).float().abs().amax() * 1.01).all()


def test_int32_and_int64_lengths_agree(server, make):
    q, k, v = make((3, 1, ROW.seq_len, 16), device=server.device)
    lengths = torch.tensor([0, 3, 5], device=server.device)
    expected = server(q, k, v, ROW, text_lengths=lengths)
    for other in (lengths.int(), lengths.short(), lengths.to(torch.uint8), torch.stack([lengths] * 2, 1)[:, 0]):
        assert torch.equal(server(q, k, v, ROW, text_lengths=other), expected)


def test_arguments_are_not_written(server, make):
    q, k, v = make((2, 2, ROW.seq_len, 16), device=server.device)
    lengths = torch.tensor([2, 4], device=server.device)
    before = [x.clone() for x in (q, k, v, lengths)]
    server(q, k, v, ROW, text_lengths=lengths)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v, lengths)))


# -- what only larger units of work show: Intel's matrix unit takes 32 queries and 12 x 32 keys at once --------------


def test_keys_that_score_higher_and_higher(server, make):
    """So the sums of the first keys are rescaled, again and again."""
    mask = causal_mask(400, (10, 40))
    q, k, v = make((1, 1, mask.seq_len, 64), torch.bfloat16, server.device)
    q, k = q.abs(), k.abs() * torch.linspace(0.1, 4, mask.seq_len, device=server.device)[:, None]
    check(server, q, k.to(torch.bfloat16), v, mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("jump", [3, 25, 50, 2000])
def test_a_score_far_above_those_of_the_first_keys(server, make, dtype, jump):
    """For some queries: the others keep their bits, and so does what has to do with the sum of it all, lse or not."""
    mask = row_mask(110, (4, 40))
    q, k, v = make((1, 2, mask.seq_len, 64), dtype, server.device)
    q[..., 0] = k[..., 0] = 0
    k[:, :, 105, 0] = 1
    kind = torch.arange(mask.seq_len, device=server.device) % 7
    loud = kind == 3
    q[:, :, kind == 5, 0] = 10 * 8
    quiet = server(q, k, v, mask, return_lse=True)
    q[:, :, loud, 0] = jump * 8
    out, lse = check(server, q, k, v, mask)
    assert torch.equal(out[:, :, ~loud], quiet[0][:, :, ~loud]) and torch.equal(lse[:, :, ~loud], quiet[1][:, :, ~loud])
    assert torch.equal(out, server(q, k, v, mask))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_reaches_all_who_see_it(server, make, dtype):
    mask = row_mask(110, (4, 40))
    q, k, v = make((1, 2, mask.seq_len, 64), dtype, server.device)
    clean = server(q, k, v, mask, return_lse=True)
    k[:, :, 105, 7] = torch.nan
    for x, before in zip(server(q, k, v, mask, return_lse=True), clean, strict=True):
        assert torch.equal(x[:, :, :105], before[:, :, :105]) and x[:, :, 105:].isnan().all()


def test_probabilities_whose_sum_overflows(server, make):
    """Where it is taken before the largest score is known, and the values are nothing that would tell."""
    mask = row_mask(110, (4, 40))
    q, k, v = make((1, 1, mask.seq_len, 64), torch.bfloat16, server.device)
    k[..., 0] = 0
    k[:, :, 105:109, 0] = 1
    for jump in range(80, 98, 2):
        q[..., 0] = jump * 8
        check(server, q, k, v * 0, mask)


def test_low_scores_of_those_who_do_not_see_the_first_keys(server, make):
    """A column's last queries and the next column's first ones are computed together."""
    mask = column_mask(0, (200, 3))
    q, k, v = make((1, 1, mask.seq_len, 64), torch.bfloat16, server.device)
    q[..., 0], k[..., 0] = 8 * 150, -1
    check(server, q, k, v, mask)


def test_values_of_any_size(server, make):
    """Even where they are multiplied with a weight that is not yet divided by the sum of all."""
    mask = row_mask(110, (4, 40))
    q, k, v = make((1, 1, mask.seq_len, 64), torch.bfloat16, server.device)
    q[..., 0], k[..., 0] = 8 * 20, 0
    k[:, :, 105, 0] = 1
    for size in (1e30, 1e-30):
        out = server(q, k, v * size, mask)
        check(server, q, k, v * size, mask)
        assert out.isfinite().all() and (out[:, :, 105:].abs() > 0).any(-1).all()


@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_any_scale_in_bfloat16(server, make, scale):
    check(server, *make((1, 2, ROW.seq_len, 16), torch.bfloat16, server.device), ROW, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [0, 2, 32, 38, 64])
def test_hidden_text_may_hold_anything(make, dtype, length):
    """On the CPU: the tokens of a text behind its end are not read, or with a weight and a number of zero."""
    mask = row_mask(70, (4, 40))
    q, k, v = make((1, 2, mask.seq_len, 24), dtype)
    lengths = torch.tensor([length])
    clean = cpu_attention(q, k, v, mask, text_lengths=lengths, return_lse=True)
    check_attention(cpu_attention, q, k, v, mask, text_lengths=lengths)
    k[:, :, length:70] = v[:, :, length:70] = torch.nan
    dirty = cpu_attention(q, k, v, mask, text_lengths=lengths, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_text_is_not_touched_by_the_image(make, dtype):
    """On the CPU: not even where it ends inside a tile, and whatever the image holds."""
    for T in (10, 38, 70):
        mask = row_mask(T, (4, 40))
        q, k, v = make((1, 2, mask.seq_len, 24), dtype)
        clean = cpu_attention(q, k, v, mask, return_lse=True)
        k[:, :, T:] = v[:, :, T:] = torch.nan
        dirty = cpu_attention(q, k, v, mask, return_lse=True)
        assert all(torch.equal(a[:, :, :T], b[:, :, :T]) for a, b in zip(clean, dirty))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 2)], ids=str)
def test_same_bits_however_a_head_is_cut(make, threads, shape, dtype):
    """Threads without a head of their own take over half of what another has left, which depends on their speed."""
    for mask in (row_mask(150, (4, 40)), column_mask(70, (9, 35)), conv_mask(130, (12, 20), 7)):
        q, k, v = make((*shape, mask.seq_len, 72), dtype)
        threads(1)
        whole = cpu_attention(q, k, v, mask, return_lse=True)
        for count in (2, 3, 5) * 4:
            threads(count)
            again = cpu_attention(q, k, v, mask, return_lse=True)
            assert all(torch.equal(a, b) for a, b in zip(whole, again)), count
            for x in again:
                x.fill_(torch.nan)  # the next call may be given this memory: nothing it forgets is right


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_that_overflow_downwards_give_nan(make, dtype):
    """Like dense attention: a query whose visible keys all score -inf has no softmax."""
    q, k, v = make((1, 1, ROW.seq_len, 16), dtype)
    q[:, :, 3], k[:] = 1e30, -1e30
    out, lse = cpu_attention(q.abs(), k, v, ROW, return_lse=True)
    assert out[:, :, 3].isnan().all() and lse[:, :, 3].isnan().all()
    assert cpu_attention(q, k, v, ROW, text_lengths=torch.tensor([0]))[:, :, 3].eq(0).all()


def test_products_of_torch_are_right_after_ours(make, threads):
    """Both configure the matrix unit where there is one, on every thread."""
    mask = row_mask(70, (4, 40))
    qkv = make((2, 4, mask.seq_len, 64), torch.bfloat16)
    a, b = make((256, 256), torch.bfloat16, count=2)
    for count in (1, 2):
        threads(count)
        product, out = a @ b, cpu_attention(*qkv, mask)
        for _ in range(3):
            assert torch.equal(a @ b, product)
            assert torch.equal(cpu_attention(*qkv, mask), out)


# -- instruction sets ------------------------------------------------------------------------------------------------


@pytest.mark.every_instruction_set
def test_instruction_set_is_the_one_asked_for():
    asked = os.environ.get("DALLE_FAST_ISA")
    native = _extension.native()
    assert native.instruction_set() in native.instruction_sets()
    assert asked is None or native.instruction_set() == asked


@pytest.mark.every_instruction_set
def test_small_float16_numbers_where_the_processor_flushes_them(make):
    """They are subnormal in 16 bits and not in float32, also on the way there."""
    q, k, _ = make((1, 2, ROW.seq_len, 21), torch.float16)
    value = torch.full_like(q, 5e-5)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormals")
    try:
        out = cpu_attention(q, k, value, ROW)
    finally:
        torch.set_flush_denormal(False)
    torch.testing.assert_close(out, value, rtol=2e-3, atol=0)


@pytest.mark.parametrize("size", [1e3, 1e5, 1e7, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_large_scores(dtype, size):
    """As near as SDPA's: lse and what the backward pass makes of it are off by no more than a score's own rounding."""
    torch.manual_seed(0)
    mask = causal_mask(7, (3, 5))
    query, key, value, grad_out = torch.randn(4, 4, 2, mask.seq_len, 64)
    factor = (size / float((query @ key.mT).abs().max() / 8)) ** 0.5
    leaves = [x.to(dtype).requires_grad_() for x in (query * factor, key * factor, value)]
    grad_out, dense = grad_out.to(dtype), ~mask.to_dense()

    def errors(attention):
        grads = torch.autograd.grad(attention(*leaves), leaves, grad_out)
        return [float((x.double() - y).abs().max()) for x, y in zip(grads, exact, strict=True)]

    wide = [x.detach().double().requires_grad_() for x in leaves]
    logits = (wide[0] @ wide[1].mT / 8).masked_fill(dense, -math.inf)
    exact = torch.autograd.grad(logits.softmax(-1) @ wide[2], wide, grad_out.double())
    sdpa = errors(lambda *qkv: torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True))
    ours = errors(lambda *qkv: sparse_attention(*qkv, mask))
    eps = torch.finfo(dtype).eps
    # Sums of probabilities are those of rounded ones; a row's scores may be added up in another order than SDPA's.
    assert all(x <= 2 * y + 4 * eps * float(z.abs().max()) for x, y, z in zip(ours, sdpa, exact, strict=True)), (
        ours,
        sdpa,
    )


def test_a_shorter_sequence_waits_for_no_longer_layout(monkeypatch):
    """The layout of this mask's 1.3 million positions takes ten seconds and 100 MB."""
    query = torch.randn(1, 1, 10, 16)
    mask = row_mask(256, 1152)
    layout, lengths = cpu._layout, []
    monkeypatch.setattr(cpu, "_layout", lambda mask, seq_len: lengths.append(seq_len) or layout(mask, seq_len))
    sparse_attention(query, query, query, mask)
    assert lengths == [10]


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("size", [1e8, 1e12])  # where float32's own unit is 8, and 65,536
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_beyond_any_integer(dtype, size):
    """Of some queries alone: they choose their largest score, and their neighbours' results are what they are without."""
    torch.manual_seed(0)
    mask = row_mask(40, (6, 32))
    query, key, value = torch.randn(3, 1, 2, mask.seq_len, 64).to(dtype)
    large = query.clone()
    large[:, :, ::5] *= size  # scores of about as many powers of 2
    out = sparse_attention(large, key, value, mask)
    expected = sparse_attention(large.double(), key.double(), value.double(), mask, impl="reference")
    eps = torch.finfo(dtype).eps  # of one value, which is the result
    torch.testing.assert_close(out[:, :, ::5].double(), expected[:, :, ::5], atol=2 * eps, rtol=2 * eps)
    others = torch.arange(mask.seq_len) % 5 > 0
    assert torch.equal(out[:, :, others], sparse_attention(query, key, value, mask)[:, :, others])
