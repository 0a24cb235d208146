"""The transformer's blocks: what each may see, what checkpointing keeps, and gradients scaled block by block.

B batch, S sequence, W width.
"""

import pytest
import torch

import dalle_fast.nn as fnn
from dalle_fast.masks import column_mask, conv_mask, row_mask
from dalle_fast.nn import functional as F
from dalle_fast.nn import transformer as module
from dalle_fast.testing import every_mask

T, GRID, W = 4, (5, 3), 24
MASKS = (row_mask(T, GRID), column_mask(T, GRID), conv_mask(T, GRID, 3))
S = MASKS[0].seq_len


def make_transformer(masks=MASKS, **options):
    torch.manual_seed(0)
    return fnn.Transformer(masks, W, 3, **options)


def gradients(model, x, autocast=None, text_lengths=None):
    """The gradients of parameters and x for a fixed gradient of the output."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        out = model(x, text_lengths)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()
    return {**{name: p.grad.clone() for name, p in model.named_parameters()}, "x": x.grad}


@pytest.mark.parametrize("rule", every_mask(T, GRID))
def test_no_output_depends_on_a_later_input(make, rule):
    """Bit for bit: with any mask twice, so that what one layer let through the next would show."""
    model = make_transformer([every_mask(T, GRID)[rule]] * 2)
    x, other, _ = make((2, S, W))
    with torch.no_grad():
        out = model(x)
        for position in (0, T - 1, T, T + 1, S - 1):
            changed = x.clone()
            changed[:, position] = other[:, position]
            again = model(changed)
            assert torch.equal(again[:, :position], out[:, :position])
            assert not torch.equal(again[:, position], out[:, position])


def test_the_packed_projection_is_read_in_place(make, monkeypatch):
    seen = []

    def attention(query, key, value, mask, **options):
        seen.append((query, key, value))
        return torch.zeros_like(query)

    monkeypatch.setattr(F, "sparse_attention", attention)
    make_transformer()(make((2, S, W))[0])
    for tensors in seen:
        assert len({x.untyped_storage().data_ptr() for x in tensors}) == 1
        assert all(x.stride(-2) == 3 * W for x in tensors)
    assert len(seen) == len(MASKS)


def test_initialisation_is_gpt2s():
    model = fnn.Transformer(MASKS * 2, 256, 4)
    block = model.blocks[0]
    for linear in (block.attention.qkv, block.mlp.up):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02)
    for linear in (block.attention.out, block.mlp.down):
        assert linear.weight.std().item() == pytest.approx(0.02 / 12**0.5, rel=0.02)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


# -- activation checkpointing -----------------------------------------------------------------------------------------


def kept_bytes(model, x):
    """Bytes of the activations that autograd keeps from the forward pass, each counted once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for parameter in model.parameters():
        kept[parameter.untyped_storage().data_ptr()] = 0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(kept.values()) - sum(kept.get(p.untyped_storage().data_ptr(), 0) for p in model.parameters())


def test_checkpointing_keeps_one_activation_a_layer_and_changes_nothing(make):
    x = make((2, S, W))[0]
    model, checkpointed = make_transformer(), make_transformer(activation_checkpointing=True)
    for lengths in (None, torch.tensor([1, 3])):
        expected = gradients(model, x, text_lengths=lengths)
        actual = gradients(checkpointed, x, text_lengths=lengths)
        assert expected.keys() == actual.keys()
        assert all(torch.equal(expected[name], actual[name]) for name in expected)
    x.requires_grad_()
    # What the last norm keeps is the same in both; of each layer, x is all.
    assert kept_bytes(checkpointed, x) <= 6 * x.nbytes < kept_bytes(model, x) / 5


# -- gradient scaling -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_scaled_gradients_are_the_same_to_the_bit(make, checkpointing):
    x = make((2, S, W))[0]
    model = make_transformer(gradient_scaling=True, activation_checkpointing=checkpointing)
    model.gradient_scale[1, 0] = 2.0**9  # each block its own
    plain = make_transformer()
    expected = gradients(plain, x)
    scaled = gradients(model, x)
    name = "blocks.1.attention.out.weight"
    assert torch.equal(scaled[name], expected[name] * 2**9)
    assert not model.unscale_gradients().any()
    actual = {**{name: p.grad for name, p in model.named_parameters()}, "x": scaled["x"]}
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_scaling_saves_what_float16_loses(make):
    """The loss is so small that unscaled float16 gradients are all 0."""
    x = make((2, S, W))[0]

    def gradient(**options):
        model = make_transformer(**options)
        with torch.autocast("cpu", torch.float16):
            out = model(x)
        (out.float() * 1e-7 * make(out.shape)[1]).sum().backward()
        model.unscale_gradients()
        return model.blocks[0].mlp.up.weight.grad

    exact = make_transformer()
    (exact(x) * 1e-7 * make(x.shape)[1]).sum().backward()
    exact = exact.blocks[0].mlp.up.weight.grad
    assert (gradient() - exact).norm() > 0.5 * exact.norm()
    assert (gradient(gradient_scaling=True) - exact).norm() < 0.02 * exact.norm()


class _Overflow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, torch.inf)


def test_an_overflow_stays_in_its_block(make):
    x = make((2, S, W))[0]
    model, plain = make_transformer(gradient_scaling=True), make_transformer()
    expected = gradients(plain, x)
    hook = model.blocks[1].mlp.gelu.register_forward_hook(lambda module, arguments, out: _Overflow.apply(out))
    gradients(model, x)
    hook.remove()
    model.updates_at_scale.fill_(500)
    dropped = model.unscale_gradients()
    assert dropped.nonzero().tolist() == [[1, 1]]
    assert model.updates_at_scale.tolist() == [[501, 501], [501, 0], [501, 501]]  # its thousand begins again
    before = torch.full((3, 2), module.FIRST_SCALE)
    before[1, 1] /= 2
    assert torch.equal(model.gradient_scale, before)
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if name.startswith("blocks.1.mlp"):
            assert not grad.any(), name
        elif name.startswith(("blocks.2", "norm")):  # the gradient has not been through the block yet
            assert torch.equal(grad, expected[name]), name
        else:
            assert grad.isfinite().all(), name
            assert grad.any(), name


def test_scales_double_after_a_thousand_updates_and_stay_in_their_range(make):
    x = make((2, S, W))[0]
    model = make_transformer(gradient_scaling=True)
    gradients(model, x)
    for _ in range(999):
        model.unscale_gradients()
    assert (model.gradient_scale == 2.0**13).all()
    model.unscale_gradients()
    assert (model.gradient_scale == 2.0**14).all()
    model.gradient_scale.fill_(module.MAX_SCALE)
    model.updates_at_scale.fill_(999)
    model.unscale_gradients()
    assert (model.gradient_scale == module.MAX_SCALE).all()
    model.gradient_scale.fill_(module.MIN_SCALE)
    model.blocks[0].mlp.up.weight.grad[0, 0] = torch.nan
    model.unscale_gradients()
    assert (model.gradient_scale == module.MIN_SCALE).all()


def test_without_scaling_gradients_are_left_alone(make):
    model = make_transformer()
    before = gradients(model, make((2, S, W))[0])
    assert not model.unscale_gradients().any()
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters())


# -- torch.compile, bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"gradient_scaling": True, "activation_checkpointing": True}], ids=str)
def test_compiles_without_graph_breaks(make, options):
    x = make((2, S, W))[0]
    expected = gradients(make_transformer(**options), x)
    model = make_transformer(**options)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual = gradients(compiled, x)
    for name in expected:
        torch.testing.assert_close(actual.get(name, actual.get(f"_orig_mod.{name}")), expected[name])


def test_bad_sizes_are_refused():
    with pytest.raises(TypeError, match="masks must hold AttentionMasks, got str"):
        fnn.Transformer(["row"], 16, 2)
    with pytest.raises(ValueError, match=r"masks must hold at least one, .* got \(\)"):
        fnn.Transformer([], 16, 2)
    with pytest.raises(ValueError, match=r"masks must hold .* all of one text_len and grid, got .*4, 4.*5, 5"):
        fnn.Transformer([row_mask(3, 4), row_mask(3, 4), row_mask(3, 5)], 16, 2)
    for name, sizes in (("width", (0, 2)), ("num_heads", (16, 0)), ("head_dim", (16, 2, 0))):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            fnn.Transformer(MASKS, *sizes)
    with pytest.raises(ValueError, match="head_dim must be at least 1, got -1"):
        fnn.Transformer(MASKS, 16, 2, -1)
    with pytest.raises(ValueError, match="width must be a multiple of num_heads .* got 16, 3"):
        fnn.Transformer(MASKS, 16, 3)
