"""Tensors with more than 2^31 elements: strides reach beyond what 32 bits count. Untouched memory costs nothing."""

import pytest
import torch

import dalle_fast.nn.functional as F
from dalle_fast.masks import row_mask

FAR = 2**31
MASK = row_mask(text_len=5, grid=(3, 4))
S, D = MASK.seq_len, 16


def far_apart(shape_at_the_front):
    """A view of zeros (..., S, D) whose two samples or heads lie 2^31 elements apart."""
    try:
        storage = torch.empty(FAR + S * D, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"4.3 GB of virtual memory cannot be reserved: {error}")
    strides = tuple(FAR if size == 2 else 0 for size in shape_at_the_front)
    return storage.as_strided((*shape_at_the_front, S, D), (*strides, D, 1))


@pytest.mark.parametrize("front", [(2, 1), (1, 2)], ids=["samples", "heads"])
def test_far_apart_is_the_same_as_side_by_side(front):
    near = torch.randn(*front, S, D).bfloat16().requires_grad_()
    far = far_apart(front)
    far.copy_(near.detach())
    far.requires_grad_()
    grad = torch.randn(*front, S, D).bfloat16()
    outputs = []
    for x in (near, far):
        out = F.sparse_attention(x, x, x, MASK, impl="cpu")
        out.backward(grad)
        outputs.append(out.detach())
    assert torch.equal(*outputs)
    assert torch.equal(near.grad, far.grad)
