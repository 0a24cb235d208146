"""Whether Triton's kernels can serve a tensor on this machine: NVIDIA GPUs, and Triton's interpreter on CPU tensors.

Nothing here imports Triton.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

__all__ = ["MIN_CAPABILITY", "capability_of", "interpreted", "loop_bounds_broken", "why_not"]

MIN_CAPABILITY = (8, 0)


def why_not(tensor, name) -> list[str]:
    """Every reason why no Triton kernel can serve `tensor`, an argument of that name; empty if one can."""
    reasons = []
    if not _installed():
        reasons.append("the package triton is not installed")
    if tensor.is_cuda:
        if torch.version.hip is not None:
            reasons.append("the kernels are for NVIDIA GPUs, and this torch is built for ROCm")
        elif (capability := capability_of(tensor)) < MIN_CAPABILITY:
            least, got = (".".join(map(str, numbers)) for numbers in (MIN_CAPABILITY, capability))
            reasons.append(f"compute capability must be at least {least}, {tensor.device} has {got}")
        if _switched_on():  # it would copy them to the CPU and back, and compute bfloat16 wrongly without a word
            reasons.append(f"TRITON_INTERPRET is set, for CPU tensors alone, and {name} is on {tensor.device}")
    elif interpreted(tensor):
        if not reasons and loop_bounds_broken():
            reasons.append("the interpreter of Triton 3.6 needs numpy before 2.4")
        if tensor.dtype == torch.bfloat16:
            reasons.append(f"Triton's interpreter computes bfloat16 wrongly, and {name} is bfloat16")
    else:
        reasons.append(
            f"Triton kernels need CUDA tensors (or CPU tensors under TRITON_INTERPRET=1), {name} is on {tensor.device}"
        )
    return reasons


def capability_of(tensor) -> tuple[int, int]:
    """(major, minor) compute capability of the tensor's device; the interpreter's is the lowest supported."""
    return _capability(tensor.device) if tensor.is_cuda else MIN_CAPABILITY


@functools.cache  # torch goes through several functions to look it up
def _capability(device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def interpreted(tensor) -> bool:
    """Does Triton's interpreter serve this tensor?"""
    return tensor.is_cpu and _switched_on()


def _switched_on() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def loop_bounds_broken() -> bool:
    """Triton 3.6's interpreter turns a loop bound into an integer in a way that numpy 2.4 refuses."""
    import importlib.metadata

    def version(package):
        return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])

    return version("triton") < (3, 7) and version("numpy") >= (2, 4)
