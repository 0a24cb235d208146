"""FLOPs of the operations for torch's `FlopCounterMode`, which knows them where this module was imported before it is made.

Counted as torch counts: two for each multiplication of a matrix product, nothing for the rest, and a backward pass makes
scores and logits again. Unlike torch, which counts pairs that a mask hides, attention's products are those of the pairs
that the mask allows (with all of the text). Steps of generation are not counted.

Apart from what registers the operations, as torch's registry brings Triton.

B batch, H heads, S sequence, D head size; x (..., I) rows, of which K codes make logits.
"""

from __future__ import annotations

import math

import torch
from torch.utils.flop_counter import register_flop_formula

import dalle_fast.ops.attention
import dalle_fast.ops.codebook
import dalle_fast.ops.linear  # noqa: F401  the operations are registered there
from dalle_fast.masks import AttentionMask, count_pairs

_ops = torch.ops.dalle_fast

# A formula gets shapes in the place of tensors.


def _of_pairs(query, mask):
    B, H, S, D = query
    return 2 * B * H * D * count_pairs(AttentionMask.decode(mask), S)


def _product(x, weight):
    return 2 * math.prod(x[:-1]) * math.prod(weight)


@register_flop_formula(_ops.sparse_attention)
def _attention(query, key, value, text_lengths, mask, *args, **kwargs):
    return 2 * _of_pairs(query, mask)  # scores and their product with value


@register_flop_formula(_ops.sparse_attention_backward)
def _attention_backward(grad_out, grad_lse, query, key, value, out, lse, text_lengths, mask, *args, **kwargs):
    return 5 * _of_pairs(query, mask)  # scores again, the gradients of probabilities, value, query and key


@register_flop_formula(_ops.gumbel_codebook)
def _codebook(hidden, weight, bias, codebook, tau, seed, seed_per_row, hard, *args, **kwargs):
    return _product(hidden, weight) + (0 if hard else _product(hidden, codebook))


@register_flop_formula(_ops.gumbel_codebook_backward)
def _codebook_backward(
    grad_embedding, grad_kl, hidden, weight, bias, codebook, tau, seed, kl, codes, stats, seed_per_row, hard, needs, *args,
    **kwargs,
):  # fmt: skip
    of_probabilities, of_codebook = any(needs[:3]), needs[3] and not hard  # hard adds rows up
    products = (of_probabilities or of_codebook) + needs[0] + needs[1]
    return products * _product(hidden, weight) + (of_probabilities + of_codebook) * _product(hidden, codebook)


@register_flop_formula([_ops.codebook_sample, _ops.codebook_cross_entropy, _ops.linear])
def _logits(x, weight, *args, **kwargs):
    return _product(x, weight)


@register_flop_formula([_ops.codebook_cross_entropy_backward, _ops.codebook_cross_entropy_reduced])
def _cross_entropy_gradients(hidden, weight, bias, target, row_weight, ignore_index, needs, *args, **kwargs):
    return (1 + needs[0] + needs[1]) * _product(hidden, weight)
