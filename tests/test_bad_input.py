"""Bad arguments get a ValueError or TypeError that names the argument, what came and what was expected."""

import re
import warnings

import numpy as np
import pytest
import torch

from dalle_fast.masks import row_mask
from dalle_fast.nn.functional import sparse_attention

MASK = row_mask(5, (3, 7))
B, H, S, D = 2, 3, MASK.seq_len, 16


def good(**changes):
    arguments = {name: torch.randn(B, H, S, D) for name in ("query", "key", "value")}
    return {**arguments, "mask": MASK, **changes}


def all_three(x):
    return {name: x.clone() for name in ("query", "key", "value")}


# What is changed in a good call, the error, and what its message says.
CASES = {
    "rank 3": (all_three(torch.randn(H, S, D)), ValueError, ["query must have 4 dimensions", "(3, 26, 16)"]),
    "rank 5": (all_three(torch.randn(1, B, H, S, D)), ValueError, ["query must have 4 dimensions"]),
    "key length": (
        {"key": torch.randn(B, H, S - 1, D)},
        ValueError,
        ["key must have shape (2, 3, 26, 16), got (2, 3, 25, 16)"],
    ),
    "key rank": ({"key": torch.randn(H, S, D)}, ValueError, ["key must have shape (2, 3, 26, 16), got (3, 26, 16)"]),
    "value batch": (
        {"value": torch.randn(1, H, S, D)},
        ValueError,
        ["value must have shape (2, 3, 26, 16), got (1, 3, 26, 16)"],
    ),
    "value heads": ({"value": torch.randn(B, 1, S, D)}, ValueError, ["value must have shape", "(2, 1, 26, 16)"]),
    "value head size": ({"value": torch.randn(B, H, S, 8)}, ValueError, ["value must have shape", "(2, 3, 26, 8)"]),
    "key dtype": (
        {"key": torch.randn(B, H, S, D, dtype=torch.float16)},
        TypeError,
        ["key must have query's dtype torch.float32, got torch.float16"],
    ),
    "key device": (
        {"key": torch.randn(B, H, S, D, device="meta")},
        ValueError,
        ["key must be on query's device cpu, got meta"],
    ),
    "too long": (
        all_three(torch.randn(B, H, S + 1, D)),
        ValueError,
        ["query must have at most the mask's 26 positions, got 27"],
    ),
    "head size 129": (all_three(torch.randn(B, H, S, 129)), ValueError, ["head size from 1 to 128, got 129"]),
    "head size 0": (all_three(torch.randn(B, H, S, 0)), ValueError, ["head size from 1 to 128, got 0"]),
    "integers": (all_three(torch.ones(B, H, S, D, dtype=torch.int64)), TypeError, ["query must be", "torch.int64"]),
    "booleans": (all_three(torch.ones(B, H, S, D, dtype=torch.bool)), TypeError, ["query must be", "torch.bool"]),
    "complex": (all_three(torch.ones(B, H, S, D, dtype=torch.cfloat)), TypeError, ["query must be", "complex64"]),
    "integer key": ({"key": torch.ones(B, H, S, D, dtype=torch.int32)}, TypeError, ["key must be", "torch.int32"]),
    "sparse": ({"key": torch.randn(B, H, S, D).to_sparse()}, TypeError, ["key must be a dense", "sparse"]),
    "no tensor": ({"value": [1.0]}, TypeError, ["value must be a tensor, got list"]),
    "no query": ({"query": None}, TypeError, ["query must be a tensor, got NoneType"]),
    "dense mask": ({"mask": MASK.to_dense()}, TypeError, ["mask must be an AttentionMask", "got Tensor"]),
    "no mask": ({"mask": None}, TypeError, ["mask must be an AttentionMask", "got NoneType"]),
    "name of a mask": ({"mask": "row"}, TypeError, ["mask must be an AttentionMask", "got str"]),
    "scale nan": ({"scale": float("nan")}, ValueError, ["scale must be finite, got nan"]),
    "scale inf": ({"scale": float("inf")}, ValueError, ["scale must be finite, got inf"]),
    "scale numpy inf": ({"scale": np.float32("inf")}, ValueError, ["scale must be finite, got inf"]),
    "scale numpy -inf": ({"scale": np.float16("-inf")}, ValueError, ["scale must be finite, got -inf"]),
    "scale numpy nan": ({"scale": np.float64("nan")}, ValueError, ["scale must be finite, got nan"]),
    "scale text": ({"scale": "1"}, TypeError, ["scale must be a number or None, got '1' of type str"]),
    "scale bool": ({"scale": True}, TypeError, ["scale must be a number or None, got True of type bool"]),
    "impl": (
        {"impl": "flash"},
        ValueError,
        ["impl must be one of auto, reference, cpu, triton, got 'flash'"],
    ),
    "impl None": ({"impl": None}, ValueError, ["impl must be one of", "got None"]),
    "impl list": ({"impl": ["cpu"]}, ValueError, ["impl must be one of", "got ['cpu']"]),
    "sparse lengths": (
        {"text_lengths": torch.ones(B, dtype=torch.long).to_sparse()},
        TypeError,
        ["text_lengths must be a dense (strided) tensor", "got layout torch.sparse_coo"],
    ),
    "lengths as a list": ({"text_lengths": [3, 4]}, TypeError, ["text_lengths must be an integer tensor", "got list"]),
    "lengths of floats": (
        {"text_lengths": torch.ones(B)},
        TypeError,
        ["text_lengths must be an integer tensor", "got torch.float32"],
    ),
    "lengths of booleans": (
        {"text_lengths": torch.ones(B, dtype=torch.bool)},
        TypeError,
        ["text_lengths must be an integer tensor", "got torch.bool"],
    ),
    "lengths, one too many": (
        {"text_lengths": torch.ones(B + 1, dtype=torch.long)},
        ValueError,
        ["text_lengths must have shape (2,), got (3,)"],
    ),
    "lengths, two dimensions": (
        {"text_lengths": torch.ones(B, 1, dtype=torch.long)},
        ValueError,
        ["text_lengths must have shape (2,), got (2, 1)"],
    ),
    "lengths, a scalar": (
        {"text_lengths": torch.tensor(2)},
        ValueError,
        ["text_lengths must have shape (2,), got ()"],
    ),
    "lengths elsewhere": (
        {"text_lengths": torch.ones(B, dtype=torch.long, device="meta")},
        ValueError,
        ["text_lengths must be on query's device cpu, got meta"],
    ),
    "lengths too long": (
        {"text_lengths": torch.tensor([1, 6])},
        ValueError,
        ["text_lengths must be from 0 to the mask's text_len 5, got values from 1 to 6"],
    ),
    "lengths negative": (
        {"text_lengths": torch.tensor([-1, 3])},
        ValueError,
        ["text_lengths must be from 0 to the mask's text_len 5, got values from -1 to 3"],
    ),
    "lengths beyond 32 bits": (
        {"text_lengths": torch.tensor([0, 1 << 32])},
        ValueError,
        ["text_lengths must be from 0", "4294967296"],
    ),
    "cpu in float64": (
        {**all_three(torch.randn(B, H, S, D, dtype=torch.float64)), "impl": "cpu"},
        ValueError,
        ["impl='cpu' cannot serve", "got torch.float64"],
    ),
    "cuda": ({"impl": "cuda"}, ValueError, ["impl must be one of", "got 'cuda'"]),
}


@pytest.mark.parametrize("case", CASES)
def test_message(case):
    changes, error, words = CASES[case]
    with pytest.raises(error) as caught:
        sparse_attention(**good(**changes))
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value)


def test_the_good_call_is_good():
    assert sparse_attention(**good()).shape == (B, H, S, D)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors under impl='triton' are refused alike, with a GPU")
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble, np.int64])
def test_a_scale_of_numpys(dtype):
    """Compared as a Python number: a NumPy one would make the largest float its own infinity, and warn."""
    arguments = good()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(sparse_attention(**arguments, scale=dtype(2)), sparse_attention(**arguments, scale=2.0))


def test_refusal_lists_every_reason(monkeypatch):
    """float64 on a CPU, for Triton: the device and the dtype are both named."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tensors = all_three(torch.randn(B, H, S, D, dtype=torch.float64))
    with pytest.raises(ValueError, match="impl='triton' cannot serve") as caught:
        sparse_attention(**good(**tensors, impl="triton"))
    for word in ("cpu", "float64"):
        assert re.search(rf"\b{word}\b", str(caught.value)), word


def test_cpu_refusal_says_how_to_build(monkeypatch):
    from dalle_fast import _extension

    monkeypatch.setattr(_extension, "why_missing", lambda: "it was not built; run make build")
    with pytest.raises(ValueError, match="make build"):
        sparse_attention(**good(impl="cpu"))
    with pytest.warns(UserWarning, match="dense reference.*make build"):
        assert sparse_attention(**good()).shape == (B, H, S, D)  # auto still computes, and says why it is slow
