"""Drawing images with the cache of this package, with a dense one, and without: images per second and bytes of cache.

    python benchmarks/generate_bench.py                        one caption, the best device here
    python benchmarks/generate_bench.py --quick                fewer rounds, and no compiled peer
    python benchmarks/generate_bench.py --preset tiny --batch 8

All contenders are the same `DALLE` with the same weights, and draw the next code in the same way. Peers are plain torch
but for that. They differ in what they keep: this package's `KVCache`, with its decode attention, its linear layers of few
rows and, on a CPU, its one native call for all blocks; a dense static cache of all positions for every sample, SDPA and torch's linear layers; or nothing, so that
every step runs the whole model over all tokens so far.

A whole image takes minutes on a CPU. What is timed is one step at each of two positions, 21% and 79% through the image:
the points of Gauss's rule, whose mean is that of all steps where the time of a step grows like any cubic polynomial of
its position. Images per second are batch / (steps of an image * that mean + the caption's pass through the model).
Before them each contender takes the same steps untimed, as the contenders run in turns, and an image's steps do not.

Each contender's results at these positions are held against the whole model in float64: the command fails where this
package errs more than twice as much as the eager reference in the same dtype, plus rounding.

B batch (images of one caption), T text positions, G image tokens, S = 1 + T + G positions, H heads, D head size.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import math
import statistics
import sys
import time

import exactness
import flags
import harness
import measuring
import reporting
import torch
from flags import DTYPES, FORWARD, OURS
from harness import Contender

import dalle_fast.nn.functional as F
from dalle_fast.nn.dalle import DALLE, PRESETS, DALLEConfig
from dalle_fast.nn.kv_cache import KVCache
from dalle_fast.nn.transformer import Linear

NAME = "generation"
SECONDS, MIN_ROUNDS = 4.0, 5
PEERS = ("dense cache", "no cache")  # the order of the ratio columns
GAUSS = (0.5 - math.sqrt(1 / 12), 0.5 + math.sqrt(1 / 12))  # of the interval from 0 to 1
COPIED_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
WARM_STEPS = 3  # on a GPU, before a step is captured in a CUDA graph


# -- cases -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the results: what is drawn."""

    config: DALLEConfig
    batch: int
    dtype: str
    pass_: str = FORWARD

    @property
    def name(self) -> str:
        return f"batch {self.batch}, {self.dtype}"

    @property
    def sizes(self) -> str:
        c = self.config
        rows, columns = c.grid
        return (
            f"{c.layers} layers of width {c.width}, {c.num_heads} heads of {c.head_dim}, text {c.text_len}, "
            f"grid {rows}x{columns}, {c.num_codes} codes"
        )

    @property
    def positions(self) -> tuple[int, ...]:
        """Of the tokens that the timed steps put through the model; every step draws the next one."""
        return tuple(int(point * (self.config.image_len - 1)) for point in GAUSS)

    @property
    def dense_bytes(self) -> int:
        """Of the dense cache."""
        c = self.config
        width = torch.empty((), dtype=DTYPES[self.dtype]).element_size()
        return 2 * c.layers * self.batch * c.num_heads * c.masks[0].seq_len * c.head_dim * width

    def small(self) -> Case:
        """The same model on a few tokens."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, text_len=8, grid=4))


def make_cases(args) -> list[Case]:
    """Every dtype with every batch."""
    changes = {name: getattr(args, name) for name in ("text_len", "grid", "layers") if getattr(args, name)}
    config = dataclasses.replace(PRESETS[args.preset], **changes)
    dtypes = args.dtype or ["bfloat16" if args.device == "cuda" else "float32"]
    batches = args.batch or ((1, 8, 64) if args.device == "cuda" else (1, 8))
    return [Case(config, batch, dtype) for dtype in dtypes for batch in batches]


# -- contenders --------------------------------------------------------------------------------------------------------


class DenseCache:
    """Keys and values of all positions for every sample, read by SDPA: a `KVCache` as others write it.

    With `whole` SDPA reads the whole cache under a mask, as CUDA graphs and compilers want it; else what is filled.
    """

    def __init__(self, config, batch, device, dtype, whole):
        self.T, self.whole, self.masks = config.text_len + 1, whole, config.masks
        self.num_prompts, self.num_images = 1, batch
        self.text_lengths, self.has_text = None, False
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        rows = {mask: mask.to_dense(device)[self.T :] for mask in set(config.masks)}  # (G, S), of image queries
        shape = (batch, config.num_heads, config.masks[0].seq_len, config.head_dim)
        self.layers = [DenseLayer(self, rows[mask], shape, device, dtype) for mask in config.masks]

    def layer(self, index):
        return self.layers[index]

    def check_room(self):
        pass

    def advance(self, count=1):
        self.position += count


class DenseLayer:
    def __init__(self, cache, rows, shape, device, dtype):
        self.cache, self.rows = cache, rows
        self.key, self.value = (torch.ones(shape, device=device, dtype=dtype) for _ in range(2))

    def prefill(self, key, value):
        """(1, H, 1 + T + n, D), for all samples."""
        self.key[:, :, : key.shape[2]] = key
        self.value[:, :, : key.shape[2]] = value

    def append(self, key, value, *, impl="auto"):
        """(B, H, D)"""
        if not self.cache.whole:
            at = self.cache.T + int(self.cache.position)
            self.key[:, :, at], self.value[:, :, at] = key, value
            return
        at = (self.cache.T + self.cache.position).view(1)
        self.key.index_copy_(2, at, key[:, :, None])
        self.value.index_copy_(2, at, value[:, :, None])

    def attend(self, query, *, impl="auto"):
        key, value = self.key, self.value
        seen = self.rows.index_select(0, self.cache.position.view(1))  # (1, S)
        if not self.cache.whole:
            end = self.cache.T + int(self.cache.position) + 1
            key, value, seen = key[:, :, :end], value[:, :, :end], seen[:, :end]
        return torch.nn.functional.scaled_dot_product_attention(query[:, :, None], key, value, attn_mask=seen)[:, :, 0]


class Drawer:
    """Draws one more code for each sample, with what `cache` keeps of those before: the function that is timed.

    It returns what predicts the new codes, (B, W), at each of the case's positions.
    """

    def __init__(self, case, inputs, cache, compiled=False):
        self.case, self.cache = case, cache
        self.model, self.text, self.codes = inputs
        self.latest = self.codes[0, :1].repeat(case.batch)  # stays where it is, for CUDA graphs
        self.seeds = torch.arange(case.batch, device=self.codes.device)
        self._fill(0)
        step = torch.compile(self._step, dynamic=False) if compiled else self._step
        self.step = Graph(step) if self.codes.is_cuda else step

    @torch.no_grad()
    def __call__(self):
        return tuple(self._step_at(position).clone() for position in self.case.positions)

    def warm_up(self):
        """In an image a step follows a step of the same kind, so that what it reads is where that has left it."""
        self()

    @torch.no_grad()
    def exact(self):
        """The same steps, each with a cache that holds the tokens before it."""
        outs = []
        for position in self.case.positions:
            self._fill(position)
            outs.append(self._step_at(position).clone())
        return tuple(outs)

    @torch.no_grad()
    def _fill(self, position):
        self._go_to(0)
        self.cache.has_text = False  # the same memory takes the text again
        self.model.hidden(self.text, self.codes[:, :position], cache=self.cache)
        self.cache.has_text = True

    def _go_to(self, position):
        self.cache.length = position
        self.cache.position.fill_(position)

    def _step_at(self, position):
        self._go_to(position)
        self.latest.copy_(self.codes[:, position])
        return self.step()

    @torch.no_grad()
    def _step(self):
        hidden = self.model.step(self.latest, self.cache)
        draw(self.model, hidden, self.seeds + self.cache.position)
        return hidden


class Graph:
    """A step as a CUDA graph, as `DALLE.generate` runs it."""

    def __init__(self, step):
        for _ in range(WARM_STEPS):
            step()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = step()

    def __call__(self):
        self.graph.replay()
        return self.outputs


class Uncached:
    """The same without a cache: every step runs the whole model over all tokens so far."""

    def __init__(self, case, inputs):
        self.case = case
        self.model, text, codes = inputs
        self.text, self.codes = text.expand(case.batch, -1), codes.expand(case.batch, -1)
        self.seeds = torch.arange(case.batch, device=codes.device)

    @torch.no_grad()
    def __call__(self):
        outs = []
        for position in self.case.positions:
            outs.append(self.model.hidden(self.text, self.codes[:, : position + 1])[:, -1])
            draw(self.model, outs[-1], self.seeds + position + 1)
        return tuple(outs)

    exact = __call__


def draw(model, hidden, seeds):
    return F.codebook_sample(hidden, model.image_weight, seed=seeds, impl=model.codebook_impl)


def with_linear(inputs, impl):
    """The inputs with a model of the same weights whose linear layers are of `impl`."""
    model, *tokens = inputs
    model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for module in model.modules():
        if isinstance(module, Linear):
            module.impl = impl
    return model, *tokens


def build_ours(case, device, *, impl):
    def make(case, inputs):
        inputs = with_linear(inputs, impl)
        for block in inputs[0].transformer.blocks:
            block.attention.impl = impl
        cache = our_cache(case, device)
        for mask in set(case.config.masks):
            mask.visible_slots()  # a table that is made once in a process, as the dense ones' masks are above
        for index in range(case.config.layers):  # as the dense ones: memory that is first touched later looks like use
            for tensor in cache.layer(index).tensors:
                tensor.fill_(1)
        return Drawer(case, inputs, cache)

    return make


def our_cache(case, device):
    c = case.config
    sizes = {"num_prompts": 1, "num_images": case.batch, "num_heads": c.num_heads, "head_dim": c.head_dim}
    return KVCache(c.masks, **sizes, device=device, dtype=DTYPES[case.dtype])


def build_dense(case, device, *, whole=False, compiled=False):
    def make(case, inputs):
        cache = DenseCache(case.config, case.batch, device, DTYPES[case.dtype], whole)
        return Drawer(case, with_linear(inputs, "reference"), cache, compiled)

    return make


def build_uncached(case, device):
    return lambda case, inputs: Uncached(case, with_linear(inputs, "reference"))


def contenders_of(case: Case, args) -> list[Contender]:
    """Ours first, then the peers."""
    found = [Contender(OURS, OURS, functools.partial(build_ours, impl=args.impl))]
    if args.device == "cpu":
        found.append(Contender("dense cache, SDPA", "dense cache", build_dense, dense=True))
    else:
        build = functools.partial(build_dense, whole=True)
        found.append(Contender("dense cache, SDPA", "dense cache", build, dense=True))
    if not args.quick:
        build = functools.partial(build_dense, whole=True, compiled=True)
        found.append(Contender("dense cache, SDPA, compiled", "dense cache", build, dense=True, compiled=True))
    found.append(Contender("no cache", "no cache", build_uncached))
    return found


def make_inputs(case: Case, device: str):
    """(model, text (1, T), codes (1, G)): random, the same in every process."""
    torch.manual_seed(0)
    with torch.device(device):  # a CPU takes 10 s to draw the numbers of a billion weights
        model = DALLE(case.config).to(dtype=DTYPES[case.dtype]).eval()
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(case.config.vocab_size, (1, case.config.text_len), generator=generator)
    codes = torch.randint(case.config.num_codes, (1, case.config.image_len), generator=generator)
    return model, text.to(device), codes.to(device)


def make_call(make, case: Case, inputs):
    """The function that is timed."""
    return make(case, inputs)


# -- exactness ---------------------------------------------------------------------------------------------------------


class Oracle:
    """The whole model in float64, and the eager reference in the case's dtype, on the tokens up to each position.

    All samples have the same tokens, so one row stands for them.
    """

    def __init__(self, case: Case, inputs):
        self._case = case
        self._model, *self._tokens = inputs
        self.names = [f"token {position}" for position in case.positions]
        self._exact = self._whole(torch.float64)
        self.facts = {
            "caption_s": self._caption_seconds(),
            "steps_timed": f"those of the tokens {' and '.join(map(str, case.positions))} of {case.config.image_len}",
            "cache_bytes_per_image": cache_bytes_per_image(case),
            "step_bytes": step_bytes(case, self._model),
            "copied_bytes_per_s": copied_bytes_per_second(self._tokens[0].device),
        }

    def judge(self, contender: Contender, call) -> dict:
        """The errors of what a contender returns."""
        return exactness.compare(self.names, call.exact(), self._exact)

    def allowed(self) -> dict:
        """The errors that are tolerated at each position: twice the eager reference's, plus one rounding."""
        eager = exactness.compare(self.names, self._whole(DTYPES[self._case.dtype]), self._exact)
        return exactness.limits(eager, torch.finfo(DTYPES[self._case.dtype]).eps)

    @torch.no_grad()
    def _whole(self, dtype):
        text, codes = self._tokens
        with text.device:
            model = DALLE(self._case.config, impl="reference").to(dtype=dtype).eval()
        model.load_state_dict(self._model.state_dict())
        return [model.hidden(text, codes[:, : position + 1])[:, -1] for position in self._case.positions]

    @torch.no_grad()
    def _caption_seconds(self) -> float:
        text, codes = self._tokens
        samples = []
        for _ in range(3):
            start = time.perf_counter()
            self._model.hidden(text, codes[:, :0])
            if text.is_cuda:
                torch.cuda.synchronize()
            samples.append(time.perf_counter() - start)
        return statistics.median(samples)


def cache_bytes_per_image(case: Case) -> dict:
    """Of this package and of a dense cache."""
    return {OURS: our_cache(case, "meta").nbytes / case.batch, "dense cache": case.dense_bytes / case.batch}


def step_bytes(case: Case, model) -> float:
    """What a step of this package must read, the mean over an image: all weights but the text's, and cached keys."""
    weights = sum(parameter.nbytes for parameter in model.transformer.parameters()) + model.image_weight.nbytes
    return weights + our_cache(case, "meta").nbytes_read


def copied_bytes_per_second(device) -> float:
    """Of a copy within the device's memory, those read and those written: what a step's bytes are held against."""
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls = {"copy": lambda: target.copy_(source)}
    calls["copy"]()
    timing = measuring.time_interleaved(calls, device=device.type, seconds=0.01, min_rounds=9)["copy"]
    return 2 * source.nbytes / timing.median


# -- results -----------------------------------------------------------------------------------------------------------


def describe_case(case: Case) -> dict:
    """What the case is, for the results file."""
    return {
        "name": case.name,
        "batch": case.batch,
        "positions": list(case.positions),
        "config": dataclasses.asdict(case.config),
    }


def images_per_second(result: dict, entry: dict) -> float | None:
    """Of one entry, from its steps and the caption's pass through the model."""
    if "median_s" not in entry:
        return None
    step = entry["median_s"] / len(result["positions"])
    rows, columns = result["config"]["grid"]
    return result["batch"] / (rows * columns * step + result["caption_s"])


def case_title(result: dict) -> str:
    speeds = [f"{e['name']} {images_per_second(result, e):.3g}" for e in result["contenders"] if "median_s" in e]
    return f"{result['name']}: {len(result['positions'])} steps; images per second: {', '.join(speeds)}"


def error_columns(result: dict):
    return ("max error", "rms error"), reporting.max_and_rms


def summary_columns(results: list[dict]) -> dict:
    def speed(peer):
        def cell(result, entries):
            name = result["ratios"].get(peer, {}).get("contender", peer)
            found = images_per_second(result, entries[name]) if name in entries else None
            return "-" if found is None else f"{found:.3g}"

        return cell

    def over_bytes(result, entries):
        if "median_s" not in entries[OURS]:
            return "-"
        step = entries[OURS]["median_s"] / len(result["positions"])
        return f"{step * result['copied_bytes_per_s'] / result['step_bytes']:.2f}x"

    def mebibytes(name):
        return lambda result, _: f"{result['cache_bytes_per_image'][name] / measuring.MIB:.1f}"

    return {
        "images/s": speed(OURS),
        **{f"{peer}, images/s": speed(peer) for peer in PEERS},
        **{f"vs {peer}": lambda result, _, peer=peer: reporting.ratio_cell(result, peer) for peer in PEERS},
        "/ its bytes": over_bytes,
        "cache MiB/image": mebibytes(OURS),
        "dense": mebibytes("dense cache"),
    }


def notes(results: list[dict]) -> str:
    """What stands below the summary."""
    steps = ", ".join({result["steps_timed"] for result in results})
    return (
        f"Timed: {steps}, the points of Gauss's rule, whose mean stands for an image's steps.\n"
        "images/s: batch / (image tokens * mean step + the caption's pass through the model); of peers the fastest.\n"
        "vs: the time of the fastest of that kind over ours. Errors: the largest, against the whole model in float64.\n"
        "/ its bytes: our step's time over that of its weights and cached keys at the speed of a copy in memory.\n"
        "Cache: keys and values, text included, per image. Extra memory: the peak of one call beyond model and cache."
    )


def plot_title(report: dict) -> str:
    return f"Drawing images, {report['settings']['sizes']}"


# -- command line ------------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = flags.make_parser(
        "Images per second and bytes of cache of generation with this package's cache, a dense one, and none."
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer rounds, and no compiled peer")
    add("--preset", choices=PRESETS, default="small", help="the model")
    add("--batch", type=flags.integer(1), action="append", metavar="B", help="images of one caption; repeatable "
        "(default: 1 and 8, on a GPU 64 too)")  # fmt: skip
    add("--grid", type=flags.grid, metavar="ROWSxCOLUMNS", help="grid of image tokens (default: the preset's)")
    add("--text-len", type=flags.integer(1), metavar="T", help="number of text tokens (default: the preset's)")
    add("--layers", type=flags.integer(1), metavar="N", help="number of layers (default: the preset's)")
    flags.add_shared_flags(
        parser, dtypes="float32, on a GPU bfloat16", rounds=MIN_ROUNDS, seconds=SECONDS, passes=False
    )
    return parser


def parse(argv: list[str]):
    parser = make_parser()
    args = parser.parse_args(argv)
    flags.settle_shared_flags(parser, args, SECONDS)
    args.cases = make_cases(args)

    def attempt(case):
        flags.attend(case.dtype, case.config.head_dim, args.device, args.impl)

    flags.refuse_what_cannot_serve(parser, args, attempt)
    return args


def main(argv: list[str] | None = None) -> int:
    return harness.run(sys.modules[__name__], argv)


if __name__ == "__main__":
    sys.exit(main())
