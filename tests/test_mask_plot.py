"""The picture of a mask shows what the mask's rule says, needs no window and no matplotlib state.

S sequence, T text, H x W image grid.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch

from dalle_fast.masks import causal_mask, column_mask, conv_mask, row_mask

pytest.importorskip("matplotlib", reason="drawing needs matplotlib")

MASKS = [
    row_mask(7, (5, 6)),
    row_mask(0, (4, 9), wrap=False),
    column_mask(13, (5, 7)),
    causal_mask(3, 4),
    conv_mask(5, (6, 9), 3, 2),
    conv_mask(5, (7, 5), 5, edges="torus"),
    conv_mask(9, (6, 6), 3, edges="corner"),
]


def drawn(axes):
    (image,) = axes.get_images()
    return np.asarray(image.get_array())


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_the_matrix_is_the_mask(mask):
    left, _ = mask.plot().axes
    colours = drawn(left)
    dense = mask.to_dense().numpy()
    assert np.array_equal(colours > 0, dense)
    assert (colours[:, : mask.text_len] != 2).all() and (colours[:, mask.text_len :] != 1).all()
    assert len(left.lines) == (2 if mask.text_len else 0)
    for line, along in zip(left.lines, ("x", "y")):  # the boundary lies between the last text and the first image key
        assert set(getattr(line, f"get_{along}data")()) == {mask.text_len - 0.5}


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_the_grid_is_the_row_of_one_query(mask):
    _, right = mask.plot().axes
    colours = drawn(right)
    assert colours.shape == mask.grid
    (query,) = np.flatnonzero(colours == 3)
    assert np.array_equal(colours.ravel() > 0, mask.to_dense().numpy()[mask.text_len + query, mask.text_len :])
    assert f"{(colours > 0).sum()} image keys" in right.get_title()


@pytest.mark.parametrize("max_size", [1, 7, 16, 29, 47])
@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_a_long_matrix_keeps_every_line(mask, max_size):
    colours = drawn(mask.plot(max_size=max_size).axes[0])
    step = -(-mask.seq_len // max_size)
    groups = len(colours)
    assert colours.shape == (groups, groups) and groups <= max_size and groups == -(-mask.seq_len // step)
    padded = torch.zeros(mask.seq_len, groups * step, dtype=torch.bool)
    padded[:, : mask.seq_len] = mask.to_dense()
    assert np.array_equal(colours > 0, padded[::step].unflatten(1, (groups, step)).any(-1).numpy())


@pytest.mark.parametrize("ending, magic", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_a_file_is_written_in_its_format(tmp_path, ending, magic):
    path = tmp_path / f"mask.{ending}"
    MASKS[0].plot(path)
    assert path.read_bytes().startswith(magic)


@pytest.mark.parametrize("value, error", [(0, ValueError), (-3, ValueError), (2.5, TypeError), (True, TypeError)])
def test_a_bad_max_size_is_named(value, error):
    with pytest.raises(error, match=f"max_size must be .*, got {value}"):
        MASKS[0].plot(max_size=value)


@pytest.mark.parametrize("path, error, words", [
    (7, TypeError, "path must be a path or None, got 7 of type int"),
    ("mask.xyz", ValueError, "path must end in one of .*png.*, got 'mask.xyz'"),
    ("mask", ValueError, "path must end in one of .*png.*, got 'mask'"),
])  # fmt: skip
def test_a_bad_path_is_named(path, error, words):
    with pytest.raises(error, match=words):
        MASKS[0].plot(path)


def test_a_figure_is_returned_and_belongs_to_no_window():
    figure = MASKS[0].plot()
    assert type(figure).__name__ == "Figure" and figure.canvas.manager is None


def run(code):
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)


def test_no_pyplot_and_no_backend_is_touched(tmp_path):
    code = (
        "import sys, matplotlib; matplotlib.use('svg'); from dalle_fast.masks import row_mask; "
        f"row_mask(3, 4).plot({str(tmp_path / 'mask.png')!r}); "
        "print('matplotlib.pyplot' in sys.modules, matplotlib.get_backend())"
    )
    result = run(code)
    assert result.stdout.split() == ["False", "svg"], result.stderr


def test_without_matplotlib_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['matplotlib'] = None; from dalle_fast.masks import row_mask\n"
        "try: row_mask(3, 4).plot()\n"
        "except ImportError as error: print(error)"
    )
    result = run(code)
    assert "pip install matplotlib" in result.stdout, result.stderr
