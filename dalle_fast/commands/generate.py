"""Draw pictures of captions, or complete a picture.

They go into one picture, or into a folder, which must not hold pictures of an earlier run.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import json
import os
import re
import sys
import traceback
from pathlib import Path

import dalle_fast
from dalle_fast.commands import drawing, training
from dalle_fast.errors import UserError

COLUMNS = 8  # of a sheet: more pictures of a caption go on in another row
TABLE = "metadata.csv"  # with a column file_name, as tools expect beside a folder's pictures
DRAWN = re.compile(r"\d{4,}-\d{4,}\.png")
KEPT = ("temperature", "top_k", "top_p", "guidance", "best_of", "score", "truncate")  # in a PNG file


def add_arguments(parser) -> None:
    what = parser.add_argument_group("what is drawn")
    what.add_argument("caption", nargs="*", help="a caption, in quotes; several: rows of pictures for each")
    what.add_argument("--captions", metavar="FILE", help="more captions, one a line")
    what.add_argument("--num-images", type=int, default=1, metavar="N", help="pictures of each caption")
    out = (
        f"a picture of all, {COLUMNS} in a row at most; or a folder (one that is there, or PATH/), for a file of each "
        f"as soon as its caption is done, and {TABLE}"
    )
    what.add_argument("--out", required=True, metavar="PATH", help=out)
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
    training.add_precision_argument(who)
    who.add_argument("--batch-size", type=int, default=64, metavar="N", help="pictures at once, at most")
    how = parser.add_argument_group("how")
    how.add_argument("--temperature", type=float, default=1.0, metavar="X", help="0 takes the most likely codes")
    how.add_argument("--top-k", type=int, metavar="K", help="sample among the K most likely codes")
    how.add_argument("--top-p", type=float, metavar="P", help="sample among those whose probabilities add up to P")
    guidance = "above 1: closer to the caption, at twice the work, by a model trained with --caption-dropout above 0"
    how.add_argument("--guidance", type=float, metavar="X", help=guidance)
    how.add_argument(
        "--seed", type=int, metavar="N", help="from 0 to 2^20 - 1 (default: another one each time, which is told)"
    )
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
    try:
        _draw(arguments, captions, score, training.device(arguments.device))
    except sampling.DoesNotFit as error:
        flags = {"batch_size": "--batch-size", "num_images": "--best-of" if arguments.best_of else "--num-images"}
        raise UserError(error.worded(f"{flags.get(error.argument)} {error.fits}")) from error
    except (ValueError, TypeError, RuntimeError, MemoryError) as error:
        if isinstance(error, (RuntimeError, MemoryError)) and not is_out_of_memory(error):
            raise
        raise UserError(str(error)) from error
    return 0


def _draw(arguments, captions, score, device):
    from dalle_fast import sampling
    from dalle_fast.nn import generation
    from dalle_fast.progress import on_terminal, tell
    from dalle_fast.training.precision import precision_on

    precision = precision_on(device, arguments.precision)
    dalle, dvae, tokenizer = sampling.load(arguments.model, dvae=arguments.dvae, device=device, precision=precision)
    drawing.check_channels(dvae, arguments.dvae or arguments.model)
    codes = None if arguments.complete is None else _first_rows(dvae, arguments, len(captions))
    with _checked_out(arguments.out, len(captions), arguments.num_images, dvae.config.image_size):
        if arguments.guidance not in (None, 1) and dalle.trained_with.get("caption_dropout") == 0:
            never = f"the model in {arguments.model} never saw: it was trained with --caption-dropout 0"
            warning = (
                f"warning: --guidance {arguments.guidance:g} leads away from pictures without a caption, which {never}"
            )
            tell(warning)
        seed = generation.random_seed()[0] if arguments.seed is None else arguments.seed
        drawn = sampling.draw_each(
            dalle,
            dvae,
            tokenizer,
            captions,
            num_images=arguments.best_of or arguments.num_images,
            score=score,
            keep=arguments.num_images if arguments.best_of else None,
            batch_size=arguments.batch_size,
            truncate=arguments.truncate,
            codes=codes,
            seed=seed,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            guidance=arguments.guidance,
            progress=on_terminal(),
        )
        if arguments.seed is None:
            tell(f"seed {seed}")
        options = {name: getattr(arguments, name) for name in KEPT} | {"precision": precision}
        if codes is not None:
            options |= {"complete": os.path.basename(arguments.complete), "keep_rows": codes.shape[1]}
        about = {"seed": seed, **{name: value for name, value in options.items() if value is not None}}
        out = (_Folder if _is_folder(arguments.out) else _Sheet)(arguments.out, about)
        try:
            for caption in captions:
                out.add(caption, next(drawn))  # under no name, that none are kept while the next ones are made
        finally:  # also of what the user's own score raises, and of Ctrl-C
            out.end()
            if 0 < out.done < len(captions):
                tell(f"stopped after {out.done} of {len(captions)} captions, whose pictures are written")


class _Folder:
    """A file of each picture, written as it comes, and a table of them. done: captions whose pictures are all there."""

    def __init__(self, path, about):
        self.path, self.about, self.done = path, about, 0

    def add(self, caption, drawn):
        for place, picture in enumerate(_pixels(drawn)):
            name, number = f"{self.done:04d}-{place:04d}.png", drawn.numbers[place]
            path = os.path.join(self.path, name)
            drawing.write([[picture]], path, _texts([caption], {**self.about, "number": number}))
            self._add_line(name, caption, self.about["seed"], number, drawn.scores[place] if drawn.scores else "")
            print(path)
        self.done += 1

    def _add_line(self, *fields):
        """At once: what ends the run among the pictures of a caption leaves each with its line."""
        path = os.path.join(self.path, TABLE)
        try:
            with open(path, "a", newline="", encoding="utf-8") as file:
                table = csv.writer(file)
                if file.tell() == 0:
                    table.writerow(("file_name", "caption", "seed", "number", "score"))
                table.writerow(fields)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error}") from error

    def end(self):
        """All is written."""


class _Sheet:
    """One picture, written at the end, of what is there then. done: captions whose pictures are all there."""

    def __init__(self, path, about):
        self.path, self.about, self.captions, self.rows = path, about, [], []

    @property
    def done(self):
        return len(self.captions)

    def add(self, caption, drawn):
        pictures = _pixels(drawn)
        if self.done == 0 and len(pictures) == 1:
            self.first = drawn.numbers[0]
        self.captions.append(caption)
        self.rows += [pictures[first : first + COLUMNS] for first in range(0, len(pictures), COLUMNS)]

    def end(self):
        if self.rows:
            alone = {"number": self.first} if len(self.rows) == len(self.rows[0]) == 1 else {}
            drawing.write(self.rows, self.path, _texts(self.captions, {**self.about, **alone}))
            print(self.path)


def _pixels(drawn):
    from dalle_fast.pictures import to_uint8

    return to_uint8(drawn.images)


def _texts(captions, about):
    """What draws the picture again, under the keywords that PNG's standard has for it."""
    return {
        "Description": "\n".join(captions),
        "Software": f"dalle_fast {dalle_fast.__version__}",
        "Comment": json.dumps(about),
    }


def _is_folder(path) -> bool:
    return os.path.isdir(path) or str(path).endswith(os.sep)


@contextlib.contextmanager
def _checked_out(path, captions, num_images, size):
    """Refuse what could not be written now, not when all is drawn; a folder is this run's own until it is left."""
    from dalle_fast.outputs import held, make_folder

    if not _is_folder(path):
        rows = captions * -(-num_images // COLUMNS)
        drawing.check_out(path, rows, min(num_images, COLUMNS), size, "a folder for a file of each")
        yield
        return
    make_folder(path, "--out")
    with held(path, "--out"):  # before a look at what is there
        if found := sorted(name for name in os.listdir(path) if name == TABLE or DRAWN.fullmatch(name)):
            raise UserError(f"--out {path} holds pictures of another run ({found[0]}): choose another folder")
        yield


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
    rows = dvae.config.grid // 2 if arguments.keep_rows is None else arguments.keep_rows
    if not 1 <= rows < dvae.config.grid:
        raise UserError(
            f"--keep-rows must be from 1 to {dvae.config.grid - 1}, as there are {dvae.config.grid} rows, got {rows}"
        )
    picture = drawing.read_square(arguments.complete, dvae.config)
    return dvae.encode(drawing.images_for(dvae, picture[None]))[:, :rows].repeat(count, 1, 1)
