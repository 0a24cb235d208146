"""The Triton kernels compute attention, every rule, forward and backward, and the rest, in Triton's interpreter.

TRITON_INTERPRET must be set before kernels are imported and would change every other test of the process, so the
cases run in a process of their own, once; each test here reports its own cases from there. To debug one:
`TRITON_INTERPRET=1 pytest tests/test_triton_interpreter.py -k NAME`.

This proves the arithmetic and the addresses in float32 and float16. It proves nothing about bfloat16 (the interpreter
gets it wrong) nor about the compiled code (see test_triton_compile.py).

B batch, H heads, S sequence, D head size, T text. For linear layers R rows, K in, N out.
"""

import itertools
import math
import os
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dalle_fast.nn as fnn
from dalle_fast.masks import causal_mask, column_mask, conv_mask, row_mask
from dalle_fast.nn import functional as F
from dalle_fast.ops import norm as norm_ops
from dalle_fast.ops import on_triton
from dalle_fast.ops.attention import triton as attention
from dalle_fast.testing import (
    SMALL_MASKS,
    assert_as_exact_as_eager,
    attention_oracle,
    eager_attention,
    every_mask,
    nan_poisoned,
)

triton = pytest.importorskip("triton", reason="the package triton is not installed")
import triton.language as tl
from faster_interpreter import make_faster

from dalle_fast.ops import linear_triton, norm_triton
from dalle_fast.ops.attention.triton import bwd, configs, dec, fwd, launch, primitives
from dalle_fast.ops.linear_triton import Tiles

INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))
if INTERPRETED:
    make_faster()
MINUTES = 20  # until the process with the cases counts as hung
CASES = 144  # in all of this file's tests under the interpreter; a change of a parameter list changes it, knowingly
interpreted_tests = {}  # name: its number of cases


# -- the other process -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    """{test name: [(case, failure text or None)]} of this file under the interpreter."""
    if on_triton.loop_bounds_broken():
        pytest.skip("the interpreter of Triton 3.6 needs numpy before 2.4")
    report = tmp_path_factory.mktemp("interpreter") / "report.xml"
    command = [sys.executable, "-m", "pytest", __file__, "--noconftest", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, "--junitxml", str(report)],
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        timeout=60 * MINUTES,
    )
    if not report.exists() or run.returncode not in (0, 1):
        pytest.fail(f"the process with the interpreter did not finish:\n{run.stdout}\n{run.stderr}", pytrace=False)
    found = {}
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        bad = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        text = None if bad is None else f"{bad.tag}: {bad.get('message')}\n{bad.text}"
        found.setdefault(case.get("name").partition("[")[0], []).append((case.get("name"), text))
    return found


def interpreted(test):
    """The test runs under the interpreter; elsewhere it reports what its cases gave there."""
    parameters = [mark.args[1] for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    expected = interpreted_tests[test.__name__] = math.prod(map(len, parameters))
    if INTERPRETED:
        return test

    def report(cases):
        mine = cases.get(test.__name__, [])
        bad = [f"{name}\n{text}" for name, text in mine if text is not None]
        print(f"{len(mine) - len(bad)} of {expected} cases passed in Triton's interpreter")
        if bad or len(mine) != expected:
            counts = f"{len(bad)} of {len(mine)} cases failed, {expected} cases expected\n"
            pytest.fail(counts + "\n".join(bad), pytrace=False)

    report.__name__, report.__doc__ = test.__name__, test.__doc__
    return report


@pytest.mark.skipif(INTERPRETED, reason="is about the cases' process, seen from outside")
def test_no_case_has_vanished(cases):
    """Neither from the parameter lists, which decide what is expected, nor between them and the process's report."""
    ran = sum(len(cases.get(name, [])) for name in interpreted_tests)
    assert (sum(interpreted_tests.values()), ran) == (CASES, CASES)


# -- the rule ----------------------------------------------------------------------------------------------------------


@triton.jit
def _dense_mask_kernel(out_ptr, size, MASK: tl.constexpr, BLOCK: tl.constexpr):
    q = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    seen = tl.where(k < MASK.T, k <= q, primitives.image_allows(q, k, MASK) & (q >= MASK.T))
    tl.store(out_ptr + q * size + k, seen.to(tl.int8), mask=(q < size) & (k < size))


@interpreted
@pytest.mark.parametrize("rule", every_mask(0, 1))
def test_rule_equals_the_masks(rule):
    windows = [(1, 1), (3, 1), (5, 1), (11, 1), (3, 2), (5, 3)] if rule.startswith("conv") else [(1, 1)]
    compared = 0
    for T, grid, (K, d) in itertools.product((0, 1, 5), ((1, 9), (9, 1), (5, 7), (3, 11), (6, 4)), windows):
        mask = every_mask(T, grid, K, d)[rule]
        S = mask.seq_len
        dense = torch.full((S, S), -1, dtype=torch.int8)
        blocks = triton.cdiv(S, 32)
        _dense_mask_kernel[(blocks, blocks)](dense, S, configs.mask_numbers(mask, "raster", 16), 32)
        assert torch.equal(dense, mask.to_dense().to(torch.int8)), mask
        compared += 1
    assert compared >= 15


# -- forward and backward against the oracle ---------------------------------------------------------------------------


def tiny(mask, walk=None, text=16, image=16):
    """Tiles of 16, so that small grids take many of them, and the mask's walk."""
    walk = walk or ("column" if mask.rule == "column" else "raster")
    numbers = configs.mask_numbers(mask, walk, 16)
    assert numbers is not None, f"{walk} does not fit {mask!r}"
    return configs.Tiles(16, text, image, warps=4, stages=1), numbers


def inputs(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(4)]


def gradient_terms(query, key, value, mask, grad_out, grad_lse, *, scale, text_lengths):
    """How large the terms are that (dQ, dK, dV) are added up from, float64, and what an lse in float32 does to them.

    u = eps / 2 of float32, L = the largest abs(logit) or abs(lse) of a row. The backward pass computes P again as
    exp2(scale_log2 * q k - lse * LOG2E). Five numbers of the size of L are rounded on the way, each by u L at most: in
    the forward pass the scaled score, row_max * LN2 and lse; in the backward pass lse * LOG2E and the scaled score
    (compiled code fuses all but lse and lse * LOG2E). So P becomes P (1 + r), abs(r) <= 5 u L = 2.5 eps L, beside the
    roundings that eager attention has as well. r is much the same in all of a row, so it does not average out, and
    eager attention, which divides by a sum with the same error, has nothing like it: twice its error is not enough
    (30 draws at scale 3: dV up to 10 times, dQ 6). In dS = P (dP - delta), r multiplies the difference, not the terms
    it is made of. In float32 both kernels divide by the row's sum of P (1 + r), and delta is rowsum(P dP) with the same
    P (1 + r) and dP, over the same sum: what is left of r is how it differs within a row, and is bounded as before.
    """
    q, k, v, do = (x.detach().double() for x in (query, key, value, grad_out))
    identity = torch.eye(q.shape[-2], dtype=torch.float64).expand(*q.shape[:-1], -1)
    p, lse = attention_oracle(q, k, identity, mask, scale=scale, text_lengths=text_lengths)
    if not p.numel():
        return q, k, v
    logits = (q @ k.mT * scale).where(p > 0, 0)
    largest = torch.maximum(logits.abs().amax(-1), lse.nan_to_num(neginf=0).abs())[..., None]
    r = p * 2.5 * largest * min(1, torch.finfo(torch.float32).eps / torch.finfo(query.dtype).eps)
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse.double()
    dp, dp_terms = do @ v.mT, do.abs() @ v.abs().mT
    delta, delta_terms = (p * dp).sum(-1) - grad_lse, (p * dp_terms).sum(-1) + grad_lse.abs()
    ds = abs(scale) * (p * (dp_terms + delta_terms[..., None]) + r * (dp - delta[..., None]).abs())
    return ds @ k.abs(), ds.mT @ q.abs(), (p + r).mT @ do.abs()


def check(mask, tensors, *, scale=0.3, text_lengths=None, tiles=None, with_lse=True, backward=True):
    """Forward (and backward) against float64, no less exact than eager torch in the same dtype."""
    *qkv, grad_out = tensors
    lengths = None if text_lengths is None else torch.tensor(text_lengths, dtype=torch.int32)
    assert attention.why_not(*qkv, mask) == []

    def with_gradients(run, *dtype):
        leaves = [x.detach().to(*dtype).requires_grad_() for x in qkv]
        out, lse = run(*leaves, mask, scale=scale, text_lengths=lengths)
        loss = (out * grad_out.to(out.dtype)).sum()
        if with_lse:
            loss = loss + (lse.masked_fill(lse.isinf(), 0) * grad_lse).sum()
        return out, lse, *torch.autograd.grad(loss, leaves)

    grad_lse = torch.linspace(-1, 1, qkv[0][..., 0].numel()).reshape(qkv[0].shape[:3])
    exact = with_gradients(attention_oracle, torch.float64)
    eager = with_gradients(eager_attention)
    before = [x.clone() for x in tensors]
    with nan_poisoned():
        out, lse = fwd.attention_forward(*qkv, lengths, mask, scale, tiles=tiles)
        results = [out, lse]
        if backward:
            args = (grad_out, grad_lse if with_lse else None, *qkv, out, lse, lengths, mask, scale)
            results += bwd.attention_backward(*args, query_tiles=tiles, key_tiles=tiles)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors)), "the inputs were written to"
    assert lse.dtype == torch.float32
    given = grad_lse if with_lse else None
    terms = (None, None, *gradient_terms(*qkv, mask, grad_out, given, scale=scale, text_lengths=lengths))
    for name, mine, plain, truth, size in zip(("out", "lse", "dQ", "dK", "dV"), results, eager, exact, terms):
        assert mine.is_contiguous()
        assert name == "lse" or mine.dtype == qkv[0].dtype
        plain = plain.to(mine.dtype)
        assert_as_exact_as_eager(f"{name} of {mask!r}", mine, plain, truth, terms=size)
    return results


@interpreted
@pytest.mark.parametrize(
    ("mask", "dtype"),
    [
        *((mask, torch.float32) for mask in SMALL_MASKS),
        # No rule asks for the dtype: one of each way through the keys.
        (row_mask(19, (5, 3)), torch.float16),
        (column_mask(19, (6, 4)), torch.float16),
        (conv_mask(19, (7, 5), 5, dilation=2), torch.float16),
        (conv_mask(5, (3, 7), 3, edges="corner"), torch.float16),
    ],
    ids=str,
)
def test_every_rule(mask, dtype):
    check(mask, inputs(1, 2, mask.seq_len, 16, dtype=dtype), tiles=tiny(mask))


@interpreted
@pytest.mark.parametrize(
    ("mask", "D"),
    [
        *((row_mask(70, (5, 7)), D) for D in (16, 40, 64)),
        (column_mask(13, (5, 7)), 40),
        (conv_mask(70, (3, 11), 3), 40),
    ],
    ids=str,
)
def test_every_head_size_with_the_tables_tiles(mask, D):
    check(mask, inputs(1, 1, mask.seq_len, D), scale=D**-0.5)


@interpreted
@pytest.mark.parametrize(("D", "dtype"), [(80, torch.float16), (128, torch.float32), (17, torch.float32)], ids=str)
def test_large_and_odd_head_sizes(D, dtype):
    mask = row_mask(9, (3, 5))
    check(mask, inputs(1, 1, mask.seq_len, D, dtype=dtype), scale=D**-0.5)


@interpreted
@pytest.mark.parametrize("rule", every_mask(0, 1))
def test_prefixes(rule):
    """The tokens before the end of the text, around it, within a row, and around a row's end."""
    mask = every_mask(17, (5, 7), 3)[rule]
    for S in (1, 16, 17, 18, 25, 38, 51):
        check(mask, inputs(1, 1, S, 16), tiles=tiny(mask), backward=S in (17, 18, 38))


@interpreted
@pytest.mark.parametrize(
    ("edges", "grid", "S"),
    [("flat", (9, 12), None), ("corner", (9, 12), None), ("flat", (8, 16), 100), ("clip", (8, 16), 100)],
)
def test_patch_walk(edges, grid, S):
    mask = conv_mask(5, grid, 3 if edges == "corner" else 7, edges=edges)
    check(mask, inputs(1, 1, S or mask.seq_len, 16), tiles=tiny(mask, "patch"))


@interpreted
def test_patch_walk_of_the_table():
    mask = conv_mask(20, (8, 128), 11)
    assert configs.tiles_for("forward", mask, (8, 0), 16, 2)[1].WALK == configs.WALKS.index("patch")
    check(mask, inputs(1, 1, mask.seq_len, 16, dtype=torch.float16), backward=False)


@interpreted
@pytest.mark.parametrize(
    ("rule", "dtype"),
    [("row", torch.float16), ("row", torch.float32), ("column", torch.float32)],
    ids=str,
)
def test_text_lengths(rule, dtype):
    """A sample without visible text has text queries that see nothing, and text keys that get no gradient."""
    mask = every_mask(37, (3, 5))[rule]
    out, lse, dq, dk, dv = check(
        mask, inputs(3, 2, mask.seq_len, 16, dtype=dtype), tiles=tiny(mask), text_lengths=[0, 33, 37]
    )
    assert torch.all(out[0, :, :37] == 0) and torch.all(lse[0, :, :37] == -torch.inf) and torch.all(dq[0, :, :37] == 0)
    for grad in (dk, dv):
        assert torch.all(grad[0, :, :37] == 0) and torch.all(grad[1, :, 33:37] == 0)


@interpreted
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_text_lengths_are_clamped_as_they_are_read(dtype):
    """A GPU's come as they were given, as nobody has looked at them."""
    mask = row_mask(37, (3, 5))
    q, k, v, grad_out = inputs(4, 2, mask.seq_len, 16)
    text, image = [x[:, :, :37] for x in (k, v)], [torch.randn(4, 2, mask.cache_slots, 16) for _ in range(2)]

    def run(lengths):
        out, lse = attention.forward(q, k, v, lengths, mask, 0.25)
        grads = attention.backward(grad_out, None, q, k, v, out, lse, lengths, mask, 0.25)
        step = attention.decode(q[:, :, 40], *text, *image, torch.tensor(3), lengths, mask, 0.25)
        return out, lse, *grads, step

    largest = torch.iinfo(dtype).max
    with nan_poisoned():
        given = run(torch.tensor([-largest - 1, -1, 38, largest], dtype=dtype))
        clamped = run(torch.tensor([0, 0, 37, 37], dtype=torch.int32))
    assert all(torch.equal(a, b) for a, b in zip(given, clamped, strict=True))


@interpreted
@pytest.mark.parametrize("rule", ["row", "column"])
def test_in_float32_an_error_of_lse_does_not_reach_the_gradients(rule):
    """A GPU's logarithm errs by up to 1e-6 of lse, the interpreter's does not: here by more."""
    mask = every_mask(20, (3, 5))[rule]
    q, k, v, grad_out = inputs(1, 2, mask.seq_len, 16)
    text_lengths = torch.tensor([7], dtype=torch.int32)
    out, lse = fwd.attention_forward(q, k, v, text_lengths, mask, 0.25)
    tiles = {"query_tiles": tiny(mask), "key_tiles": tiny(mask)}
    wrong = lse + 1e-3 * torch.randn(lse.shape, generator=torch.Generator().manual_seed(1))
    expected = bwd.attention_backward(grad_out, None, q, k, v, out, lse, text_lengths, mask, 0.25, **tiles)
    actual = bwd.attention_backward(grad_out, None, q, k, v, out, wrong, text_lengths, mask, 0.25, **tiles)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=3e-6)


@interpreted
@pytest.mark.parametrize("rule", ["row", "column"])
def test_in_float32_a_row_with_one_key_has_no_gradient_of_scores(rule):
    """Row 0 sees one key: its dS is 0 to the last bit, as eager torch has it, however rowsum(O * dO) was rounded.

    Only row 0 has a gradient here, so all of dQ and dK is what it adds to them. The errors of out and lse stand for
    roundings that differ between a GPU's kernels; products of whole numbers have none.
    """
    mask = every_mask(20, (3, 5))[rule]
    q, k, v, grad_out = ((4 * x).round() for x in inputs(1, 2, mask.seq_len, 16))
    grad_out[:, :, 1:] = 0
    out, lse = fwd.attention_forward(q, k, v, None, mask, 0.01)
    noise = [1e-5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in (out, lse)]
    tiles = {"query_tiles": tiny(mask), "key_tiles": tiny(mask)}
    args = (grad_out, None, q, k, v, out + noise[0], lse + noise[1], None, mask, 0.01)
    dq, dk, dv = bwd.attention_backward(*args, **tiles)
    assert torch.all(dq == 0) and torch.all(dk == 0)
    torch.testing.assert_close(dv[:, :, 0], grad_out[:, :, 0], rtol=1e-6, atol=0)
    assert torch.all(dv[:, :, 1:] == 0)


@interpreted
def test_in_float32_a_row_with_one_key_has_no_gradient_of_its_query():
    """As above, with out and lse as the forward kernel gives them, and any numbers."""
    mask = row_mask(20, (3, 5))
    q, k, v, grad_out = inputs(3, 2, mask.seq_len, 64)
    out, lse = fwd.attention_forward(q, k, v, None, mask, 0.125, tiles=tiny(mask))
    tiles = {"query_tiles": tiny(mask), "key_tiles": tiny(mask)}
    dq, _, _ = bwd.attention_backward(grad_out, None, q, k, v, out, lse, None, mask, 0.125, **tiles)
    assert torch.all(dq[:, :, 0] == 0) and torch.all(dq[:, :, 1:].abs().amax(-1) > 0)


@interpreted
@pytest.mark.parametrize("scale", [-0.4, 0.0, 1, 3, -3])
def test_any_scale(scale):
    """At scale 3, 12 times the usual, logits reach 40, and what their rounding does shows: see gradient_terms."""
    mask = row_mask(20, (3, 5))
    check(mask, inputs(1, 1, mask.seq_len, 16), scale=scale, tiles=tiny(mask))


@interpreted
@pytest.mark.parametrize("mask", [column_mask(256, 32), conv_mask(256, 32, 11)], ids=repr)
def test_the_papers_size(mask):
    check(mask, inputs(1, 1, mask.seq_len, 64), scale=0.125, backward=False)


# -- memory ------------------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(
    "layout",
    ["packed", "sequence_first", "transposed", "expanded", "offset", "grad_expanded", "rows of 25", "rows of 28"],
)
def test_any_strides(layout):
    mask = column_mask(7, (3, 5))
    B, H, S, D = 2, 2, mask.seq_len, 24
    query, key, value, grad_out = inputs(B, H, S, D)
    if layout == "packed":
        query, key, value = torch.randn(B, S, 3, H, D).permute(2, 0, 3, 1, 4)
    elif layout == "sequence_first":
        query, key, value = torch.randn(3, S, B, H, D).permute(0, 2, 3, 1, 4)
    elif layout == "transposed":
        query, key, value, grad_out = torch.randn(4, B, H, D, S).transpose(-1, -2)
    elif layout == "expanded":
        key, value = key[:, :1].expand(B, H, S, D), value[:1, :1].expand(B, H, S, D)
        query = torch.randn(B, H, 1, D).expand(B, H, S, D)
    elif layout == "offset":
        query, key, value = (torch.randn(B, H, S + 3, 2 * D)[:, :, 3:, 1::2] for _ in range(3))
    elif layout == "grad_expanded":
        grad_out = torch.tensor(0.7).expand(B, H, S, D)
    else:
        query, key, value = torch.randn(3, B, H, S, int(layout.split()[-1]))[..., :D]
    check(mask, [query, key, value, grad_out], tiles=tiny(mask))


@triton.jit
def _addresses_kernel(out_ptr, base_ptr, strides, batch, head, BLOCK: tl.constexpr, UNIT: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    strides = primitives.in_elements(strides, UNIT, True)
    base = primitives.head_base(base_ptr, strides, batch + tl.zeros([], tl.int32), head + tl.zeros([], tl.int32))
    pointers = primitives.tile_pointers(base, strides, rows, rows, True)
    tl.store(out_ptr + rows[:, None] * BLOCK + rows[None, :], pointers.to(tl.int64))


@interpreted
@pytest.mark.parametrize(
    "strides",
    [
        (2**31 - 1, 5, 3, 1),
        (7, 2**30 + 1, 3, 1),
        (1, 1, 2**29 + 3, 1),
        (1, 1, 2, 2**31 - 5),
        (2**32 + 8, 8, 8, 1),
        (8, 2**32 + 24, 8, 1),
        (8, 8, 2**32 + 40, 1),
    ],
    ids=str,
)
def test_addresses_beyond_two_to_the_31(strides):
    """Every product of an index and a stride is 64 bits wide, also where the stride, or it divided, fits into 32."""
    memory, addresses = torch.zeros(1), torch.zeros(16, 16, dtype=torch.int64)
    unit, in_units = launch.in_units(strides)
    _addresses_kernel[(1,)](addresses, memory, in_units, 9, 13, 16, unit)
    index = np.arange(16, dtype=np.int64)
    elements = 9 * strides[0] + 13 * strides[1] + index[:, None] * strides[2] + index[None, :] * strides[3]
    assert elements.max() > 2**31
    assert np.array_equal(addresses.numpy(), memory.data_ptr() + 4 * elements)


@pytest.mark.skipif(INTERPRETED, reason="runs no kernel")
def test_offsets_of_a_head_are_64_bits_wide_where_they_must_be():
    """Those between heads always are."""

    narrow = (2**40, 2**40, (2**31 - 8) // 4, 1), (1, 1, 1, (2**31 - 8) // 7)
    assert not launch.wide(5, 8, *narrow)
    for strides in ((1, 1, 2**29, 1), (1, 1, 2**31 // 5, 2**31 // 5)):
        assert launch.wide(5, 8, *narrow, strides)


@pytest.mark.skipif(INTERPRETED, reason="runs no kernel")
def test_strides_are_divided_where_16_divides_not_all_of_them():
    assert launch.in_units((640, 80, 40, 1), (0, 0, 8, 1)) == (8, (80, 10, 5, 1), (0, 0, 1, 1))
    assert launch.in_units((640, 36, 1), (16, 16, 16, 3)) == (4, (160, 9, 1), (4, 4, 4, 3))
    for strides in (((640, 80, 16, 1), (32, 0, 48, 1)), ((640, 80, 40, 1), (40, 40, 25, 1)), ((0, 0, 0, 0),)):
        assert launch.in_units(*strides) == (1, *strides)


@interpreted
@pytest.mark.parametrize(("B", "H", "S"), [(0, 2, 5), (2, 0, 5), (2, 2, 0)])
def test_nothing_to_do(B, H, S, monkeypatch):
    """Nothing is launched: a GPU refuses an empty grid, which the interpreter would not notice."""
    monkeypatch.setattr(fwd, "_launch", None)
    monkeypatch.setattr(bwd, "_launch_query", None)
    results = check(row_mask(3, (2, 3)), inputs(B, H, S, 16))
    assert all(x.shape[:3] == (B, H, S) for x in results)


@interpreted
@pytest.mark.parametrize(
    ("mask", "value"),
    [
        *((mask, torch.nan) for mask in (row_mask(19, (3, 5)), column_mask(19, (3, 5)), conv_mask(19, (3, 5), 3))),
        (row_mask(19, (3, 5)), torch.inf),
    ],
    ids=str,
)
def test_one_samples_nan_stays_there(mask, value):
    tensors = inputs(2, 1, mask.seq_len, 16)
    tiles = tiny(mask)
    lengths = torch.tensor([19, 7], dtype=torch.int32)

    def run(q, k, v, g):
        out, lse = fwd.attention_forward(q, k, v, lengths, mask, 0.25, tiles=tiles)
        grads = bwd.attention_backward(
            g, None, q, k, v, out, lse, lengths, mask, 0.25, query_tiles=tiles, key_tiles=tiles
        )
        return out, lse, *grads

    clean = run(*tensors)
    # All of sample 0, and what text_lengths hides of sample 1.
    for tensor in tensors:
        tensor[0] = value
    for hidden in tensors[1:3]:
        hidden[1, :, 7:19] = value
    with np.errstate(all="ignore"):
        dirty = run(*tensors)
    for name, a, b in zip(("out", "lse", "dQ", "dK", "dV"), clean, dirty):
        assert torch.equal(a[1], b[1]), name


@interpreted
@pytest.mark.parametrize("rule", every_mask(0, 1))
def test_later_tokens_do_not_reach_earlier_ones_and_bits_repeat(rule):
    mask = every_mask(7, (3, 5))[rule]
    tensors, tiles = inputs(1, 1, mask.seq_len, 16), tiny(mask)

    def run(q, k, v, g):
        out, lse = fwd.attention_forward(q, k, v, None, mask, 0.25, tiles=tiles)
        args = (g, None, q, k, v, out, lse, None, mask, 0.25)
        return out, lse, *bwd.attention_backward(*args, query_tiles=tiles, key_tiles=tiles)

    first, second = run(*tensors), run(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    for token in (3, 8, 14, 20):
        changed = [x.clone() for x in tensors]
        for x in changed[:3]:
            x[:, :, token] += 1
        out, lse = fwd.attention_forward(*changed[:3], None, mask, 0.25, tiles=tiles)
        assert torch.equal(out[:, :, :token], first[0][:, :, :token]) and torch.equal(
            lse[..., :token], first[1][..., :token]
        )
        assert not torch.equal(out[:, :, token], first[0][:, :, token])


# -- decoding ----------------------------------------------------------------------------------------------------------


def decoding(mask, P, N, D, dtype=torch.float32):
    """(q, k, v) whose samples of a prompt share the text, and the caches before the first token, NaN."""
    T, B = mask.text_len, P * N
    q, k, v, _ = inputs(B, 2, mask.seq_len, D, dtype=dtype)
    for x in (k, v):
        x[:, :, :T] = x[::N, :, :T].repeat_interleave(N, 0)
    caches = [torch.full((B, 2, mask.cache_slots, D), torch.nan, dtype=dtype) for _ in range(2)]
    return (q, k, v), caches


@interpreted
@pytest.mark.parametrize(
    ("mask", "dtype"),
    [
        *((mask, torch.float32) for mask in every_mask(5, (3, 4)).values()),
        (row_mask(0, (2, 3)), torch.float32),
        (column_mask(150, (3, 2)), torch.float32),
        (causal_mask(3, (5, 9)), torch.float32),
        # A rule is a table of slots here, whatever the dtype.
        (every_mask(5, (3, 4))["row"], torch.float16),
        (every_mask(5, (3, 4))["conv_flat"], torch.float16),
        (column_mask(150, (3, 2)), torch.float16),
    ],
    ids=str,
)
def test_decode_against_float64(mask, dtype):
    """Hidden text and slots that a query does not see hold NaN; the position is read from a tensor."""
    P, N, D, T = 3, 2, 24, mask.text_len
    (q, k, v), caches = decoding(mask, P, N, D, dtype)
    lengths = torch.tensor([T, 0, T // 2], dtype=torch.int32)
    text = [x[::N, :, :T].clone() for x in (k, v)]
    for x in text:
        for p in range(P):
            x[p, :, lengths[p] :] = torch.nan
    position, outs = torch.zeros((), dtype=torch.int64), []
    for i in range(mask.image_len):
        position.fill_(i)
        for cache, x in zip(caches, (k, v), strict=True):
            cache[:, :, mask.cache_slot(i)] = x[:, :, T + i]
        if i % 7 in (0, 5):
            with nan_poisoned():
                outs.append((i, attention.decode(q[:, :, T + i], *text, *caches, position, lengths, mask, -0.3)))
    options = {"scale": -0.3, "text_lengths": lengths.repeat_interleave(N)}
    rows = [T + i for i, _ in outs]
    exact, eager = (run(q, k, v, mask, **options)[0][:, :, rows] for run in (attention_oracle, eager_attention))
    assert_as_exact_as_eager("decode", torch.stack([out for _, out in outs], 2), eager, exact)


@interpreted
@pytest.mark.parametrize("mask", [causal_mask(70, (3, 9)), conv_mask(33, (4, 5), 5)], ids=repr)
def test_decode_in_small_steps(mask, monkeypatch):
    """Many parts of a text, weighed a few at a time, and image keys a few at a time: what otherwise long ones take."""
    for name, value in {"TEXT_PART": 16, "TEXT_STEP": 16, "MERGE_PARTS": 2, "IMAGE_BYTES": 4 * 16 * 4}.items():
        monkeypatch.setattr(dec, name, value)
    assert dec.image_blocks(mask.visible_slots()[0].shape[1], 4) == (4, 0, True)
    (q, k, v), caches = decoding(mask, 2, 2, 16)
    T, lengths = mask.text_len, torch.tensor([mask.text_len, 20], dtype=torch.int32)
    text, outs, rows = [x[::2, :, :T] for x in (k, v)], [], range(0, mask.image_len, 4)
    for i in range(mask.image_len):
        for cache, x in zip(caches, (k, v), strict=True):
            cache[:, :, mask.cache_slot(i)] = x[:, :, T + i]
        if i in rows:
            with nan_poisoned():
                outs.append(attention.decode(q[:, :, T + i], *text, *caches, torch.tensor(i), lengths, mask, 0.3))
    options = {"scale": 0.3, "text_lengths": lengths.repeat_interleave(2)}
    seen = [T + i for i in rows]
    exact, eager = (run(q, k, v, mask, **options)[0][:, :, seen] for run in (attention_oracle, eager_attention))
    assert_as_exact_as_eager("decode", torch.stack(outs, 2), eager, exact)


def test_image_keys_are_cut_into_blocks_that_hold_them():
    for most in range(1, 300):
        block, rest, loop = dec.image_blocks(most, 128)
        assert loop == (most > 192 or most > 128 and not rest) and block <= 128
        assert loop or most <= block + rest < max(2, 1.5 * most + 1) and block & (block - 1) == rest & (rest - 1) == 0


@interpreted
def test_decode_does_not_depend_on_the_number_of_samples():
    """Bit for bit. Only for samples that keep their rows: numpy's products are not the same for every row."""
    mask, P, N, i = conv_mask(140, (4, 5), 3), 2, 19, 13
    T = mask.text_len
    (q, k, v), caches = decoding(mask, P, N, 16)
    for cache, x in zip(caches, (k, v), strict=True):
        for j in range(i + 1):
            cache[:, :, mask.cache_slot(j)] = x[:, :, T + j]
    text, position = [x[::N, :, :T] for x in (k, v)], torch.tensor(i)
    together = attention.decode(q[:, :, T + i], *text, *caches, position, None, mask, 0.3)
    for n in (1, 2, 17):
        second = slice(N, N + n)  # of the second prompt the first n
        own = [x[1:] for x in text] + [x[second] for x in caches]
        assert torch.equal(attention.decode(q[second, :, T + i], *own, position, None, mask, 0.3), together[second])


@interpreted
@pytest.mark.parametrize(
    ("rule", "dtype"), [("row", torch.float16), *((rule, torch.float32) for rule in every_mask(0, 1))], ids=str
)
def test_append_writes_one_slot(rule, dtype):
    """Key and value of every position, out of a packed projection: a ring comes around, and nothing else is written."""
    mask, B, H = every_mask(3, (5, 3))[rule], 3, 7  # 21 heads: more than one program, and a part of one
    for D in (1, 24, 64):
        packed = inputs(mask.image_len, B, 3, H, D, dtype=dtype)[0]
        caches = [torch.full((B, H, mask.cache_slots, D), torch.nan, dtype=dtype) for _ in range(2)]
        # A cache with other strides, and what lies between its numbers.
        caches[1] = torch.full((B, mask.cache_slots, H, 2 * D), torch.nan, dtype=dtype)[..., ::2].transpose(1, 2)
        expected, position = [x.clone() for x in caches], torch.zeros((), dtype=torch.int64)
        for i in range(mask.image_len):
            _, *tokens = packed[i].unbind(1)
            attention.append(*caches, *tokens, position.fill_(i), mask)
            for cache, token in zip(expected, tokens, strict=True):
                cache[:, :, mask.cache_slot(i)] = token
            for cache, wanted in zip(caches, expected, strict=True):
                assert torch.equal(cache.nan_to_num(7), wanted.nan_to_num(7)), (D, i)
        assert not caches[0].isnan().any() and caches[1]._base[..., 1::2].isnan().all()
        for outside, inside in ((-1, 0), (mask.image_len + 7, mask.image_len - 1)):
            tokens = [-token for token in tokens]
            attention.append(*caches, *tokens, position.fill_(outside), mask)
            for cache, wanted, token in zip(caches, expected, tokens, strict=True):
                wanted[:, :, mask.cache_slot(inside)] = token
                assert torch.equal(cache, wanted)


@interpreted
def test_append_of_nothing_and_as_a_torch_operation():
    mask = column_mask(3, (5, 3))
    for B in (0, 2):
        key, value, *_ = inputs(B, 4, 16)
        cache = [torch.zeros(B, 4, mask.cache_slots, 16) for _ in range(2)]
        arguments = *cache, key, value, torch.tensor(4), list(mask.encode())
        torch.library.opcheck(torch.ops.dalle_fast.attention_append.default, arguments)


# -- a residual and its norm -------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_add_norm_against_float64(dtype):
    """The sum is torch's to the bit; the norm of it is as exact as torch's."""
    for R, W in ((1, 1), (3, 2), (1, 31), (4, 33), (5, 129), (2, 1000), (1, 2048), (1, 8191)):
        x, update, weight, _ = (3 * t + 40 for t in inputs(R, W, dtype=dtype))
        norm = torch.nn.LayerNorm(W, eps=1e-3, dtype=dtype).requires_grad_(False)
        norm.weight.copy_(weight[0])
        norm.bias.copy_(weight[-1])
        for added in (update, None):
            with nan_poisoned():
                total, out = norm_triton.add_norm(x, added, norm.weight, norm.bias, norm.eps)
            expected, eager = norm_ops.add_norm(x, added, norm)
            assert torch.equal(total, expected) and total.dtype == out.dtype == dtype
            assert total.data_ptr() != x.data_ptr()
            exact = torch.nn.functional.layer_norm(total.double(), (W,), norm.weight.double(), norm.bias.double(), 1e-3)
            assert_as_exact_as_eager(f"{R} x {W}", out, eager, exact)
    empty = torch.zeros(0, W, dtype=dtype)
    assert [t.shape for t in norm_triton.add_norm(empty, empty, norm.weight, norm.bias, 1e-3)] == [(0, W)] * 2


@interpreted
def test_a_row_of_add_norm_is_its_own():
    x, update, weight, _ = inputs(6, 70)
    clean = norm_triton.add_norm(x, update, weight[0], weight[1], 1e-5)
    alone = norm_triton.add_norm(x[4:], update[4:], weight[0], weight[1], 1e-5)
    x[1, 3], update[2, 69] = torch.nan, torch.inf
    with np.errstate(all="ignore"):
        total, out = norm_triton.add_norm(x, update, weight[0], weight[1], 1e-5)
    assert total.isfinite().sum() == 6 * 70 - 2 and out[[1, 2]].isnan().all()
    for before, after, last in zip(clean, (total, out), alone, strict=True):
        assert torch.equal(before[[0, 3, 4, 5]], after[[0, 3, 4, 5]]) and torch.equal(before[4:], last)


@interpreted
def test_add_norm_is_a_good_torch_operation():
    x, update, weight, _ = inputs(3, 20)
    for added in (update, None):
        torch.library.opcheck(torch.ops.dalle_fast.add_norm.default, (x, added, weight[0], weight[1], 1e-5))


# -- linear layers -----------------------------------------------------------------------------------------------------


def assert_counters_are_zero():
    assert all(not counters.any() for counters in linear_triton._of_stream.values())


@interpreted
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1), (3, 5, 7), (2, 3, 0), (17, 65, 63), (5, 130, 200), (33, 64, 129), (64, 48, 128), (16, 128, 256)],
    ids=str,
)
def test_linear_is_exact_however_it_is_cut(sizes):
    """-2 to 2: sums are exact, and so must results be. K smaller than the splits leaves some of them nothing to do."""
    R, N, K = sizes
    x, weight, bias = (torch.randint(-2, 3, shape).half() for shape in ((R, K), (N, K), (N,)))
    exact = x.double() @ weight.double().T
    block_m = max(16, triton.next_power_of_2(R))
    cuts = [Tiles(block_m, *cut, 4, 3) for cut in ((16, 32, 1), (64, 16, 2), (32, 64, 3), (64, 32, 8), (128, 16, 17))]
    for tiles in (None, *cuts):
        for b, expected in ((None, exact), (bias, exact + bias)):
            with nan_poisoned():
                out = linear_triton.linear(x, weight, b, None, tiles)
            assert torch.equal(out, expected.half()), tiles
            assert_counters_are_zero()


@interpreted
def test_linear_takes_any_leading_dimensions_and_strides():
    x, weight, bias = (torch.randint(-2, 3, shape).half() for shape in ((6, 40), (10, 40), (10,)))
    expected = torch.nn.functional.linear(x, weight, bias)
    wide = [torch.full((len(t), 50), torch.nan).half() for t in (x, weight)]
    for place, t in zip(wide, (x, weight), strict=True):
        place[:, 3:43] = t
    for a, b in (
        (F.linear(x.view(2, 3, 40), weight, bias, impl="triton"), expected.view(2, 3, 10)),
        (F.linear(x[0], weight, bias, impl="triton"), expected[0]),
        (F.linear(x.T.contiguous().T, weight, bias, impl="triton"), expected),
        (F.linear(wide[0][:, 3:43], wide[1][:, 3:43], bias, impl="triton"), expected),
        (F.linear(x, weight[:0], bias[:0], impl="triton"), expected[:, :0]),
    ):
        assert torch.equal(a, b)


@interpreted
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_linear_errs_as_float32_sums_do(activation):
    """GELU is taken of the sum itself, so it is rounded once. Several splits by the table's own choice."""
    (R, N, K), generator = (37, 150, 2048), torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((R, K), (N, K), (N,)))
    x, weight, bias = x.half(), (weight / 32).half(), bias.half()
    assert linear_triton.tiles_for(R, N, K, 132, 227 << 10).splits > 1
    eager = F.linear(x, weight, bias, activation=activation, impl="reference")
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    with nan_poisoned():
        first, again = (F.linear(x, weight, bias, activation=activation, impl="triton") for _ in range(2))
    exact = torch.nn.functional.gelu(exact) if activation else exact
    assert_as_exact_as_eager("out", first, eager, exact, factor=1.0, terms=exact.abs())
    assert torch.equal(first, again)


@interpreted
def test_a_row_of_linear_does_not_depend_on_how_many_there_are():
    """Bit for bit. In each block of 128 columns one product, which numpy cannot get wrong, and sums that their order changes."""
    K, N, generator = 4096, 5, torch.Generator().manual_seed(0)
    blocks = K // 128
    order = torch.randperm(blocks, generator=generator)
    values = torch.randn(64, blocks, generator=generator)
    values[:, order[:8]] = 1024 + 64 * values[:, order[:8]]
    values[:, order[8:16]] = -values[:, order[:8]]  # these cancel, and have swallowed digits of the others
    factors = torch.rand(N, blocks, generator=generator)
    factors[:, order[:16]] = 1024.0
    x, weight = (torch.zeros(len(t), blocks, 128) for t in (values, factors))
    x[..., 7], weight[..., 7] = values, factors
    x, weight = x.view(64, K).half(), weight.view(N, K).half()
    together = F.linear(x, weight, impl="triton")
    for R in (1, 2, 16, 17, 33):
        assert torch.equal(F.linear(x[-R:], weight, impl="triton"), together[-R:])
    tiles = linear_triton.tiles_for(64, N, K, 132, 227 << 10)
    assert tiles.splits > 1
    assert not torch.equal(linear_triton.linear(x, weight, None, None, tiles._replace(splits=1)), together)


@interpreted
def test_infinity_and_nan_stay_in_their_row_of_linear():
    x, weight = (torch.randint(-2, 3, shape).half() for shape in ((9, 200), (70, 200)))
    weight[:, 3] = 1
    expected = torch.nn.functional.linear(x, weight)
    x[2, 3], x[5, 3] = torch.nan, torch.inf
    others = [r for r in range(9) if r not in (2, 5)]
    for splits in (1, 3):
        with np.errstate(all="ignore"):
            out = linear_triton.linear(x, weight, None, None, Tiles(16, 64, 32, splits, 4, 3))
        assert out[2].isnan().all() and out[5].isinf().all()
        assert torch.equal(out[others], expected[others])


@interpreted
def test_linear_is_a_good_torch_operation():
    x, weight, bias = (torch.randint(-2, 3, shape).half() for shape in ((3, 20), (5, 20), (5,)))
    for arguments in ((x, weight, bias), (x, weight, None), (x.view(3, 1, 20), weight, bias)):
        torch.library.opcheck(torch.ops.dalle_fast.linear.default, (*arguments, "gelu", "triton"))


# -- refusals ----------------------------------------------------------------------------------------------------------


@interpreted
def test_interpreter_refuses_what_it_gets_wrong():
    x = torch.zeros(1, 1, 4, 16, dtype=torch.bfloat16)
    assert any("bfloat16" in reason for reason in attention.why_not(x, x, x, causal_mask(4, 1)))
    x = torch.zeros(1, 1, 4, 16)
    assert attention.why_not(x, x, x, causal_mask(4, 1)) == []


@pytest.mark.skipif(INTERPRETED, reason="runs no kernel")
def test_the_interpreter_is_for_cpu_tensors_alone(monkeypatch):
    """It takes a GPU's too, by way of the CPU, and those in bfloat16 wrongly."""
    monkeypatch.setattr(on_triton, "capability_of", lambda tensor: (9, 0))
    tensor = SimpleNamespace(is_cuda=True, is_cpu=False, device=torch.device("cuda", 0), dtype=torch.bfloat16)
    assert on_triton.why_not(tensor, "query") == []
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (reason,) = on_triton.why_not(tensor, "query")
    assert reason == "TRITON_INTERPRET is set, for CPU tensors alone, and query is on cuda:0"


@pytest.mark.skipif(INTERPRETED, reason="is about processes without the interpreter")
def test_every_reason_is_given_with_its_value():
    x = torch.zeros(1, 1, 4, 129, dtype=torch.float64)
    reasons = "\n".join(attention.why_not(x, x, x, causal_mask(1 << 30, (1 << 10, 1))))
    for part in ("query is on cpu", "query is torch.float64", "1 to 128, got 129", f"got {(1 << 30) + (1 << 10)}"):
        assert part in reasons, reasons


@interpreted
@pytest.mark.parametrize("D", [1, 128])
def test_the_packages_functions_twice(D):
    """Importing the kernels' modules must not put anything in the place of the functions of the package."""
    mask = row_mask(3, (2, 3))
    query, key, value, grad_out = inputs(1, 1, mask.seq_len, D)
    assert attention.why_not(query, key, value, mask) == []
    for _ in range(2):
        out, lse = attention.forward(query, key, value, None, mask, 0.25)
        grads = attention.backward(grad_out, None, query, key, value, out, lse, None, mask, 0.25)
        assert torch.allclose(out.double(), attention_oracle(query, key, value, mask, scale=0.25)[0], atol=1e-6)
        assert all(grad.isfinite().all() for grad in grads)


@interpreted
def test_many_gradients_of_one_sample():
    """Only grad_out is batched, so that lse, whose strides no kernel takes, has a batch stride of 0."""
    mask = row_mask(3, (2, 3))
    query, key, value, _ = inputs(1, 2, mask.seq_len, 4)
    jacobian = [
        torch.func.jacrev(lambda q: F.sparse_attention(q, key, value, mask, impl=impl).sum((0, 2)))(query)  # noqa: B023
        for impl in ("triton", "reference")
    ]
    torch.testing.assert_close(*jacobian)


@interpreted
def test_a_model_whose_attention_is_triton():
    """Losses and samples, which Triton does not serve alone, choose for themselves."""
    config = fnn.DALLEConfig(16, 3, 12, (2, 3), layers=2, width=32, num_heads=2, head_dim=16, kernel_size=1)
    model = fnn.DALLE(config, impl="triton")
    text, codes = torch.randint(12, (2, 3)), torch.randint(12, (2, 2, 3))
    model(text, codes).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.generate(text, seed=0).shape == (2, 2, 3)


@pytest.mark.skipif(INTERPRETED, reason="is about processes without the interpreter")
@pytest.mark.parametrize("name", ["older", "newer"])
def test_tf32_only_where_torch_allows_it(name):
    """Through either of torch's settings; the newer one makes the older one's getter raise."""
    code = {"older": "torch.set_float32_matmul_precision('high')", "newer": "matmul.fp32_precision = 'tf32'"}[name]
    code = f"""
import torch
from dalle_fast.ops.attention.triton.launch import input_precision
matmul = torch.backends.cuda.matmul
print(input_precision(torch.float32))
{code}
print(input_precision(torch.float32), input_precision(torch.float16))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["ieee", "tf32", "ieee"]
