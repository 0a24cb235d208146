"""Wrong arguments to the public face: each must be refused with an error that names it.

A case is one good call with one argument spoilt. A crash or a hang ends the process, which the runner counts; an answer
is a silent wrong one. Where shapes disagree, the error may name the other argument. Before any of a function's arguments
is spoilt, the good call itself must be taken.
"""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

import torch

from dalle_fast import masks, nn
from dalle_fast.nn import dvae
from dalle_fast.nn import functional as F

MASK = masks.row_mask(5, (3, 7))
B, H, S, D = 2, 3, MASK.seq_len, 16
N, K, I, E = 4, 9, 6, 8  # rows, codes, sizes of hidden and of an embedding

# Ways to spoil an argument: from a good value to a bad one.
NOT_TENSORS = {
    "text": lambda x: "text",
    "a list": lambda x: [1.0, 2.0],
    "a number": lambda x: 3.0,
    "numpy": lambda x: x.numpy(),
    "integers": lambda x: x.to(torch.int64),
    "booleans": lambda x: x > 0,
    "complex numbers": lambda x: x.to(torch.complex64),
    "another device": lambda x: x.to("meta"),
}
REQUIRED = {"None": lambda x: None}
OTHER_DTYPE = {"float64 beside float32": lambda x: x.double(), "float16 beside float32": lambda x: x.half()}
SHAPES = {
    "a dimension more": lambda x: x[None],
    "a dimension less": lambda x: x[0],
    "a shorter last dimension": lambda x: x[..., :-1],
    "a longer first dimension": lambda x: torch.cat([x, x]),
}
INT64 = {
    "text": lambda x: "text",
    "a list": lambda x: x.tolist(),
    "floats": lambda x: x.float(),
    "booleans": lambda x: x > 0,
    "another device": lambda x: x.to("meta"),
    "a longer first dimension": lambda x: torch.cat([x, x]),
    "a dimension more": lambda x: x[None],
}
BEYOND = {"negative values": lambda x: x - 1000, "values too large": lambda x: x + 1000}
NUMBER = {"text": lambda x: "1", "a list": lambda x: [1.0], "NaN": lambda x: math.nan, "complex": lambda x: 1j}
POSITIVE = {"0": lambda x: 0, "negative": lambda x: -1.0}
SIZE = {
    "0": lambda x: 0,
    "negative": lambda x: -3,
    "a fraction": lambda x: 2.5,
    "text": lambda x: "3",
    "None": lambda x: None,
    "a boolean": lambda x: True,
}
NOT_NEGATIVE = {key: spoil for key, spoil in SIZE.items() if key != "0"}
CHOICE = {"an unknown name": lambda x: "nothing", "None": lambda x: None, "a list": lambda x: ["cpu"], "7": lambda x: 7}
MASKS = {
    "a matrix": lambda x: x.to_dense(),
    "a name": lambda x: "row",
    "too short": lambda x: masks.row_mask(5, (2, 7)),
}
GRID = {**SIZE, "three sizes": lambda x: (3, 3, 3), "an empty one": lambda x: (), "0 rows": lambda x: (0, 4)}
RANGES = {
    "backwards": lambda x: (5, 2),
    "empty": lambda x: (3, 3),
    "beyond the codes": lambda x: (0, K + 1),
    "negative": lambda x: (-1, 3),
    "one number": lambda x: 4,
    "fractions": lambda x: (0.0, 2.5),
}


class Call(NamedTuple):
    """A function, its good arguments by name, and for each the ways to spoil it."""

    function: object
    good: dict
    spoils: dict


def _attention_call(function, mask_name):
    q, k, v = torch.randn(3, B, H, S, D, generator=torch.Generator().manual_seed(0))
    tensor = {**REQUIRED, **NOT_TENSORS, **SHAPES}
    others = {**tensor, **OTHER_DTYPE}
    return Call(
        function,
        {"query": q, "key": k, "value": v, mask_name: MASK},
        {"query": tensor, "key": others, "value": others, mask_name: MASKS},
    )


def _sparse_attention():
    call = _attention_call(F.sparse_attention, "mask")
    call.good.update(scale=0.5, text_lengths=torch.tensor([2, 5]), impl="auto")
    infinite = {"infinity": lambda x: math.inf}
    call.spoils.update(scale={**NUMBER, **infinite}, text_lengths={**INT64, **BEYOND}, impl=CHOICE)
    return call


def _scaled_dot_product_attention():
    """As torch's, it also takes matrices, and tensors of other ranks that broadcast."""
    call = _attention_call(F.scaled_dot_product_attention, "attn_mask")
    valid = ("a dimension more", "a dimension less", "a matrix")
    spoils = {name: {k: s for k, s in ways.items() if k not in valid} for name, ways in call.spoils.items()}
    return call._replace(spoils=spoils)


def _codebook_tensors(*names):
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (N, I), "weight": (K, I), "bias": (K,), "codebook": (K, E)}
    good = {name: torch.randn(shapes[name], generator=generator) for name in names}
    others = {**NOT_TENSORS, **OTHER_DTYPE, **SHAPES}
    spoils = {name: others if name == "bias" else {**REQUIRED, **others} for name in names}
    any_shape = ("a dimension more", "a dimension less", "a longer first dimension")
    spoils["hidden"] = {key: spoil for key, spoil in spoils["hidden"].items() if key not in any_shape}
    if "codebook" in names:
        spoils["codebook"] = {k: spoil for k, spoil in spoils["codebook"].items() if k != "a shorter last dimension"}
    return good, spoils


def _gumbel_codebook():
    good, spoils = _codebook_tensors("hidden", "weight", "bias", "codebook")
    seeds = {"negative": lambda x: -1, "a fraction": lambda x: 0.5, "text": lambda x: "1", "2^63": lambda x: 1 << 63}
    tensor_seeds = {"int32": lambda x: torch.zeros(N, dtype=torch.int32), "too long": lambda x: torch.arange(N + 1)}
    return Call(
        F.gumbel_codebook,
        {**good, "tau": 0.5, "seed": 1, "impl": "auto"},
        {**spoils, "tau": {**NUMBER, **POSITIVE}, "seed": {**seeds, **tensor_seeds}, "impl": CHOICE},
    )


def _codebook_sample():
    good, spoils = _codebook_tensors("hidden", "weight", "bias")
    below = {"negative": POSITIVE["negative"]}
    return Call(
        F.codebook_sample,
        {**good, "temperature": 1.0, "code_range": (2, 5), "impl": "auto"},
        {**spoils, "temperature": {**NUMBER, **below}, "code_range": RANGES, "impl": CHOICE},
    )


def _codebook_cross_entropy():
    good, spoils = _codebook_tensors("hidden", "weight", "bias")
    target = {**REQUIRED, **INT64, **BEYOND}
    return Call(
        F.codebook_cross_entropy,
        {**good, "target": torch.tensor([0, 8, -100, 3]), "reduction": "mean", "code_range": None},
        {**spoils, "target": target, "reduction": CHOICE, "code_range": RANGES},
    )


def _gumbel_softmax():
    spoils = {k: spoil for k, spoil in NOT_TENSORS.items() if k != "another device"}
    dim = {"too large": lambda x: 2, "too small": lambda x: -3, "text": lambda x: "last"}
    return Call(
        F.gumbel_softmax,
        {"logits": torch.randn(N, K), "tau": 1.0, "dim": -1},
        {"logits": {**REQUIRED, **spoils}, "tau": {**NUMBER, **POSITIVE}, "dim": dim},
    )


def _noise_seed():
    whole = {
        "negative": lambda x: -1,
        "a fraction": lambda x: 1.5,
        "text": lambda x: "1",
        "too large": lambda x: 1 << 40,
    }
    return Call(F.noise_seed, {"seed": 1, "step": 2, "rank": 3}, dict.fromkeys(("seed", "step", "rank"), whole))


def _mask(function, **more):
    spoils = {"text_len": NOT_NEGATIVE, "grid": {k: s for k, s in GRID.items() if k != "a boolean"}}
    if more:
        spoils["kernel_size"] = {**SIZE, "even": lambda x: 4}
        spoils["dilation"], spoils["edges"] = SIZE, CHOICE
    return Call(function, {"text_len": 5, "grid": (3, 7), **more}, spoils)


def _multihead_attention():
    spoils = {"embed_dim": {**SIZE, "not a multiple of heads": lambda x: 13}, "num_heads": SIZE, "mask": MASKS}
    spoils["mask"] = {k: spoil for k, spoil in MASKS.items() if k != "too short"}
    spoils["embed_dim"] = {k: s for k, s in spoils["embed_dim"].items() if k not in ("a boolean",)}
    spoils["num_heads"] = {k: s for k, s in SIZE.items() if k not in ("a boolean",)}
    return Call(nn.MultiheadAttention, {"embed_dim": 12, "num_heads": 3, "mask": MASK}, spoils)


def _dvae_config():
    sizes = dict.fromkeys(("image_size", "downsampling", "num_codes", "embedding_dim", "hidden", "channels"), SIZE)
    sizes = {name: {k: s for k, s in spoil.items() if k != "a boolean"} for name, spoil in sizes.items()}
    good = {"image_size": 32, "downsampling": 4, "num_codes": 16, "embedding_dim": 8, "hidden": 8, "channels": 3}
    gain = {**NUMBER, **POSITIVE, "infinity": lambda x: math.inf}
    spoils = {**sizes, "likelihood": CHOICE, "residual_gain": gain}
    return Call(dvae.DVAEConfig, {**good, "likelihood": "l2", "residual_gain": 0.5}, spoils)


@functools.cache
def _small_dvae():
    return nn.DiscreteVAE(dvae.DVAEConfig(image_size=16, downsampling=4, num_codes=K, embedding_dim=4, hidden=4))


def _dvae_encode():
    spoils = {"a size that does not fit": lambda x: x[..., :-1], "one channel": lambda x: x[:, :1], **REQUIRED}
    spoils |= {k: s for k, s in NOT_TENSORS.items() if k != "another device"} | {"rank": lambda x: x[0]}
    spoils = {k: s for k, s in spoils.items() if k != "complex numbers"}
    return Call(lambda images: _small_dvae().encode(images), {"images": torch.rand(2, 3, 16, 16)}, {"images": spoils})


def _dvae_decode():
    spoils = {"floats": lambda x: x.float(), "rank": lambda x: x[0], "int32": lambda x: x.int(), "text": lambda x: "0"}
    spoils |= BEYOND
    return Call(lambda codes: _small_dvae().decode(codes), {"codes": torch.zeros(2, 4, 4).long()}, {"codes": spoils})


CALLS = {
    "sparse_attention": _sparse_attention,
    "scaled_dot_product_attention": _scaled_dot_product_attention,
    "gumbel_codebook": _gumbel_codebook,
    "codebook_argmax": lambda: Call(F.codebook_argmax, *_codebook_tensors("hidden", "weight", "bias")),
    "codebook_sample": _codebook_sample,
    "codebook_cross_entropy": _codebook_cross_entropy,
    "gumbel_softmax": _gumbel_softmax,
    "noise_seed": _noise_seed,
    "row_mask": lambda: _mask(masks.row_mask),
    "column_mask": lambda: _mask(masks.column_mask),
    "causal_mask": lambda: _mask(masks.causal_mask),
    "conv_mask": lambda: _mask(masks.conv_mask, kernel_size=3, dilation=1, edges="flat"),
    "MultiheadAttention": _multihead_attention,
    "DVAEConfig": _dvae_config,
    "DiscreteVAE.encode": _dvae_encode,
    "DiscreteVAE.decode": _dvae_decode,
}


@functools.cache
def cases() -> list[tuple[str, str, str]]:
    """(function, argument, way to spoil it)"""
    return [
        (name, argument, way)
        for name, make in CALLS.items()
        for argument, ways in make().spoils.items()
        for way in ways
    ]


def case(number: int, device: str) -> None:
    name, argument, way = cases()[number]
    call = CALLS[name]()
    call.function(**call.good)
    bad = {**call.good, argument: call.spoils[argument][way](call.good[argument])}
    try:
        answer = call.function(**bad)
    except (TypeError, ValueError) as error:
        names = call.good if way in (*SHAPES, "too short") else (argument,)
        if any(re.search(rf"\b{word}\b", str(error)) for word in names):
            return
        raise AssertionError(f"{name}, {argument} {way}: the error does not name it: {error}") from None
    except Exception as error:  # noqa: BLE001
        raise AssertionError(f"{name}, {argument} {way}: {type(error).__name__}: {str(error)[:200]}") from None
    raise AssertionError(f"{name}, {argument} {way}: an answer of type {type(answer).__name__}")
