"""Draw pictures of captions, or complete a picture."""

from __future__ import annotations

import importlib
import io
import os
import sys
import traceback
from pathlib import Path

from dalle_fast.commands import training
from dalle_fast.commands.reconstruct import read_square
from dalle_fast.commands.train_dalle import DVAE, TOKENIZER
from dalle_fast.errors import UserError


def add_arguments(parser) -> None:
    what = parser.add_argument_group("what is drawn")
    what.add_argument("caption", nargs="*", help="a caption, in quotes; several: a row of pictures for each")
    what.add_argument("--captions", metavar="FILE", help="more captions, one a line")
    what.add_argument("--num-images", type=int, default=1, metavar="N", help="pictures of each caption")
    what.add_argument("--out", required=True, metavar="PATH", help="a picture of all; or a folder, for a file of each")
    what.add_argument(
        "--complete",
        metavar="IMAGE",
        help="draw what is missing below the first rows of this picture, cropped to its middle square",
    )
    what.add_argument("--keep-rows", type=int, metavar="N", help="rows of codes that are kept of it (default: half)")
    who = parser.add_argument_group("who draws")
    who.add_argument("--model", required=True, metavar="DIR", help="folder of a run of train-dalle")
    who.add_argument("--dvae", metavar="DIR", help="folder of another run of train-dvae (default: the model's own)")
    training.add_device_argument(who)
    who.add_argument("--batch-size", type=int, default=64, metavar="N", help="pictures at once, at most")
    how = parser.add_argument_group("how")
    how.add_argument("--temperature", type=float, default=1.0, metavar="X", help="0 takes the most likely codes")
    how.add_argument("--top-k", type=int, metavar="K", help="sample among the K most likely codes")
    how.add_argument("--top-p", type=float, metavar="P", help="sample among those whose probabilities add up to P")
    guidance = "above 1: closer to the caption, at twice the work, by a model trained with --caption-dropout above 0"
    how.add_argument("--guidance", type=float, metavar="X", help=guidance)
    how.add_argument("--seed", type=int, metavar="N", help="from 0 to 2^20 - 1 (default: another one each time)")
    how.add_argument("--best-of", type=int, metavar="M", help="draw M of each caption and keep the best --num-images")
    how.add_argument(
        "--score",
        metavar="MODULE:FUNCTION",
        help="what is best: called with pictures (M, 3, H, W) from 0 to 1 and their caption, returns M numbers",
    )
    how.add_argument("--truncate", action="store_true", help="cut captions that are too long, instead of refusing them")
    parser.epilog = "--complete with --keep-rows gives the model the top of a picture; without captions it has none."


def run(arguments) -> int:
    from dalle_fast import sampling
    from dalle_fast.nn.memory import is_out_of_memory
    from dalle_fast.training.stage1 import to_uint8

    captions = _captions(arguments)
    if arguments.num_images < 1:
        raise UserError(f"--num-images must be at least 1, got {arguments.num_images}")
    if (arguments.best_of is None) != (arguments.score is None):
        raise UserError("--best-of and --score must be given together: how many are drawn, and what is best")
    if arguments.best_of is not None and arguments.best_of < 1:
        raise UserError(f"--best-of must be at least 1, got {arguments.best_of}")
    if arguments.best_of is not None and arguments.num_images > arguments.best_of:
        flags = f"--num-images must be at most --best-of {arguments.best_of}, as that many are drawn"
        raise UserError(f"{flags}, got {arguments.num_images}")
    if arguments.keep_rows is not None and arguments.complete is None:
        raise UserError("--keep-rows needs --complete, the picture whose rows are kept")
    score = None if arguments.score is None else _function(arguments.score)
    device = training.device(arguments.device)
    try:
        dalle, dvae, tokenizer = load_parts(arguments.model, dvae=arguments.dvae, device=device)
        codes = None if arguments.complete is None else _first_rows(dvae, arguments, len(captions))
        _check_out(arguments.out)
        if arguments.guidance not in (None, 1) and dalle.trained_with.get("caption_dropout") == 0:
            never = f"the model in {arguments.model} never saw: it was trained with --caption-dropout 0"
            warning = (
                f"warning: --guidance {arguments.guidance:g} leads away from pictures without a caption, which {never}"
            )
            print(warning, file=sys.stderr)
        drawn = sampling.draw(
            dalle,
            dvae,
            tokenizer,
            captions,
            num_images=arguments.best_of or arguments.num_images,
            score=score,
            keep=arguments.num_images,
            batch_size=arguments.batch_size,
            truncate=arguments.truncate,
            codes=codes,
            seed=arguments.seed,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            guidance=arguments.guidance,
            progress=sys.stderr.isatty(),
        )
    except (ValueError, TypeError, RuntimeError, MemoryError) as error:
        if isinstance(error, (RuntimeError, MemoryError)) and not is_out_of_memory(error):
            raise
        raise UserError(str(error)) from error
    for path in write([to_uint8(row) for row in drawn], arguments.out):
        print(path)
    return 0


def load_parts(folder, *, dvae=None, device="cpu"):
    """What draws: the `DALLE`, the `DiscreteVAE` and the `Tokenizer` of a run of train-dalle, finished or not.

    Args:
        dvae: folder of another VAE than the run's own.

    Raises:
        UserError: one of them is not there, or they do not fit each other.
    """
    from dalle_fast import checkpoint, sampling
    from dalle_fast.data.text import Tokenizer

    folder = Path(folder)
    dalle = checkpoint.load_model(folder, kind="DALLE", device=device)
    own = dvae is None
    if own and not (folder / DVAE).is_dir():
        raise UserError(f"{folder} has no folder {DVAE!r} with a discrete VAE: name one with --dvae")
    dvae = checkpoint.load_model(folder / DVAE if own else dvae, kind="DiscreteVAE", device=device)
    try:
        tokenizer = Tokenizer.load(folder / TOKENIZER)
        sampling.check_fit(dalle, dvae, tokenizer)
    except (ValueError, OSError) as error:
        raise UserError(f"{folder}: {error}") from error
    return dalle, dvae, tokenizer


def write(rows, path) -> list[str]:
    """Write pictures: rows of arrays (N, S, S, 3) uint8. A folder, or a path that ends like one, gets a file of each.

    A picture alone keeps its size; several become one picture, in which small ones are enlarged.

    Returns:
        The paths.
    """
    from PIL import Image

    from dalle_fast.outputs import written_whole
    from dalle_fast.pictures import picture_grid

    if _is_folder(path):
        pictures = {
            os.path.join(path, f"{row:04d}-{number:04d}.png"): picture
            for row, of_caption in enumerate(rows)
            for number, picture in enumerate(of_caption)
        }
    else:
        pictures = {str(path): rows[0][0] if len(rows) == len(rows[0]) == 1 else picture_grid(rows)}
    for name, picture in pictures.items():
        try:
            os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
            with written_whole(name) as unfinished:
                Image.fromarray(picture).save(unfinished)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write {name}: {error}") from error
    return list(pictures)


def _is_folder(path) -> bool:
    return os.path.isdir(path) or str(path).endswith(os.sep)


def _check_out(path) -> None:
    """Refuse what `write` could not write now, not when all is drawn. It makes folders, but leaves no file."""
    from PIL import Image

    from dalle_fast.outputs import can_write, make_folder

    if _is_folder(path):
        make_folder(path, "--out")
        return
    memory = io.BytesIO()
    memory.name = path  # whose ending says the format
    try:
        Image.new("RGB", (1, 1)).save(memory)
    except (KeyError, OSError, ValueError) as error:  # KeyError: of formats that Pillow only reads
        raise UserError(f"--out must end as a colour picture that Pillow writes, as .png does, got {path}") from error
    make_folder(os.path.dirname(path) or ".", "--out's folder")
    if not can_write(path):
        raise UserError(f"--out must name a file that can be written, got {path}")


def _captions(arguments) -> list[str]:
    captions = list(arguments.caption)
    if arguments.captions is not None:
        try:
            # Not splitlines(), which ends lines at U+2028 and others too: read as text, \n stands for \r\n and \r.
            lines = Path(arguments.captions).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read captions from {arguments.captions}: {error}") from error
        captions += [line.strip() for line in lines if line.strip()]
    if not captions and arguments.complete is not None:
        return [""]
    if not captions:
        raise UserError("a caption is needed, as an argument or from --captions FILE with one a line")
    return captions


def _function(name):
    module_name, _, function = name.partition(":")
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise UserError(f"--score must be MODULE:FUNCTION, the module as `import` takes it, got {name}")
    if os.getcwd() not in sys.path:  # as `python -m` does; it stays, for what the function imports when it is called
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's own code; a script may end the process
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"--score {name}: cannot import {module_name}: {what}{_where(error)}") from error
    try:
        found = getattr(module, function)
    except AttributeError as error:
        raise UserError(f"--score {name} must be MODULE:FUNCTION: {error}") from error
    if not callable(found):
        raise UserError(f"--score {name} must be a function, got {type(found).__name__}")

    def score(images, caption):
        try:
            return found(images, caption)
        except Exception as error:  # the user's own code: what is needed is where
            traceback.print_exception(type(error), error, error.__traceback__.tb_next)
            raise UserError(f"--score {name} failed: {type(error).__name__}: {error}") from error

    return score


def _where(error):
    """File and line that raised it while it was imported, or nothing where that is not in an imported file."""
    if isinstance(error, SyntaxError):
        return ""  # says them itself
    ours = (__file__, importlib.__file__)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename not in ours]
    frames = [frame for frame in frames if not frame.filename.startswith("<frozen ")]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def _first_rows(dvae, arguments, count):
    """The codes (count, rows, w) of the first rows of the picture to complete, of its middle square."""
    import torch

    size, rows = dvae.config.image_size, arguments.keep_rows
    rows = dvae.config.grid // 2 if rows is None else rows
    if not 1 <= rows < dvae.config.grid:
        raise UserError(
            f"--keep-rows must be from 1 to {dvae.config.grid - 1}, as there are {dvae.config.grid} rows, got {rows}"
        )
    pixels = read_square(arguments.complete, size)
    device = next(dvae.parameters()).device
    images = torch.from_numpy(pixels).movedim(-1, 0)[None].to(device).float() / 255
    return dvae.encode(images)[:, :rows].repeat(count, 1, 1)
