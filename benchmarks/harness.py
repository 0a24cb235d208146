"""What every benchmark here shares: interleaved timing, extra memory, the machine's description, results and tables.

A benchmark compares contenders: functions that compute the same thing in different ways. They are timed in turns in one
process, so that whatever else the machine does meets all of them alike, and are reported as medians with quartiles.

A benchmark is a module with

    NAME, PEERS, MIN_ROUNDS          its name in results files, the kinds of contenders that have ratios, rounds timed
    parse(argv)                      the flags, with `device`, `cases` and what `add_shared_flags` adds
    contenders_of(case, args)        list of `Contender`, this package's first
    describe_case(case) -> dict      what the case is, for the results file; `name` among it
    make_inputs(case, device)        tensors, the same in every process
    make_call(function, case, inputs)  the function without arguments that is timed; it returns a tuple of tensors, and may
                                     have a method warm_up, which is called before every timed call
    Oracle(case, inputs)             has `facts` (a dictionary for the results file), and judges: see `measure_case`
    error_columns(result)            two headers, and a function from an entry's errors to their two cells
    case_title(result), summary_columns(results), notes(results), plot_title(report)

and its cases have name, sizes, pass_, dtype, dense_bytes and `small()`, a tiny case of the same kind.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import functools
import logging
import math
import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import statistics
import sys
import textwrap
import time
from pathlib import Path

import torch

try:
    from dalle_fast.checkpoint import write_json
    from dalle_fast.provenance import describe_commit, describe_machine, describe_versions
except ImportError as error:
    sys.exit(f"dalle_fast cannot be imported ({error}); install it from the repository's root: pip install -e .")

from dalle_fast.masks import causal_mask
from dalle_fast.nn.functional import sparse_attention
from dalle_fast.nn.memory import free_memory
from dalle_fast.ops.choice import IMPLS
from dalle_fast.outputs import can_write

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
OURS = "dalle_fast"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORWARD, FORWARD_BACKWARD = "forward", "forward+backward"
PASSES = (FORWARD, FORWARD_BACKWARD)
CUDA_FLUSH_BYTES = 256 * MIB  # written between two timed calls: more than any GPU's L2
CUDA_FLUSHES = 48  # about 3 ms of writing, in which the host enqueues the next call: what that costs is told apart


class NotRun(Exception):
    """A contender cannot take part; the text says why. It is reported, never dropped."""


class Died(NotRun):
    """Its process was ended from outside, most likely for want of memory: not to be tried in this one."""


# -- time --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call: the median, the quartiles, how many calls they come from, and on CUDA the host's median."""

    median: float
    q1: float
    q3: float
    repetitions: int
    host: float | None

    @classmethod
    def of(cls, samples: list[tuple[float, float | None]]) -> Timing:
        seconds, host = ([sample[n] for sample in samples] for n in range(2))
        q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
        return cls(median, q1, q3, len(samples), None if None in host else statistics.median(host))


def time_interleaved(calls: dict, *, device: str, seconds: float, min_rounds: int, tick=lambda fraction: None) -> dict:
    """Time functions in turns: every round calls each once, in an order drawn anew.

    The functions must have run before. On CUDA a call's time is the device's, between two events, with the L2 cache
    overwritten before it and the host running ahead; how long the host takes to enqueue the call is measured beside it.

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
                getattr(calls[name], "warm_up", lambda: None)()
                samples[name].append(measure(calls[name]))
            rounds += 1
            tick(min(rounds / min_rounds, (time.perf_counter() - start) / seconds, 1.0))
    except KeyboardInterrupt as interrupt:
        interrupt.timings = {name: Timing.of(values) for name, values in samples.items() if values}
        raise
    return {name: Timing.of(values) for name, values in samples.items()}


def _cpu_seconds(call) -> tuple[float, None]:
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result  # freed outside the measured time, for everyone
    return seconds, None


def _cuda_timer():
    flush = torch.empty(CUDA_FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def measure(call) -> tuple[float, float]:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(CUDA_FLUSHES):
            flush.zero_()
        begin.record()
        start = time.perf_counter()
        call()
        host = time.perf_counter() - start
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3, host

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
    _give_back_what_is_kept()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM, to the present
        before = _proc_status("VmRSS")
        outputs = call()
        peak = _proc_status("VmHWM")
    except OSError as error:
        raise NotRun(f"needs /proc/self/clear_refs ({error.strerror})") from None
    return max(0, peak - before - _bytes_of(outputs))


_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def _give_back_what_is_kept() -> None:
    """Else a call would reuse what the process has freed but still holds, or what MKL keeps from product to product.

    Contenders whose first call is not the measured one, as it compiles, would seem to need less than others.
    """
    with contextlib.suppress(AttributeError, OSError):  # a torch without MKL
        ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).mkl_serv_free_buffers()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        libc = ctypes.CDLL(None)
        # Large blocks are mappings of their own, gone as soon as freed. glibc otherwise moves its limit up with what is
        # freed, and holes in its heap, which differ from run to run, count as needed.
        libc.mallopt(_M_MMAP_THRESHOLD, 128 * 1024)
        libc.malloc_trim(0)


def _proc_status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(0, f"no {key} in /proc/self/status")


def _bytes_of(outputs) -> int:
    tensors = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


# Imports that take a process two seconds: all of ours go through `strict_compile`.
PRELOADED = ["torch", "torch._dynamo", "torch._inductor.compile_fx"]


def isolated(function, arguments: dict, *, workers: int, tick=lambda: None) -> dict:
    """Run `function(*args)` once for each of `arguments`, each in a fresh process, `workers` of them at a time.

    The processes are forked from a server that has imported torch and its compiler and run nothing, so one costs
    milliseconds, and no state is shared. `function` must be importable by name.

    Args:
        arguments: name -> tuple of arguments that can be pickled.
        tick: called as each ends.

    Returns:
        name -> what the function returned, or the exception it raised; Died where the process did.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(PRELOADED)
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


# -- contenders --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Contender:
    """Who computes it. `build(case, device)` returns the function that `make_call` takes, or raises NotRun.

    `peer` is the column of the ratios it counts for: the fastest of a column is the one compared with.
    """

    name: str
    peer: str
    build: object
    dense: bool = False  # materialises the logits, so its memory is guarded
    compiled: bool = False  # by torch.compile, for every shape
    floor: bool = False  # computes a part only, in memory made before: a bound, with neither errors nor memory


def as_added(mask, dtype):
    """A boolean mask as what is added to scores: 0 where a pair attends, else -inf."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)


class TooLarge(NotRun):
    """It would need more memory than is free."""


def check_memory(contender: Contender, case, available: int | None) -> None:
    """Raise TooLarge where the contender would materialise more than the `available` bytes."""
    if contender.dense and available is not None and case.dense_bytes > available:
        need, have = (f"{size / 2**30:.1f} GiB" for size in (case.dense_bytes, available))
        raise TooLarge(f"its dense logits need about {need}, {have} are free")


@contextlib.contextmanager
def strict_compile():
    """Forget earlier variants, and make torch.compile fail where it would run eagerly: past its limit of them."""
    import torch._dynamo

    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no talk of a missing GPU
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


def extra_memory(make_inputs, make_call, contender: Contender, case, device: str, threads: int) -> int:
    """Extra bytes of one call. On the CPU this runs in a process of its own, on the first call at this size.

    Before it comes a call on a tiny case, which loads code. What torch.compile makes is called at its full size
    instead, since it is compiled per shape: here, so that contenders compile side by side and the timing process finds
    the result in the compiler's cache.
    """

    def call_of(case):
        return make_call(contender.build(case, device), case, make_inputs(case, device))

    torch.set_num_threads(threads)
    with strict_compile():
        if device == "cpu" and not contender.compiled:
            call_of(case.small())()
            call = call_of(case)
        else:
            call = call_of(case)
            call()
        return cpu_extra_bytes(call) if device == "cpu" else cuda_extra_bytes(call)


def measure_memory(benchmark, case, contenders, args, tick=lambda fraction: None) -> dict:
    """name -> extra bytes, or the exception that says why there is no such number."""
    device = args.device
    found, available, done = {}, free_memory(torch.device(device)), 0
    for contender in contenders:
        try:
            check_memory(contender, case, available)
            if contender.floor:
                raise NotRun("it is a bound on time")
        except NotRun as reason:
            found[contender.name] = reason
    functions = benchmark.make_inputs, benchmark.make_call
    todo = {c.name: (*functions, c, case, device, args.threads) for c in contenders if c.name not in found}

    def one_more():
        nonlocal done
        done += 1
        tick(done / len(todo))

    if device == "cpu":
        roomy = available is not None and 2 * case.dense_bytes < available
        workers = min(2, describe_machine()["cores"]) if roomy else 1
        return found | isolated(extra_memory, todo, workers=workers, tick=one_more)
    for name, arguments in todo.items():
        try:
            found[name] = extra_memory(*arguments)
        except Exception as error:  # noqa: BLE001 - reported with the contender
            found[name] = error
        torch.cuda.empty_cache()
        one_more()
    return found


# -- a case ------------------------------------------------------------------------------------------------------------


def measure_case(benchmark, case, args, tick, say) -> dict:
    """Everything about one case as a dictionary for the results file.

    The benchmark's oracle judges each contender: `judge(contender, call)` returns name -> {which error: how large},
    and `allowed()` name -> {which of these: its limit}. On KeyboardInterrupt the exception carries what is complete as
    `result`.
    """
    contenders = benchmark.contenders_of(case, args)
    result = benchmark.describe_case(case) | {"dtype": case.dtype, "pass": case.pass_, "complete": False}
    entries = {c.name: {"name": c.name, "peer": c.peer, "status": "ok"} for c in contenders}
    calls = {}
    finish = functools.partial(finish_case, result, entries, benchmark.PEERS)
    try:
        say(f"{case.name}: memory, compiling")
        memory = measure_memory(benchmark, case, contenders, args, lambda fraction: tick(0.5 * fraction))
        say(f"{case.name}: exactness")
        inputs = benchmark.make_inputs(case, args.device)
        oracle = benchmark.Oracle(case, inputs)
        result |= oracle.facts
        with strict_compile():
            for contender in contenders:
                entry = entries[contender.name]
                try:
                    if isinstance(memory[contender.name], (TooLarge, Died)):
                        raise memory[contender.name]
                    call = benchmark.make_call(contender.build(case, args.device), case, inputs)
                    entry["error"] = oracle.judge(contender, call) if not contender.floor else {}
                except Exception as error:  # noqa: BLE001 - a contender's failure is a line of the report
                    entry |= {"status": "not run", "reason": reason_of(error)}
                    continue
                extra = memory[contender.name]
                entry["extra_bytes"] = None if isinstance(extra, Exception) else extra
                if isinstance(extra, Exception):
                    entry["extra_bytes_reason"] = reason_of(extra)
                calls[contender.name] = call
            for call in calls.values():
                call()  # now that everything is compiled
            if OURS in calls:
                second = oracle.judge(contenders[0], calls[OURS])
                check_ours(entries[OURS], oracle.allowed(), second)
            del oracle
            say(f"{case.name}: timing")
            timings = time_interleaved(
                calls,
                device=args.device,
                seconds=args.seconds,
                min_rounds=3 if args.quick else benchmark.MIN_ROUNDS,
                tick=lambda fraction: tick(0.5 + 0.5 * fraction),
            )
        result["complete"] = True
    except KeyboardInterrupt as interrupt:
        interrupt.result = finish(getattr(interrupt, "timings", {}))
        raise
    return finish(timings)


def reason_of(error: BaseException) -> str:
    """One line: a refusal's text as it is, of other exceptions also their type."""
    if isinstance(error, NotRun):
        return str(error)
    return describe(error)


def check_ours(entry: dict, allowed: dict, second: dict) -> None:
    """Judge this package's errors in its first call and in a second one; the verdict goes into its entry."""
    entry["allowed_error"] = allowed
    entry["exact"] = not any(beyond(errors, allowed) for errors in (entry["error"], second))


def beyond(errors: dict, allowed: dict) -> dict:
    """What is not within its limits, NaN included."""
    return {
        name: errors[name]
        for name, limits in allowed.items()
        if not all(errors[name][which] <= limit for which, limit in limits.items())
    }


def limits(eager: dict, epsilon: float, sizes: dict | None = None) -> dict:
    """What is tolerated of each tensor: twice what eager torch errs (`compare`), plus one rounding.

    Of the largest error, which few elements decide, and of the root mean square, to which all contribute.

    Args:
        sizes: of what is rounded, where that is not the tensor itself.
    """
    allowed = {}
    for name, errors in eager.items():
        largest, size = errors["largest"], (sizes or {}).get(name, errors["largest"])
        rounding = epsilon * size / largest if largest else math.inf  # of what is 0 throughout there is no relative one
        allowed[name] = {
            "max_abs": 2 * errors["max_abs"] + epsilon * size,
            "rms_relative": 2 * errors["rms_relative"] + rounding,
        }
    return allowed


def compare(names, outputs, exact) -> dict:
    """Of each tensor the largest error, its root mean square relative to that of the exact values, and their largest."""
    errors = {}
    for name, output, expected in zip(names, outputs, exact):
        difference = output.detach().double() - expected
        size = difference.norm()
        errors[name] = {
            "max_abs": float(difference.abs().max()),
            "rms_relative": float(size / expected.norm()) if size != 0 else 0.0,
            "largest": float(expected.abs().max()),
        }
    return errors


def worst(errors: dict, key: str) -> float:
    """The largest of a case's tensors; NaN if any is (null in a results file)."""
    values = [entry[key] for entry in errors.values()]
    return math.nan if any(value is None or math.isnan(value) for value in values) else max(values)


def finish_case(result: dict, entries: dict, peers, timings: dict) -> dict:
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
        if timing.host is not None:
            entry["host_s"] = timing.host
        entry["ratio"] = timing.median / ours.median if ours else None
    ratios = {}
    for peer in peers:
        runs = [e for e in entries.values() if e["peer"] == peer and e.get("ratio")]
        if runs:
            best = min(runs, key=lambda e: e["median_s"])
            ratios[peer] = {"ratio": best["ratio"], "contender": best["name"]}
    return result | {"contenders": list(entries.values()), "ratios": ratios}


def passed(result: dict) -> bool:
    """Did this package run, and exactly?"""
    ours = result["contenders"][0]
    return ours["status"] == "ok" and ours["exact"]


# -- the device, and the head of a results file ---------------------------------------------------------------------------


def best_device() -> str:
    """The device to measure on: cuda if torch can use a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


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


# -- results, tables, progress -----------------------------------------------------------------------------------------


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


# -- what is printed and drawn -----------------------------------------------------------------------------------------


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


# -- command line ------------------------------------------------------------------------------------------------------


def run(benchmark, argv: list[str] | None) -> int:
    """Measure what the flags say (None: those of the command line), print and write the results.

    Returns 0, 1 where this package failed or was inexact, 130 where Ctrl-C ended the run.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = benchmark.parse(argv)
    torch.set_num_threads(args.threads)
    report = describe_run(benchmark.NAME, argv)
    report["settings"] = {
        "device": args.device,
        "impl": args.impl,
        "threads": args.threads,
        "seconds_per_case": args.seconds,
        "quick": args.quick,
        "sizes": args.cases[0].sizes,
    }
    report |= {"complete": False, "cases": []}
    print(f"{where_line(report)}\n{args.cases[0].sizes}\n", flush=True)
    progress = Progress(len(args.cases))
    interrupted = False
    for number, case in enumerate(args.cases):
        result = None
        try:
            if args.json and report["cases"]:  # now, as what comes may end the process
                with contextlib.suppress(OSError):  # told at the end, if there is room for no more then either
                    write_json(args.json, report)
            tick = functools.partial(lambda done, fraction: progress.advance(done + fraction), number)
            result = measure_case(benchmark, case, args, tick, progress.say)
        except KeyboardInterrupt as interrupt:
            interrupted = True
            result = getattr(interrupt, "result", None)
        if result is not None and (result["complete"] or result["ratios"]):
            report["cases"].append(result)
            progress.print(case_text(benchmark, result))
        if interrupted:
            break
        progress.advance(number + 1)
    progress.close()
    report["complete"] = not interrupted
    return _finish(benchmark, report, args)


def _finish(benchmark, report: dict, args) -> int:
    """Print the summary, write the files, return the exit code."""
    results = report["cases"]
    if results:
        print(table(*summary_rows(benchmark.summary_columns(results), results)))
        print(f"\n{benchmark.notes(results)}")
    else:
        print("nothing was measured")
    if args.json:
        write_json(args.json, report)
        print(f"wrote {args.json}")
    if args.plot:
        if any(result["ratios"] for result in results):
            draw(benchmark, report, args.plot)
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


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose help shows defaults, and that takes no abbreviated flags."""
    return argparse.ArgumentParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)


def add_shared_flags(parser, *, dtypes: str, rounds: int, seconds: float, passes: bool = True) -> None:
    """The flags that every benchmark has. `dtypes` says which are measured without --dtype; `passes`: --pass too."""
    add = parser.add_argument
    add("--dtype", choices=DTYPES, action="append", help=f"repeatable (default: {dtypes})")
    if passes:
        add("--pass", dest="pass_", choices=PASSES, action="append", help="repeatable (default: both)")
    add("--impl", choices=IMPLS, default="auto", help="implementation of this package")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is the best present")
    add("--threads", type=integer(1), default=torch.get_num_threads(), help="CPU threads, of all contenders")
    add("--seconds", type=positive_seconds, help="timing per case, all contenders together (default: "
        f"{seconds:g}{', or 1 with --quick' * (seconds != 1)}); at least {rounds} rounds are timed, or 3")  # fmt: skip
    add("--json", type=output_file(".json"), metavar="FILE.json", help="write the results there")
    add("--plot", type=output_file(".png"), metavar="FILE.png", help="draw the ratios there")


def settle_shared_flags(parser: argparse.ArgumentParser, args, seconds: float) -> None:
    """Defaults that depend on others, and what this machine cannot do; exits with a usage error there."""
    args.seconds = args.seconds or (1.0 if args.quick else seconds)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch finds no CUDA device here; expected auto or cpu")
    args.device = best_device() if args.device == "auto" else args.device
    if args.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            parser.error("argument --plot: needs matplotlib (pip install matplotlib)")


def refuse_what_cannot_serve(parser: argparse.ArgumentParser, args, attempt) -> None:
    """A usage error now, not a line of the report behind all peers, where --impl cannot serve a case on this machine.

    Args:
        attempt: a function of a case, which raises ValueError there.
    """
    if args.impl != "auto":
        for case in args.cases:
            try:
                attempt(case)
            except ValueError as error:
                parser.error(f"argument --impl: {error}")


@functools.cache
def attend(dtype: str, head_dim: int, device: str, impl: str) -> None:
    """Attention of a token to itself, for `refuse_what_cannot_serve`."""
    token = torch.zeros(1, 1, 1, head_dim, dtype=DTYPES[dtype], device=device)
    sparse_attention(token, token, token, causal_mask(0, 1), impl=impl)


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
    """An argparse type: a file that can be written, in a folder that exists, with one of these endings."""

    def parse(text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() not in endings:
            raise argparse.ArgumentTypeError(f"expected a file name ending in {' or '.join(endings)}, got {text!r}")
        if not can_write(path):
            raise argparse.ArgumentTypeError(f"expected a writable file in an existing folder, got {text!r}")
        return path

    return parse


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows defaults, but not "(default: None)" or that of a switch."""

    def _get_help_string(self, action):
        if action.default in (None, False) or action.default is argparse.SUPPRESS:
            return action.help
        return super()._get_help_string(action)
