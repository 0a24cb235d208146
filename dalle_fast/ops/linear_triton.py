"""A linear layer of up to 64 rows in Triton, for NVIDIA GPUs: every weight is read once, as fast as memory gives it.

A program multiplies BLOCK_N rows of the weight by all rows of x, with the weight on the left: a matrix instruction takes
64 rows on its left and as few as 8 columns on its right, so that few rows of x leave nothing of it idle. Where N gives
fewer programs than the GPU has multiprocessors, K is split among several. Each leaves float32 sums in memory, and the last
to come adds them up in the order of the splits, so that bits repeat.

M rows of x, N rows of the weight, K columns of both.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dalle_fast.ops.calls import current_device
from dalle_fast.ops.launches_triton import Launches

__all__ = ["Tiles", "can_be_captured", "counters_of_graph", "linear", "tiles_for"]

# The most counters of one call, one for each BLOCK_N rows of the weight; those of a graph that brings its own, 256 KiB;
# and of all other captured calls on a device, 8 MiB.
COUNTERS = 512
GRAPH_COUNTERS = 1 << 16
CAPTURED_COUNTERS = 1 << 21
INTERPRETED_DEVICE = (132, 227 << 10)


class Tiles(NamedTuple):
    """How a call is cut.

    block_m: rows of x, all of them: a power of two from 16.
    block_n, block_k: rows and columns of the weight that a program multiplies at once.
    splits: programs that share the columns of block_n rows.
    """

    block_m: int
    block_n: int
    block_k: int
    splits: int
    warps: int
    stages: int


@functools.lru_cache(maxsize=1024)
def tiles_for(M, N, K, multiprocessors, shared_bytes) -> Tiles:
    """The tiles of a call on a device with so many multiprocessors and so much shared memory for a program.

    The order of a sum's terms follows from block_k and splits. They depend on the weight and the device alone, so that
    the bits of a sample do not depend on how many there are.

    One program of 64 weight rows for each multiprocessor, at most, with 64 KiB of the weight on their way. Tuned on an
    H200 (2026-11-27, Triton 3.6, bfloat16, weights from memory). Not reproducible, as the script is gone: whoever changes
    them measures these as well. Microseconds of 8 and of 64 rows, and torch's:
    2048 -> 6144 9.2 and 9.9 (9.5, 9.9), 2048 -> 2048 5.3 and 7.0 (6.3, 6.5), 2048 -> 8192 10.9 and 12.3 (11.0, 12.3, and
    about 2 for GELU), 8192 -> 2048 11.5 and 13.5 (13.1, 15.5). Twice as many programs, 128 weight rows or 64 columns at a
    time were slower.
    """
    narrow = triton.cdiv(N, 64)
    splits = 1
    while narrow <= COUNTERS and 2 * narrow * splits <= multiprocessors and K >= 1024 * splits:
        splits *= 2
    block_m = max(16, triton.next_power_of_2(M))
    stage = 2 * 128 * (64 + block_m)
    return Tiles(block_m, 64, 128, splits, 4, max(2, min(4, (shared_bytes - 1024) // stage)))


@triton.jit
def _store_result(acc, n, m, bias_ptr, out_ptr, M, N, GELU: tl.constexpr):
    """float32 sums (len(n), len(m)) -> out (M, N), with the bias and the exact GELU of the unrounded result."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if GELU:
        acc = 0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))
    pointers = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(pointers, tl.trans(acc).to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    x_ptr,
    x_stride,
    weight_ptr,
    weight_stride,
    bias_ptr,
    out_ptr,
    partials_ptr,
    counters_ptr,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    GELU: tl.constexpr,
):
    """x (M, K) and weight (N, K), of contiguous rows, and bias (N,) or None -> out (M, N), contiguous.

    Programs: cdiv(N, BLOCK_N) * SPLITS. EVEN_N, EVEN_K: N and K are multiples of their blocks. partials: float32
    (SPLITS, N, BLOCK_M), of any content; counters: int32, zero before and after.
    """
    program = tl.program_id(0)
    split = program % SPLITS
    tile = program // SPLITS
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    weight_rows = weight_ptr + n.to(tl.int64)[:, None] * weight_stride + k[None, :]
    x_rows = x_ptr + m.to(tl.int64)[:, None] * x_stride + k[None, :]
    columns = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for first in range(split * columns, min(K, (split + 1) * columns), BLOCK_K):
        x_mask = (m < M)[:, None]
        if not EVEN_K:
            x_mask = x_mask & (k < K - first)[None, :]
        if EVEN_N and EVEN_K:
            weight = tl.load(weight_rows + first)
        else:
            weight = tl.load(weight_rows + first, mask=(n < N)[:, None] & (k < K - first)[None, :], other=0.0)
        x = tl.load(x_rows + first, mask=x_mask, other=0.0)
        acc = tl.dot(weight, tl.trans(x), acc)
    if SPLITS == 1:
        _store_result(acc, n, m, bias_ptr, out_ptr, M, N, GELU)
    else:
        size = N * BLOCK_M  # COUNTERS keeps these below 2**31
        sums = partials_ptr + n[:, None] * BLOCK_M + m[None, :]
        tl.store(sums + split * size, acc, mask=(n < N)[:, None])
        # One thread counts for all: the barrier puts everyone's sums before its release, and its acquire, which the
        # others get the count after, puts the sums of all programs before what they read.
        tl.debug_barrier()
        arrived = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLITS - 1:
            total = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
            # As many at once as four warps have 128 registers a thread for.
            AT_ONCE: tl.constexpr = min(SPLITS, 16384 // (BLOCK_N * BLOCK_M))
            for first in range(0, SPLITS, AT_ONCE):
                for i in tl.static_range(AT_ONCE):
                    mask = (n < N)[:, None] & (first + i < SPLITS)
                    # .cg: not from this multiprocessor's own cache
                    total += tl.load(sums + (first + i) * size, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(counters_ptr + tile, 0)
            _store_result(total, n, m, bias_ptr, out_ptr, M, N, GELU)


_launch = Launches(_linear_kernel)


def linear(x, weight, bias, activation, tiles=None):
    """x (..., K), of 1 to 64 rows, and weight (N, K) with contiguous rows -> (..., N). tiles: instead of `tiles_for`."""
    N, K = weight.shape
    rows = x.reshape(-1, K) if K else x.new_zeros(x.shape[:-1].numel(), 0)
    if K and rows.stride(1) != 1:
        rows = rows.contiguous()
    M = len(rows)
    out = x.new_empty((*x.shape[:-1], N))
    if N == 0:
        return out
    tiles = tiles or tiles_for(M, N, K, *_sizes_of(x.device))
    programs = triton.cdiv(N, tiles.block_n)
    with current_device(x):
        counters = partials = None
        _prepare(x.device)
        if tiles.splits > 1:
            counters = _counters(x.device, programs)
            partials = torch.empty((tiles.splits, N, tiles.block_m), dtype=torch.float32, device=x.device)
        _launch(
            (programs * tiles.splits,),
            rows,
            rows.stride(0),
            weight,
            weight.stride(0),
            bias,
            out,
            partials,
            counters,
            M,
            N,
            K,
            tiles.block_m,
            tiles.block_n,
            tiles.block_k,
            tiles.splits,
            N % tiles.block_n == 0,
            K % tiles.block_k == 0,
            activation == "gelu",
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            enable_fp_fusion=True,
        )
    return out


@functools.cache
def _sizes_of(device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a program may use."""
    if device.type == "cpu":
        return INTERPRETED_DEVICE
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


# -- counters ----------------------------------------------------------------------------------------------------------

_of_stream = {}  # (device, stream): counters of the calls there, which run one after another
_of_graphs = {}  # device: [counters of captured calls, how many of them have been given to one]
_changing_them = threading.Lock()  # those of graphs


class _OfThread(threading.local):
    capture = {}  # as _of_graphs, of the graph that this thread captures


_of_thread = _OfThread()


def _counters(device, count):
    """`count` zeros, which the call leaves zero, and which no call that may run at the same time has.

    A graph is replayed on any stream, beside others, so what it captured has counters of its own for good: nothing says
    when it is gone, but for `counters_of_graph`. After 65,536 captured calls of up to 2,048 rows of a weight there are
    none left, and a graph makes the zeros of a call itself, at every replay.
    """
    if count > COUNTERS:
        raise ValueError(f"with splits at most {COUNTERS} tiles of the weight's rows are counted, got {count}")
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        with _changing_them:
            for pool in (_of_thread.capture.get(device), _of_graphs[device]):
                counters, first = pool or ((), 0)
                last = first + triton.cdiv(count, 32) * 32  # on a line of their own, as all calls' are
                if last <= len(counters):
                    pool[1] = last
                    return counters[first:last]
        return torch.zeros(count, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if (device, stream) not in _of_stream:
        _of_stream[device, stream] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    return _of_stream[device, stream]


def _prepare(device):
    """Make the counters of captured calls, at the first call that is not captured itself."""
    if device.type != "cuda" or device in _of_graphs or torch.cuda.is_current_stream_capturing():
        return
    with _changing_them:
        if device not in _of_graphs:  # made by another thread, they may be captured already
            counters = torch.zeros(CAPTURED_COUNTERS, dtype=torch.int32, device=device)
            torch.cuda.current_stream(device).synchronize()  # a graph may be replayed on another stream
            _of_graphs[device] = [counters, 0]


@contextlib.contextmanager
def counters_of_graph(device):
    """What this thread captures within takes counters from the tensor that this gives, to be kept as long as the graph.

    What torch does with its memory afterwards waits for replays on the current stream, so there must be no others.
    """
    counters = torch.zeros(GRAPH_COUNTERS, dtype=torch.int32, device=device)
    _of_thread.capture = {device: [counters, 0]}
    try:
        yield counters
    finally:
        _of_thread.capture = {}


def can_be_captured(device) -> bool:
    """Are there counters for a call in a CUDA graph? Zeros that are made in one are made at every replay."""
    return device in _of_graphs
