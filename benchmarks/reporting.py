"""What a run leaves: the head of its results file, tables, plots, and a progress bar meanwhile."""

from __future__ import annotations

import datetime
import math
import os
import sys
import textwrap
from pathlib import Path

from exactness import worst
from flags import OURS
from measuring import MIB

from dalle_fast.provenance import describe_commit, describe_machine, describe_versions


def describe_run(benchmark: str, argv: list[str], output_flags: tuple[str, ...] = ("--json", "--plot")) -> dict:
    """The head of a results file: benchmark, date (UTC), commit, command line, machine, versions.

    Of files only the name goes in, so that a committed result does not show where someone's home is.
    """
    environment = {name: Path(value).name for name, value in os.environ.items() if name.startswith("DALLE_FAST_")}
    words = list(argv)
    for position, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in output_flags and equals:
            words[position] = f"{flag}={Path(value).name}"
        elif position and words[position - 1] in output_flags:
            words[position] = Path(word).name
    return {
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": describe_commit(),
        "environment": dict(sorted(environment.items())),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words]),
        "machine": describe_machine(),
        "versions": describe_versions(),
    }


def table(header: list[str], rows: list[list[str]], *, markdown: bool = False) -> str:
    """A table as text, the first column to the left and the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    cells = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    if markdown:
        rule = ["-" * width if column == 0 else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
        return "\n".join("| " + " | ".join(line) + " |" for line in [cells[0], rule, *cells[1:]])
    return "\n".join("  ".join(line).rstrip() for line in cells)


class Progress:
    """A progress bar on standard error, in units of steps that may be split; nothing where that is no terminal.

    Text printed through `print` goes to standard output without tearing the bar.
    """

    def __init__(self, steps: int):
        from tqdm import tqdm

        layout = "{percentage:3.0f}%|{bar:24}| {elapsed}<{remaining} {desc}"
        self._bar = tqdm(total=steps, bar_format=layout, file=sys.stderr, disable=None, leave=False)
        self._done = 0.0

    def say(self, text: str) -> None:
        """What is being done now."""
        self._bar.set_description_str(text)

    def advance(self, to: float) -> None:
        """`to` steps are done."""
        self._bar.update(to - self._done)
        self._done = to

    def print(self, text: str) -> None:
        """Print a line (or more) to standard output."""
        self._bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()


# -- a case, and all of them -------------------------------------------------------------------------------------------


def case_text(benchmark, result: dict) -> str:
    """One case as a table for people."""
    (first, second), error_cells = benchmark.error_columns(result)
    host = ["host ms"] if any("host_s" in entry for entry in result["contenders"]) else []
    header = ["contender", "median ms", "quartiles ms", *host, "runs", "/ ours", first, second, "extra MiB"]
    rows, notes = [], []
    for entry in result["contenders"]:
        if "median_s" not in entry:
            notes.append(f"{entry['name']}: not run ({entry.get('reason', 'interrupted')})")
            continue
        if entry["extra_bytes"] is None:
            notes.append(f"{entry['name']}: memory not measured ({entry['extra_bytes_reason']})")
        rows.append(
            [
                entry["name"],
                f"{entry['median_s'] * 1e3:.3f}",
                f"{entry['q1_s'] * 1e3:.3f} .. {entry['q3_s'] * 1e3:.3f}",
                *([f"{entry['host_s'] * 1e3:.3f}"] if host else []),
                str(entry["repetitions"]),
                f"{entry['ratio']:.2f}x" if entry["ratio"] else "-",
                *error_cells(entry["error"]),
                extra_mib(entry),
            ]
        )
    if result["contenders"][0]["status"] == "ok" and not result["contenders"][0].get("exact", True):
        allowed = result["contenders"][0]["allowed_error"].items()
        texts = (f"{name} {which} {limit:.1e}" for name, limits in allowed for which, limit in limits.items())
        notes.append(f"{OURS}: TOO INEXACT, allowed are {', '.join(texts)}")
    body = [table(header, rows)] if rows else []
    return "\n".join([benchmark.case_title(result), *body, *notes]) + "\n"


def extra_mib(entry: dict) -> str:
    """A cell: an entry's extra memory."""
    extra = entry.get("extra_bytes")
    return "-" if extra is None else f"{extra / MIB:.2f}"


def max_and_rms(errors: dict) -> list[str]:
    """Two cells: errors of `compare`."""
    return [f"{worst(errors, key):.1e}" for key in ("max_abs", "rms_relative")] if errors else ["-", "-"]


def error_over(errors: dict | None, eager: dict | None, *, least: float = 0.0) -> str:
    """A cell: the largest over tensors of `errors` over those of eager torch, both of `compare`.

    Args:
        least: of the tensor's largest number, what counts as eager's error where it is less.
    """
    if not errors or not eager:
        return "-"
    ratios = {}
    for name, yardstick in eager.items():
        if yardstick["largest"] != 0:  # what is 0 throughout has no error of its own size
            ours, theirs, largest = (
                math.nan if x is None else x
                for x in (errors[name]["max_abs"], yardstick["max_abs"], yardstick["largest"])
            )
            ratios[name] = {"ratio": ours / max(theirs, least * largest, 1e-300)}
    return f"{worst(ratios, 'ratio'):.2f}" if ratios else "-"


def ratio_cell(result: dict, peer: str) -> str:
    """A cell: how many times this package's time a peer takes; behind it, where the host enqueues calls, the same of calls
    that come one after another from Python, which take as long as the slower of host and GPU (an estimate)."""
    if peer not in result["ratios"]:
        return "-"
    ratio = f"{result['ratios'][peer]['ratio']:.2f}x"
    ours = result["contenders"][0]
    theirs = [entry for entry in result["contenders"] if entry["peer"] == peer and "host_s" in entry]
    if "host_s" not in ours or not theirs:
        return ratio
    slower = [max(entry["median_s"], entry["host_s"]) for entry in (ours, *theirs)]
    return f"{ratio} ({min(slower[1:]) / slower[0]:.2f}x)"


def summary_rows(columns: dict, results: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of ratios, one row per case; also what RESULTS.md shows.

    Args:
        columns: header -> function(result, entries), entries by name; they stand between "ours, ms" (on a GPU with what
            the host takes to enqueue it) and "extra MiB".
    """
    host = ["host, ms"] if any("host_s" in entry for result in results for entry in result["contenders"]) else []
    header, rows = ["case", "ours, ms", *host, *columns, "extra MiB"], []
    for result in results:
        entries = {entry["name"]: entry for entry in result["contenders"]}
        ours = entries[OURS]
        cells = [cell(result, entries) for cell in columns.values()]
        time_cell = f"{ours['median_s'] * 1e3:.2f}" if "median_s" in ours else "not run"
        host_cell = [f"{ours['host_s'] * 1e3:.2f}" if "host_s" in ours else "-"] if host else []
        rows.append([result["name"], time_cell, *host_cell, *cells, extra_mib(ours)])
    return header, rows


def draw(benchmark, report: dict, path) -> None:
    """A grouped bar chart: for every case, how many times longer each peer takes than this package; below 1 it is faster."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = [result for result in report["cases"] if result["ratios"]]
    peers = [peer for peer in benchmark.PEERS if any(peer in result["ratios"] for result in results)]
    figure = Figure(figsize=(max(6.0, 1.5 + 1.35 * len(results)), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / len(peers)
    for place, peer in enumerate(peers):
        at = [n for n, result in enumerate(results) if peer in result["ratios"]]
        heights = [results[n]["ratios"][peer]["ratio"] for n in at]
        offset = (place - (len(peers) - 1) / 2) * width
        several = len({e["name"] for result in results for e in result["contenders"] if e["peer"] == peer}) > 1
        label = f"{peer} (the fastest)" if several else peer
        bars = axes.bar([n + offset for n in at], [height - 1 for height in heights], width, bottom=1, label=label)
        axes.bar_label(bars, [f"{height:.1f}" for height in heights], fontsize=7, padding=1)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(results)), [result["name"].replace(", ", "\n") for result in results], fontsize=8)
    axes.set_ylabel(f"time / {OURS}'s time")
    axes.set_yscale("log", base=2)  # some peers take a hundred times as long
    axes.yaxis.set_major_formatter("{x:g}")
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    letters = int(13 * figure.get_figwidth())  # in a line
    lines = [textwrap.fill(line, letters) for line in (benchmark.plot_title(report), where_line(report))]
    axes.set_title("\n".join(lines), fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def where_line(report: dict) -> str:
    """The machine, its instruction set and the versions, in one line."""
    machine, versions = report["machine"], report["versions"]
    if report["settings"]["device"] == "cuda":
        where = machine["gpu"]["name"]
    else:
        isa = machine["dalle_fast_isa"]
        where = f"{machine['cpu']}, {report['settings']['threads']} threads" + (f", {isa}" if isa else "")
    return f"{where}; torch {versions['torch']}, Python {versions['python']}"
