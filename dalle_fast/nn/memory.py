"""How much memory there is still to take."""

from __future__ import annotations

import os
from pathlib import Path

import torch

OUT_OF_MEMORY = (  # said by torch's allocator of a CPU; by the driver past torch's of a GPU; by cuBLAS; by Triton
    "DefaultCPUAllocator: ",
    "CUDA error: out of memory",
    "cudaErrorMemoryAllocation",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
)


def free_memory(device):
    """Bytes that can still be allocated on `device`, or None where that is not known."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu" and os.path.exists("/proc/meminfo"):
        machine = int(_table("/proc/meminfo")["MemAvailable:"]) * 1024
        return max(0, min(machine, *left_by_process(), *left_by_groups()))
    return None


def is_out_of_memory(error) -> bool:
    """Whether an exception says that memory has run out: only torch's allocator of a GPU has a type for that."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in OUT_OF_MEMORY)


def left_by_process():
    """What the process' limit (ulimit -v) leaves, where it has one."""
    import resource  # Unix has it

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        yield limit - pages * resource.getpagesize()


def left_by_groups(own="/proc/self/cgroup", mounts="/sys/fs/cgroup"):
    """What the limits of the process' control groups leave, as a container's. Files that are cached count as free."""
    try:
        lines = Path(own).read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root, prefix, names = Path(mounts), "", ("memory.max", "memory.current")
        if "memory" in controllers.split(","):  # version 1
            root, prefix, names = root / "memory", "total_", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        elif controllers:
            continue
        folder = root / path.lstrip("/")  # in a container perhaps as the host names it, and only the root is there
        for group in (folder, *folder.parents[: len(folder.parts) - len(root.parts)]):
            try:
                limit, used = (int((group / name).read_text()) for name in names)
                stat = _table(group / "memory.stat")
            except (OSError, ValueError):  # no such files, or "max"
                continue
            yield limit - used + sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))


def _table(path):
    """The first two words of each line."""
    return dict(line.split()[:2] for line in Path(path).read_text().splitlines())
