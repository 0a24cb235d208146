"""Times every way to cut the Triton attention kernels into tiles on this GPU; `configs.TILES` is written from it by hand.

    python benchmarks/tune_attention.py --json tiles.json
    python benchmarks/tune_attention.py --mask conv:11 --head-dim 128 --grid 64

Compiling is what takes the time, so it is done by several processes before one of them measures. Each line is a
candidate of a kernel for a mask: its median, and how it stands to the tiles that the package uses now.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import sys

import torch
from attn_bench import mask_argument
from flags import DTYPES, output_file
from reporting import Progress, describe_run

from dalle_fast.checkpoint import write_json
from dalle_fast.ops.attention.triton import configs, launch
from dalle_fast.ops.attention.triton.configs import KERNELS, Tiles

ROUNDS = 15
DEFAULT_MASKS = ("row", "column", "conv:11")
OWN = ((64, 4), (128, 8))  # with the warps: a product of 64 rows keeps one group of four busy
STEPS, STAGES, REGISTERS = ((32, 32), (64, 32), (64, 64)), (1, 2, 3), (128, 168, 240)


def candidates() -> list[Tiles]:
    return [
        Tiles(own, *step, warps, stages, registers)
        for (own, warps), step, stages, registers in itertools.product(OWN, STEPS, STAGES, REGISTERS)
    ]


def choices(mask):
    """(Tiles, MaskNumbers) of every candidate and walk that fit the mask."""
    for tiles in candidates():
        for walk in configs._walks(mask):
            numbers = configs.mask_numbers(mask, walk, tiles.own)
            if numbers is not None and not (walk == "patch" and tiles.own % tiles.image):
                yield tiles, numbers


class Attention:
    """One mask's tensors, and calls of its kernels with tiles of one's choice."""

    def __init__(self, mask, dtype, batch, heads, head_dim):
        from dalle_fast.ops.attention.triton.bwd import attention_backward
        from dalle_fast.ops.attention.triton.fwd import attention_forward

        shape = batch, heads, mask.seq_len, head_dim
        self.tensors = [torch.randn(shape, device="cuda", dtype=dtype) for _ in range(4)]
        self.mask, self.forward, self.backward = mask, attention_forward, attention_backward
        self.results = attention_forward(*self.tensors[:3], None, mask, head_dim**-0.5)

    def call(self, kernel, choice):
        """A function; for a gradient's kernel it runs the whole backward pass, with the other kernel's own tiles."""
        *qkv, grad_out = self.tensors
        rest = None, self.mask, qkv[0].shape[-1] ** -0.5
        if kernel == "forward":
            return lambda: self.forward(*qkv, *rest, tiles=choice)
        which = {"query_tiles" if kernel == "grad_query" else "key_tiles": choice}
        return lambda: self.backward(grad_out, None, *qkv, *self.results, *rest, **which)


def compile_share(arguments):
    """Compile the jobs of one process, into Triton's cache on disk. Returns what could not be compiled or run."""
    jobs, dtype, heads, head_dim = arguments
    failures = {}
    for number, mask, kernel, choice in jobs:
        try:
            Attention(mask, DTYPES[dtype], 1, heads, head_dim).call(kernel, choice)()
            torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001 - too much shared memory, say: a line of the report
            failures[number] = f"{type(error).__name__}: {str(error)[:120]}"
    return failures


def time_of(calls: dict) -> dict:
    """Medians in seconds, the calls in turns."""
    samples = {key: [] for key in calls}
    for _ in range(ROUNDS):
        for key, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(200_000)  # the host gets ahead
            begin.record()
            call()
            end.record()
            end.synchronize()
            samples[key].append(begin.elapsed_time(end) / 1e3)
    return {key: statistics.median(values) for key, values in samples.items()}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mask", action="append", type=mask_argument, help="as in attn_bench.py; repeatable")
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="repeatable (default: all)")
    parser.add_argument("--grid", type=int, default=32, help="side of the grid (default: 32)")
    parser.add_argument("--text-len", type=int, default=256, metavar="T", help="(default: 256)")
    parser.add_argument("--batch", type=int, default=16, metavar="B", help="(default: 16)")
    parser.add_argument("--heads", type=int, default=16, metavar="H", help="(default: 16)")
    parser.add_argument("--head-dim", type=int, default=64, metavar="D", help="(default: 64)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() - 2), help="processes that compile")
    parser.add_argument("--json", type=output_file(".json"), metavar="FILE.json", help="write the results there")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("it needs a GPU, torch sees none")
    masks = [make(args.text_len, (args.grid, args.grid)) for make in args.mask or map(mask_argument, DEFAULT_MASKS)]
    jobs = []
    for mask in masks:
        for kernel in args.kernel or KERNELS:
            jobs += [(mask, kernel, choice) for choice in [None, *choices(mask)]]
    jobs = [(number, *job) for number, job in enumerate(jobs)]
    print(f"{len(jobs)} kernels to compile", flush=True)
    report = describe_run("tune_attention", sys.argv[1:] if argv is None else argv) | {"complete": False, "results": []}
    try:
        failures = compile_all(jobs, args)
        for mask in masks:
            attention = Attention(mask, DTYPES[args.dtype], args.batch, args.heads, args.head_dim)
            for kernel in args.kernel or KERNELS:
                mine = [job for job in jobs if job[1] == mask and job[2] == kernel]
                report["results"] += measure(attention, mask, kernel, mine, failures)
        report["complete"] = True
    except KeyboardInterrupt:
        print(f"interrupted: {len(report['results'])} of {len(jobs)} candidates are measured", file=sys.stderr)
    if args.json and report["results"]:
        write_json(args.json, report)
        print(f"wrote {args.json}")
    return 0 if report["complete"] else 130


def compile_all(jobs, args) -> dict:
    """Compile all, in processes of their own; returns the numbers of those that failed, with the reason."""
    shares, failures = [(jobs[n :: args.jobs], args.dtype, args.heads, args.head_dim) for n in range(args.jobs)], {}
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        progress = Progress(len(shares))
        for done, found in enumerate(pool.imap_unordered(compile_share, shares)):
            failures |= found
            progress.advance(done + 1)
        progress.close()
    return failures


def measure(attention, mask, kernel, jobs, failures) -> list[dict]:
    """Time one kernel's candidates for one mask, print the fastest, and return a row for each, the fastest first."""
    calls = {job[0]: attention.call(*job[2:]) for job in jobs if job[0] not in failures}
    for call in calls.values():
        call()
    times = time_of(calls)
    now = times.get(jobs[0][0], float("nan"))
    rows = []
    for number, _, _, choice in jobs:
        tiles, numbers = choice or launch.chosen_tiles(kernel, attention.tensors[0], mask)
        row = {
            "mask": repr(mask),
            "kernel": kernel,
            "tiles": tiles._asdict(),
            "walk": configs.WALKS[numbers.WALK],
            "present": choice is None,
        }
        rows.append(row | ({"reason": failures[number]} if number in failures else {"seconds": times[number]}))
    rows.sort(key=lambda row: row.get("seconds", float("inf")))
    print(f"\n{mask!r} {kernel}: {now * 1e6:.0f} us now")
    for row in rows[:6]:
        if "seconds" in row:
            tiles = tuple(Tiles(**row["tiles"]))
            print(f"  {row['seconds'] * 1e6:7.1f} us  {now / row['seconds']:.2f}x  {tiles} {row['walk']}")
    return rows


if __name__ == "__main__":
    sys.exit(main())
