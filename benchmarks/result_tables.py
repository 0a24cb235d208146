"""Write a results file of a benchmark into RESULTS.md as a table, between two markers.

    python benchmarks/result_tables.py benchmarks/results/attn_cpu.json
    python benchmarks/result_tables.py benchmarks/results/attn_gpu.json --name attn_bench_gpu
    python benchmarks/result_tables.py benchmarks/results/codebook_cpu.json

The markers are `<!-- attn_bench:begin -->` and `<!-- attn_bench:end -->`, each on a line of its own, or the same with
the name of the benchmark that wrote the file; what is between them is replaced. With --check nothing is written, and
the exit code is 1 where RESULTS.md shows something else.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import attn_bench
import codebook_bench
import flags
import reporting

BENCHMARKS = {module.NAME: module for module in (attn_bench, codebook_bench)}


class Refusal(Exception):
    """What stands between these files and a table."""


def read_report(path: Path) -> dict:
    """The results file at `path`.

    Raises:
        Refusal: it cannot be read, is not one of a benchmark's, or holds no case.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refusal(f"{path}: {error.strerror}") from error
    except ValueError as error:  # not JSON, or not text
        raise Refusal(f"{path} is not JSON ({error})") from error
    if not isinstance(report, dict) or report.get("benchmark") not in BENCHMARKS:
        scripts = " or ".join(f"{module.__name__}.py" for module in BENCHMARKS.values())
        names = " or ".join(f'"{name}"' for name in BENCHMARKS)
        raise Refusal(f'{path} is not a results file of {scripts}: expected "benchmark": {names}')
    if not report.get("cases"):
        raise Refusal(f"{path} holds no measured case")
    return report


def render(report: dict) -> str:
    """The Markdown of a report: what was measured where, the table of ratios, and who could not run.

    Raises:
        Refusal: the report lacks something.
    """
    benchmark = BENCHMARKS[report["benchmark"]]
    try:
        commit, changes, _ = (report["commit"] or "unknown").partition("+")
        measured = (
            f"Measured {report['date'][:10]} at commit {commit[:10]}{changes and '+changes'} on "
            f"{reporting.where_line(report)}: {report['settings']['sizes']}. A ratio is the other's median time over "
            "this package's in the same run."
        )
        columns = benchmark.summary_columns(report["cases"])
        table = reporting.table(*reporting.summary_rows(columns, report["cases"]), markdown=True)
        if any("host_s" in entry for case in report["cases"] for entry in case["contenders"]):
            measured += " In brackets: with launch (see above)."
        lines = [measured, "", table]
        if not report["complete"]:
            lines += ["", "The run was interrupted: not every case is here."]
        refusals = not_run(report["cases"])
    except (KeyError, TypeError, AttributeError) as error:
        script = f"{benchmark.__name__}.py"
        raise Refusal(f"these results are not as this version of {script} writes them ({error!r})") from error
    if refusals:
        lines += ["", "Not run: " + "; ".join(refusals) + "."]
    return "\n".join(lines)


def not_run(results: list[dict]) -> list[str]:
    """Text "contenders: reason (in so many cases)", one for each reason why somebody could not take part."""
    found = {}
    for result in results:
        for entry in result["contenders"]:
            if entry["status"] != "ok":
                found.setdefault(entry["reason"], []).append((entry["name"], result["name"]))
    texts = []
    for reason, pairs in found.items():
        names, cases = (list(dict.fromkeys(column)) for column in zip(*pairs))
        texts.append(f"{' and '.join(names)}: {reason} ({len(cases)} of {len(results)} cases)")
    return texts


def insert(text: str, content: str, name: str) -> str:
    """`text` with `content` between the lines of markers called `name`.

    Raises:
        Refusal: not exactly one line of each marker is there, the beginning first.
    """
    markers = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    lines = text.split("\n")
    places = [[n for n, line in enumerate(lines) if line.strip() == marker] for marker in markers]
    if [len(found) for found in places] != [1, 1] or places[0] > places[1]:
        raise Refusal(
            f"expected one line {markers[0]} and one line {markers[1]} after it, found the first on "
            f"{_line_numbers(places[0])} and the second on {_line_numbers(places[1])}"
        )
    (begin,), (end,) = places
    return "\n".join([*lines[: begin + 1], content, *lines[end:]])


def _line_numbers(places: list[int]) -> str:
    return f"line {', '.join(str(n + 1) for n in places)}" if places else "no line"


def write_text(path: Path, text: str) -> None:
    """Replace the file at `path`, keeping its mode: the whole of it or nothing."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.chmod(temporary, path.stat().st_mode)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def marker_name(text: str) -> str:
    """An argparse type: what the markers are called."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", text):
        raise argparse.ArgumentTypeError(f"expected letters, digits, _ and -, got {text!r}")
    return text


def main(argv: list[str] | None = None) -> int:
    parser = flags.make_parser(
        "Write a results file of a benchmark into RESULTS.md, between <!-- NAME:begin --> and <!-- NAME:end -->."
    )
    parser.add_argument("results", type=Path, metavar="RESULTS.json", help="what a benchmark's --json wrote")
    parser.add_argument("--into", type=Path, metavar="FILE", help="file to write into (default: benchmarks/RESULTS.md)")
    parser.add_argument("--name", type=marker_name, help="name of the markers (default: that of the benchmark, "
        "attn_bench or codebook_bench)")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the file differs")
    args = parser.parse_args(argv)
    target = args.into or flags.ROOT / "benchmarks" / "RESULTS.md"
    try:
        report = read_report(args.results)
        content, name = render(report), args.name or BENCHMARKS[report["benchmark"]].__name__
        try:
            with open(target, encoding="utf-8", newline="") as file:
                before = file.read()
        except OSError as error:
            raise Refusal(f"{target}: {error.strerror}") from error
        try:
            after = insert(before, content, name)
        except Refusal as refusal:
            raise Refusal(f"{target}: {refusal}") from None
    except Refusal as refusal:
        parser.error(str(refusal))
    if before == after:
        print(f"{target.name} is up to date")
    elif args.check:
        print(f"{target.name} does not show {args.results.name}; run benchmarks/result_tables.py without --check")
        return 1
    else:
        write_text(target, after)
        print(f"wrote the table into {target.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
