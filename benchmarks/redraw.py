"""Draw the plot of a results file once more, as --plot would draw it today.

python benchmarks/redraw.py benchmarks/results/attn_cpu.json benchmarks/results/attn_cpu.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import attn_bench
import codebook_bench
import flags
import generate_bench
import measuring
import reporting
import train_bench

BENCHMARKS = {module.NAME: module for module in (attn_bench, codebook_bench, generate_bench, train_bench)}


def main(argv: list[str] | None = None) -> int:
    parser = flags.make_parser("Draw the plot of a results file once more.")
    parser.add_argument("results", type=Path, metavar="RESULTS.json", help="what a benchmark's --json wrote")
    parser.add_argument("plot", type=flags.output_file(".png"), metavar="FILE.png", help="write the plot there")
    args = parser.parse_args(argv)
    try:
        report = json.loads(args.results.read_text(encoding="utf-8"))
        benchmark = BENCHMARKS[report["benchmark"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{args.results} is not a results file of a benchmark with a plot ({measuring.describe(error)})")
    reporting.draw(benchmark, report, args.plot)
    print(f"wrote {args.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
