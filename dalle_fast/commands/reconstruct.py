"""Show what a trained discrete VAE makes of pictures: originals above reconstructions."""

from __future__ import annotations

from dalle_fast.commands import training
from dalle_fast.errors import UserError


def add_arguments(parser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files")
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of a run of train-dvae")
    parser.add_argument("--out", required=True, metavar="FILE.png", help="picture to write")
    training.add_device_argument(parser)


def run(arguments) -> int:
    from dalle_fast.checkpoint import load_model
    from dalle_fast.pictures import save_picture

    model = load_model(arguments.model, kind="DiscreteVAE", device=training.device(arguments.device))
    picture = reconstructions(model, arguments.images)
    try:
        save_picture(picture, arguments.out)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {arguments.out}: {error}") from error
    print(arguments.out)
    return 0


def reconstructions(model, paths):
    """Pictures from files, cropped to a square of the model's size, above their reconstructions.

    Returns:
        (height, width, 3) uint8.

    Raises:
        UserError: a file that cannot be read as a picture, or one smaller than the model's.
    """
    import numpy as np
    import torch

    from dalle_fast.pictures import picture_grid, to_uint8

    originals = torch.from_numpy(np.stack([read_square(path, model.config.image_size) for path in paths]))
    device = next(model.parameters()).device
    pixels = originals.movedim(-1, 1).to(device).float() / 255
    return picture_grid([originals.numpy(), to_uint8(model.reconstruct(pixels))])


def read_square(path, size):
    """The middle square of the picture in a file, resized: (size, size, 3) uint8.

    Raises:
        UserError: it cannot be read as a picture, or is smaller.
    """
    from dalle_fast.data.crops import centre_crop
    from dalle_fast.data.images import BadImage, decode, read_file

    try:
        return centre_crop(decode(read_file(path), draft=size), size)
    except (BadImage, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
