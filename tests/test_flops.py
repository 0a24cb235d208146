"""torch's FlopCounterMode counts the operations as it counts the same in torch's own."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import dalle_fast.nn.functional as F
import dalle_fast.ops.flops  # noqa: F401  registers
from dalle_fast.masks import conv_mask

N, K, I, D = 10, 64, 32, 8


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("length", [3, 9, 21])
def test_attention_is_its_allowed_pairs(length):
    """Also where nothing is computed, as in a planner's FakeTensorMode, and of a mask that was never asked before."""
    mask = conv_mask(5, (4, 4), 3, edges="clip")
    pairs = int(mask.to_dense(seq_len=length).sum())
    conv_mask.__globals__["count_pairs"].cache_clear()
    with FakeTensorMode():
        q, k, v = (torch.randn(2, 3, length, D, requires_grad=True) for _ in range(3))
        assert flops(lambda: F.sparse_attention(q, k, v, mask)) == 2 * (2 * 2 * 3 * D * pairs)
        assert flops(lambda: F.sparse_attention(q, k, v, mask).sum().backward()) == 7 * (2 * 2 * 3 * D * pairs)


def rows():
    torch.manual_seed(0)
    sizes = (N, I), (K, I), (K,), (K, D)
    return [torch.randn(size, requires_grad=True) for size in sizes]


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (0, 1, 2), (3,)])
@pytest.mark.parametrize("hard", [False, True])
def test_the_codebook_is_its_products(frozen, hard):
    """torch's, whose backward pass finds the probabilities in memory, and the logits again."""
    hidden, weight, bias, codebook = tensors = rows()
    for x in frozen:
        tensors[x].requires_grad_(False)

    def eager():
        p = torch.softmax(hidden @ weight.T + bias, -1)
        (p @ codebook).sum().backward()

    logits, lookup = 2 * N * K * I, 2 * N * K * D
    expected = flops(eager) + logits
    if hard:  # rows are looked up and added up
        expected -= lookup * (1 + tensors[3].requires_grad)
        expected -= 0 if any(x.requires_grad for x in tensors[:3]) else logits
    assert flops(lambda: F.gumbel_codebook(*tensors, 1.0, hard=hard).embedding.sum().backward()) == expected


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (0, 1, 2)])
def test_losses_and_codes_are_their_products(frozen):
    hidden, weight, bias, _ = tensors = rows()
    target = torch.arange(N)
    for x in frozen:
        tensors[x].requires_grad_(False)
    logits = 2 * N * K * I
    assert flops(lambda: torch.nn.functional.cross_entropy(hidden @ weight.T + bias, target)) == logits
    assert flops(lambda: F.codebook_argmax(hidden, weight)) == logits
    assert flops(lambda: F.codebook_sample(hidden, weight)) == logits
    assert flops(lambda: F.codebook_cross_entropy(hidden, weight, bias, target, reduction="none")) == logits
    gradients = logits * (hidden.requires_grad + weight.requires_grad)
    assert flops(lambda: F.codebook_cross_entropy(hidden, weight, bias, target)) == logits + gradients
    if any(x.requires_grad for x in (hidden, weight, bias)):
        loss = F.codebook_cross_entropy(hidden, weight, bias, target, reduction="none")
        assert flops(lambda: loss.sum().backward()) == logits + gradients
