"""A benchmark's run: its contenders measured and judged, case by case, and what came of it printed and written.

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

import contextlib
import dataclasses
import functools
import logging
import math
import sys

import torch
from exactness import beyond
from flags import OURS
from measuring import Died, NotRun, cpu_extra_bytes, cuda_extra_bytes, isolated, reason_of, time_interleaved
from reporting import Progress, case_text, describe_run, draw, summary_rows, table, where_line

from dalle_fast.checkpoint import write_json
from dalle_fast.nn.memory import free_memory
from dalle_fast.provenance import describe_machine

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


def check_ours(entry: dict, allowed: dict, second: dict) -> None:
    """Judge this package's errors in its first call and in a second one; the verdict goes into its entry."""
    entry["allowed_error"] = allowed
    entry["exact"] = not any(beyond(errors, allowed) for errors in (entry["error"], second))


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


# -- a run -------------------------------------------------------------------------------------------------------------


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
