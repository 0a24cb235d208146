"""Show what a trained discrete VAE makes of pictures: originals above reconstructions."""

from __future__ import annotations

from dalle_fast.commands import drawing, training
from dalle_fast.errors import UserError

BATCH = 64  # pictures that go through the model at once


def add_arguments(parser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files")
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of a run of train-dvae")
    parser.add_argument("--out", required=True, metavar="FILE.png", help="picture to write")
    training.add_device_argument(parser)


def run(arguments) -> int:
    from dalle_fast.checkpoint import load_model
    from dalle_fast.nn.memory import is_out_of_memory

    device = training.device(arguments.device)
    try:
        model = load_model(arguments.model, kind="DiscreteVAE", device=device)
        drawing.check_channels(model, arguments.model)
        drawing.check_out(arguments.out, 2, len(arguments.images), model.config.image_size, "fewer pictures")
        drawing.write(reconstructions(model, arguments.images), arguments.out)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"reconstructing {len(arguments.images)} pictures ran out of memory: {error}") from error
    print(arguments.out)
    return 0


def reconstructions(model, paths):
    """Pictures from files, cropped to a square of the model's size, and their reconstructions.

    Returns:
        Two rows (N, S, S, 3) uint8.

    Raises:
        UserError: a file that cannot be read as a picture, or one smaller than the model's.
    """
    import numpy as np

    from dalle_fast.pictures import to_uint8

    originals = np.stack([drawing.read_square(path, model.config) for path in paths])  # what is wrong is told first
    parts = (originals[first : first + BATCH] for first in range(0, len(originals), BATCH))
    drawn = [to_uint8(model.reconstruct(drawing.images_for(model, part))) for part in parts]
    return [originals, np.concatenate(drawn)]
