"""A training step with sparse masks against the same step with dense attention: time, memory, exactness.

    python benchmarks/train_bench.py                       grids 16, 32 and 64 on the best device here
    python benchmarks/train_bench.py --quick               grids 16 and 32, fewer rounds
    python benchmarks/train_bench.py --grid 64 --width 512 --layers 12

A step is the loss of a `DALLE` and the gradients of all its parameters; the optimizer, the same for all, is left out. The
contenders are one model with the same weights and masks, whose attention is this package's, torch's
scaled_dot_product_attention with the masks as boolean matrices or as what is added to scores (booleans become that in
every call on a CPU), or compiled FlexAttention (which has no backward pass on a CPU). Everything else is the same code. On
a CPU the model is small, so that attention's share is larger than in a wide one.

In each case the loss and two gradients are held against the reference in float64: the command fails where this package
errs more than twice as much as the eager reference in the same dtype, plus rounding.

B batch, T text positions, G image tokens, S = T + G inputs, H heads, D head size, W width.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import sys

import exactness
import flags
import harness
import reporting
import torch
from flags import DTYPES, FORWARD_BACKWARD, OURS
from harness import Contender
from measuring import NotRun
from torch import nn

from dalle_fast.nn.dalle import DALLE, DALLEConfig

NAME = "training"
GRIDS = ((16, 16), (32, 32), (64, 64))
SECONDS, MIN_ROUNDS = 6.0, 5
PEERS = ("SDPA mask", "FlexAttention")  # the order of the ratio columns
SDPA_BOOLEAN, SDPA_ADDED = "SDPA mask, boolean", "SDPA mask, added"
# (layers, width, text tokens, codes) without flags.
SIZES = {"cpu": (4, 128, 256, 1024), "cuda": (12, 1024, 256, 8192)}
BATCH = {"cpu": 1, "cuda": 4}  # of one, a GPU waits for the host
HEAD_DIM = 64
JUDGED = ("transformer.blocks.0.attention.qkv.weight", "image_embedding.weight")  # gradients that are looked at


# -- cases -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the results: what is trained."""

    config: DALLEConfig
    batch: int
    dtype: str
    pass_: str = FORWARD_BACKWARD

    @property
    def name(self) -> str:
        rows, columns = self.config.grid
        return f"grid {rows}x{columns}, {self.dtype}"

    @property
    def sizes(self) -> str:
        c = self.config
        return (
            f"{c.layers} layers of width {c.width}, {c.num_heads} heads of {c.head_dim}, text {c.text_len}, "
            f"{c.num_codes} codes, batch {self.batch}"
        )

    @property
    def tokens(self) -> int:
        return self.batch * (self.config.text_len + self.config.image_len)

    @property
    def dense_bytes(self) -> int:
        """Of the logits of one layer's attention, where they are materialised."""
        width = torch.empty((), dtype=DTYPES[self.dtype]).element_size()
        return self.batch * self.config.num_heads * self.config.masks[0].seq_len ** 2 * width

    @property
    def mask_bytes(self) -> dict[str, int]:
        """Of the masks that SDPA's contenders hold, one for each kind of layer."""
        width = torch.empty((), dtype=DTYPES[self.dtype]).element_size()
        pairs = sum((mask.seq_len - 1) ** 2 for mask in set(self.config.masks))
        return {SDPA_BOOLEAN: pairs, SDPA_ADDED: width * pairs}

    def small(self) -> Case:
        """The same model on a few tokens."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, text_len=8, grid=(4, 4)))


def make_cases(args) -> list[Case]:
    """Every dtype with every grid."""
    layers, width, text_len, codes = SIZES[args.device]
    config = DALLEConfig(
        vocab_size=codes,
        text_len=args.text_len or text_len,
        num_codes=codes,
        layers=args.layers or layers,
        width=args.width or width,
        num_heads=max(1, (args.width or width) // HEAD_DIM),
        head_dim=HEAD_DIM,
    )
    grids = args.grid or (GRIDS[:2] if args.quick else GRIDS)
    dtypes = args.dtype or ["bfloat16" if args.device == "cuda" else "float32"]
    return [Case(dataclasses.replace(config, grid=grid), args.batch, dtype) for dtype in dtypes for grid in grids]


# -- contenders --------------------------------------------------------------------------------------------------------


class PeerAttention(nn.Module):
    """The model's attention layer around another function of query, key and value, each (B, H, S, D)."""

    def __init__(self, attention, function):
        super().__init__()
        self.attention, self.function = attention, function

    def forward(self, x, text_lengths=None, cache=None):
        a = self.attention
        query, key, value = a.qkv(x).unflatten(-1, (3, a.num_heads, a.head_dim)).permute(2, 0, 3, 1, 4).unbind()
        return a.out(self.function(query, key, value).transpose(1, 2).flatten(2))


def with_attention(model, function_of):
    """A copy of the model whose layers compute attention with `function_of(mask)`, made once for each mask."""
    model = copy.deepcopy(model)
    functions = {mask: function_of(mask) for mask in set(model.transformer.masks)}
    for block in model.transformer.blocks:
        block.attention = PeerAttention(block.attention, functions[block.attention.mask])
    return model


def build_ours(case, device, *, impl):
    def make(model):
        model = copy.deepcopy(model)
        for block in model.transformer.blocks:
            block.attention.impl = impl
        return model

    return make


def build_sdpa_mask(case, device, *, added=False):
    def function_of(mask):
        dense = mask.to_dense(device, seq_len=mask.seq_len - 1)  # the last token is not an input
        dense = harness.as_added(dense, DTYPES[case.dtype]) if added else dense
        return functools.partial(nn.functional.scaled_dot_product_attention, attn_mask=dense)

    return functools.partial(with_attention, function_of=function_of)


def build_flex(case, device, *, block):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if device == "cpu":
        raise NotRun("FlexAttention has no backward on CPU")
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    options = {}
    if block < 128:  # the default tile is larger than the block, which is an error
        options = {"BLOCK_M": block, "BLOCK_N": block}
        options |= {f"BLOCK_{side}{step}": block for side in "MN" for step in (1, 2)}

    def function_of(mask):
        S = mask.seq_len - 1
        block_mask = create_block_mask(mask.mask_mod, None, None, S, S, device=device, BLOCK_SIZE=block)
        return functools.partial(compiled, block_mask=block_mask, kernel_options=options or None)

    return functools.partial(with_attention, function_of=function_of)


def contenders_of(case: Case, args) -> list[Contender]:
    """Ours first, then the peers."""
    found = [Contender(OURS, OURS, functools.partial(build_ours, impl=args.impl))]
    found.append(Contender(SDPA_BOOLEAN, "SDPA mask", build_sdpa_mask))
    found.append(Contender(SDPA_ADDED, "SDPA mask", functools.partial(build_sdpa_mask, added=True)))
    for block in (64, 128):
        build = functools.partial(build_flex, block=block)
        found.append(Contender(f"FlexAttention, block {block}", "FlexAttention", build, compiled=True))
    return found


def make_inputs(case: Case, device: str):
    """(model, text (B, T), codes (B, G)): random, the same in every process."""
    torch.manual_seed(0)
    with torch.device(device):
        model = DALLE(case.config).to(dtype=DTYPES[case.dtype])
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(case.config.vocab_size, (case.batch, case.config.text_len), generator=generator)
    codes = torch.randint(case.config.num_codes, (case.batch, case.config.image_len), generator=generator)
    return model, text.to(device), codes.to(device)


def make_call(make, case: Case, inputs):
    """The function that is timed. It returns the loss and the gradients of all parameters."""
    model, text, codes = inputs
    model = make(model)
    parameters = list(model.parameters())

    def step():
        loss = model(text, codes).loss
        return (loss.detach(), *torch.autograd.grad(loss, parameters))

    return step


# -- exactness ---------------------------------------------------------------------------------------------------------


class Oracle:
    """The model on the dense reference, in float64 and, as the yardstick, in the case's dtype."""

    TENSORS = ("loss", "grad of the first layer's qkv", "grad of the image embedding")

    def __init__(self, case: Case, inputs):
        self._case, self._inputs = case, inputs
        names = [name for name, _ in inputs[0].named_parameters()]
        self._places = [0, *(1 + names.index(name) for name in JUDGED)]
        self._exact = self._reference(torch.float64)
        self.facts = {}

    def judge(self, contender: Contender, call) -> dict:
        """The errors of what a contender returns."""
        return self._compare(call())

    def allowed(self) -> dict:
        """The errors that are tolerated, per tensor: twice the eager reference's, plus one rounding."""
        eager = self._compare(self._reference(DTYPES[self._case.dtype]))
        return exactness.limits(eager, torch.finfo(DTYPES[self._case.dtype]).eps)

    def _compare(self, outputs):
        return exactness.compare(self.TENSORS, *([x[place] for place in self._places] for x in (outputs, self._exact)))

    def _reference(self, dtype):
        model, text, codes = self._inputs
        # Layer by layer, as the S x S matrices of all layers at once are too many.
        with text.device:
            reference = DALLE(self._case.config, impl="reference", activation_checkpointing=True).to(dtype=dtype)
        reference.load_state_dict(model.state_dict())
        return make_call(lambda model: model, self._case, (reference, text, codes))()


# -- results -----------------------------------------------------------------------------------------------------------


def describe_case(case: Case) -> dict:
    """What the case is, for the results file."""
    return {
        "name": case.name,
        "batch": case.batch,
        "tokens": case.tokens,
        "config": dataclasses.asdict(case.config),
        "mask_bytes": case.mask_bytes,
    }


def case_title(result: dict) -> str:
    speeds = [f"{e['name']} {result['tokens'] / e['median_s']:.0f}" for e in result["contenders"] if "median_s" in e]
    return f"{result['name']}; tokens per second: {', '.join(speeds)}"


def error_columns(result: dict):
    return ("max error", "rms error"), reporting.max_and_rms


def summary_columns(results: list[dict]) -> dict:
    def speed(result, entries):
        median = entries[OURS].get("median_s")
        return f"{result['tokens'] / median:.0f}" if median else "-"

    def memory(result, entries, *, masks):
        ours = entries[OURS].get("extra_bytes")
        peers = [
            entries[name]["extra_bytes"] + (held if masks else 0)
            for name, held in result["mask_bytes"].items()
            if entries[name].get("extra_bytes")
        ]
        return f"{min(peers) / ours:.2f}x" if ours and peers else "-"

    return {
        "tokens/s": speed,
        **{f"vs {peer}": lambda result, _, peer=peer: reporting.ratio_cell(result, peer) for peer in PEERS},
        "SDPA's memory": functools.partial(memory, masks=False),
        "and masks": functools.partial(memory, masks=True),
    }


def notes(results: list[dict]) -> str:
    """What stands below the summary."""
    return (
        "vs: the time of the fastest of that kind over ours. Errors: the largest, against float64.\n"
        "Extra memory: the peak of one step beyond weights, gradients and masks. SDPA's memory: the smaller of its two over\n"
        "ours; and masks: with those that it holds, which this package does without."
    )


def plot_title(report: dict) -> str:
    return f"A training step, {report['settings']['sizes']}"


# -- command line ------------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = flags.make_parser("Time and memory of a training step against SDPA with masks and FlexAttention.")
    add = parser.add_argument
    layers, width, text_len, _ = (
        f"{cpu}" if cpu == gpu else f"{cpu} on a CPU, {gpu} on a GPU" for cpu, gpu in zip(SIZES["cpu"], SIZES["cuda"])
    )
    add("--quick", action="store_true", help="fewer rounds; without the largest grid")
    add("--grid", type=flags.grid, action="append", metavar="ROWSxCOLUMNS", help="grid of image tokens, 32 or "
        "32x48; repeatable (default: 16, 32 and 64)")  # fmt: skip
    add("--batch", type=flags.integer(1), metavar="B", help=f"batch size (default: {BATCH['cpu']} on a CPU, "
        f"{BATCH['cuda']} on a GPU)")  # fmt: skip
    add("--layers", type=flags.integer(1), metavar="N", help=f"number of layers (default: {layers})")
    add("--width", type=flags.integer(HEAD_DIM), metavar="W", help=f"width, of heads of {HEAD_DIM} "
        f"(default: {width})")  # fmt: skip
    add("--text-len", type=flags.integer(1), metavar="T", help="number of text tokens "
        f"(default: {text_len})")  # fmt: skip
    flags.add_shared_flags(
        parser, dtypes="float32, on a GPU bfloat16", rounds=MIN_ROUNDS, seconds=SECONDS, passes=False
    )
    return parser


def parse(argv: list[str]):
    parser = make_parser()
    args = parser.parse_args(argv)
    flags.settle_shared_flags(parser, args, SECONDS)
    args.batch = args.batch or BATCH[args.device]
    args.cases = make_cases(args)

    def attempt(case):
        flags.attend(case.dtype, case.config.head_dim, args.device, args.impl)

    flags.refuse_what_cannot_serve(parser, args, attempt)
    return args


def main(argv: list[str] | None = None) -> int:
    return harness.run(sys.modules[__name__], argv)


if __name__ == "__main__":
    sys.exit(main())
