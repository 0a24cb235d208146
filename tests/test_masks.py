"""The mask rule against the paper's table, written a second time, slowly; values, derived data and ports."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dalle_fast.nn
from dalle_fast import _extension, masks
from dalle_fast.masks import RULES, AttentionMask, causal_mask, column_mask, conv_mask, row_mask

SIZES = [(0, (3, 5)), (1, (1, 1)), (2, (1, 6)), (3, (5, 1)), (4, (4, 4)), (3, (5, 3)), (1, (2, 7)), (7, (6, 4))]
KERNELS = [(1, 1), (3, 1), (5, 1), (7, 1), (3, 2), (5, 2), (3, 3)]


def all_masks():
    for text_len, grid in SIZES:
        for rule in RULES:
            for kernel_size, dilation in KERNELS if rule.startswith("conv_") else [(1, 1)]:
                yield AttentionMask(rule, text_len, grid, kernel_size, dilation)


def image_key_visible(mask, i, j):
    """The row of the table in PAPER.md's section "Masks, exactly", for image query i and image key j."""
    H, W = mask.grid
    K, d = mask.kernel_size, mask.dilation
    h = K // 2
    if j > i:
        return False
    (ri, ci), (rj, cj) = divmod(i, W), divmod(j, W)
    dr, dc = ri - rj, ci - cj
    window = [step * d for step in range(-h, h + 1)]
    if mask.rule == "causal":
        return True
    if mask.rule == "row":
        return 0 <= i - j <= W
    if mask.rule == "axial_row":
        return dr == 0
    if mask.rule == "column":
        return (i - j) % W == 0
    if mask.rule == "conv_flat":
        return any(i - j == d * (row * W + column) for row in range(h + 1) for column in range(-h, h + 1))
    if mask.rule == "conv_clip":
        return dr in window and dc in window
    if mask.rule == "conv_torus":
        # A difference modulo the grid is one of two numbers: this many rows up, or that many down.
        return any(x in window for x in (dr % H, dr % H - H)) and any(x in window for x in (dc % W, dc % W - W))
    assert mask.rule == "conv_corner"
    corner = [step * d for step in range(K)]
    return dr in corner and dc in corner


def slow_dense(mask):
    T, S = mask.text_len, mask.text_len + mask.grid[0] * mask.grid[1]
    dense = np.zeros((S, S), dtype=bool)
    for q in range(S):
        for k in range(S):
            if q < T:
                dense[q, k] = k <= q
            else:
                dense[q, k] = k < T or image_key_visible(mask, q - T, k - T)
    return dense


@pytest.mark.parametrize("rule", RULES)
def test_rule_is_the_papers(rule):
    for mask in all_masks():
        if mask.rule == rule:
            np.testing.assert_array_equal(mask.to_dense().numpy(), slow_dense(mask), err_msg=repr(mask))


def test_constructors_name_the_rules():
    assert row_mask(2, 3).rule == "row"
    assert row_mask(2, 3, wrap=False).rule == "axial_row"
    assert column_mask(2, 3).rule == "column"
    assert causal_mask(2, 3).rule == "causal"
    assert [conv_mask(2, 3, edges=e).rule for e in ("flat", "clip", "torus", "corner")] == list(RULES[4:])
    assert conv_mask(2, 3) == conv_mask(2, (3, 3), kernel_size=11, dilation=1, edges="flat")


def test_native_rule_is_the_same():
    dense_mask = _extension.native().dense_mask
    for mask in all_masks():
        for seq_len in {0, mask.text_len, mask.text_len + 1, mask.seq_len}:
            port = dense_mask(mask.encode(), seq_len)
            assert port.shape == (seq_len, seq_len) and port.dtype == bool
            np.testing.assert_array_equal(port, mask.to_dense(seq_len=seq_len).numpy(), err_msg=repr(mask))


def test_prefix_is_a_corner_of_the_whole():
    mask = conv_mask(3, (4, 5), 3)
    whole = mask.to_dense()
    for seq_len in range(mask.seq_len + 1):
        assert torch.equal(mask.to_dense(seq_len=seq_len), whole[:seq_len, :seq_len])


def test_allows_takes_anything_that_broadcasts():
    mask = row_mask(2, (3, 3))
    dense = mask.to_dense()
    assert all(bool(mask.allows(q, k)) == bool(dense[q, k]) for q in range(11) for k in range(11))
    positions = np.arange(11, dtype=np.int64)
    np.testing.assert_array_equal(mask.allows(positions[:, None], positions), dense.numpy())
    q = torch.arange(11, dtype=torch.int32)
    assert torch.equal(mask.allows(q, torch.zeros((), dtype=torch.int32)), dense[:, 0])


NARROW = ["int8", "int16", "uint8", "uint16", "uint32", "uint64"]


@pytest.mark.parametrize("dtype", [*NARROW, "int32"])
def test_positions_of_any_integer_type_give_the_same(dtype):
    wide = conv_mask(0, (1, 127), 3)  # int8 holds its positions, not what the rule adds to them
    for mask in [*all_masks(), conv_mask(6, 11, 3, edges="clip"), wide]:
        dense, slots = mask.to_dense(), [mask.cache_slot(j) for j in range(mask.image_len)]
        positions = torch.arange(mask.seq_len).to(getattr(torch, dtype))
        assert torch.equal(mask.allows(positions[:, None], positions), dense), mask
        assert torch.equal(mask.allows(positions[:, None], torch.arange(mask.seq_len)), dense), mask
        assert torch.equal(mask.allows(mask.seq_len - 1, positions), dense[-1]), mask
        assert mask.cache_slot(positions[: mask.image_len]).tolist() == slots, mask
        array = np.arange(mask.seq_len).astype(dtype)
        np.testing.assert_array_equal(mask.allows(array[:, None], array), dense.numpy(), err_msg=repr(mask))
        np.testing.assert_array_equal(mask.allows(array[-1], array), dense[-1].numpy(), err_msg=repr(mask))
        assert mask.cache_slot(array[: mask.image_len]).tolist() == slots, mask


def test_slots_and_positions_of_a_byte():
    mask = column_mask(0, (20, 20))  # more slots than a byte counts
    j = torch.arange(256, dtype=torch.uint8)
    expected = [mask.cache_slot(x) for x in range(256)]
    assert mask.cache_slot(j).tolist() == mask.cache_slot(j.numpy()).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_the_rule_compiles(dtype):
    mask = conv_mask(3, (4, 5), 3, edges="torus")
    positions = torch.arange(mask.seq_len).to(dtype)
    compiled = torch.compile(mask.allows, backend="eager", fullgraph=True)
    assert torch.equal(compiled(positions[:, None], positions), mask.to_dense())


def test_what_is_derived_ignores_the_default_device():
    # As sequences of their own, so that nothing is cached: made while "meta" is the default, used when it is not.
    for n, rule in enumerate(RULES):
        there, here = AttentionMask(rule, 101 + n, (3, 4)), AttentionMask(rule, 201 + n, (3, 4))
        with torch.device("meta"):
            order, (slots, counts), pairs = there.token_order, there.visible_slots(), there.num_pairs
        assert order.device == slots.device == counts.device == torch.device("cpu")
        assert there.token_order.tolist() == order.tolist()
        assert (order[101 + n :] - 101 - n).tolist() == (here.token_order[201 + n :] - 201 - n).tolist()
        assert torch.equal(slots, here.visible_slots()[0]) and torch.equal(counts, here.visible_slots()[1])
        assert pairs == int(there.to_dense().sum())
        assert there.visible_slots("meta")[0].device.type == "meta"


@pytest.mark.parametrize("make", [row_mask, causal_mask])
def test_tables_without_numbers_are_not_kept(make):
    mask = make(5, (2, 9))
    with FakeTensorMode(), pytest.raises(RuntimeError, match="must not be in FakeTensorMode"):
        mask.visible_slots()
    assert [type(x) for x in mask.visible_slots()] == [torch.Tensor] * 2


def test_the_causal_slots_are_one_row_on_every_device():
    """As on the host: 1 GiB at grid 128 otherwise."""
    mask = causal_mask(3, 128)
    for device in ("cpu", "meta"):
        slots, counts = mask.visible_slots(device)
        assert slots.shape == (1 << 14, 1 << 14) and slots.stride() == (0, 1) and counts.shape == (1 << 14,)
        assert slots.untyped_storage().nbytes() == 4 << 14


def test_the_picture_ignores_the_default_device():
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
    mask = row_mask(7, (5, 6))
    with torch.device("meta"):
        there = mask.plot(max_size=20).axes
    for axes, expected in zip(there, mask.plot(max_size=20).axes, strict=True):
        np.testing.assert_array_equal(axes.get_images()[0].get_array(), expected.get_images()[0].get_array())


def test_num_pairs_counts_exactly():
    for mask in all_masks():
        assert mask.num_pairs == int(slow_dense(mask).sum()), mask
    # The numbers of DESIGN.md's table.
    assert row_mask(256, 32).num_pairs == 328_304
    assert column_mask(256, 32).num_pairs == 311_936
    assert conv_mask(256, 32, 11).num_pairs == 352_209


def test_kv_reach_is_the_farthest_key():
    for mask in all_masks():
        T = mask.text_len
        image = slow_dense(mask)[T:, T:]
        farthest = max(i - j for i, j in zip(*np.nonzero(image), strict=True)) + 1
        assert mask.kv_reach >= farthest, mask
        if mask.dilation == 1 and mask.rule != "conv_torus":
            assert mask.kv_reach == farthest, mask
    assert row_mask(256, 32).kv_reach == 33
    assert conv_mask(256, 32, 11).kv_reach == 5 * 33 + 1


def test_token_order_walks_columns():
    T, (H, W) = 3, (4, 5)
    order = column_mask(T, (H, W)).token_order
    assert order.dtype == torch.int64
    assert order.tolist() == [0, 1, 2] + [T + r * W + c for c in range(W) for r in range(H)]
    for mask in all_masks():
        order = mask.token_order
        assert sorted(order.tolist()) == list(range(mask.seq_len))
        if mask.rule != "column":
            assert order.tolist() == sorted(order.tolist())
    order.fill_(0)  # a caller's copy: what is cached stays
    assert sorted(mask.token_order.tolist()) == list(range(mask.seq_len))


def test_a_cache_holds_what_is_visible_in_slots_of_its_own():
    for mask in all_masks():
        T, G, C = mask.text_len, mask.image_len, mask.cache_slots
        image = slow_dense(mask)[T:, T:]
        slots, counts = mask.visible_slots()
        assert slots.dtype == counts.dtype == torch.int32 and slots.shape == (G, int(image.sum(1).max()))
        token_in = [None] * C
        for i in range(G):
            token_in[mask.cache_slot(i)] = i
            visible = np.nonzero(image[i])[0].tolist()
            where = [mask.cache_slot(j) for j in visible]
            assert [token_in[slot] for slot in where] == visible, (mask, i)
            assert slots[i, : counts[i]].tolist() == sorted(where), (mask, i)


def test_cache_slots_are_few_and_close():
    assert row_mask(256, 32).cache_slots == 33
    assert conv_mask(256, 32, 11).cache_slots == 166
    assert column_mask(256, 32).cache_slots == causal_mask(256, 32).cache_slots == 1024
    slots, counts = column_mask(3, (4, 5)).visible_slots()
    for i in range(20):  # the keys of a column's query lie side by side
        first = i % 5 * 4
        assert slots[i, : counts[i]].tolist() == list(range(first, first + i // 5 + 1))
    for mask in all_masks():
        j = torch.arange(mask.image_len)
        expected = [mask.cache_slot(x) for x in range(mask.image_len)]
        assert mask.cache_slot(j).tolist() == mask.cache_slot(j.numpy()).tolist() == expected
        assert 0 <= min(expected) and max(expected) < mask.cache_slots <= mask.image_len


def test_visible_slots_are_made_in_parts(monkeypatch):
    mask = conv_mask(3, (6, 7), 3)
    slots, counts = mask.visible_slots()
    monkeypatch.setattr(masks, "_COUNT_CHUNK", mask.kv_reach * 5)
    parts = masks._visible_slots.__wrapped__(mask, "cpu")
    assert torch.equal(parts[0], slots) and torch.equal(parts[1], counts)


def test_masks_in_files_need_no_pickle_and_are_checked(tmp_path):
    """What torch.load takes with weights_only=True, its default; kernels trust what a mask says."""
    assert dalle_fast.nn  # registers it
    path = tmp_path / "masks.pt"
    torch.save({"masks": list(all_masks()), "tensor": torch.ones(2)}, path)
    assert torch.load(path, weights_only=True)["masks"] == list(all_masks())
    mask = row_mask(3, (2, 2))
    for name, value, error, words in (
        ("text_len", -5, ValueError, "text_len must be at least 0, got -5"),
        ("grid", (1 << 20, 1 << 20), ValueError, "below 2"),
        ("rule", "none", ValueError, "rule must be one of"),
        ("other", 1, TypeError, "unexpected keyword argument 'other'"),
    ):
        wrong = copy.copy(mask)
        object.__setattr__(wrong, name, value)
        torch.save(wrong, path)
        for load in (lambda: torch.load(path, weights_only=True), lambda: pickle.loads(pickle.dumps(wrong))):  # noqa: B023
            with pytest.raises((error, pickle.UnpicklingError), match=words):
                load()


@pytest.mark.filterwarnings("ignore")
def test_mask_mod_works_in_flex_attention():
    from torch.nn.attention.flex_attention import create_block_mask, create_mask

    for mask in all_masks():
        if mask.grid == (5, 3):
            S = mask.seq_len
            assert torch.equal(create_mask(mask.mask_mod, 1, 1, S, S, device="cpu")[0, 0], mask.to_dense()), mask
    mask = row_mask(64, (8, 16))
    blocks = create_block_mask(mask.mask_mod, None, None, mask.seq_len, mask.seq_len, device="cpu", BLOCK_SIZE=32)
    tiles = mask.to_dense().view(6, 32, 6, 32).any(3).any(1)
    assert torch.equal(blocks.to_dense()[0, 0].bool(), tiles)


# -- values ------------------------------------------------------------------------------------------------------------


def test_masks_are_values():
    masks = list(all_masks())
    again = list(all_masks())
    assert masks == again and [hash(m) for m in masks] == [hash(m) for m in again]
    assert len(set(masks)) == len(masks)
    for mask in masks:
        assert pickle.loads(pickle.dumps(mask)) == mask
        assert copy.deepcopy(mask) == mask
        assert b"hash" not in pickle.dumps(mask)
        assert hash(pickle.loads(pickle.dumps(mask))) == hash(copy.copy(mask)) == hash(mask)
        assert AttentionMask.decode(mask.encode()) == mask
        assert AttentionMask.decode(torch.tensor(mask.encode()).tolist()) == mask
    assert row_mask(np.int64(3), np.int32(4)) == row_mask(3, (4, 4)) == row_mask(3, [4, 4])
    with pytest.raises(AttributeError):
        masks[0].text_len = 5


def test_repr_evaluates_to_the_mask():
    for mask in all_masks():
        assert eval(repr(mask)) == mask


# -- errors ------------------------------------------------------------------------------------------------------------


BIG = 1 << 70


@pytest.mark.parametrize("edges", ["flat", "clip", "torus", "corner"])
def test_a_window_too_large_for_32_bits_is_refused(edges):
    for window in [(65537, 65536), (BIG + 1, 1), (1, BIG), (3, 1 << 31), ((1 << 31) + 1, 1), (1, (1 << 31) - 14)]:
        with pytest.raises(ValueError, match=rf"kernel_size \* dilation .* kernel_size {window[0]} .* {window[1]}$"):
            conv_mask(2, 3, *window, edges=edges)
    with pytest.raises(ValueError, match=r"\(rows \+ 1\) \* columns must be below 2\*\*31, got 2147483652 "):
        conv_mask(1, (1, 1 << 30), 3, edges=edges)  # a row beyond the sequence: the ports round up to one


@pytest.mark.parametrize("edges", ["flat", "clip", "torus", "corner"])
@pytest.mark.parametrize("window", [(99999, 1), (32767, 65536), (99999, 21474), (1, (1 << 31) - 15)])
def test_the_largest_windows_are_the_same_natively(edges, window):
    mask = conv_mask(2, 3, *window, edges=edges)
    dense = mask.to_dense().numpy()
    np.testing.assert_array_equal(dense, slow_dense(dataclasses.replace(mask, kernel_size=min(window[0], 7))))
    np.testing.assert_array_equal(_extension.native().dense_mask(mask.encode(), mask.seq_len), dense)
    positions = torch.arange(mask.seq_len, dtype=torch.int32)
    np.testing.assert_array_equal(mask.allows(positions[:, None], positions).numpy(), dense)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: conv_mask(3, 4, 4), ValueError, "kernel_size must be odd, got 4"),
        (lambda: conv_mask(3, 4, 0), ValueError, "kernel_size must be at least 1, got 0"),
        (lambda: conv_mask(3, 4, -3), ValueError, "kernel_size must be at least 1, got -3"),
        (lambda: conv_mask(3, 4, 3.0), TypeError, "kernel_size must be an integer, got 3.0"),
        (lambda: conv_mask(3, 4, 3, 0), ValueError, "dilation must be at least 1, got 0"),
        (lambda: conv_mask(3, 4, 3, edges="round"), ValueError, "edges must be one of flat, .* got 'round'"),
        (lambda: conv_mask(3, 4, 3, edges=np.array(["flat"] * 2)), ValueError, "edges must be one of .* got array"),
        (lambda: AttentionMask(np.array(["row", "column"]), 3, 4), ValueError, "rule must be one of .* got array"),
        (lambda: AttentionMask.decode([-1, 1, 2, 2, 1, 1]), ValueError, "rule number must be at least 0, got -1"),
        (lambda: AttentionMask.decode([77, 1, 2, 2, 1, 1]), ValueError, "rule number must be below 8, got 77"),
        (lambda: row_mask(-1, 4), ValueError, "text_len must be at least 0, got -1"),
        (lambda: row_mask(True, 4), TypeError, "text_len must be an integer, got True"),
        (lambda: row_mask(torch.tensor(True), 4), TypeError, r"text_len must be an integer, got tensor\(True\)"),
        (lambda: row_mask("3", 4), TypeError, "text_len must be an integer, got '3'"),
        (lambda: row_mask(3, 0), ValueError, r"grid, where it is not \(rows, columns\), must be at least 1, got 0"),
        (
            lambda: row_mask(3, np.array([4, 4])),
            TypeError,
            r"grid, where it is not \(rows, columns\), .* array\(\[4, 4",
        ),
        (lambda: row_mask(3, (4, "4")), TypeError, "grid columns must be an integer, got '4'"),
        (lambda: row_mask(3, 4, wrap="no"), TypeError, "wrap must be True or False, got 'no'"),
        (lambda: row_mask(3, 4, wrap=0), TypeError, "wrap must be True or False, got 0"),
        (lambda: column_mask(3, (4, -1)), ValueError, "grid columns must be at least 1, got -1"),
        (lambda: column_mask(3, (4, 4, 4)), ValueError, r"grid must be \(rows, columns\).* got \(4, 4, 4\)"),
        (lambda: column_mask(3, 4.5), TypeError, "grid, where it is not .*, must be an integer, got 4.5"),
        (lambda: AttentionMask("diagonal", 3, 4), ValueError, "rule must be one of .* got 'diagonal'"),
        (lambda: AttentionMask("row", 3, 4, 5), ValueError, "kernel_size and dilation belong to"),
        (lambda: row_mask(1, 1 << 16), ValueError, "must be below 2\\*\\*31, got 4294967297"),
        (lambda: row_mask(3, 4).to_dense(seq_len=20), ValueError, "seq_len must be at most .*19.*20"),
        (lambda: row_mask(3, 4).to_dense(seq_len=-1), ValueError, "seq_len must be at least 0, got -1"),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()
