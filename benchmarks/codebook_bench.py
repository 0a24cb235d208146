"""The codebook operation against what else there is: time, exactness and memory, case by case.

    python benchmarks/codebook_bench.py                            the sizes of the paper's dVAE on the best device here
    python benchmarks/codebook_bench.py --quick                    fewer cases, about a second of timing each
    python benchmarks/codebook_bench.py --op gumbel --din 1024     one operation at another size of hidden

A case is an operation (Gumbel-softmax to codebook, argmax, sample, cross-entropy), a pass, a dtype and the sizes. The
contenders take turns in one process (`measuring.time_interleaved`). In the same run each one's result is held against
float64, and the command fails where this package errs more than twice as much as eager torch in the same dtype, plus
rounding. Where there is noise, every contender gets the same values of it for this comparison; timed is what users
write, with torch's own generator. Samples are not compared but tested: how many standard deviations some sums over the
sampled codes are from what the exact probabilities say.

N rows, K codes, Din size of hidden, D size of an embedding.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import inspect
import math
import os
import sys
from typing import NamedTuple

import exactness
import flags
import harness
import reporting
import torch
import torch.nn.functional as torch_F
from flags import DTYPES, FORWARD, FORWARD_BACKWARD, OURS, PASSES
from harness import Contender
from measuring import NotRun

import dalle_fast.nn.functional as F
from dalle_fast.ops.codebook import noise as codebook_noise

NAME = "codebook"
OPS = ("gumbel", "argmax", "sample", "cross_entropy")
DIFFERENTIABLE = ("gumbel", "cross_entropy")
DINS = (512, 2048)
ROWS = {"cpu": 1024, "cuda": 8192}
SECONDS, MIN_ROUNDS = 1.0, 9  # of long rounds few would do, but nine of the longest here take 20 s
PEERS = ("eager", "compiled", "Liger", "cut-cross-entropy")
PRODUCTS = "products alone"
TAU = 0.5
SEED = 1  # of the noise that errors are compared with
BLOCK_PAIRS = 1 << 23  # (row, code) pairs in float64 at once: 64 MiB a tensor
SAMPLE_ROUNDS = 4  # calls whose samples are tested
MOST_Z = 5.0  # a fair sampler is beyond it once in 1.7 million
DENSE_COPIES = {"gumbel": 5, "argmax": 1, "sample": 3, "cross_entropy": 2}  # (N, K) tensors that eager torch holds


# -- cases -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the results: what is computed."""

    op: str
    pass_: str
    dtype: str
    din: int
    rows: int
    codes: int
    embedding_dim: int

    @property
    def name(self) -> str:
        return f"{self.op.replace('_', ' ')}, {self.pass_.replace('+', ' + ')}, {self.dtype}, Din {self.din}"

    @property
    def sizes(self) -> str:
        return f"{self.rows} rows, {self.codes} codes, embedding {self.embedding_dim}"

    @property
    def dense_bytes(self) -> int:
        """What an implementation that materialises the logits needs, roughly."""
        width = torch.empty((), dtype=DTYPES[self.dtype]).element_size()
        return self.rows * self.codes * width * DENSE_COPIES[self.op] * (2 if self.pass_ == FORWARD_BACKWARD else 1)

    def small(self) -> Case:
        """The same at a few rows and codes."""
        sizes = {"din": 16, "rows": 4, "codes": 32, "embedding_dim": 8}
        return dataclasses.replace(self, **{name: min(size, getattr(self, name)) for name, size in sizes.items()})


def make_cases(args) -> list[Case]:
    """Every combination of what the flags name. What they leave open is kept to what is worth its time."""
    on_cpu = args.device == "cpu"
    dtypes = args.dtype or (["float32", "bfloat16"] if on_cpu else ["bfloat16"])
    dins = args.din or (DINS[:1] if args.quick else DINS)
    kinds = [
        (op, pass_, dtype, din)
        for op in args.op or OPS
        for pass_ in args.pass_ or PASSES
        for dtype in dtypes
        for din in dins
        if pass_ == FORWARD or op in DIFFERENTIABLE
    ]
    if on_cpu and args.dtype is None:  # bfloat16 once
        once = ("gumbel", FORWARD, "bfloat16", dins[0])
        kinds = [kind for kind in kinds if kind[2] == "float32" or (kind == once and not args.quick)]
    return [Case(*kind, args.rows, args.codes, args.embedding_dim) for kind in kinds]


class Inputs(NamedTuple):
    """What a case computes with; the gradients are those of the results of `gumbel`."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    codebook: torch.Tensor
    target: torch.Tensor
    grad_embedding: torch.Tensor
    grad_kl: torch.Tensor

    def parameters(self, case: Case):
        """What the case's operation is differentiated by."""
        return [self.hidden, self.weight, self.bias, *([self.codebook] if case.op == "gumbel" else [])]


def make_inputs(case: Case, device: str) -> Inputs:
    """Normal numbers, logits of standard deviation 1.4; the same in every process."""
    generator = torch.Generator().manual_seed(0)
    N, K, Din, D = case.rows, case.codes, case.din, case.embedding_dim
    shapes = {"hidden": (N, Din), "weight": (K, Din), "bias": (K,), "codebook": (K, D)}
    shapes |= {"grad_embedding": (N, D), "grad_kl": (N,)}
    tensors = {}
    for name, shape in shapes.items():
        numbers = torch.randn(shape, generator=generator) * (Din**-0.5 if name == "weight" else 1)
        tensors[name] = numbers.to(DTYPES[case.dtype]).to(device)
    target = torch.randint(K, (N,), generator=generator).to(device)
    inputs = Inputs(**tensors, target=target)
    if case.pass_ == FORWARD_BACKWARD:
        for tensor in inputs.parameters(case):
            tensor.requires_grad_()
    return inputs


def make_call(function, case: Case, inputs: Inputs):
    """The function that is timed. It returns a tuple: the results, and with a backward pass the gradients.

    `function(inputs)` returns a tuple: embedding and kl, codes, or the loss.
    """

    def forward():
        with torch.no_grad():
            return function(inputs)

    def forward_backward():
        outputs = function(inputs)
        of_outputs = [None]  # a scalar's is 1
        if case.op == "gumbel":
            of_outputs = [grad.to(out.dtype) for grad, out in zip((inputs.grad_embedding, inputs.grad_kl), outputs)]
        grads = torch.autograd.grad(outputs, inputs.parameters(case), of_outputs)
        return (*(out.detach() for out in outputs), *grads)

    return forward if case.pass_ == FORWARD else forward_backward


# -- contenders --------------------------------------------------------------------------------------------------------
# As users write them. `noise` is None where they draw their own; otherwise it takes the place of what they would draw.


def eager_gumbel(hidden, weight, bias, codebook, noise=None):
    logits = torch_F.linear(hidden, weight, bias)
    if noise is None:
        y = torch_F.gumbel_softmax(logits, TAU)
    else:
        y = ((logits + noise) / TAU).softmax(-1)  # what gumbel_softmax does with its own
    log_p = torch_F.log_softmax(logits, -1)
    return y @ codebook, (log_p.exp() * (log_p + math.log(len(weight)))).sum(-1)


def eager_argmax(hidden, weight, bias):
    return torch_F.linear(hidden, weight, bias).argmax(-1)


def eager_multinomial(hidden, weight, bias):
    return torch.multinomial(torch_F.linear(hidden, weight, bias).softmax(-1), 1)[:, 0]


def eager_gumbel_argmax(hidden, weight, bias):
    logits = torch_F.linear(hidden, weight, bias)
    return (logits - torch.empty_like(logits).exponential_().log()).argmax(-1)


def eager_cross_entropy(hidden, weight, bias, target):
    return torch_F.cross_entropy(torch_F.linear(hidden, weight, bias), target)


def build_ours(case, device, noise=None, *, impl):
    """With noise it takes the seed that the noise is of."""
    seed = None if noise is None else SEED

    def ours(inputs):
        product = inputs.hidden, inputs.weight, inputs.bias
        if case.op == "gumbel":
            return F.gumbel_codebook(*product, inputs.codebook, TAU, seed=seed, impl=impl)[:2]
        if case.op == "argmax":
            return (F.codebook_argmax(*product, impl=impl),)
        if case.op == "sample":
            return (F.codebook_sample(*product, impl=impl),)
        return (F.codebook_cross_entropy(*product, inputs.target, impl=impl),)

    return ours


def build_eager(case, device, noise=None, *, function, compiled=False):
    if compiled:
        import torch._dynamo

        if torch._dynamo.config.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
            raise NotRun("torch.compile is switched off in this environment")
        function = torch.compile(function, fullgraph=True, dynamic=False)

    def eager(inputs):
        product = inputs.hidden, inputs.weight, inputs.bias
        if case.op == "gumbel":
            return function(*product, inputs.codebook, noise)
        return (function(*product, inputs.target) if case.op == "cross_entropy" else function(*product),)

    return eager


def build_products(case, device):
    """The two matrix products, without bias, into memory that is there already."""
    options = {"dtype": DTYPES[case.dtype], "device": device}
    logits = torch.empty(case.rows, case.codes, **options)
    embedding = torch.empty(case.rows, case.embedding_dim, **options)

    def products(inputs):
        torch.mm(inputs.hidden, inputs.weight.T, out=logits)
        return (torch.mm(logits, inputs.codebook, out=embedding),)

    return products


def needs(package: str, device: str) -> None:
    """Raise NotRun where a package of GPU kernels cannot run."""
    if importlib.util.find_spec(package) is None:
        raise NotRun("not installed")
    if device != "cuda":
        raise NotRun("needs a GPU")


def build_liger(case, device):
    needs("liger_kernel", device)
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda inputs: (loss(inputs.weight, inputs.hidden, inputs.target, inputs.bias),)


def build_cut_cross_entropy(case, device):
    needs("cut_cross_entropy", device)
    from cut_cross_entropy import linear_cross_entropy

    if "bias" not in inspect.signature(linear_cross_entropy).parameters:
        raise NotRun("its function takes no bias")
    return lambda inputs: (linear_cross_entropy(inputs.hidden, inputs.weight, inputs.target, bias=inputs.bias),)


def contenders_of(case: Case, args) -> list[Contender]:
    """Ours first, then the peers."""
    found = [Contender(OURS, OURS, functools.partial(build_ours, impl=args.impl))]

    def eager(function, suffix=""):
        build = functools.partial(build_eager, function=function)
        found.append(Contender("eager" + suffix, "eager", build, dense=True))

    def compiled(function, suffix=""):
        build = functools.partial(build_eager, function=function, compiled=True)
        found.append(Contender("compiled" + suffix, "compiled", build, dense=True, compiled=True))

    if case.op == "gumbel":
        if case.pass_ == FORWARD:
            found.append(Contender(PRODUCTS, "products", build_products, dense=True, floor=True))
        eager(eager_gumbel)
        compiled(eager_gumbel)
    elif case.op == "argmax":
        eager(eager_argmax)
        compiled(eager_argmax)
    elif case.op == "sample":
        eager(eager_multinomial, ", multinomial")
        eager(eager_gumbel_argmax, ", Gumbel argmax")
        compiled(eager_gumbel_argmax, ", Gumbel argmax")
    else:
        eager(eager_cross_entropy)
        compiled(eager_cross_entropy)
        found.append(Contender("Liger", "Liger", build_liger))
        found.append(Contender("cut-cross-entropy", "cut-cross-entropy", build_cut_cross_entropy))
    return found


# -- exactness ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def noise_of(rows: int, codes: int, device: str) -> torch.Tensor:
    """The noise of SEED, (N, K) float32, as every implementation of this package computes it."""
    seed = torch.full((1,), SEED, dtype=torch.int64, device=device)
    numbers = torch.arange(rows, device=device).split(max(1, BLOCK_PAIRS // codes))
    return torch.cat([codebook_noise.gumbel_noise(seed, row, codes) for row in numbers])


class Oracle:
    """Holds results against the same expressions in float64, by blocks of rows so that little memory is held."""

    CONTRASTS = ("parity of the code", "code modulo 32", "last eighth against first", "log probability")

    def __init__(self, case: Case, inputs: Inputs):
        self._case, self._inputs = case, inputs
        self._device = inputs.hidden.device.type
        self._exact = {}
        self.facts = {"samples": SAMPLE_ROUNDS * case.rows} if case.op == "sample" else {}
        results = {"gumbel": ("embedding", "kl"), "cross_entropy": ("loss",)}.get(case.op, ())
        grads = ("grad_hidden", "grad_weight", "grad_bias", "grad_codebook") if case.pass_ == FORWARD_BACKWARD else ()
        self._names = (*results, *grads)

    def judge(self, contender: Contender, call) -> dict:
        """The errors of a contender: of each tensor by its name, or of its codes."""
        case = self._case
        if case.op == "sample":
            return self._contrasts(call)
        if case.op == "argmax":
            return self._codes_errors(call()[0])
        if case.op == "cross_entropy":
            return exactness.compare(self._names, call(), self._expected())
        call()  # what is timed has to run, too
        # This package's noise is float32; others hold it in the dtype of the logits, and are exact for what they hold.
        dtype = torch.float32 if contender.name == OURS else DTYPES[case.dtype]
        noise = noise_of(case.rows, case.codes, self._device).to(dtype)
        outputs = make_call(contender.build(case, self._device, noise=noise), case, self._inputs)()
        return exactness.compare(self._names, outputs, self._expected(dtype))

    def allowed(self) -> dict:
        """Of each tensor the errors that are tolerated: twice those of eager torch, plus one rounding."""
        case, dtype = self._case, DTYPES[self._case.dtype]
        if case.op == "sample":
            return {name: {"z": MOST_Z} for name in self.CONTRASTS}
        epsilon = torch.finfo(dtype).eps
        if case.op == "argmax":
            eager = torch.cat([eager_argmax(*product) for product in self._blocks(dtype)])
            rounding = epsilon * float(self._largest_logits().abs().max())
            return {"codes": {"max_abs": 2 * self._codes_errors(eager)["codes"]["max_abs"] + rounding}}
        errors = exactness.compare(self._names, self._dense(dtype, dtype), self._expected(dtype))
        # The terms of kl's sum, log p + log K, have this size.
        sizes = {"kl": errors["kl"]["largest"] + math.log(case.codes)} if case.op == "gumbel" else None
        return exactness.limits(errors, epsilon, sizes)

    # Results and gradients

    def _expected(self, noise_dtype=torch.float32):
        if noise_dtype not in self._exact:
            self._exact[noise_dtype] = self._dense(torch.float64, noise_dtype)
        return self._exact[noise_dtype]

    def _dense(self, dtype, noise_dtype):
        """Results and gradients of the expressions in `dtype`, with noise rounded to `noise_dtype`; sums in float64."""
        case, inputs = self._case, self._inputs
        backward = case.pass_ == FORWARD_BACKWARD
        parameters = [x.detach().to(dtype).requires_grad_(backward) for x in inputs.parameters(case)]
        results, of_rows, sums = [], [], [torch.zeros_like(x, dtype=torch.float64) for x in parameters[1:]]
        for rows in self._row_blocks():
            hidden, *others = parameters
            block = hidden[rows].detach().requires_grad_(backward)
            with torch.set_grad_enabled(backward):
                if case.op == "gumbel":
                    noise = noise_of(case.rows, case.codes, self._device)[rows].to(noise_dtype).to(dtype)
                    outputs = eager_gumbel(block, *others, noise)
                    of_outputs = [grad[rows].to(dtype) for grad in (inputs.grad_embedding, inputs.grad_kl)]
                else:
                    share = len(block) / case.rows  # of the mean over all rows
                    outputs = (eager_cross_entropy(block, *others, inputs.target[rows]),)
                    of_outputs = [torch.full_like(outputs[0], share)]
            if backward:
                grads = torch.autograd.grad(outputs, (block, *others), of_outputs)
                of_rows.append(grads[0])
                for total, grad in zip(sums, grads[1:]):
                    total += grad
            results.append([out.detach().double() for out in outputs])
        if case.op == "gumbel":
            results = [torch.cat(parts) for parts in zip(*results)]
        else:
            results = [sum(loss * len(rows) for (loss,), rows in zip(results, self._row_blocks())) / case.rows]
        return (*results, torch.cat(of_rows).double(), *sums) if backward else tuple(results)

    def _row_blocks(self):
        numbers = torch.arange(self._case.rows, device=self._device)
        return numbers.split(max(1, BLOCK_PAIRS // self._case.codes))

    def _blocks(self, dtype):
        """(hidden, weight, bias) in `dtype`, by blocks of rows."""
        hidden, weight, bias = (x.detach().to(dtype) for x in self._inputs[:3])
        return ((hidden[rows], weight, bias) for rows in self._row_blocks())

    def _logits(self):
        return (torch_F.linear(*product) for product in self._blocks(torch.float64))

    # Codes

    def _largest_logits(self):
        return torch.cat([logits.amax(-1) for logits in self._logits()])

    def _codes_errors(self, codes) -> dict:
        """How much smaller the logits of the codes are than the largest, and the share of rows with other codes."""
        blocks = codes.split(max(1, BLOCK_PAIRS // self._case.codes))
        taken = [logits.gather(-1, of[:, None])[:, 0] for logits, of in zip(self._logits(), blocks)]
        largest = self._largest_logits()
        lost = largest - torch.cat(taken)
        errors = exactness.compare(["codes"], [largest - lost], [largest])
        errors["codes"]["rows_that_differ"] = float((lost > 0).double().mean())
        return errors

    def _contrasts(self, call) -> dict:
        """How many standard deviations sums over the sampled codes are from what they are expected to be."""
        torch.manual_seed(SEED)
        samples = torch.stack([call()[0] for _ in range(SAMPLE_ROUNDS)], -1)
        K = self._case.codes
        code = torch.arange(K, device=self._device)
        in_eighths = (8 * code >= 7 * K).double() - (8 * code < K).double()
        of_codes = [(code % 2).double(), (code % 32 >= 16).double(), in_eighths]
        difference, variance = 0, 0
        for logits, rows in zip(self._logits(), self._row_blocks()):
            log_p = torch.log_softmax(logits, -1)
            p = log_p.exp()
            numbers = [*(number.expand_as(p) for number in of_codes), log_p]  # in the order of CONTRASTS
            expected = [(p * number).sum(-1, keepdim=True) for number in numbers]
            taken = [number.gather(-1, samples[rows]) for number in numbers]
            difference += torch.stack([(one - mean).sum() for one, mean in zip(taken, expected)])
            variance += torch.stack([(p * (number - mean) ** 2).sum() for number, mean in zip(numbers, expected)])
        z = difference.abs() / (SAMPLE_ROUNDS * variance).sqrt()
        return {name: {"z": float(size)} for name, size in zip(self.CONTRASTS, z)}


# -- results -----------------------------------------------------------------------------------------------------------


def describe_case(case: Case) -> dict:
    """What the case is, for the results file."""
    return {
        "name": case.name,
        "op": case.op,
        "din": case.din,
        "rows": case.rows,
        "codes": case.codes,
        "embedding_dim": case.embedding_dim,
    }


def case_title(result: dict) -> str:
    samples = f" ({result['samples']} samples tested)" if "samples" in result else ""
    return result["name"] + samples


def error_columns(result: dict):
    if result["op"] == "sample":
        return ("largest z", "of contrasts"), lambda errors: [f"{exactness.worst(errors, 'z'):.1f}", str(len(errors))]
    if result["op"] == "argmax":
        return ("logit lost", "other codes"), lambda errors: [
            f"{errors['codes']['max_abs']:.1e}", f"{errors['codes']['rows_that_differ']:.2%}"
        ]  # fmt: skip
    return ("max error", "rms error"), reporting.max_and_rms


def error_over_eager(result: dict, entries: dict) -> str:
    """A cell: the largest over tensors of this package's error over eager torch's; of samples the largest z.

    Of eager's error at least one rounding of the largest number counts: a loss is one number, and may be right by luck.
    """
    errors = entries[OURS].get("error")
    if not errors:
        return "-"
    if result["op"] == "sample":
        return f"z {exactness.worst(errors, 'z'):.1f}"
    if result["op"] == "argmax":
        return f"{errors['codes']['rows_that_differ']:.2%} differ"
    rounding = torch.finfo(DTYPES[result["dtype"]]).eps / 2
    return reporting.error_over(errors, entries["eager"].get("error"), least=rounding)


def time_over_products(result: dict, entries: dict) -> str:
    """A cell: this package's time over that of the two matrix products alone."""
    both = [entries.get(name, {}).get("median_s") for name in (OURS, PRODUCTS)]
    return f"{both[0] / both[1]:.2f}x" if all(both) else "-"


def fastest_other(result: dict, entries: dict) -> str:
    """A cell: the ratio of the fastest of the others, and who that is."""
    if not result["ratios"]:
        return "-"
    best = min(result["ratios"].values(), key=lambda entry: entry["ratio"])
    return f"{best['ratio']:.2f}x ({best['contender']})"


def summary_columns(results: list[dict]) -> dict:
    def vs(peer):
        return lambda result, _: reporting.ratio_cell(result, peer)

    return {
        "/ products": time_over_products,
        "vs eager": vs("eager"),
        "vs compiled": vs("compiled"),
        "vs fastest other": fastest_other,
        "error / eager's": error_over_eager,
    }


def notes(results: list[dict]) -> str:
    """What stands below the summary."""
    return (
        "/ products: ours over the two matrix products alone, which are a bound. vs: the time of the fastest of that "
        "kind over ours.\n"
        "Errors: against float64 with the same noise, the largest ratio of all tensors, or argmax's rows with another "
        "code than\nfloat64's, or of a sample how many standard deviations the farthest of "
        f"{len(Oracle.CONTRASTS)} sums over its codes is off.\n"
        "Extra memory: the peak of one call beyond inputs, outputs and gradients."
    )


def plot_title(report: dict) -> str:
    return f"Codebook, {report['settings']['sizes']}"


# -- command line ------------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = flags.make_parser(
        "Time, exactness and memory of Gumbel-softmax over a codebook, argmax, sampling and cross-entropy against "
        "eager and compiled torch and others' kernels."
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer cases and rounds")
    add("--op", choices=OPS, action="append", help="repeatable (default: all)")
    add("--rows", type=flags.integer(1), metavar="N", help="number of rows (default: "
        f"{ROWS['cpu']} on a CPU, {ROWS['cuda']} on a GPU)")  # fmt: skip
    add("--codes", type=flags.integer(2), default=8192, metavar="K", help="number of codes")
    add("--embedding-dim", type=flags.integer(1), default=128, metavar="D", help="size of an embedding")
    add("--din", type=flags.integer(1), action="append", metavar="DIN", help="size of hidden; repeatable (default: "
        f"{' and '.join(map(str, DINS))}, or {DINS[0]} with --quick)")  # fmt: skip
    dtypes = f"float32 on a CPU, and bfloat16 once: gumbel, forward, Din {DINS[0]}; bfloat16 on a GPU"
    flags.add_shared_flags(parser, dtypes=dtypes, rounds=MIN_ROUNDS, seconds=SECONDS)
    return parser


def parse(argv: list[str]):
    parser = make_parser()
    args = parser.parse_args(argv)
    flags.settle_shared_flags(parser, args, SECONDS)
    args.rows = args.rows or ROWS[args.device]
    args.cases = make_cases(args)
    if without := [op for op in args.op or () if op not in {case.op for case in args.cases}]:
        parser.error(f"argument --pass: {' and '.join(without)} has no backward pass; expected {FORWARD}")

    def attempt(case):
        case = case.small()
        make_call(build_ours(case, args.device, impl=args.impl), case, make_inputs(case, args.device))()

    flags.refuse_what_cannot_serve(parser, args, attempt)
    return args


def main(argv: list[str] | None = None) -> int:
    return harness.run(sys.modules[__name__], argv)


if __name__ == "__main__":
    sys.exit(main())
