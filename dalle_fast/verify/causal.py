"""Nothing comes from the future: a changed token leaves every earlier output as it was, bit for bit.

Every rule on odd grids, every position. A change that also leaves the later outputs alone would prove nothing, so the
position's own output must change.
"""

from __future__ import annotations

import torch

from dalle_fast.nn import functional as F
from dalle_fast.testing import SMALL_MASKS
from dalle_fast.verify.random_calls import IMPLEMENTATIONS

POSITIONS = [(mask, position) for mask in SMALL_MASKS for position in range(mask.seq_len)]


def case(number: int, device: str) -> None:
    mask, position = POSITIONS[number]
    generator = torch.Generator().manual_seed(number)
    qkv = torch.randn(3, 2, 2, mask.seq_len, 32, generator=generator).to(device)
    before = _attend(qkv, mask, device)
    changed = qkv.clone()
    changed[..., position, :] = torch.randn(32, generator=generator).to(device) * 100
    after = _attend(changed, mask, device)
    if not torch.equal(before[..., :position, :], after[..., :position, :]):
        raise AssertionError(f"{mask!r}: token {position} changes an earlier output")
    if torch.equal(before[..., position, :], after[..., position, :]):
        raise AssertionError(f"{mask!r}: token {position} does not change its own output")


def _attend(qkv, mask, device):
    return F.sparse_attention(*qkv, mask, impl=IMPLEMENTATIONS["attention"][device])
