"""What the commands that draw have in common: pictures read as a model takes them, and written where they can be."""

from __future__ import annotations

import io
import os

from dalle_fast.errors import UserError

SHEETS = 4  # as many times as it has pixels a sheet is in memory where it is made: 3.3 were measured


def check_channels(dvae, folder) -> None:
    """Refuse a `DiscreteVAE`, of a run's folder, that is not of pictures."""
    if dvae.config.channels not in (1, 3):
        raise UserError(f"the dVAE in {folder} must have 1 or 3 channels, as pictures have, got {dvae.config.channels}")


def read_square(path, config):
    """The middle square of the picture in a file, of the size that a `DiscreteVAE` of `config` takes: (S, S, 3) uint8,
    shades of grey where that has one channel.

    Raises:
        UserError: it cannot be read as a picture, or is smaller.
    """
    import numpy as np
    from PIL import Image

    from dalle_fast.data.crops import centre_crop
    from dalle_fast.data.images import BadImage, decode, read_file

    try:
        picture = centre_crop(decode(read_file(path), draft=config.image_size), config.image_size)
    except (BadImage, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
    return picture if config.channels == 3 else np.array(Image.fromarray(picture).convert("L").convert("RGB"))


def images_for(dvae, pictures):
    """Of pictures (N, S, S, 3) uint8 what the VAE takes: (N, C, S, S) float32 from 0 to 1, on its device."""
    import torch

    images = torch.from_numpy(pictures).movedim(-1, 1)[:, : dvae.config.channels]
    return images.to(next(dvae.parameters()).device).float() / 255


def check_out(path, rows, columns, size, instead) -> None:
    """Refuse a file in which rows of pictures could not be written now, not when they are made. It makes the file's
    folder, but leaves no file.

    Args:
        size: of a picture's side. instead: of one file of all that is too large, what can be chosen.
    """
    import torch

    from dalle_fast.nn.memory import free_memory
    from dalle_fast.outputs import can_write, make_folder
    from dalle_fast.pictures import grid_layout

    height, width = (size, size) if rows == columns == 1 else grid_layout(rows, columns, size).size
    try:
        _try_to_save(path, 1, 1)
    except (KeyError, OSError, ValueError) as error:  # KeyError: of formats that Pillow only reads
        raise UserError(f"--out must end as a colour picture that Pillow writes, as .png does, got {path}") from error
    needed, free = SHEETS * 3 * height * width, free_memory(torch.device("cpu"))
    if free is not None and needed > free:
        room = f"{needed / 1e9:.3g} GB of memory, and {free / 1e9:.3g} GB are free"
        raise UserError(f"--out {path} takes {room}, for {width} x {height} pixels: choose {instead}")
    try:  # a format's limits are of a side
        _try_to_save(path, width, 1)
        _try_to_save(path, 1, height)
    except (OSError, ValueError, OverflowError) as error:
        too_large = f"--out {path} cannot hold {width} x {height} pixels, which all pictures together have"
        raise UserError(f"{too_large}: choose .png, or {instead}") from error
    make_folder(os.path.dirname(path) or ".", "--out's folder")
    if not can_write(path):
        raise UserError(f"--out must name a file that can be written, got {path}")


def _try_to_save(path, width, height):
    from PIL import Image

    memory = io.BytesIO()
    memory.name = path  # whose ending says the format
    Image.new("RGB", (width, height)).save(memory)


def write(rows, path, texts=None) -> None:
    """Write pictures: rows of arrays (N, S, S, 3) uint8. One alone keeps its size; of several small ones are enlarged.

    Args:
        texts: see `save_picture`.

    Raises:
        UserError: it cannot be written.
    """
    from dalle_fast.pictures import picture_grid, save_picture

    picture = rows[0][0] if len(rows) == len(rows[0]) == 1 else picture_grid(rows)
    try:
        save_picture(picture, path, texts)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {error}") from error
