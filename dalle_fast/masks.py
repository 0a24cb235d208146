"""Attention masks over a [text | image grid] sequence.

A mask is one small frozen value. Its rule is written once, in `AttentionMask.allows`; the dense matrix, the pair
count, the cache reach, the picture and the kernels' tables are derived from it. The ports of the rule that kernels
need (`csrc/mask.h`, `ops/attention/triton/primitives.py`) are compared with it exhaustively by `tests/test_masks.py`.

S sequence length, T text length, H x W image grid, N = H * W image tokens; q, k positions in the sequence; i = q - T,
j = k - T image positions in raster order; (r, c) = divmod(i, W); K kernel size, d dilation, h = K // 2.

The rules are those of Ramesh et al. 2021 (arXiv 2102.12092, appendix B) and of its public implementations.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from dalle_fast.integers import as_integer

if TYPE_CHECKING:  # masks load neither torch nor matplotlib before one is asked for what needs them
    import os

    import torch
    from matplotlib.figure import Figure

__all__ = ["AttentionMask", "causal_mask", "column_mask", "conv_mask", "row_mask"]

# The order is part of the ABI: csrc/mask.h and triton/primitives.py use the same numbers.
RULES = ("causal", "row", "axial_row", "column", "conv_flat", "conv_clip", "conv_torus", "conv_corner")
CONV_EDGES = ("flat", "clip", "torus", "corner")
_Grid = int | tuple[int, int]
_Integers = TypeVar("_Integers")  # a tensor or an array of integers, or a Python integer
_COUNT_CHUNK = 1 << 22  # pairs looked at together when counting; bounds the memory of num_pairs


@dataclasses.dataclass(frozen=True, repr=False)
class AttentionMask:
    """Which keys each query may see. Make one with `row_mask`, `column_mask`, `conv_mask` or `causal_mask`.

    Every rule is causal in raster order and lets image queries see all text keys:

    =============  =====================================================================================
    rule           an image query i sees the image keys j <= i with
    =============  =====================================================================================
    causal         all of them
    row            i - j <= W (wraps across row ends: W + 1 keys, itself included)
    axial_row      r_i == r_j
    column         (i - j) % W == 0
    conv_flat      i - j = d * (dr * W + dc) for some 0 <= dr <= h, abs(dc) <= h (wraps at row ends)
    conv_clip      abs(r_i - r_j) and abs(c_i - c_j) in {0, d, ..., h d} (no wrap)
    conv_torus     the same with both differences taken modulo the grid
    conv_corner    r_i - r_j and c_i - c_j in {0, d, ..., (K - 1) d}
    =============  =====================================================================================

    Values are immutable, comparable, hashable and picklable; what is derived from them is cached. Once `dalle_fast.nn` is
    imported, `torch.load` takes them with weights_only=True.

    Args:
        rule: one of the names above.
        text_len: number of text positions T, at least 0.
        grid: (H, W) of the image tokens, or one integer for a square.
        kernel_size: odd K of the convolutional rules, 1 otherwise.
        dilation: d of the convolutional rules, 1 otherwise.

    Raises:
        TypeError: an argument is not an integer (or, for grid, not one or two of them).
        ValueError: an argument is out of its range.
    """

    rule: str
    text_len: int
    grid: tuple[int, int]
    kernel_size: int = 1
    dilation: int = 1

    def __post_init__(self):
        _choice("rule", self.rule, RULES)
        set_ = functools.partial(object.__setattr__, self)
        set_("text_len", as_integer("text_len", self.text_len, least=0))
        set_("grid", _grid(self.grid))
        set_("kernel_size", as_integer("kernel_size", self.kernel_size, least=1))
        set_("dilation", as_integer("dilation", self.dilation, least=1))
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}")
        if not self.rule.startswith("conv_") and (self.kernel_size, self.dilation) != (1, 1):
            raise ValueError(
                f"kernel_size and dilation belong to the convolutional rules; rule {self.rule!r} takes 1 and 1, "
                f"got {self.kernel_size} and {self.dilation}"
            )
        if self.seq_len >= 1 << 31:
            raise ValueError(f"text_len + rows * columns must be below 2**31, got {self.seq_len}")
        # csrc/mask.h, and the rule on int32 positions, calculate in 32 bits: none of their terms is larger than this sum.
        largest = self.seq_len + self.grid[1] + self.kernel_size * self.dilation
        if self.rule.startswith("conv_") and largest >= 1 << 31:
            raise ValueError(
                "kernel_size * dilation + text_len + (rows + 1) * columns must be below 2**31, "
                f"got {largest} with kernel_size {self.kernel_size} and dilation {self.dilation}"
            )
        set_("_hash", hash((self.rule, self.text_len, self.grid, self.kernel_size, self.dilation)))

    def __hash__(self) -> int:
        return self._hash  # every look into a cache asks for it, and with cold caches to make it takes 0.015 ms

    def __getstate__(self):
        state = dict(self.__dict__)
        del state["_hash"]  # another process has another for the same strings
        return state

    def __setstate__(self, state):
        self.__init__(**state)  # kernels trust a mask: what comes out of a file is checked as what is made

    # -- the rule ------------------------------------------------------------------------------------------------

    def allows(self, q_idx: Any, k_idx: Any) -> Any:
        """THE rule: may query position `q_idx` see key position `k_idx`?

        Args:
            q_idx, k_idx: integer tensors (or arrays, or Python integers) of positions in [0, seq_len) that broadcast.

        Returns:
            Booleans of the broadcast shape, True = attends.
        """
        T = self.text_len
        q_idx, k_idx = _wide(q_idx), _wide(k_idx)
        return (k_idx <= q_idx) & ((k_idx < T) | self._image_allows(q_idx - T, k_idx - T))

    def _image_allows(self, i, j):
        """The image part of the rule; the caller has j <= i, and discards what negative positions give."""
        H, W = self.grid
        K, d = self.kernel_size, self.dilation
        h = K // 2
        delta = i - j
        if self.rule == "causal":
            return delta >= 0
        if self.rule == "row":
            return delta <= W
        if self.rule == "column":
            return delta % W == 0
        if self.rule == "conv_flat":
            # The smallest dr whose row of the kernel ends at or after delta / d must also begin at or before it.
            steps = delta // d
            past = steps - h
            dr = ((past * (past > 0)) + W - 1) // W
            return (delta % d == 0) & (dr <= h) & (dr * W <= steps + h)
        dr = i // W - j // W
        dc = i % W - j % W
        if self.rule == "axial_row":
            return dr == 0
        if self.rule == "conv_clip":
            return _within(dr, h, d) & _within(dc, h, d)
        if self.rule == "conv_torus":
            rows = _in_steps(dr % H, h, d) | _in_steps(-dr % H, h, d)
            return rows & (_in_steps(dc % W, h, d) | _in_steps(-dc % W, h, d))
        return _in_steps(dr, K - 1, d) & _in_steps(dc, K - 1, d)  # conv_corner

    # -- what follows from the fields ----------------------------------------------------------------------------

    @property
    def image_len(self) -> int:
        """Number of image positions N = H * W."""
        return self.grid[0] * self.grid[1]

    @property
    def seq_len(self) -> int:
        """Number of positions S = T + H * W."""
        return self.text_len + self.image_len

    @property
    def kv_reach(self) -> int:
        """How many image keys back a decoding step can look, the query's own included: max(i - j) + 1.

        A cache that keeps the text and a ring of the last `kv_reach` image tokens is enough: W + 1 for row,
        (K // 2) * (W + 1) + 1 for an undilated conv_flat, (H - 1) * W + 1 (so every row) for column. Where dilation
        does not divide the grid the true reach may be a little smaller, never larger.
        """
        H, W = self.grid
        h, corner = self.kernel_size // 2 * self.dilation, (self.kernel_size - 1) * self.dilation
        reach = {
            "causal": self.image_len - 1,
            "row": W,
            "axial_row": W - 1,
            "column": (H - 1) * W,
            "conv_flat": h * (W + 1),
            "conv_clip": min(h, H - 1) * W + min(h, W - 1),
            "conv_torus": self.image_len - 1,
            "conv_corner": min(corner, H - 1) * W + min(corner, W - 1),
        }[self.rule]
        return min(reach + 1, self.image_len)

    @property
    def cache_slots(self) -> int:
        """How many image tokens a decoding cache must have room for: `cache_slot` says where each of them goes.

        `kv_reach` for all rules but column, whose reach spares only W - 1 tokens and would scatter its keys.
        """
        return self.image_len if self.rule == "column" else self.kv_reach

    def cache_slot(self, j: _Integers) -> _Integers:
        """The slot of image token `j` in a decoding cache of `cache_slots` slots.

        A ring, j % cache_slots, which never wraps where the reach is the whole image; for column the transposed grid,
        c * H + r, so that the keys of a query lie side by side. When token i decodes, the tokens it sees are in
        distinct slots that no token from then on to i has taken.

        Args:
            j: integer tensor (or array, or Python integer) of image positions in [0, H * W), in raster order.

        Returns:
            The same kind and shape, values in [0, cache_slots).
        """
        H, W = self.grid
        j = _wide(j)
        return j % W * H + j // W if self.rule == "column" else j % self.cache_slots

    def visible_slots(self, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Which slots of a decoding cache each image token sees, `allows` and `cache_slot` as tables for kernels.

        Args:
            device: where the tables are wanted. They are kept there, shared by all callers: do not write to them.

        Returns:
            slots (H * W, V) int32, for every image position the slots that it sees, in rising order, V the most that
            any of them sees; entries from counts[i] on mean nothing. counts (H * W,) int32. For causal, slots is one
            row, expanded.
        """
        return _visible_slots(self, _full_name(device))

    @property
    def num_pairs(self) -> int:
        """Exact number of (query, key) pairs that attend, over the whole sequence."""
        return count_pairs(self, self.seq_len)

    @property
    def token_order(self) -> torch.Tensor:
        """(S,) int64 tensor: the order in which kernels walk the tokens.

        The sequence's own order, but for `column` text first and then the image column by column, so that the keys
        of a query lie side by side. Kernels follow it by address; nothing is copied.
        """
        import torch

        order = torch.arange(self.seq_len, device="cpu")
        if self.rule == "column":
            order[self.text_len :] = order[self.text_len :].view(self.grid).t().reshape(-1)
        return order

    @property
    def mask_mod(self) -> Callable[..., torch.Tensor]:
        """The rule in FlexAttention's form: a callable of (batch, head, q_idx, kv_idx)."""
        return functools.partial(_mask_mod, self)

    def to_dense(self, device: torch.device | str | int | None = None, *, seq_len: int | None = None) -> torch.Tensor:
        """The mask as a matrix, by evaluating `allows` everywhere.

        Args:
            device: where to make it; torch's default device if None.
            seq_len: make it for the first `seq_len` positions only.

        Returns:
            Boolean tensor (S, S), rows are queries, True = attends (the convention of
            `torch.nn.functional.scaled_dot_product_attention`).
        """
        import torch

        if seq_len is None:
            seq_len = self.seq_len
        elif not torch.compiler.is_compiling():  # a compiler leaves lengths open, and to look would close them
            seq_len = as_integer("seq_len", seq_len, least=0)
        if seq_len > self.seq_len:
            raise ValueError(f"seq_len must be at most {self.seq_len}, the length of {self!r}, got {seq_len}")
        positions = torch.arange(seq_len, device=device)
        return self.allows(positions[:, None], positions[None, :])

    def plot(self, path: str | os.PathLike | None = None, *, max_size: int = 1024) -> Figure:
        """Draw the mask: the (S, S) matrix beside what one image query sees on the grid.

        Args:
            path: where to save the picture (PNG, SVG, ... by its ending); None returns the figure unsaved.
            max_size: of longer matrices every n-th query is shown, n keys to a cell, coloured if it sees any of them.

        Returns:
            The `matplotlib.figure.Figure`.

        Raises:
            ImportError: matplotlib is not installed (`pip install matplotlib`).
        """
        from dalle_fast.mask_plot import plot_mask

        return plot_mask(self, path, max_size=max_size)

    # -- values --------------------------------------------------------------------------------------------------

    def encode(self) -> tuple[int, int, int, int, int, int]:
        """The mask as six integers (rule, T, H, W, K, d): what torch operations and native kernels receive."""
        return (RULES.index(self.rule), self.text_len, *self.grid, self.kernel_size, self.dilation)

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def _decode(numbers: tuple[int, ...]) -> AttentionMask:
        rule, text_len, rows, columns, kernel_size, dilation = numbers
        if as_integer("rule number", rule, least=0) >= len(RULES):
            raise ValueError(f"rule number must be below {len(RULES)}, got {rule}")
        return AttentionMask(RULES[rule], text_len, (rows, columns), kernel_size, dilation)

    @staticmethod
    def decode(numbers: Iterable[int]) -> AttentionMask:
        """The mask that `encode` turned into six integers."""
        return AttentionMask._decode(tuple(numbers))

    def __repr__(self) -> str:
        size = f"text_len={self.text_len}, grid={self.grid}"
        if self.rule == "causal":
            return f"causal_mask({size})"
        if self.rule == "column":
            return f"column_mask({size})"
        if self.rule in ("row", "axial_row"):
            return f"row_mask({size}{'' if self.rule == 'row' else ', wrap=False'})"
        edges = self.rule.removeprefix("conv_")
        return f"conv_mask({size}, kernel_size={self.kernel_size}, dilation={self.dilation}, edges={edges!r})"


def row_mask(text_len: int, grid: _Grid, *, wrap: bool = True) -> AttentionMask:
    """Row attention: the W + 1 latest image keys (`wrap=True`, the paper's), or only those of the query's own row."""
    if not isinstance(wrap, bool):
        raise TypeError(f"wrap must be True or False, got {wrap!r}")
    return AttentionMask("row" if wrap else "axial_row", text_len, grid)


def column_mask(text_len: int, grid: _Grid) -> AttentionMask:
    """Column attention: the image keys above the query in its column, itself included."""
    return AttentionMask("column", text_len, grid)


def conv_mask(
    text_len: int, grid: _Grid, kernel_size: int = 11, dilation: int = 1, edges: str = "flat"
) -> AttentionMask:
    """Convolutional attention: a causal K x K window around the query.

    Args:
        text_len, grid: as of `AttentionMask`.
        kernel_size: odd K.
        dilation: distance between neighbouring rows and columns of the window.
        edges: what the window does at the ends of rows. "flat": it is a set of raster distances, so it wraps into the
            neighbouring row (the paper's, on its natural reading). "clip": it stops (ru-dalle v3). "torus": it wraps
            around the grid (ru-dalle v2). "corner": the query is its lower right corner (dalle-pytorch, which uses
            kernel_size=5).
    """
    _choice("edges", edges, CONV_EDGES)
    return AttentionMask(f"conv_{edges}", text_len, grid, kernel_size, dilation)


def causal_mask(text_len: int, grid: _Grid) -> AttentionMask:
    """Ordinary causal attention over the whole stream."""
    return AttentionMask("causal", text_len, grid)


def _wide(x):
    """`x`, as int64 where it is a tensor or an array of integers that are unsigned or have fewer than 32 bits.

    The rule's differences are negative and its sums large. int32 holds them all, and kernels are faster for it.
    """
    if not hasattr(x, "dtype"):
        return x
    import torch

    if isinstance(x, torch.Tensor):
        narrow = (torch.int8, torch.int16, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
        return x.long() if x.dtype in narrow else x
    is_narrow = x.dtype.kind == "u" or (x.dtype.kind == "i" and x.dtype.itemsize < 4)
    return x.astype("int64") if is_narrow else x


def _in_steps(x, steps: int, d: int):
    """x in {0, d, ..., steps * d}"""
    return (x >= 0) & (x <= steps * d) & (x % d == 0)


def _within(x, steps: int, d: int):
    """abs(x) in {0, d, ..., steps * d}"""
    return (x <= steps * d) & (x >= -steps * d) & (x % d == 0)


def _mask_mod(mask: AttentionMask, batch, head, q_idx, kv_idx):
    return mask.allows(q_idx, kv_idx)


@functools.lru_cache(maxsize=256)
def count_pairs(mask: AttentionMask, seq_len: int) -> int:
    """Exact number of (query, key) pairs that attend among the first `seq_len` positions."""
    text = min(seq_len, mask.text_len)
    image = seq_len - text
    return text * (text + 1) // 2 + image * text + sum(int(seen.sum()) for _, seen in _within_reach(mask, image))


def _within_reach(mask: AttentionMask, image_len: int):
    """Image keys (rows, reach) of the first image queries, some after others, and which of them are seen.

    In NumPy, as torch's modes would make fakes of tensors, and in int32, in which the rule is sooner evaluated.
    """
    import numpy as np

    reach = mask.kv_reach
    rows = max(1, _COUNT_CHUNK // reach)
    back = np.arange(reach, dtype=np.int32)
    for start in range(0, image_len, rows):
        i = np.arange(start, min(start + rows, image_len), dtype=np.int32)[:, None]
        j = i - back
        yield j, mask._image_allows(i, j) & (j >= 0)


def _full_name(device) -> str:
    """A device's name with its number, which "cuda" leaves to torch."""
    if str(device) != "cuda":
        return str(device)
    import torch

    return f"cuda:{torch.cuda.current_device()}"


@functools.lru_cache(maxsize=64)
def _visible_slots(mask: AttentionMask, device: str):
    import torch

    if device != "cpu":
        if device.startswith("cuda") and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a mask's first step of decoding on a device must not be captured in a CUDA graph")
        slots, counts = _visible_slots(mask, "cpu")
        shared = slots.stride(0) == 0  # one row for all, which must not become as many
        moved = slots[0].to(device).expand(slots.shape) if shared else slots.to(device)
        return moved, counts.to(device)
    N, C = mask.image_len, mask.cache_slots
    if mask.rule == "causal":  # every row begins as the last one does: N x N numbers would tell nothing new
        slots = torch.arange(N, dtype=torch.int32, device="cpu")
        return _real(slots).expand(N, N), slots + 1
    import numpy as np

    tables = []
    for j, seen in _within_reach(mask, N):
        slots = np.sort(np.where(seen, mask.cache_slot(j), C), axis=1)  # the hidden ones to the end
        tables.append(slots[:, : int(seen.sum(1).max())].astype(np.int32))
    width = max(table.shape[1] for table in tables)
    slots = np.concatenate([np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=C) for x in tables])
    return _real(torch.from_numpy(slots)), torch.from_numpy((slots < C).sum(1, dtype=np.int32))


def _real(table: torch.Tensor) -> torch.Tensor:
    """The table, which is kept; RuntimeError where a mode made it without numbers, as later steps would have none."""
    import torch

    if type(table) is not torch.Tensor:
        raise RuntimeError("a mask's first step of decoding must not be in FakeTensorMode")
    return table


def _choice(name: str, value, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:  # an array would be compared entry by entry
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _grid(value) -> tuple[int, int]:
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"grid must be (rows, columns) or one integer, got {value!r}")
        rows, columns = value
    else:
        rows = columns = as_integer("grid, where it is not (rows, columns),", value, least=1)
    return as_integer("grid rows", rows, least=1), as_integer("grid columns", columns, least=1)
