"""Sparse attention against what else torch offers: time, exactness and memory, case by case.

    python benchmarks/attn_bench.py                        the paper's sizes on the best device here
    python benchmarks/attn_bench.py --quick                fewer cases, about a second of timing each
    python benchmarks/attn_bench.py --mask row --grid 64   one mask on a larger grid

A case is a mask, a pass (forward, or forward and backward), a dtype and the sizes. In each case the contenders take
turns in one process (`measuring.time_interleaved`), and each one's result is held against float64 in the same run: the
command fails where this package errs more than twice as much as eager attention in the same dtype, plus rounding.

B batch, H heads, S sequence, D head size, T text.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys

import exactness
import flags
import harness
import reporting
import torch
import torch.nn.functional as torch_F
from flags import DTYPES, FORWARD, FORWARD_BACKWARD, OURS, PASSES
from measuring import NotRun

from dalle_fast.masks import CONV_EDGES, AttentionMask, causal_mask, column_mask, conv_mask, row_mask

NAME = "attention"
DEFAULT_MASKS = ("row", "column", "conv:11")
SECONDS, MIN_ROUNDS = 6.0, 7
PEERS = ("SDPA causal", "SDPA mask", "FlexAttention", "eager")  # the order of the ratio columns
ORACLE_PAIRS = 1 << 26  # (query, key) pairs computed in float64 at most; beyond it, only some heads are checked
BLOCK_PAIRS = 1 << 25  # of these at once: all of a head up to 5,792 positions, 256 MiB in float64
DENSE_COPIES = {FORWARD: 3, FORWARD_BACKWARD: 6}  # S x S matrices per head that eager attention holds at its peak


# -- cases -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the results: what is computed."""

    mask: AttentionMask
    dtype: str
    pass_: str
    batch: int
    heads: int
    head_dim: int

    @property
    def name(self) -> str:
        mask = self.mask
        kernel = f" {mask.kernel_size}" + (f" dilation {mask.dilation}" if mask.dilation > 1 else "")
        rule = mask.rule.replace("_", " ").removesuffix(" flat") + (kernel if mask.rule.startswith("conv") else "")
        return f"{rule}, {self.pass_.replace('+', ' + ')}, {self.dtype}"

    @property
    def sizes(self) -> str:
        rows, columns = self.mask.grid
        return (
            f"text {self.mask.text_len}, grid {rows}x{columns}, batch {self.batch}, heads {self.heads}, "
            f"head size {self.head_dim}"
        )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.mask.seq_len, self.head_dim

    @property
    def dense_bytes(self) -> int:
        """What an implementation that materialises the logits needs, roughly."""
        width = torch.empty((), dtype=DTYPES[self.dtype]).element_size()
        return self.batch * self.heads * self.mask.seq_len**2 * width * DENSE_COPIES[self.pass_]

    def small(self) -> Case:
        """The same on a few tokens."""
        mask = dataclasses.replace(self.mask, text_len=min(self.mask.text_len, 8), grid=(4, 4))
        return dataclasses.replace(self, mask=mask)


def mask_argument(text: str):
    """An argparse type: a mask without its sizes, as a function of (text_len, grid)."""
    name, *rest = text.split(":")
    plain = {"row": row_mask, "column": column_mask, "causal": causal_mask}
    plain["axial_row"] = functools.partial(row_mask, wrap=False)
    if name in plain and not rest:
        return plain[name]
    if name == "conv" and len(rest) <= 3:
        options = dict(zip(("kernel_size", "edges", "dilation"), rest))
        try:
            for number in options.keys() & {"kernel_size", "dilation"}:
                options[number] = int(options[number])
            conv_mask(1, 1, **options)  # its own checks
            return functools.partial(conv_mask, **options)
        except ValueError as error:
            reason = f" ({error})"
    else:
        reason = ""
    raise argparse.ArgumentTypeError(
        "expected row, axial_row, column, causal or conv[:KERNEL[:EDGES[:DILATION]]] with an odd KERNEL and EDGES one "
        f"of {', '.join(CONV_EDGES)}, such as conv:11 or conv:5:corner, got {text!r}{reason}"
    )


def make_cases(args, device: str) -> list[Case]:
    """Every mask with every (dtype, pass). What the flags leave open is the paper's."""
    if args.dtype or args.pass_:
        kinds = [(dtype, pass_) for dtype in args.dtype or default_dtypes(device) for pass_ in args.pass_ or PASSES]
    elif device == "cuda":
        kinds = [("bfloat16", FORWARD), ("bfloat16", FORWARD_BACKWARD)]
    else:
        kinds = [("float32", FORWARD), ("bfloat16", FORWARD), ("float32", FORWARD_BACKWARD)]
    masks = [make(args.text_len, args.grid) for make in args.mask or map(mask_argument, DEFAULT_MASKS)]
    cases = [
        Case(mask, dtype, pass_, args.batch, args.heads, args.head_dim) for dtype, pass_ in kinds for mask in masks
    ]
    if args.quick and not (args.mask or args.dtype or args.pass_) and device == "cpu":
        cases = [case for case in cases if case.mask.rule == "row" or (case.dtype, case.pass_) == kinds[0]]
    return cases


def default_dtypes(device: str) -> list[str]:
    return ["bfloat16"] if device == "cuda" else ["float32", "bfloat16"]


# -- contenders --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Contender(harness.Contender):
    """`causal` ones compute dense causal attention, and are held against that."""

    causal: bool = False


def build_ours(case, device, *, impl):
    import dalle_fast.nn.functional as F

    return functools.partial(F.sparse_attention, mask=case.mask, impl=impl)


def build_eager(case, device):
    hidden = ~case.mask.to_dense(device)
    scale = 1 / math.sqrt(case.head_dim)

    def eager(query, key, value):
        logits = (query @ key.transpose(-2, -1)) * scale
        return torch.softmax(logits.masked_fill(hidden, -math.inf), dim=-1) @ value

    return eager


def build_sdpa_mask(case, device, *, added=False):
    """With the mask as booleans, or as what is `added` to scores: which is faster depends on dtype and device."""
    mask = case.mask.to_dense(device)
    if added:
        mask = harness.as_added(mask, DTYPES[case.dtype])
    return functools.partial(torch_F.scaled_dot_product_attention, attn_mask=mask)


def build_sdpa_causal(case, device, *, backend=None):
    if backend is None:
        return functools.partial(torch_F.scaled_dot_product_attention, is_causal=True)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def sdpa_causal(query, key, value):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch_F.scaled_dot_product_attention(query, key, value, is_causal=True)

    return sdpa_causal


def build_flex(case, device, *, block, tuned=False, backend=None):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if device == "cpu" and case.pass_ != FORWARD:
        raise NotRun("FlexAttention has no backward on CPU")
    S = case.mask.seq_len
    block_mask = create_block_mask(case.mask.mask_mod, None, None, S, S, device=device, BLOCK_SIZE=block)
    options = {}
    if device == "cuda":
        if block < 128:  # the default tile is larger than the block, which is an error
            options = {"BLOCK_M": block, "BLOCK_N": block}
            options |= {f"BLOCK_{side}{step}": block for side in "MN" for step in (1, 2)}
        if tuned:
            options = {}  # the tuner's own candidates that fit the block
        if backend:
            options = {"BACKEND": backend}
    mode = "max-autotune-no-cudagraphs" if tuned else None
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False, mode=mode)
    return functools.partial(compiled, block_mask=block_mask, kernel_options=options or None)


def make_contenders(device: str, impl: str, flex_blocks: list[int], autotune: bool = False) -> list[Contender]:
    """Ours first, then the peers."""
    found = [Contender(OURS, OURS, functools.partial(build_ours, impl=impl))]

    def flex(name, **options):
        found.append(Contender(name, "FlexAttention", functools.partial(build_flex, **options), compiled=True))

    if device == "cuda":
        for name, backend in (("cuDNN", "CUDNN_ATTENTION"), ("FlashAttention-2", "FLASH_ATTENTION")):
            build = functools.partial(build_sdpa_causal, backend=backend)
            found.append(Contender(f"SDPA causal, {name}", "SDPA causal", build, causal=True))
    else:
        found.append(Contender("SDPA causal", "SDPA causal", build_sdpa_causal, causal=True))
    found.append(Contender("SDPA mask, boolean", "SDPA mask", build_sdpa_mask))
    found.append(Contender("SDPA mask, added", "SDPA mask", functools.partial(build_sdpa_mask, added=True)))
    if device == "cuda":
        flex("FlexAttention, default", block=128)
    for block in flex_blocks:
        name = f"FlexAttention, block {block}"
        if device == "cpu" or block != 128:  # 128 is the default
            flex(name, block=block)
        if device == "cuda" and autotune:
            flex(f"{name}, autotuned", block=block, tuned=True)
    if device == "cuda":
        flex("FlexAttention, FLASH", block=128, backend="FLASH")
    found.append(Contender("eager", "eager", build_eager, dense=True))
    return found


def contenders_of(case: Case, args) -> list[Contender]:
    """The same for every case."""
    return make_contenders(args.device, args.impl, args.flex_block, args.flex_autotune)


def make_inputs(case: Case, device: str):
    """query, key, value and the gradient of the output: normal, contiguous, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(case.shape, generator=generator).to(DTYPES[case.dtype]).to(device) for _ in range(4)]
    if case.pass_ == FORWARD_BACKWARD:
        for tensor in tensors[:3]:
            tensor.requires_grad_()
    return tensors


def make_call(attention, case: Case, inputs):
    """The function that is timed. It returns a tuple: the output, and with a backward pass the three gradients."""
    *qkv, grad_out = inputs

    def forward():  # no input wants a gradient; entering and leaving torch.no_grad would be timed too
        return (attention(*qkv),)

    def forward_backward():
        out = attention(*qkv)
        return (out.detach(), *torch.autograd.grad(out, qkv, grad_out))

    return forward if case.pass_ == FORWARD else forward_backward


# -- exactness ---------------------------------------------------------------------------------------------------------


class Oracle:
    """Dense attention in float64 on some of the heads, and eager attention in the case's dtype on the same ones."""

    TENSORS = ("out", "grad_query", "grad_key", "grad_value")

    def __init__(self, case: Case, inputs):
        B, H, S, _ = case.shape
        count = max(1, min(B * H, ORACLE_PAIRS // S**2)) if S else B * H
        self.heads = [round(n * (B * H - 1) / max(1, count - 1)) for n in range(count)]  # the first to the last
        self._case = case
        self._inputs = self._select(inputs)
        self._causal_mask = causal_mask(case.mask.text_len, case.mask.grid)
        self._exact = {}
        self.facts = {"heads_checked": f"{len(self.heads)} of {B * H}"}

    def judge(self, contender: Contender, call) -> dict:
        """The errors of what a contender returns."""
        return self.errors(call(), causal=contender.causal)

    def errors(self, outputs, *, causal: bool = False) -> dict:
        """Of each tensor the largest error, and its root mean square relative to that of the exact values."""
        return self._compare(self._select(outputs), causal)

    def eager_errors(self) -> dict:
        """What eager attention in the case's dtype errs on these heads."""
        return self._compare(self._dense(self._case.mask, self._inputs), causal=False)

    def allowed(self) -> dict:
        """The errors that are tolerated, per tensor: twice eager attention's, plus one rounding."""
        eager = self.eager_errors()
        largest = max(errors["largest"] for errors in eager.values())
        # A gradient that is zero throughout (one visible key) is the difference of terms as large as the others.
        sizes = {name: errors["largest"] or largest for name, errors in eager.items()}
        return exactness.limits(eager, torch.finfo(DTYPES[self._case.dtype]).eps, sizes)

    def _select(self, tensors):
        return [tensor.detach().flatten(0, 1)[self.heads] for tensor in tensors]

    def _compare(self, outputs, causal):
        return exactness.compare(self.TENSORS, outputs, self._expected(causal))

    def _expected(self, causal):
        if causal not in self._exact:
            mask = self._causal_mask if causal else self._case.mask
            self._exact[causal] = self._dense(mask, [x.double() for x in self._inputs])
        return self._exact[causal]

    def _dense(self, mask, inputs):
        """Head by head, and long sequences by blocks of queries, so that little memory is held at a time."""
        return [torch.stack(tensors) for tensors in zip(*(self._one_head(mask, *head) for head in zip(*inputs)))]

    def _one_head(self, mask, query, key, value, grad_out):
        backward = self._case.pass_ == FORWARD_BACKWARD
        key, value = (x.clone().requires_grad_(backward) for x in (key, value))
        positions = torch.arange(len(query), device=query.device)
        out, grad_query, grad_key, grad_value = [], [], 0, 0
        for rows in positions.split(max(1, BLOCK_PAIRS // len(query))):
            block = query[rows].requires_grad_(backward)
            with torch.set_grad_enabled(backward):
                logits = (block @ key.T) / math.sqrt(self._case.head_dim)
                logits = logits.masked_fill(~mask.allows(rows[:, None], positions), -math.inf)
                out.append(torch.softmax(logits, dim=-1) @ value)
            if backward:
                grads = torch.autograd.grad(out[-1], (block, key, value), grad_out[rows])
                grad_query.append(grads[0])
                grad_key, grad_value = grad_key + grads[1], grad_value + grads[2]
        out = torch.cat(out).detach()
        return (out, torch.cat(grad_query), grad_key, grad_value) if backward else (out,)


# -- results -----------------------------------------------------------------------------------------------------------


def describe_case(case: Case) -> dict:
    """What the case is, for the results file."""
    mask = case.mask
    return {
        "name": case.name,
        "mask": repr(mask),
        "rule": mask.rule,
        "text_len": mask.text_len,
        "grid": list(mask.grid),
        "seq_len": mask.seq_len,
        "kernel_size": mask.kernel_size,
        "dilation": mask.dilation,
        "batch": case.batch,
        "heads": case.heads,
        "head_dim": case.head_dim,
        "pairs_of_causal": mask.num_pairs / (mask.seq_len * (mask.seq_len + 1) / 2),
    }


def case_title(result: dict) -> str:
    return f"{result['name']} ({result['pairs_of_causal']:.2f} of the causal pairs)"


def error_columns(result: dict):
    return ("max error", "rms error"), reporting.max_and_rms


def error_over_eager(result: dict, entries: dict) -> str:
    """A cell: the largest over tensors of this package's error over eager attention's."""
    return reporting.error_over(*(entries[name].get("error") for name in (OURS, "eager")))


def summary_columns(results: list[dict]) -> dict:
    columns = {f"vs {peer}": lambda result, _, peer=peer: reporting.ratio_cell(result, peer) for peer in PEERS}
    return columns | {"error / eager's": error_over_eager}


def notes(results: list[dict]) -> str:
    """What stands below the summary."""
    checked = ", ".join({result["heads_checked"] for result in results})
    return (
        f"vs: the time of the fastest of that kind over ours. Errors: the largest, against float64, on {checked} "
        "heads.\nExtra memory: the peak of one call beyond inputs, outputs and gradients; the masks of eager attention "
        "and SDPA and\nFlexAttention's block mask are made before it and not counted."
    )


def plot_title(report: dict) -> str:
    return f"Attention, {report['settings']['sizes']}"


# -- command line ------------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = flags.make_parser(
        "Time, exactness and memory of sparse attention against eager attention, SDPA and FlexAttention."
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer cases and rounds; on the CPU one FlexAttention block size")
    add("--grid", type=flags.grid, default="32", metavar="ROWSxCOLUMNS", help="grid of image tokens, 32 or 32x48")
    add("--text-len", type=flags.integer(0), default=256, metavar="T", help="number of text tokens")
    add("--batch", type=flags.integer(1), default=1, metavar="B", help="batch size")
    add("--heads", type=flags.integer(1), default=16, metavar="H", help="number of heads")
    add("--head-dim", type=flags.integer(1), default=64, metavar="D", help="head size")
    add("--mask", type=mask_argument, action="append", metavar="MASK", help="row, axial_row, column, causal or "
        f"conv[:KERNEL[:EDGES[:DILATION]]]; repeatable (default: {', '.join(DEFAULT_MASKS)})")  # fmt: skip
    add("--flex-block", type=flags.integer(16), action="append", metavar="N", help="FlexAttention block size to try; "
        "repeatable (default: 64 and 128, or 128 with --quick)")  # fmt: skip
    add("--flex-autotune", action="store_true", help="on a GPU also FlexAttention with the tiles that inductor's tuner "
        "picks, which takes it half a minute for a case with its backward pass")  # fmt: skip
    dtypes = "float32 and bfloat16 on a CPU, the latter forward only; bfloat16 on a GPU"
    flags.add_shared_flags(parser, dtypes=dtypes, rounds=MIN_ROUNDS, seconds=SECONDS)
    return parser


def parse(argv: list[str]):
    parser = make_parser()
    args = parser.parse_args(argv)
    flags.settle_shared_flags(parser, args, SECONDS)
    args.flex_block = args.flex_block or ([128] if args.quick else [64, 128])
    if args.flex_autotune and args.device == "cpu":
        parser.error("argument --flex-autotune: inductor has no tuner for FlexAttention on a CPU")
    try:
        args.cases = make_cases(args, args.device)
    except ValueError as error:  # sizes that are right one by one
        parser.error(f"argument --grid, --text-len or --mask: {error}")

    def attempt(case):
        flags.attend(case.dtype, case.head_dim, args.device, args.impl)

    flags.refuse_what_cannot_serve(parser, args, attempt)
    return args


def main(argv: list[str] | None = None) -> int:
    return harness.run(sys.modules[__name__], argv)


if __name__ == "__main__":
    sys.exit(main())
