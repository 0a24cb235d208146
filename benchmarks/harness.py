"""What every benchmark here shares: interleaved timing, extra memory, the machine's description, results and tables.

A benchmark compares contenders: functions that compute the same thing in different ways. They are timed in turns in one
process, so that whatever else the machine does meets all of them alike, and are reported as medians with quartiles.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import importlib.metadata
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

try:
    import dalle_fast
except ImportError as error:
    sys.exit(f"dalle_fast cannot be imported ({error}); install it from the repository's root: pip install -e .")

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
CUDA_FLUSH_BYTES = 256 * MIB  # written between two timed calls: more than any GPU's L2
CUDA_FLUSHES = 4  # about 0.3 ms of writing, in which the host can enqueue the next call, so that its cost is hidden


class NotRun(Exception):
    """A contender cannot take part; the text says why. It is reported, never dropped."""


class Died(NotRun):
    """Its process was ended from outside, most likely for want of memory: not to be tried in this one."""


# -- time --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call: the median, the quartiles and how many calls they come from."""

    median: float
    q1: float
    q3: float
    repetitions: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
        return cls(median, q1, q3, len(samples))


def time_interleaved(calls: dict, *, device: str, seconds: float, min_rounds: int, tick=lambda fraction: None) -> dict:
    """Time functions in turns: every round calls each once, in an order drawn anew.

    The functions must have run before. On CUDA a call's time is the device's, between two events, with the L2 cache
    overwritten before it and the host running ahead.

    Args:
        calls: name -> function without arguments.
        device: "cpu" or "cuda".
        seconds: start no further round after this much time ...
        min_rounds: ... but do at least this many.
        tick: told the share of the work done, for a progress bar.

    Returns:
        name -> Timing. On KeyboardInterrupt the exception carries what is complete so far as `timings`.
    """
    samples = {name: [] for name in calls}
    measure = _cuda_timer() if device == "cuda" else _cpu_seconds
    order = random.Random(0)
    start = time.perf_counter()
    rounds = 0
    try:
        while calls and (rounds < min_rounds or time.perf_counter() - start < seconds):
            for name in order.sample(list(calls), len(calls)):
                samples[name].append(measure(calls[name]))
            rounds += 1
            tick(min(rounds / min_rounds, (time.perf_counter() - start) / seconds, 1.0))
    except KeyboardInterrupt as interrupt:
        interrupt.timings = {name: Timing.of(values) for name, values in samples.items() if values}
        raise
    return {name: Timing.of(values) for name, values in samples.items()}


def _cpu_seconds(call) -> float:
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result  # freed outside the measured time, for everyone
    return seconds


def _cuda_timer():
    flush = torch.empty(CUDA_FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def measure(call) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(CUDA_FLUSHES):
            flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return measure


# -- memory ------------------------------------------------------------------------------------------------------------


def cuda_extra_bytes(call) -> int:
    """Peak bytes that `call` takes from torch's CUDA allocator, beyond the tensors it returns."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = call()
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before - _bytes_of(outputs))


def cpu_extra_bytes(call) -> int:
    """Peak growth of this process's resident memory during `call`, beyond the tensors it returns.

    This sees every allocator alike: torch's, that of MKL and oneDNN, native scratch. Use it in a fresh process (see
    `isolated`) on the first call at this size, so that no buffer kept from an earlier call hides; repeatable to about
    0.1 MiB.

    Raises:
        NotRun: the system does not offer what this needs (Linux's /proc/self/clear_refs).
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else the call would reuse what the process has freed but still holds
    except (AttributeError, OSError, TypeError):
        pass  # not glibc
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM, to the present
        before = _proc_status("VmRSS")
        outputs = call()
        peak = _proc_status("VmHWM")
    except OSError as error:
        raise NotRun(f"needs /proc/self/clear_refs ({error.strerror})") from None
    return max(0, peak - before - _bytes_of(outputs))


def _proc_status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(0, f"no {key} in /proc/self/status")


def _bytes_of(outputs) -> int:
    tensors = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def available_bytes() -> int | None:
    """Bytes of main memory that can be had without swapping; None where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def isolated(function, arguments: dict, *, workers: int, tick=lambda: None) -> dict:
    """Run `function(*args)` once for each of `arguments`, each in a fresh process, `workers` of them at a time.

    The processes are forked from a server that has imported torch and run nothing, so one costs milliseconds, and no
    state is shared. `function` must be importable by name.

    Args:
        arguments: name -> tuple of arguments that can be pickled.
        tick: called as each ends.

    Returns:
        name -> what the function returned, or the exception it raised; Died where the process did.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["torch"])
    waiting, running, results = list(arguments.items()), {}, {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                name, args = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_isolated_main, args=(sender, function, args))
                process.start()
                sender.close()
                running[receiver] = (name, process)
            for receiver in multiprocessing.connection.wait(list(running)):
                name, process = running.pop(receiver)
                try:
                    results[name] = receiver.recv()
                except (EOFError, OSError):
                    process.join()
                    results[name] = Died(f"its process ended with exit code {process.exitcode}")
                receiver.close()
                process.join()
                tick()
    finally:
        for _, process in running.values():
            process.kill()
    return results


def _isolated_main(sender, function, args):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        result = function(*args)
    except Exception as error:  # noqa: BLE001 - reported by the parent
        result = error if isinstance(error, NotRun) else NotRun(describe(error))
    sender.send(result)
    sender.close()


def describe(error: BaseException) -> str:
    """An exception as one line for a table: its type and the first line of its text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


# -- machine, versions, commit -----------------------------------------------------------------------------------------


def best_device() -> str:
    """The device to measure on: cuda if torch can use a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def describe_machine() -> dict:
    """What the numbers were measured on. Nothing in it names the host or a path."""
    try:
        usable = len(os.sched_getaffinity(0))
    except AttributeError:
        usable = os.cpu_count()
    machine = {
        "cpu": _cpu_model(),
        "cores": usable,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "dalle_fast_isa": _native("instruction_set"),
        "system": f"{platform.system()} {platform.machine()}",
        "memory_gib": None,
        "gpu": None,
    }
    with contextlib.suppress(AttributeError, ValueError, OSError):
        machine["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        machine["gpu"] = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
        }
    return machine


def describe_versions() -> dict:
    """Versions of what computes: Python, torch, Triton, CUDA, this package and the C++ compiler."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "dalle_fast": dalle_fast.__version__,
        "dalle_fast_build": _native("build_info"),
        "cxx": _compiler(),
    }


def _native(function: str):
    """What the native module's function says; None where the module is not built or refuses."""
    from dalle_fast import _extension

    try:
        return getattr(_extension.native(), function)()
    except (ImportError, ValueError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _compiler() -> str | None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return None
    return _output_of(compiler, "--version").partition("\n")[0] or None


def describe_commit() -> str | None:
    """The commit of this tree, with "+changes" where tracked files differ from it; None outside a repository."""
    commit = _output_of("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if not commit:
        return None
    return commit + ("+changes" if _output_of("git", "-C", str(ROOT), "status", "--porcelain", "-uno") else "")


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def describe_run(benchmark: str, argv: list[str], output_flags: tuple[str, ...] = ("--json", "--plot")) -> dict:
    """The head of a results file: benchmark, date (UTC), commit, command line, machine, versions.

    Of output files only the name goes in, so that a committed result does not show where someone's home is.
    """
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
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words]),
        "machine": describe_machine(),
        "versions": describe_versions(),
    }


# -- results, tables, progress -----------------------------------------------------------------------------------------


def write_json(path, data) -> None:
    """Write `data` to `path`: the whole file or, if anything fails, nothing. JSON has no NaN: it becomes null."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(_finite(data), file, indent=1, allow_nan=False)
            file.write("\n")
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's own mode keeps everyone else out
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _finite(data):
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


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


# -- command line ------------------------------------------------------------------------------------------------------


def integer(minimum: int):
    """An argparse type: an integer of at least `minimum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < minimum:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {minimum}, got {text!r}")
        return value

    return parse


def positive_seconds(text: str) -> float:
    """An argparse type: a positive, finite number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text!r}")
    return value


def grid(text: str) -> tuple[int, int]:
    """An argparse type: a grid of image tokens, "32" or "32x48" (rows x columns)."""
    parts = text.lower().split("x")
    if len(parts) == 1:
        parts *= 2
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected ROWSxCOLUMNS or one integer, such as 32x48 or 32, got {text!r}")
    return int(parts[0]), int(parts[1])


def output_file(*endings: str):
    """An argparse type: a file to be written, in a folder that exists, with one of these endings."""

    def parse(text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() not in endings:
            raise argparse.ArgumentTypeError(f"expected a file name ending in {' or '.join(endings)}, got {text!r}")
        if path.is_dir() or not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"expected a file in an existing folder, got {text!r}")
        return path

    return parse


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows defaults, but not "(default: None)" or that of a switch."""

    def _get_help_string(self, action):
        if action.default in (None, False) or action.default is argparse.SUPPRESS:
            return action.help
        return super()._get_help_string(action)
