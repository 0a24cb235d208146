"""In which numbers models compute: a rule for training and for drawing. Without torch until it is asked, for --help."""

from __future__ import annotations

PRECISIONS = ("auto", "float32", "bfloat16")


def precision_on(device, precision: str) -> str:
    """What one of PRECISIONS means there: auto is bfloat16 where the device multiplies in it, as some CPUs do."""
    if precision == "auto":
        return "bfloat16" if _has_bfloat16(device) else "float32"
    return precision


def _has_bfloat16(device) -> bool:
    """Whether products in bfloat16 are the device's own, and so the fastest."""
    import torch

    from dalle_fast import _extension

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and not _extension.why_missing():
        return "avx512_bf16" in _extension.native().instruction_sets()
    return False
