"""Runs figures in processes of their own and keeps what they find: a crash or a hang is a result, not the end."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import datetime
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from tqdm import tqdm

from dalle_fast.checkpoint import write_json
from dalle_fast.errors import UserError
from dalle_fast.outputs import can_write
from dalle_fast.provenance import describe_commit, describe_machine, describe_versions
from dalle_fast.verify.figures import FIGURES, Figure

PASS, FAIL, NOT_RUN = "pass", "fail", "not run"
GPU = "gpu"  # the name of all that a GPU changes
KEPT_FAILURES = 20  # of each figure; all are counted
SAVE_SECONDS = 5
WAIT = 0.5  # seconds, for a line at a time
SAME = ("commit", "machine", "versions", "gpu")  # what must not change between two runs that add to one file


class VerifyError(UserError, ValueError):
    """An unknown figure, or a file that must not be added to; the message says which."""


def verify(names, out: Path, *, gpu: bool, budget: float, restart: bool) -> int:
    """Measure the figures and write FILE; see `dalle_fast.verify`. Returns the exit status.

    Raises:
        VerifyError: no such figure, or FILE cannot be written, or holds results of another commit, machine or set of
            versions.
    """
    unknown = [name for name in names if name not in (*FIGURES, GPU)]
    if unknown:
        raise VerifyError(f"NAME must be one of {', '.join((*FIGURES, GPU))}, got {', '.join(unknown)}")
    if not can_write(out):
        raise VerifyError(f"--out must name a writable file in a folder that exists, got {out}")
    report = _report(out, gpu, restart)
    chosen = _figures(names, gpu)
    deadline = time.monotonic() + budget
    jobs = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), 8)
    saver = _Saver(report, out)
    with _as_ctrl_c(signal.SIGTERM, signal.SIGHUP), concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        runs = [
            pool.submit(_Run(figure, report["figures"].setdefault(key, {}), saver, deadline).go)
            for key, figure in chosen.items()
        ]
        try:
            for run in concurrent.futures.as_completed(runs):
                run.result()
        except BaseException:  # stop: what has been found so far is in the file
            saver.stop.set()
            for run in runs:
                run.cancel()
            raise
        finally:
            saver.save()
    print(summary(report))
    return int(any(result["status"] == FAIL for result in report["figures"].values()))


@contextlib.contextmanager
def _as_ctrl_c(*signals):
    """Else what figures have started, in sessions of its own, would go on for its hours, and what was found be lost."""
    heard = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]  # nohup's is ignored
    before = {number: signal.signal(number, signal.default_int_handler) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _figures(names, gpu: bool) -> dict[str, Figure]:
    """By their keys in the results file: the figures, and before them with `gpu` those that a GPU changes once more."""
    chosen = {name: figure for name, figure in FIGURES.items() if name in (names or FIGURES)}
    there = {
        f"{name}, gpu": dataclasses.replace(figure, device="cuda", total=figure.gpu_total if gpu else 0)
        for name, figure in FIGURES.items()
        if figure.gpu_total and (name in chosen or GPU in names)
    }
    return there | chosen if gpu else chosen | there


def _report(out: Path, gpu: bool, restart: bool) -> dict:
    """The file's results to go on with, or the head of new ones."""
    head = {
        "command": "dalle-fast verify",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": describe_commit(),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "gpu": gpu,
        "figures": {},
    }
    if restart or not out.exists():
        return head
    try:
        report = json.loads(out.read_text(encoding="utf-8"))
        changed = [key for key in SAME if report[key] != head[key]]
    except (ValueError, KeyError, TypeError):  # not JSON, or not text
        raise VerifyError(
            f"{out} holds something else than results of verify: name another file, or --restart"
        ) from None
    if changed:
        raise VerifyError(f"{out} has results of another {', '.join(changed)}: name another file, or --restart")
    report["date"] = head["date"]
    return report


class _Saver:
    """Writes the file now and then; several figures add to it."""

    def __init__(self, report: dict, out: Path):
        self.report, self.out, self.lock, self.saved = report, out, threading.Lock(), 0.0
        self.stop = threading.Event()

    def save(self, *, if_due: bool = False):
        with self.lock:
            if not if_due or time.monotonic() - self.saved > SAVE_SECONDS:
                write_json(self.out, self.report)
                self.saved = time.monotonic()


class _Run:
    """One figure, case by case, in a child process that is started again behind a case that ended it."""

    def __init__(self, figure: Figure, result: dict, saver: _Saver, deadline: float):
        self.figure, self.result, self.saver, self.deadline = figure, result, saver, deadline
        for key, value in {
            "done": 0,
            "skipped": 0,
            "again": [],
            "lacking": [],
            "num_failures": 0,
            "failures": [],
            "worst": {},
            "counts": {},
            "seconds": 0,
        }.items():
            result.setdefault(key, value)
        if result["done"] == result["skipped"]:  # one after another, not each in a process of its own
            result |= {"done": 0, "skipped": 0, "lacking": []}
        self.once_more = list(result["lacking"])  # what these cases lacked may be there now
        result.update(title=figure.title, total=figure.total)
        self._judge()

    def go(self) -> None:
        total, start = self.figure.total, time.monotonic()
        bar = tqdm(
            total=total, initial=self.result["done"], desc=f"{self.figure.name} {self.figure.device}", disable=None
        )
        with bar:
            while (cases := self._next_cases()) and not self._too_late():
                with tempfile.TemporaryDirectory(prefix="dalle_fast_verify_", ignore_cleanup_errors=True) as scratch:
                    self._child(cases, bar, scratch)
        self.result["seconds"] = round(self.result["seconds"] + time.monotonic() - start, 1)
        self._judge()
        self.saver.save()

    def _next_cases(self) -> range:
        if self.once_more:
            return range(self.once_more[0], self.once_more[0] + 1)
        return range(self.result["done"], self.figure.total)

    def _stopping(self) -> bool:
        return time.monotonic() > self.deadline or self.saver.stop.is_set()

    def _too_late(self) -> bool:
        """Whether no other case is to begin."""
        return self._stopping() or time.monotonic() + self.figure.about > self.deadline

    def _child(self, cases: range, bar, scratch: str) -> None:
        """Let a child try cases, until it ends, hangs, or the budget is spent.

        What it leaves in temporary files when it is killed lies in `scratch`.
        """
        command = [sys.executable, "-m", "dalle_fast.verify.worker", self.figure.name, self.figure.device]
        command += [str(cases.start), str(cases.stop), "--guarded"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = {**os.environ, "TMPDIR": scratch}
        with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as child:
            lines, errors = queue.Queue(), []
            readers = [
                threading.Thread(target=_read, args=(child.stdout, lines.put), daemon=True),
                threading.Thread(target=_read, args=(child.stderr, errors.append), daemon=True),
            ]
            for reader in readers:
                reader.start()
            try:
                for number in cases:
                    if self._too_late():
                        return
                    line = _next(lines, self.figure.seconds, self._stopping)
                    if line is None:
                        self._no_answer(number, bar)
                        return
                    if line:
                        self._add(number, json.loads(line), bar)
                    elif self._stopping():
                        return
                    else:
                        child.wait()
                        readers[1].join(timeout=5)
                        end = f"signal {-child.returncode}" if child.returncode < 0 else f"status {child.returncode}"
                        error = f"the process ended with {end}: {''.join(errors)[-500:].strip()}"
                        self._add(number, {"error": error}, bar)
                        return
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                for reader in readers:  # to the end: their pipes are closed next, and reading would be an error
                    reader.join(timeout=5)

    def _no_answer(self, number: int, bar) -> None:
        """A machine that is busy looks like a case that hangs: it counts as one when it does so twice."""
        if number in self.result["again"]:
            self._add(number, {"error": f"no answer within {self.figure.seconds:g} s, twice"}, bar)
        else:
            self.result["again"].append(number)

    def _add(self, number: int, found: dict, bar) -> None:
        result = self.result
        if number in self.once_more:
            self.once_more.remove(number)
            result["lacking"].remove(number)
            result["skipped"] -= 1
        else:
            result["done"] += 1
            bar.update()
        if "error" in found:
            result["num_failures"] += 1
            if len(result["failures"]) < KEPT_FAILURES:
                result["failures"].append({"case": number, "what": found["error"]})
        elif "not run" in found:
            result["skipped"] += 1
            result["lacking"].append(number)
            result["skip_reason"] = found["not run"]
        for key, value in found.get("numbers", {}).items():
            if isinstance(value, int):
                result["counts"][key] = value + result["counts"].get(key, 0)
            else:
                result["worst"][key] = max(value, result["worst"].get(key, value))
        self._judge()
        self.saver.save(if_due=True)

    def _judge(self) -> None:
        """A figure passes only where every case was tried and none failed."""
        result, reason = self.result, None
        if not result["total"]:
            reason = "--gpu was not given"
        elif result["done"] < result["total"]:
            reason = f"the budget ended after {result['done']} of {result['total']}"
            if self.figure.about:
                reason += f", of about {self.figure.about:g} s each"
        elif result["skipped"]:
            reason = result["skip_reason"]
        result.pop("reason", None)  # of an earlier judgement
        if result["num_failures"]:
            result["status"] = FAIL
        elif reason is None:
            result["status"] = PASS
        else:
            result |= {"status": NOT_RUN, "reason": reason}


def _read(stream, keep) -> None:
    for line in stream:
        keep(line)
    keep("")


def _next(lines: queue.Queue, seconds: float, stopping) -> str | None:
    """The next line, "" at the end or where `stopping()`, None where there is none within `seconds`.

    Waits are counted, not the clock: while a machine sleeps, or this process is stopped, a case can give no answer.
    """
    for _ in range(max(1, round(seconds / WAIT))):
        if stopping():
            return ""
        try:
            return lines.get(timeout=WAIT)
        except queue.Empty:
            continue
    return "" if stopping() else None


def summary(report: dict) -> str:
    """One line a figure, and the three counts."""
    lines, counts = [], dict.fromkeys((PASS, FAIL, NOT_RUN), 0)
    for key, result in report["figures"].items():
        counts[result["status"]] += 1
        tried = result["done"] - result["skipped"]
        text = f"{result['status']:7}  {key:14} {result['num_failures']} of {tried} tried: {result['title']}"
        numbers = [f"{name} {value:.3g}" for name, value in result["worst"].items()]
        numbers += [f"{name} {value}" for name, value in result["counts"].items()]
        text += f" ({', '.join(numbers)})" if numbers else ""
        if again := result["again"]:
            text += f"; no answer in time at first: {', '.join(map(str, again))}"
        if result["status"] == NOT_RUN:
            text += f"; {result.get('reason', '')}"
        lines.append(text)
        lines += [f"         case {failure['case']}: {failure['what']}" for failure in result["failures"][:3]]
    return "\n".join([*lines, ", ".join(f"{count} {name}" for name, count in counts.items())])
