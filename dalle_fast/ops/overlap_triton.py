"""Launches that begin while the one before them ends: what a step of generation, 230 short launches, waits for most.

Programmatic dependent launch, of NVIDIA GPUs from Hopper on. The programs of a launch may then be there before the
launch before it has ended, which says when (`let_next_begin`). Each waits (`wait_for_previous`) before it reads or writes
anything that another kernel may have written or may still read: waiting is for the end of the launch before, which has
itself waited, so that all earlier ones have ended too. Before that a kernel may only fetch into the second-level cache,
which all multiprocessors share: a hint that cannot bring what is out of date.

Off unless DALLE_FAST_OVERLAP=1, as no GPU has run it yet: kernels are compiled so and read by the tests, and that is all.
"""

import functools
import os

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["fetch_rows", "let_next_begin", "options", "overlaps", "wait_for_previous"]

LEAST_CAPABILITY = (9, 0)


def overlaps(tensor) -> bool:
    """May a launch on this tensor's device begin before the one before it has ended?"""
    return tensor.is_cuda and _switched_on() and torch.cuda.get_device_capability(tensor.device) >= LEAST_CAPABILITY


@functools.cache
def _switched_on() -> bool:
    return os.environ.get("DALLE_FAST_OVERLAP", "0") == "1"


def options(overlap: bool) -> dict:
    """Of a launch; the interpreter does not know this one."""
    return {"launch_pdl": True} if overlap else {}


@triton.jit
def let_next_begin(OVERLAP: tl.constexpr):
    """The next launch may begin once every program of this one has come here, or ended."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Until the launch before this one has ended and what it wrote can be read."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def fetch_rows(rows, count, PIECES: tl.constexpr):
    """Fetch `count` bytes from each of the addresses `rows` (n,) into the second-level cache, PIECES of each at a time.

    Addresses and count / PIECES are multiples of 16.
    """
    size = (count // PIECES).to(tl.int32)
    starts = rows.to(tl.int64)[:, None] + tl.arange(0, PIECES)[None, :] * size
    tl.inline_asm_elementwise(
        "{ .reg .pred some; setp.gt.s32 some, $2, 0; @some cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [starts, size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
