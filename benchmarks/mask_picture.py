"""Draw the README's picture: row, column and convolutional attention at the paper's sizes, side by side.

python benchmarks/mask_picture.py            writes benchmarks/results/masks.png
python benchmarks/mask_picture.py FILE.png   writes there
"""

from __future__ import annotations

import argparse
import sys

import flags

from dalle_fast.mask_plot import DPI, add_legend, draw_matrix, draw_query_view, example_query, new_figure
from dalle_fast.masks import column_mask, conv_mask, row_mask

MATRIX_CELLS = 427  # about one pixel a cell: finer, the single diagonals of column attention would pale


def draw(path, *, text_len: int = 256, grid: tuple[int, int] = (32, 32), kernel_size: int = 11) -> None:
    """Two rows of panels, the matrices above and the query's view below, one column per mask."""
    sizes = {"text_len": text_len, "grid": grid}
    masks = {
        "row": row_mask(**sizes),
        "column": column_mask(**sizes),
        f"convolutional, {kernel_size}x{kernel_size}": conv_mask(**sizes, kernel_size=kernel_size),
    }
    figure = new_figure(12.4, 9)
    for (name, mask), (above, below) in zip(masks.items(), figure.subplots(2, len(masks)).T):
        draw_matrix(above, mask, max_size=MATRIX_CELLS)
        causal_pairs = mask.seq_len * (mask.seq_len + 1) / 2
        above.set_title(f"{name}: {mask.num_pairs / causal_pairs:.0%} of the causal pairs", fontsize=11)
        draw_query_view(below, mask, example_query(mask))
        below.set_title(below.get_title().replace(", and all", "\nand all"), fontsize=10)
    add_legend(figure)
    save_small(figure, path)


def save_small(figure, path) -> None:
    """Save as a PNG of 64 colours, about a fifth of what matplotlib's own takes."""
    import numpy as np
    from PIL import Image  # matplotlib brings it

    figure.set_dpi(DPI)
    figure.canvas.draw()
    pixels = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    pixels.quantize(64, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the picture of the masks for the README.")
    default = flags.ROOT / "benchmarks" / "results" / "masks.png"
    parser.add_argument("path", nargs="?", type=flags.output_file(".png"), default=default, metavar="FILE.png",
        help="where to (default: benchmarks/results/masks.png)")  # fmt: skip
    args = parser.parse_args(argv)
    draw(args.path)
    print(f"wrote {args.path.name}, {args.path.stat().st_size / 1024:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
