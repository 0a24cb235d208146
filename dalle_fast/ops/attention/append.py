"""A new image token's keys and values into the caches of a layer: on a GPU one launch for what takes torch several.

`dalle_fast::attention_append` is registered as in op.py. It has no gradient; where one is needed, and off the GPU, a call
goes to torch.

B samples, H heads, D head size, C slots of an image cache.
"""

from __future__ import annotations

import torch

from dalle_fast.masks import AttentionMask
from dalle_fast.ops.attention.op import implementation
from dalle_fast.ops.calls import needs_grad
from dalle_fast.ops.registry import register


def attention_append(image_key, image_value, key, value, mask, position, *, impl="auto"):
    """Write key and value (B, H, D) of image token `position` into image_key and image_value (B, H, C, D).

    Args:
        position: int64 tensor without dimensions on their device, where it is read: a CUDA graph follows it. On a GPU
            it is clamped to the image.
        impl: "reference" is torch's; anything else takes one launch on a GPU, where that serves.
    """
    if impl != "reference" and _is_served(image_key, image_value, key, value, mask):
        _append_op(image_key, image_value, key, value, position, mask.encode())
        return
    slot = mask.cache_slot(position).view(1)
    image_key.index_copy_(2, slot, key[:, :, None].to(image_key.dtype))
    image_value.index_copy_(2, slot, value[:, :, None].to(image_value.dtype))


def _is_served(image_key, image_value, key, value, mask):
    tensors = image_key, image_value, key, value
    if torch.compiler.is_compiling() or not all(tensor.is_cuda for tensor in tensors):
        return False
    shape = *image_key.shape[:2], image_key.shape[3]
    if image_value.shape != image_key.shape or key.shape != shape or value.shape != shape:
        return False
    if any(tensor.dtype != key.dtype or tensor.device != key.device for tensor in tensors):
        return False
    if needs_grad(tensors):
        return False
    return not implementation("triton").why_not(key, image_key, image_value, mask)


# -- the operation -----------------------------------------------------------------------------------------------------


def _append_kernel(image_key, image_value, key, value, position, mask):
    implementation("triton").append(image_key, image_value, key, value, position, AttentionMask.decode(mask))


def _append_fake(image_key, image_value, key, value, position, mask):
    return None


_append_op = register(
    "attention_append(Tensor(a!) image_key, Tensor(b!) image_value, Tensor key, Tensor value, Tensor position, "
    "int[] mask) -> ()",
    _append_kernel,
    _append_fake,
)
