"""Masks and attention outputs that public implementations computed: see README.md in shared/goldens."""

import json

import numpy as np
import pytest
import torch
from conftest import GOLDENS
from torch.nn.functional import linear

from dalle_fast.masks import causal_mask, column_mask, conv_mask, row_mask

RUDALLE = {
    "row_T16_W8": row_mask(16, 8),
    "col_T16_W8": column_mask(16, 8),
    "conv5_v3_T16_W8": conv_mask(16, 8, 5, edges="clip"),
    "conv5_v2_T16_W8": conv_mask(16, 8, 5, edges="torus"),
    "row_T128_W32": row_mask(128, 32),
    "conv11_v3_T128_W32": conv_mask(128, 32, 11, edges="clip"),
}
LUCIDRAINS = {  # 16 text tokens after a <bos>; the last image token is never fed
    "full": causal_mask(17, 8),
    "axial_row": row_mask(17, 8, wrap=False),
    "conv_like_k5_d1": conv_mask(17, 8, 5, edges="corner"),
}


@pytest.mark.parametrize("name", RUDALLE)
def test_rudalle_masks(golden, name):
    S = RUDALLE[name].seq_len
    bits = np.unpackbits(golden("rudalle_masks")[name].numpy())[: S * S]
    assert np.array_equal(bits.reshape(S, S).astype(bool), RUDALLE[name].to_dense().numpy())


def test_rudalle_masks_are_all_looked_at(golden):
    assert set(golden("rudalle_masks")) == set(RUDALLE)
    assert json.loads((GOLDENS / "rudalle_masks.json").read_text())["mask_shapes"].keys() == RUDALLE.keys()


def attend(server, x, tensors, mask, text_lengths=None):
    """The module of lucidrains/DALLE-pytorch around our attention: x (B, S, 32), 2 heads of 16."""
    B, S, _ = x.shape
    q, k, v = linear(x, tensors["w.to_qkv.weight"]).view(B, S, 3, 2, 16).permute(2, 0, 3, 1, 4)
    out = server(q, k, v, mask, text_lengths=text_lengths).transpose(1, 2).flatten(-2)
    return linear(out, tensors["w.to_out.0.weight"], tensors["w.to_out.0.bias"])


@pytest.mark.parametrize("name", LUCIDRAINS)
def test_lucidrains_attention(golden, server, name):
    tensors = {key: x.to(server.device) for key, x in golden(f"lucidrains_attn_{name}").items()}
    mask = LUCIDRAINS[name]
    leaves = ["w.to_qkv.weight", "w.to_out.0.weight", "w.to_out.0.bias", "x"]
    for leaf in leaves:
        tensors[leaf].requires_grad_()
    out = attend(server, tensors["x"], tensors, mask)
    torch.testing.assert_close(out, tensors["out"], rtol=0, atol=2e-5)
    out.backward(tensors["grad_out"])
    for leaf in leaves:
        expected = tensors["grad_x" if leaf == "x" else f"grad.{leaf[2:]}"]
        torch.testing.assert_close(tensors[leaf].grad, expected, rtol=1e-3, atol=1e-4)
    prefix = attend(server, tensors["x"][:, :37], tensors, mask)
    torch.testing.assert_close(prefix, tensors["out_prefix37"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["axial_row", "conv_like_k5_d1"])
def test_lucidrains_text_mask(golden, server, name):
    """Their text mask hides text keys from image queries only, ours from all: the image queries must agree."""
    tensors = {key: x.to(server.device) for key, x in golden(f"lucidrains_attn_{name}").items()}
    keep = tensors["text_mask"]
    lengths = keep.sum(-1)
    assert torch.equal(keep, torch.arange(17, device=keep.device) < lengths[:, None])  # so that lengths say it all
    assert (lengths < 17).any()
    out = attend(server, tensors["x"], tensors, LUCIDRAINS[name], lengths)
    torch.testing.assert_close(out[:, 17:], tensors["out_text_mask"][:, 17:], rtol=0, atol=2e-5)
