"""Sparse attention against what else torch offers: time, exactness and memory, case by case.

    python benchmarks/attn_bench.py                        the paper's sizes on the best device here
    python benchmarks/attn_bench.py --quick                fewer cases, about a second of timing each
    python benchmarks/attn_bench.py --mask row --grid 64   one mask on a larger grid

A case is a mask, a pass (forward, or forward and backward), a dtype and the sizes. In each case the contenders take
turns in one process (`harness.time_interleaved`), and each one's result is held against float64 in the same run: the
command fails where this package errs more than twice as much as eager attention in the same dtype, plus rounding.

B batch, H heads, S sequence, D head size, T text.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import logging
import math
import sys

import harness
import torch
import torch.nn.functional as torch_F
from harness import NotRun

from dalle_fast.masks import CONV_EDGES, AttentionMask, causal_mask, column_mask, conv_mask, row_mask

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORWARD, FORWARD_BACKWARD = "forward", "forward+backward"
PASSES = (FORWARD, FORWARD_BACKWARD)
IMPLS = ("auto", "reference", "cpu", "triton", "cuda")
DEFAULT_MASKS = ("row", "column", "conv:11")
OURS = "dalle_fast"
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
class Contender:
    """Who computes it. `build(case, device)` returns attention(query, key, value) or raises NotRun.

    `peer` is the column of the ratios it counts for: the fastest of a column is the one compared with. `causal` ones
    compute dense causal attention, and are held against that.
    """

    name: str
    peer: str
    build: object
    causal: bool = False
    dense: bool = False  # materialises the logits, so its memory is guarded


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


def build_sdpa_mask(case, device):
    return functools.partial(torch_F.scaled_dot_product_attention, attn_mask=case.mask.to_dense(device))


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


def make_contenders(device: str, impl: str, flex_blocks: list[int]) -> list[Contender]:
    """Ours first, then the peers."""
    found = [Contender(OURS, OURS, functools.partial(build_ours, impl=impl))]
    if device == "cuda":
        for name, backend in (("cuDNN", "CUDNN_ATTENTION"), ("FlashAttention-2", "FLASH_ATTENTION")):
            build = functools.partial(build_sdpa_causal, backend=backend)
            found.append(Contender(f"SDPA causal, {name}", "SDPA causal", build, causal=True))
    else:
        found.append(Contender("SDPA causal", "SDPA causal", build_sdpa_causal, causal=True))
    found.append(Contender("SDPA mask", "SDPA mask", build_sdpa_mask))
    if device == "cuda":
        found.append(Contender("FlexAttention, default", "FlexAttention", functools.partial(build_flex, block=128)))
    for block in flex_blocks:
        name = f"FlexAttention, block {block}"
        if device == "cpu" or block != 128:  # 128 is the default
            found.append(Contender(name, "FlexAttention", functools.partial(build_flex, block=block)))
        if device == "cuda":
            build = functools.partial(build_flex, block=block, tuned=True)
            found.append(Contender(f"{name}, autotuned", "FlexAttention", build))
    if device == "cuda":
        build = functools.partial(build_flex, block=128, backend="FLASH")
        found.append(Contender("FlexAttention, FLASH", "FlexAttention", build))
    found.append(Contender("eager", "eager", build_eager, dense=True))
    return found


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

    def forward():
        with torch.no_grad():
            return (attention(*qkv),)

    def forward_backward():
        out = attention(*qkv)
        return (out.detach(), *torch.autograd.grad(out, qkv, grad_out))

    return forward if case.pass_ == FORWARD else forward_backward


@contextlib.contextmanager
def strict_compile():
    """Forget earlier variants, and make torch.compile fail where it would run eagerly: past its limit of them."""
    import torch._dynamo

    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no talk of a missing GPU
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


def extra_memory(contender: Contender, case: Case, device: str, threads: int) -> int:
    """Extra bytes of one call. On the CPU this runs in a process of its own, on the first call at this size.

    Before it comes a call on a few tokens, which loads code. FlexAttention is called at its full size instead, since
    it is compiled per shape: here, so that contenders compile side by side and the timing process finds the result
    in the compiler's cache.
    """
    torch.set_num_threads(threads)
    with strict_compile():
        if device == "cpu" and contender.peer != "FlexAttention":
            mask = dataclasses.replace(case.mask, text_len=min(case.mask.text_len, 8), grid=(4, 4))
            small = dataclasses.replace(case, mask=mask)
            make_call(contender.build(small, device), small, make_inputs(small, device))()
            call = make_call(contender.build(case, device), case, make_inputs(case, device))
        else:
            call = make_call(contender.build(case, device), case, make_inputs(case, device))
            call()
        return harness.cpu_extra_bytes(call) if device == "cpu" else harness.cuda_extra_bytes(call)


class TooLarge(NotRun):
    """It would need more memory than is free."""


def check_memory(contender: Contender, case: Case, available: int | None) -> None:
    if contender.dense and available is not None and case.dense_bytes > available:
        need, have = (f"{size / 2**30:.1f} GiB" for size in (case.dense_bytes, available))
        raise TooLarge(f"its dense logits need about {need}, {have} are free")


def free_bytes(device: str) -> int | None:
    return torch.cuda.mem_get_info()[0] if device == "cuda" else harness.available_bytes()


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

    def errors(self, outputs, *, causal: bool = False) -> dict:
        """Of each tensor the largest error, and its root mean square relative to that of the exact values."""
        return self._compare(self._select(outputs), causal)

    def eager_errors(self) -> dict:
        """What eager attention in the case's dtype errs on these heads."""
        return self._compare(self._dense(self._case.mask, self._inputs), causal=False)

    def allowed(self) -> dict:
        """The largest error that is tolerated, per tensor: twice eager attention's, plus one rounding."""
        epsilon = torch.finfo(DTYPES[self._case.dtype]).eps
        eager = self.eager_errors()
        largest = [float(exact.abs().max()) for exact in self._expected(causal=False)]
        # A gradient that is zero throughout (one visible key) is the difference of terms as large as the others.
        sizes = [size or max(largest) for size in largest]
        return {name: 2 * eager[name]["max_abs"] + epsilon * size for name, size in zip(eager, sizes)}

    def _select(self, tensors):
        return [tensor.detach().flatten(0, 1)[self.heads] for tensor in tensors]

    def _compare(self, outputs, causal):
        errors = {}
        for name, output, exact in zip(self.TENSORS, outputs, self._expected(causal)):
            difference = output.double() - exact
            size = difference.norm()
            errors[name] = {
                "max_abs": float(difference.abs().max()),
                "rms_relative": float(size / exact.norm()) if size != 0 else 0.0,
            }
        return errors

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


def worst(errors: dict, key: str) -> float:
    """The largest of a case's tensors; NaN if any is (null in a results file)."""
    values = [entry[key] for entry in errors.values()]
    return math.nan if any(value is None or math.isnan(value) for value in values) else max(values)


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure_case(case: Case, contenders: list[Contender], args, device: str, tick, say) -> dict:
    """Everything about one case as a dictionary for the results file.

    On KeyboardInterrupt the exception carries what is complete as `result`.
    """
    result = {
        "name": case.name,
        "mask": repr(case.mask),
        "rule": case.mask.rule,
        "text_len": case.mask.text_len,
        "grid": list(case.mask.grid),
        "seq_len": case.mask.seq_len,
        "kernel_size": case.mask.kernel_size,
        "dilation": case.mask.dilation,
        "batch": case.batch,
        "heads": case.heads,
        "head_dim": case.head_dim,
        "dtype": case.dtype,
        "pass": case.pass_,
        "pairs_of_causal": case.mask.num_pairs / (case.mask.seq_len * (case.mask.seq_len + 1) / 2),
        "complete": False,
    }
    entries = {c.name: {"name": c.name, "peer": c.peer, "status": "ok"} for c in contenders}
    calls = {}
    try:
        say(f"{case.name}: memory, compiling")
        memory = measure_memory(case, contenders, args, device, lambda fraction: tick(0.5 * fraction))
        say(f"{case.name}: exactness")
        inputs = make_inputs(case, device)
        oracle = Oracle(case, inputs)
        result["heads_checked"] = f"{len(oracle.heads)} of {case.batch * case.heads}"
        with strict_compile():
            for contender in contenders:
                entry = entries[contender.name]
                try:
                    if isinstance(memory[contender.name], (TooLarge, harness.Died)):
                        raise memory[contender.name]
                    call = make_call(contender.build(case, device), case, inputs)
                    entry["error"] = oracle.errors(call(), causal=contender.causal)
                except Exception as error:  # noqa: BLE001 - a contender's failure is a line of the report
                    entry |= {"status": "not run", "reason": reason_of(error)}
                    continue
                extra = memory[contender.name]
                entry["extra_bytes"] = None if isinstance(extra, Exception) else extra
                if isinstance(extra, Exception):
                    entry["extra_bytes_reason"] = reason_of(extra)
                calls[contender.name] = call
            again = {name: call() for name, call in calls.items()}  # now that everything is compiled
            if OURS in again:
                check_ours(entries[OURS], oracle.allowed(), oracle.errors(again[OURS]))
            del oracle, again
            say(f"{case.name}: timing")
            timings = harness.time_interleaved(
                calls,
                device=device,
                seconds=args.seconds,
                min_rounds=3 if args.quick else 7,
                tick=lambda fraction: tick(0.5 + 0.5 * fraction),
            )
        result["complete"] = True
    except KeyboardInterrupt as interrupt:
        timings = getattr(interrupt, "timings", {})
        interrupt.result = finish_case(result, entries, timings)
        raise
    return finish_case(result, entries, timings)


def measure_memory(case: Case, contenders, args, device: str, tick) -> dict:
    """name -> extra bytes, or the exception that says why there is no such number."""
    found, available, done = {}, free_bytes(device), 0
    for contender in contenders:
        try:
            check_memory(contender, case, available)
        except NotRun as reason:
            found[contender.name] = reason
    todo = {c.name: (c, case, device, args.threads) for c in contenders if c.name not in found}

    def one_more():
        nonlocal done
        done += 1
        tick(done / len(todo))

    if device == "cpu":
        roomy = available is not None and 2 * case.dense_bytes < available
        workers = min(2, harness.describe_machine()["cores"]) if roomy else 1
        return found | harness.isolated(extra_memory, todo, workers=workers, tick=one_more)
    for name, arguments in todo.items():
        try:
            found[name] = extra_memory(*arguments)
        except Exception as error:  # noqa: BLE001 - reported with the contender
            found[name] = error
        torch.cuda.empty_cache()
        one_more()
    return found


def reason_of(error: BaseException) -> str:
    """One line: a refusal's text as it is, of other exceptions also their type."""
    if isinstance(error, NotRun):
        return str(error)
    return harness.describe(error)


def check_ours(entry: dict, allowed: dict, second: dict) -> None:
    """Judge this package's errors in its first call and in a second one; the verdict goes into its entry."""
    entry["allowed_error"] = allowed
    entry["exact"] = all(
        errors[name]["max_abs"] <= limit for errors in (entry["error"], second) for name, limit in allowed.items()
    )


def finish_case(result: dict, entries: dict, timings: dict) -> dict:
    """Add timings and ratios."""
    ours = timings.get(OURS)
    for name, entry in entries.items():
        timing = timings.get(name)
        if timing is None:
            if entry["status"] == "ok":
                entry |= {"status": "not run", "reason": "interrupted"}
            continue
        entry |= {"median_s": timing.median, "q1_s": timing.q1, "q3_s": timing.q3}
        entry["repetitions"] = timing.repetitions
        entry["ratio"] = timing.median / ours.median if ours else None
    ratios = {}
    for peer in PEERS:
        runs = [e for e in entries.values() if e["peer"] == peer and e.get("ratio")]
        if runs:
            best = min(runs, key=lambda e: e["median_s"])
            ratios[peer] = {"ratio": best["ratio"], "contender": best["name"]}
    return result | {"contenders": list(entries.values()), "ratios": ratios}


def passed(result: dict) -> bool:
    """Did this package run, and exactly?"""
    ours = result["contenders"][0]
    return ours["status"] == "ok" and ours["exact"]


# -- printing ----------------------------------------------------------------------------------------------------------


def case_text(result: dict) -> str:
    """One case as a table for people."""
    header = ["contender", "median ms", "quartiles ms", "runs", "/ ours", "max error", "rms error", "extra MiB"]
    rows, notes = [], []
    for entry in result["contenders"]:
        if "median_s" not in entry:
            notes.append(f"{entry['name']}: not run ({entry.get('reason', 'interrupted')})")
            continue
        extra = entry["extra_bytes"]
        if extra is None:
            notes.append(f"{entry['name']}: memory not measured ({entry['extra_bytes_reason']})")
        rows.append(
            [
                entry["name"],
                f"{entry['median_s'] * 1e3:.3f}",
                f"{entry['q1_s'] * 1e3:.3f} .. {entry['q3_s'] * 1e3:.3f}",
                str(entry["repetitions"]),
                f"{entry['ratio']:.2f}x" if entry["ratio"] else "-",
                f"{worst(entry['error'], 'max_abs'):.1e}",
                f"{worst(entry['error'], 'rms_relative'):.1e}",
                "-" if extra is None else f"{extra / harness.MIB:.2f}",
            ]
        )
    if result["contenders"][0]["status"] == "ok" and not result["contenders"][0].get("exact", True):
        limits = ", ".join(f"{name} {limit:.1e}" for name, limit in result["contenders"][0]["allowed_error"].items())
        notes.append(f"{OURS}: TOO INEXACT, allowed are {limits}")
    title = f"{result['name']} ({result['pairs_of_causal']:.2f} of the causal pairs)"
    body = [harness.table(header, rows)] if rows else []
    return "\n".join([title, *body, *notes]) + "\n"


def summary_rows(results: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of ratios, one row per case; also what the README shows."""
    header = ["case", "ours, ms", *(f"vs {peer}" for peer in PEERS), "error / eager's", "extra MiB"]
    rows = []
    for result in results:
        entries = {entry["name"]: entry for entry in result["contenders"]}
        ours, eager = entries[OURS], entries["eager"]
        row = [result["name"], f"{ours['median_s'] * 1e3:.2f}" if "median_s" in ours else "not run"]
        row += [f"{result['ratios'][p]['ratio']:.2f}x" if p in result["ratios"] else "-" for p in PEERS]
        both = "error" in ours and "error" in eager and worst(eager["error"], "max_abs") > 0
        row.append(f"{worst(ours['error'], 'max_abs') / worst(eager['error'], 'max_abs'):.2f}" if both else "-")
        extra = ours.get("extra_bytes")
        row.append("-" if extra is None else f"{extra / harness.MIB:.2f}")
        rows.append(row)
    return header, rows


def draw(report: dict, path) -> None:
    """A grouped bar chart: for every case, how many times longer each peer takes than this package."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = [result for result in report["cases"] if result["ratios"]]
    figure = Figure(figsize=(max(6.0, 1.5 + 1.35 * len(results)), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / len(PEERS)
    for place, peer in enumerate(PEERS):
        at = [n for n, result in enumerate(results) if peer in result["ratios"]]
        heights = [results[n]["ratios"][peer]["ratio"] for n in at]
        offset = (place - (len(PEERS) - 1) / 2) * width
        label = f"{peer} (best of its settings)" if peer == "FlexAttention" else peer
        bars = axes.bar([n + offset for n in at], heights, width, label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=1)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(results)), [result["name"].replace(", ", "\n") for result in results], fontsize=8)
    axes.set_ylabel("time / dalle_fast's time")
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"Attention, {report['settings']['sizes']}\n{where_line(report)}", fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


# -- command line ------------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time, exactness and memory of sparse attention against eager attention, SDPA and FlexAttention.",
        formatter_class=harness.HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer cases and rounds; on the CPU one FlexAttention block size")
    add("--grid", type=harness.grid, default="32", metavar="ROWSxCOLUMNS", help="grid of image tokens, 32 or 32x48")
    add("--text-len", type=harness.integer(0), default=256, metavar="T", help="number of text tokens")
    add("--batch", type=harness.integer(1), default=1, metavar="B", help="batch size")
    add("--heads", type=harness.integer(1), default=16, metavar="H", help="number of heads")
    add("--head-dim", type=harness.integer(1), default=64, metavar="D", help="head size")
    add("--dtype", choices=DTYPES, action="append", help="repeatable (default: float32 and bfloat16 on a CPU, the "
        "latter forward only; bfloat16 on a GPU)")  # fmt: skip
    add("--mask", type=mask_argument, action="append", metavar="MASK", help="row, axial_row, column, causal or "
        f"conv[:KERNEL[:EDGES[:DILATION]]]; repeatable (default: {', '.join(DEFAULT_MASKS)})")  # fmt: skip
    add("--pass", dest="pass_", choices=PASSES, action="append", help="repeatable (default: both)")
    add("--impl", choices=IMPLS, default="auto", help="implementation of this package")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is the best present")
    add("--threads", type=harness.integer(1), default=torch.get_num_threads(), help="CPU threads, of all contenders")
    add("--seconds", type=harness.positive_seconds, help="timing per case, all contenders together (default: 4, or 1 "
        "with --quick); at least 7 rounds are timed, or 3")  # fmt: skip
    add("--flex-block", type=harness.integer(16), action="append", metavar="N", help="FlexAttention block size to try; "
        "repeatable (default: 64 and 128, or 128 with --quick)")  # fmt: skip
    add("--json", type=harness.output_file(".json"), metavar="FILE.json", help="write the results there")
    add("--plot", type=harness.output_file(".png"), metavar="FILE.png", help="draw the ratios there")
    return parser


def parse(argv: list[str]):
    parser = make_parser()
    args = parser.parse_args(argv)
    args.seconds = args.seconds or (1.0 if args.quick else 4.0)
    args.flex_block = args.flex_block or ([128] if args.quick else [64, 128])
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch finds no CUDA device here; expected auto or cpu")
    args.device = harness.best_device() if args.device == "auto" else args.device
    try:
        args.cases = make_cases(args, args.device)
    except ValueError as error:  # sizes that are right one by one
        parser.error(f"argument --grid, --text-len or --mask: {error}")
    if args.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            parser.error("argument --plot: needs matplotlib (pip install matplotlib)")
    return args


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 1 where this package failed or was inexact, 130 where Ctrl-C ended the run."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    device = args.device
    torch.set_num_threads(args.threads)
    cases = args.cases
    contenders = make_contenders(device, args.impl, args.flex_block)
    report = harness.describe_run("attention", argv)
    report["settings"] = {
        "device": device,
        "impl": args.impl,
        "threads": args.threads,
        "seconds_per_case": args.seconds,
        "quick": args.quick,
        "sizes": cases[0].sizes,
    }
    report |= {"complete": False, "cases": []}
    print(f"{where_line(report)}\n{cases[0].sizes}\n", flush=True)
    progress = harness.Progress(len(cases))
    interrupted = False
    for number, case in enumerate(cases):
        try:
            tick = functools.partial(lambda done, fraction: progress.advance(done + fraction), number)
            result = measure_case(case, contenders, args, device, tick, progress.say)
        except KeyboardInterrupt as interrupt:
            interrupted = True
            result = getattr(interrupt, "result", None)
        if result is not None and (result["complete"] or result["ratios"]):
            report["cases"].append(result)
            progress.print(case_text(result))
        if interrupted:
            break
        progress.advance(number + 1)
    progress.close()
    report["complete"] = not interrupted
    return finish(report, args)


def finish(report: dict, args) -> int:
    """Print the summary, write the files, return the exit code."""
    results = report["cases"]
    if results:
        print(harness.table(*summary_rows(results)))
        checked = {result["heads_checked"] for result in results}
        print(f"\nvs: the time of the fastest of that kind over ours. Errors: the largest, against float64, on "
              f"{', '.join(checked)} heads.")  # fmt: skip
        print("Extra memory: the peak of one call beyond inputs, outputs and gradients; the masks of eager "
              "attention and SDPA and\nFlexAttention's block mask are made before it and not counted.")  # fmt: skip
    else:
        print("nothing was measured")
    if args.json:
        harness.write_json(args.json, report)
        print(f"wrote {args.json}")
    if args.plot:
        if any(result["ratios"] for result in results):
            draw(report, args.plot)
            print(f"wrote {args.plot}")
        else:
            print(f"did not write {args.plot}: there is no ratio to draw")
    failed = [result["name"] for result in results if not passed(result)]
    if failed:
        print(f"{OURS} failed or was too inexact: {'; '.join(failed)}", file=sys.stderr)
    if not report["complete"]:
        print("interrupted", file=sys.stderr)
        return 130
    return 1 if failed else 0


def where_line(report: dict) -> str:
    """The machine, its instruction set and the versions, in one line."""
    machine, versions = report["machine"], report["versions"]
    if report["settings"]["device"] == "cuda":
        where = machine["gpu"]["name"]
    else:
        isa = machine["dalle_fast_isa"]
        where = f"{machine['cpu']}, {report['settings']['threads']} threads" + (f", {isa}" if isa else "")
    return f"{where}; torch {versions['torch']}, Python {versions['python']}"


if __name__ == "__main__":
    sys.exit(main())
