"""Which tensors of numbers the operations take, and how native code is given them."""

from __future__ import annotations

import torch

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # the order of DType in csrc/dtype.h


def check_tensor(name, tensor):
    """Raise TypeError where `tensor` is no dense tensor of floating-point numbers that an operation takes."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    check_dense(name, tensor)
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}")


def check_dense(name, tensor):
    """Raise TypeError where its numbers are not where strides say."""
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{name} must be a dense (strided) tensor, got {kind}")


def address(tensor) -> int:
    """Where a tensor's numbers begin; 0 of None."""
    return 0 if tensor is None else tensor.data_ptr()
