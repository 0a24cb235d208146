"""The kernel of `norm.py` in Triton: a program takes one row, which it reads once and keeps in registers.

R rows, W width.
"""

import torch
import triton
import triton.language as tl

from dalle_fast.ops.calls import current_device
from dalle_fast.ops.launches_triton import Launches

__all__ = ["add_norm"]

# 16 bytes of 16 bits: a row's loads are then all under way at once, and a thread has few of its numbers to add up. Not
# tuned on a GPU.
THREAD_ELEMENTS = 8
MAX_WARPS = 16


@triton.jit
def _add_norm_kernel(
    x_ptr, update_ptr, weight_ptr, bias_ptr, sum_ptr, out_ptr, eps, W: tl.constexpr, BLOCK: tl.constexpr
):
    """x, update (R, W) -> sum and out (R, W), all contiguous. Programs: R."""
    start = tl.program_id(0).to(tl.int64) * W
    columns = tl.arange(0, BLOCK)
    inside = columns < W
    x = tl.load(x_ptr + start + columns, mask=inside, other=0.0)
    if update_ptr is not None:
        update = tl.load(update_ptr + start + columns, mask=inside, other=0.0)
        x = (x.to(tl.float32) + update.to(tl.float32)).to(x.dtype)  # rounded, as torch's sum is before it is normed
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)  # before the sums, which wait for each other
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0)
    tl.store(sum_ptr + start + columns, x, mask=inside)
    x = x.to(tl.float32)
    mean = tl.sum(x, 0) / W
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centred * centred, 0) / W
    out = centred * tl.rsqrt(variance + eps) * weight.to(tl.float32) + bias.to(tl.float32)
    tl.store(out_ptr + start + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


_launch = Launches(_add_norm_kernel)


def add_norm(x, update, weight, bias, eps):
    """(x + update, its layer norm) of contiguous tensors of one dtype: x and update (R, W), update or None."""
    total, out = torch.empty_like(x), torch.empty_like(x)
    R, W = x.shape
    if R == 0:
        return total, out
    BLOCK = triton.next_power_of_2(W)
    warps = min(max(1, BLOCK // (32 * THREAD_ELEMENTS)), MAX_WARPS)
    with current_device(x):
        _launch((R,), x, update, weight, bias, total, out, eps, W, BLOCK, num_warps=warps, enable_fp_fusion=True)
    return total, out
