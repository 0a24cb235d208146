"""torch.fx takes every function of `F` into its graph as one node: what stands for a tensor is asked what a call means.

N rows, K codes, Din size of hidden, D size of an embedding.
"""

import pytest
import torch

from dalle_fast.masks import row_mask
from dalle_fast.nn import functional as F

MASK = row_mask(3, (2, 2))
N, Din, K, D = 4, 6, 5, 3
WEIGHT, BIAS, CODEBOOK = torch.randn(K, Din), torch.randn(K), torch.randn(K, D)
CODES = torch.arange(N) % K
CACHES = [torch.randn(1, 2, size, Din) for size in (3, 3, MASK.cache_slots, MASK.cache_slots)]
CALLS = {
    F.sparse_attention: lambda x: F.sparse_attention(x, x, x, MASK, return_lse=True, impl="cpu")[1],
    F.scaled_dot_product_attention: lambda x: F.scaled_dot_product_attention(x, x, x, MASK, scale=0.3),
    F.sparse_attention_decode: lambda x: F.sparse_attention_decode(x[:, :, 1], *CACHES, MASK, 2, scale=0.3),
    F.gumbel_codebook: lambda x: F.gumbel_codebook(x, WEIGHT, BIAS, CODEBOOK, 0.7, hard=True, seed=3).embedding,
    F.codebook_argmax: lambda x: F.codebook_argmax(x, WEIGHT, code_range=(1, 3)),
    F.codebook_sample: lambda x: F.codebook_sample(x, WEIGHT, BIAS, seed=3, code_range=(1, 3), temperature=2.0),
    F.codebook_cross_entropy: lambda x: F.codebook_cross_entropy(
        x[0, 0, :N], WEIGHT, None, CODES, reduction="sum", ignore_index=1
    ),
    F.gumbel_softmax: lambda x: F.gumbel_softmax(x, 0.5, True, dim=1, seed=3),
    F.linear: lambda x: F.linear(x, WEIGHT, BIAS, activation="gelu"),
}


def test_these_are_all_functions_of_tensors():
    assert {f.__name__ for f in CALLS} == {*F.__all__} - {"GumbelCodebookOutput", "noise_seed"}


@pytest.mark.parametrize("function", CALLS, ids=lambda f: f.__name__)
def test_a_function_is_a_node_with_all_its_arguments(function):
    traced = torch.fx.symbolic_trace(CALLS[function])
    assert [node.target for node in traced.graph.nodes].count(function) == 1
    x = torch.randn(1, 2, MASK.seq_len, Din)
    assert torch.equal(traced(x), CALLS[function](x))


def test_tensors_of_other_classes_are_none_of_that():
    """They see torch's functions, of which ours are made, as any function's."""
    seen = []

    class Seeing(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(function)
            return super().__torch_function__(function, types, args, kwargs)

    F.codebook_argmax(torch.randn(N, Din).as_subclass(Seeing), WEIGHT)
    assert seen and F.codebook_argmax not in seen
