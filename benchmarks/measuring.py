"""Measuring a call: its time in turns with others', its extra memory, and both in a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import multiprocessing
import multiprocessing.connection
import random
import signal
import statistics
import time
from pathlib import Path

import torch

MIB = 1 << 20
CUDA_FLUSH_BYTES = 256 * MIB  # written between two timed calls: more than any GPU's L2
CUDA_FLUSHES = 48  # about 3 ms of writing, in which the host enqueues the next call: what that costs is told apart


class NotRun(Exception):
    """A contender cannot take part; the text says why. It is reported, never dropped."""


class Died(NotRun):
    """Its process was ended from outside, most likely for want of memory: not to be tried in this one."""


def describe(error: BaseException) -> str:
    """An exception as one line for a table: its type and the first line of its text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def reason_of(error: BaseException) -> str:
    """One line: a refusal's text as it is, of other exceptions also their type."""
    if isinstance(error, NotRun):
        return str(error)
    return describe(error)


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


# -- a process of its own ----------------------------------------------------------------------------------------------


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
