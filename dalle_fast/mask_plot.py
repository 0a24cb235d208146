"""The picture of an attention mask: the (S, S) matrix, and what one image query sees on the grid.

S sequence length, T text length, H x W image grid. Figures are made on their own Agg canvas, so nothing here touches
pyplot's global state or needs a display; matplotlib is imported when a picture is drawn.
"""

from __future__ import annotations

import os

from dalle_fast.integers import as_integer

__all__ = ["draw_matrix", "draw_query_view", "example_query", "new_figure", "plot_mask"]

HIDDEN, TEXT, IMAGE, QUERY = range(4)
COLORS = ("#f2f2f2", "#9fc1de", "#2c6fad", "#d9482b")
LABELS = ("not seen", "text key", "image key", "the query")
DPI = 110


def plot_mask(mask, path=None, *, max_size: int = 1024):
    """Draw the (S, S) matrix of a mask beside what one image query sees on the grid.

    Args:
        mask: a `dalle_fast.masks.AttentionMask`.
        path: where to save the picture, its format by the ending; None saves nothing.
        max_size: of a longer sequence every n-th query is shown, and n keys as one cell that is coloured if any of them
            is seen, with the least n that makes at most `max_size` cells a side.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: `max_size` is no integer or below 1; `path` is no path or its ending no known format.
    """
    max_size = as_integer("max_size", max_size, least=1)
    if path is not None and not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a path or None, got {path!r} of type {type(path).__name__}")
    figure = new_figure(10, 5.6)
    check_ending(figure, path)
    matrix_axes, grid_axes = figure.subplots(1, 2)
    draw_matrix(matrix_axes, mask, max_size=max_size)
    draw_query_view(grid_axes, mask, example_query(mask))
    figure.suptitle(repr(mask), fontsize=10)
    add_legend(figure)
    if path is not None:
        figure.savefig(path, dpi=DPI)
    return figure


def new_figure(width: float, height: float):
    """A `matplotlib.figure.Figure` of so many inches on a canvas of its own.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing a mask needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def check_ending(figure, path) -> None:
    """Raise ValueError where `path`'s ending names no format the figure can be saved in."""
    if path is None:
        return
    formats = figure.canvas.get_supported_filetypes()
    ending = os.path.splitext(os.fspath(path))[1].removeprefix(".").lower()
    if ending not in formats:
        raise ValueError(f"path must end in one of {', '.join(sorted(formats))}, got {os.fspath(path)!r}")


def example_query(mask) -> tuple[int, int]:
    """(row, column) of the query that shows the rule best: a little below and right of the middle of the grid."""
    H, W = mask.grid
    return min(H - 1, H * 5 // 8), min(W - 1, W * 5 // 8)


def draw_matrix(axes, mask, *, max_size: int) -> None:
    """Draw on `axes` the matrix: queries downwards, keys to the right, lines where the image begins."""
    T, S = mask.text_len, mask.seq_len
    kinds, step = pooled_matrix(mask, max_size)
    _show(axes, kinds)
    boundary = T / step - 0.5  # in cells, whose centres are whole numbers
    places, names = [(T + (S - T) / 2) / step - 0.5], ["image {}x{}".format(*mask.grid)]
    if T:
        axes.axvline(boundary, color="black", linewidth=0.7)
        axes.axhline(boundary, color="black", linewidth=0.7)
        places, names = [T / 2 / step - 0.5, *places], [f"text {T}" if T >= S / 6 else str(T), *names]
    axes.set_xticks(places, names)
    axes.set_yticks(places, names, rotation=90, va="center")
    axes.tick_params(length=0)
    axes.set(xlabel="keys", ylabel="queries")
    axes.set_title("who sees whom" + (f" (a cell is {step} queries x {step} keys)" if step > 1 else ""), fontsize=9)


def pooled_matrix(mask, max_size: int):
    """(C, C) tensor of HIDDEN, TEXT and IMAGE with C = ceil(S / n) <= max_size, and n.

    A cell shows the first of its n queries and has the kind of the last of its n keys that this query sees. Taking
    every n-th key instead would lose most of column attention, whose keys are W apart, or show it W * n apart.
    """
    import torch

    S, T = mask.seq_len, mask.text_len
    step = max(1, -(-S // max_size))
    cells = -(-S // step)
    # Keys past S come after every query, so none is seen.
    keys = torch.arange(cells * step, dtype=torch.int32, device="cpu")
    kinds = torch.where(keys < T, TEXT, IMAGE).to(torch.uint8)
    rows = [mask.allows(query, keys) * kinds for query in range(0, S, step)]
    return torch.stack([row.view(cells, step).amax(dim=1) for row in rows]), step


def draw_query_view(axes, mask, query: tuple[int, int]) -> None:
    """Draw on `axes` the image grid as the query at (row, column) sees it."""
    import torch

    row, column = query
    H, W = mask.grid
    position = row * W + column
    keys = torch.arange(mask.image_len, device="cpu")
    # Later keys are no business of the rule's image part, so they go through the whole rule.
    seen = mask.allows(mask.text_len + position, mask.text_len + keys)
    kinds = torch.where(seen, IMAGE, HIDDEN)
    kinds[position] = QUERY
    _show(axes, kinds.view(H, W))
    if max(H, W) <= 64:
        for line in range(1, H):
            axes.axhline(line - 0.5, color="white", linewidth=0.5)
        for line in range(1, W):
            axes.axvline(line - 0.5, color="white", linewidth=0.5)
    axes.set_xlabel("grid column")
    axes.set_ylabel("grid row")
    text = f", and all {mask.text_len} text keys" if mask.text_len else ""
    axes.set_title(f"image query ({row}, {column}) sees {int(seen.sum())} image keys{text}", fontsize=9)


def add_legend(figure) -> None:
    """What the colours mean, under the figure."""
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=color, edgecolor="grey", linewidth=0.4, label=label)
               for color, label in zip(COLORS, LABELS)]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)


def _show(axes, kinds) -> None:
    """One cell per entry. Where cells are smaller than pixels, colours are averaged instead of cells dropped."""
    from matplotlib.colors import ListedColormap

    colors = ListedColormap(COLORS)
    axes.imshow(
        kinds.numpy(), cmap=colors, vmin=HIDDEN, vmax=QUERY, interpolation="antialiased", interpolation_stage="rgba"
    )
