"""Make OpenAI's published discrete VAE a model for train-dalle and reconstruct.

Its files, encoder.pkl and decoder.pkl, are read for their weights alone: no code in them runs. State dicts of the same
names do as well, as .safetensors or .pt.
"""

from __future__ import annotations

from dalle_fast.errors import UserError


def add_arguments(parser) -> None:
    parser.add_argument("encoder", metavar="ENCODER", help="file of the encoder")
    parser.add_argument("decoder", metavar="DECODER", help="file of the decoder")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the model: what --dvae and --model take")
    parser.add_argument(
        "--image-size", type=int, default=256, metavar="N", help="pixels of a side of the pictures it will be used for"
    )


def run(arguments) -> int:
    from pathlib import Path

    from dalle_fast import checkpoint, convert
    from dalle_fast.outputs import make_folder

    out = Path(arguments.out)
    if (out / checkpoint.MODEL).exists() or checkpoint.latest(out / checkpoint.CHECKPOINTS):
        raise UserError(f"{out} holds a model already: choose another folder")
    weights = [_read(path) for path in (arguments.encoder, arguments.decoder)]
    try:
        model = convert.openai_dvae(*weights, image_size=arguments.image_size)
    except ValueError as error:
        raise UserError(f"{arguments.encoder}, {arguments.decoder}: {error}") from error
    make_folder(out, "the folder of the model")
    checkpoint.export(out / checkpoint.MODEL, model)
    config = model.config
    print(
        f"{out / checkpoint.MODEL}: {config.num_codes} codes, {config.grid} x {config.grid} of them for "
        f"{config.image_size} x {config.image_size} pixels"
    )
    return 0


def _read(path):
    from dalle_fast.convert import read_openai

    try:
        return read_openai(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
