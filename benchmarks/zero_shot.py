"""How often a model draws what a caption of `shapes` says, also captions whose combination of words it has never seen.

python benchmarks/zero_shot.py --model DIR

DIR is a run of `dalle-fast train-dalle --data shapes`. Every picture is read back from its pixels by the data's own
checker, which names all five attributes or says that there is no such scene; all five must be the caption's. Beside it:

    control     the same pictures, each against the caption of another, drawn at random: about one in all captions
    real        real pictures of the same captions after the discrete VAE, the most that the transformer can reach
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time

import flags
import numpy as np
import reporting
import torch

from dalle_fast import sampling
from dalle_fast.checkpoint import write_json
from dalle_fast.commands import training
from dalle_fast.commands.drawing import write
from dalle_fast.data.shapes import Shapes, caption_of_scene, read_captions, scene_of_caption
from dalle_fast.errors import UserError
from dalle_fast.nn import functional as F
from dalle_fast.nn.generation import Sampling
from dalle_fast.pictures import to_uint8

SPLITS = {"heldout": "held out", "train": "seen"}
TARGETS = {"heldout": 0.80, "train": 0.95}
PICTURE_ROWS, PICTURE_COLUMNS = 6, 6
BATCH = 64


@dataclasses.dataclass
class Drawn:
    """Pictures (N, S, S, 3) uint8 of N captions, and the captions that were read from them."""

    pictures: np.ndarray
    captions: list[str]
    read: list[str | None]

    def right(self, captions=None) -> float:
        """The share of pictures from which their caption was read, or another one."""
        pairs = zip(self.read, self.captions if captions is None else captions, strict=True)
        return float(np.mean([read == caption for read, caption in pairs]))

    def interval(self) -> tuple[float, float]:
        """The 95% interval of `right`, also of other captions: pictures of one caption are right or wrong together, so that
        they count as fewer where captions differ by more than chance."""
        _, caption = np.unique(self.captions, return_inverse=True)
        right = np.array([a == b for a, b in zip(self.read, self.captions, strict=True)])
        variance = np.var(np.bincount(caption, right) / np.bincount(caption)) / (caption.max() + 1)
        share = right.mean()
        return wilson(share, min(len(right), share * (1 - share) / variance) if variance else len(right))

    def attributes(self) -> dict[str, float]:
        """The share of pictures in which each attribute is right."""
        scenes = [
            (scene_of_caption(c), r and scene_of_caption(r)) for c, r in zip(self.captions, self.read, strict=True)
        ]
        names = [field.name for field in dataclasses.fields(scenes[0][0])]
        return {n: float(np.mean([bool(r) and getattr(r, n) == getattr(c, n) for c, r in scenes])) for n in names}


def captions_of(source, num: int) -> tuple[list[str], int]:
    """Captions of a source's scenes and pictures of each, at least `num` pictures in all."""
    captions = [caption_of_scene(scene) for scene in source.scenes][:num]
    return captions, math.ceil(num / len(captions))


def draw(parts, source, num: int, sampling_options: dict) -> Drawn:
    """Generated pictures of a source's captions."""
    captions, num_images = captions_of(source, num)
    drawn = sampling.draw(*parts, captions, num_images=num_images, batch_size=BATCH, **sampling_options)
    pictures = to_uint8(drawn.flatten(0, 1))
    return Drawn(pictures, [caption for caption in captions for _ in range(num_images)], read_captions(pictures))


@torch.no_grad()
def reconstruct(dvae, source, num: int) -> Drawn:
    """Real pictures of a source's scenes after the discrete VAE."""
    examples = [source[index] for index in range(min(num, len(source)))]
    pixels = torch.from_numpy(np.stack([image for image, _ in examples])).movedim(-1, 1)
    device = next(dvae.parameters()).device
    pictures = np.concatenate(
        [to_uint8(dvae.reconstruct(some.to(device).float() / 255)) for some in pixels.split(BATCH)]
    )
    return Drawn(pictures, [caption for _, caption in examples], read_captions(pictures))


def measure(parts, split: str, num: int, sampling_options: dict, seed: int) -> tuple[dict, Drawn]:
    """All that is said of a split."""
    dvae = parts[1]
    source = Shapes(dvae.config.image_size, split=split, seed=seed)
    began = time.perf_counter()
    drawn = draw(parts, source, num, sampling_options)
    seconds = time.perf_counter() - began
    others = [drawn.captions[index] for index in np.random.default_rng(seed).permutation(len(drawn.captions))]
    return {
        "pictures": len(drawn.captions),
        "captions": len(source.scenes),
        "right": drawn.right(),
        "interval": drawn.interval(),
        "target": TARGETS[split],
        "control": drawn.right(others),
        "chance": 1 / len(set(drawn.captions)),
        "real": reconstruct(dvae, source, num).right(),
        "attributes": drawn.attributes(),
        "seconds": seconds,
    }, drawn


def wilson(share: float, count: float, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share that was seen in `count` trials."""
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return middle - half, middle + half


def as_table(results: dict) -> str:
    header = ["captions", "pictures", "drawn right", "95% interval", "control", "chance", "real, after the VAE"]
    names = list(next(iter(results.values()))["attributes"])
    rows = []
    for split, r in results.items():
        low, high = r["interval"]
        cells = [SPLITS[split], f"{r['pictures']:,}", f"{r['right']:.1%}", f"{low:.1%} to {high:.1%}"]
        cells += [f"{r[name]:.1%}" for name in ("control", "chance", "real")]
        rows.append(cells + [f"{r['attributes'][name]:.1%}" for name in names])
    return reporting.table(header + names, rows, markdown=True)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], formatter_class=flags.HelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="a run of train-dalle on shapes")
    parser.add_argument(
        "--num", type=flags.integer(1), default=648, metavar="N", help="pictures of each kind, at least"
    )
    parser.add_argument("--temperature", type=float, default=1.0, metavar="X", help="of sampling")
    parser.add_argument("--top-p", type=float, metavar="P", help="of sampling")
    parser.add_argument("--guidance", type=float, metavar="X", help="of sampling")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling")
    parser.add_argument("--device", default=flags.best_device(), help="cpu, cuda or cuda:N")
    parser.add_argument("--json", type=flags.output_file(".json"), metavar="FILE", help="write the numbers there")
    parser.add_argument(
        "--picture",
        type=flags.output_file(".png"),
        metavar="FILE",
        help="draw first pictures of held-out captions there",
    )
    args = parser.parse_args(argv)
    try:
        args.device = training.device(args.device)
        Sampling(args.temperature, top_p=args.top_p, guidance=args.guidance).check(num_codes=0)  # of top_k alone
        F.noise_seed(args.seed)
    except (UserError, ValueError, TypeError) as error:
        parser.error(str(error))
    return args


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    try:
        parts = sampling.load(args.model, device=args.device)
    except UserError as error:
        raise SystemExit(f"zero_shot.py: error: {error}") from error
    options = {name: getattr(args, name) for name in ("temperature", "top_p", "guidance", "seed")}
    measured = {split: measure(parts, split, args.num, options, args.seed) for split in SPLITS}
    results = {split: result for split, (result, _) in measured.items()}
    print(as_table(results))
    for split, result in results.items():
        reached = "reached" if result["right"] >= result["target"] else "MISSED"
        print(f"{SPLITS[split]}: {result['right']:.1%} right, at least {result['target']:.0%} wanted: {reached}")
    if args.json:
        report = {"sampling": options, "config": dataclasses.asdict(parts[0].config), "results": results}
        write_json(
            args.json, {**reporting.describe_run("zero_shot", argv, ("--json", "--picture", "--model")), **report}
        )
    if args.picture:
        heldout = measured["heldout"][1]
        of_each = heldout.captions.count(heldout.captions[0])
        firsts = range(0, min(PICTURE_ROWS * of_each, len(heldout.pictures)), of_each)
        write([heldout.pictures[first : first + of_each][:PICTURE_COLUMNS] for first in firsts], args.picture)
    return 0 if all(result["right"] >= result["target"] for result in results.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
