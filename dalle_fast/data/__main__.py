"""`python -m dalle_fast.data SOURCE --out FILE.png`: a sheet of a source's pictures with their captions."""

from __future__ import annotations

import argparse
import sys
import textwrap

import numpy as np

from dalle_fast.data.crops import centre_crop
from dalle_fast.data.images import left_out
from dalle_fast.data.source import open_source
from dalle_fast.outputs import written_whole
from dalle_fast.pictures import Layout

MARGIN = 10
LINE = 15  # pixels from one line of text to the next
LETTER = 6.2  # pixels of an average letter


def contact_sheet(examples, *, columns: int, scale: int):
    """Pictures with their captions below them.

    Args:
        examples: of pictures of one size.
        columns: pictures in a row.
        scale: pixels of the sheet for one of a picture.

    Returns:
        A `PIL.Image.Image`.
    """
    from PIL import Image, ImageDraw, ImageFont

    side = scale * examples[0].image.shape[0]
    texts = [textwrap.wrap(example.caption, max(1, int(side / LETTER))) for example in examples]
    below = LINE * max(len(text) for text in texts) + 4
    layout = Layout(-(-len(examples) // columns), columns, side + below, side, MARGIN)
    sheet = Image.new("RGB", layout.size[::-1], "#dde3ea")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, (example, text) in enumerate(zip(examples, texts)):
        top, left = layout.corner(*divmod(number, columns))
        sheet.paste(Image.fromarray(example.image).resize((side, side), Image.Resampling.NEAREST), (left, top))
        for line, words in enumerate(text):
            draw.text((left, top + side + 3 + LINE * line), words, fill="#202020", font=font)
    return sheet


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dalle_fast.data", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("source", help="shapes, emoji, stamps, a folder or tar shards")
    parser.add_argument("--out", required=True, metavar="FILE.png", help="where to save the sheet")
    parser.add_argument("--split", default="train", help="train or validation; of shapes also heldout")
    parser.add_argument("--image-size", type=int, default=32, help="pixels of a side")
    parser.add_argument("--count", type=int, default=12, help="how many pictures")
    parser.add_argument("--columns", type=int, default=6, help="pictures in a row")
    parser.add_argument("--scale", type=int, default=4, help="pixels of the sheet for one of a picture")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if min(arguments.count, arguments.columns, arguments.scale) < 1:
        parser.error("--count, --columns and --scale must be at least 1")
    try:
        size = arguments.image_size
        source = open_source(arguments.source, image_size=size, split=arguments.split, seed=arguments.seed)
        for line in left_out(source):
            print(line, file=sys.stderr)
        examples = [source[index] for index in range(min(arguments.count, len(source)))]
    except (ValueError, ImportError) as error:
        print(f"python -m dalle_fast.data: {error}", file=sys.stderr)
        return 1
    examples = [example._replace(image=np.ascontiguousarray(centre_crop(example.image, size))) for example in examples]
    sheet = contact_sheet(examples, columns=arguments.columns, scale=arguments.scale)
    try:
        with written_whole(arguments.out) as unfinished:
            sheet.save(unfinished)
    except (KeyError, OSError, ValueError) as error:  # KeyError: of formats that Pillow only reads
        print(f"python -m dalle_fast.data: cannot write {arguments.out}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
