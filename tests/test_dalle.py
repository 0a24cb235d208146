"""DALLE: the paper's schedule, embeddings and loss, against the same written out in float64.

B batch, T text positions, h x w grid, G image positions, V text vocabulary, K codes, W width, H heads.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, gelu, layer_norm, linear

import dalle_fast.nn as fnn
from dalle_fast.masks import column_mask, conv_mask, row_mask
from dalle_fast.nn.dalle import PRESETS
from dalle_fast.testing import eager_attention

SMALL = fnn.DALLEConfig(
    vocab_size=23, text_len=5, num_codes=19, grid=(4, 3), layers=5, width=24, num_heads=2, head_dim=16, kernel_size=5
)
B, T, G, V, K = 3, 5, 12, 23, 19


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(V, (B, T), generator=generator)
    codes = torch.randint(K, (B, 4, 3), generator=generator)
    return text, codes, torch.tensor([5, 2, 0])


def make_model(**changes):
    """With embeddings and biases large enough that all of them matter."""
    torch.manual_seed(0)
    model = fnn.DALLE(dataclasses.replace(SMALL, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def written_out(model, text, codes, text_lengths):
    """(text logits (B, T, V), image logits (B, G, K)) in float64, one embedding after another, masks dense."""
    config, p = model.config, {name: x.detach().double() for name, x in model.named_parameters()}
    w, H = config.grid[1], config.num_heads
    rows = []
    for b in range(len(text)):
        length = int(text_lengths[b])
        row = [p["start.weight"][0]]
        for t in range(T):
            token = text[b, t] if t < length else V + t
            row.append(p["text_embedding.weight"][token] + p["text_position.weight"][t])
        for i in range(G - 1):
            place = p["row_embedding.weight"][i // w] + p["column_embedding.weight"][i % w]
            row.append(p["image_embedding.weight"][codes[b, i // w, i % w]] + place)
        rows.append(torch.stack(row))
    x = torch.stack(rows)  # (B, T + G, W)
    for index, mask in enumerate(config.masks):

        def of(name, index=index):
            return p[f"transformer.blocks.{index}.{name}.weight"], p[f"transformer.blocks.{index}.{name}.bias"]

        inner = linear(layer_norm(x, x.shape[-1:], *of("attention_norm")), *of("attention.qkv"))
        q, k, v = (part.unflatten(-1, (H, config.head_dim)).transpose(1, 2) for part in inner.chunk(3, -1))
        lengths = text_lengths + 1 if config.hide_padding else None
        out, _ = eager_attention(q, k, v, mask, text_lengths=lengths)
        x = x + linear(out.transpose(1, 2).flatten(2), *of("attention.out"))
        inner = gelu(linear(layer_norm(x, x.shape[-1:], *of("mlp_norm")), *of("mlp.up")))
        x = x + linear(inner, *of("mlp.down"))
    x = layer_norm(x, x.shape[-1:], p["transformer.norm.weight"], p["transformer.norm.bias"])
    logits = x @ p["head.weight"].T
    return logits[:, :T, :V], logits[:, T:, V:]


@pytest.mark.parametrize("hide_padding", [False, True])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_logits_and_losses_are_the_papers(batch, impl, hide_padding):
    text, codes, lengths = batch
    model = make_model(hide_padding=hide_padding)
    model = fnn.DALLE(model.config, impl=impl).eval().requires_grad_(False)
    model.load_state_dict(make_model(hide_padding=hide_padding).state_dict())
    of_text, of_image = written_out(model, text, codes, lengths)
    actual_text, actual_image = model.logits(text, codes.flatten(1)[:, :-1], text_lengths=lengths)
    torch.testing.assert_close(actual_text.double(), of_text, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual_image.double(), of_image, rtol=1e-4, atol=1e-4)
    # Of the text 5 + 2 + 0 tokens count, of the image all.
    kept = torch.arange(T) < lengths[:, None]
    text_loss = cross_entropy(of_text[kept], text[kept])
    image_loss = cross_entropy(of_image.flatten(0, 1), codes.flatten())
    out = model(text, codes, text_lengths=lengths)
    torch.testing.assert_close(out.text_loss.double(), text_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.image_loss.double(), image_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.loss.double(), text_loss / 8 + image_loss * 7 / 8, rtol=1e-5, atol=0)


def test_gradients_are_those_of_dense_logits(batch):
    text, codes, lengths = batch
    model = make_model()
    model(text, codes, text_lengths=lengths).loss.backward()
    actual = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    of_text, of_image = model.logits(text, codes.flatten(1)[:, :-1], text_lengths=lengths)
    kept = torch.arange(T) < lengths[:, None]
    loss = cross_entropy(of_text[kept], text[kept]) / 8 + cross_entropy(of_image.flatten(0, 1), codes.flatten()) * 7 / 8
    loss.backward()
    for name, parameter in model.named_parameters():
        assert actual[name].any(), f"{name} has no gradient"
        torch.testing.assert_close(actual[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_reference_serves_all_that_is_asked_of_it(batch, no_kernels):
    text, codes, lengths = batch
    model = fnn.DALLE(SMALL, impl="reference")
    model(text, codes, text_lengths=lengths).loss.backward()
    model.generate(text, text_lengths=lengths, num_images=2, seed=0)


def test_a_named_kernel_serves_attention_or_refuses(batch):
    """In float64 none computes."""
    text, codes, lengths = batch
    with pytest.raises(ValueError, match="impl='cpu' cannot serve this call: it computes in float32"):
        fnn.DALLE(SMALL, impl="cpu").double()(text, codes, text_lengths=lengths)


def test_text_weight(batch):
    text, codes, lengths = batch
    out = make_model(text_weight=0.25)(text, codes, text_lengths=lengths)
    torch.testing.assert_close(out.loss, 0.25 * out.text_loss + 0.75 * out.image_loss)


def test_nothing_depends_on_what_stands_in_padding(batch):
    text, codes, lengths = batch
    model = make_model()
    garbage = text.masked_fill(torch.arange(T) >= lengths[:, None], -7)
    assert torch.equal(model(text, codes, text_lengths=lengths).loss, model(garbage, codes, text_lengths=lengths).loss)


def test_no_lengths_are_full_lengths(batch):
    text, codes, _ = batch
    model = make_model()
    assert torch.equal(model(text, codes).loss, model(text, codes, text_lengths=torch.full((B,), T)).loss)


def test_captions_that_are_all_empty_have_a_loss_of_0(batch):
    text, codes, _ = batch
    out = make_model()(text, codes, text_lengths=torch.zeros(B, dtype=torch.int64))
    assert out.text_loss.item() == 0
    torch.testing.assert_close(out.loss, out.image_loss * 7 / 8)
    out.loss.backward()


@torch.no_grad()
def test_hidden_padding_is_seen_by_nobody_else(batch):
    """Of the padding tokens only the last one matters to the image: as an input that the first code is predicted at."""
    text, codes, lengths = batch
    for hide in (True, False):
        model = make_model(hide_padding=hide)
        before = model(text, codes, text_lengths=lengths).image_loss
        model.text_embedding.weight[V : V + T - 1] *= -1
        assert torch.equal(model(text, codes, text_lengths=lengths).image_loss, before) == hide


@torch.no_grad()
def test_no_prediction_depends_on_its_own_token_or_a_later_one(batch):
    """Bit for bit, in the stream's order."""
    text, codes, _ = batch
    model = make_model().eval()

    def hidden(text, codes):
        return model.hidden(text, codes.flatten(1))

    before = hidden(text, codes)  # row s predicts token s
    for token in range(T + G):
        changed_text, changed_codes = text.clone(), codes.flatten(1).clone()
        part, index, size = (changed_text, token, V) if token < T else (changed_codes, token - T, K)
        part[:, index] = (part[:, index] + 1) % size
        after = hidden(changed_text, changed_codes)
        assert torch.equal(after[:, : token + 1], before[:, : token + 1])
        assert (after[:, token + 1] != before[:, token + 1]).any(-1).all()


# -- the schedule, presets, parameters --------------------------------------------------------------------------------


def test_the_schedule_is_the_papers():
    config = PRESETS["small"]
    row, column = row_mask(257, 32), column_mask(257, 32)
    assert config.masks[:6] == (row, column, row, row, row, column)
    assert config.masks[-1] == conv_mask(257, 32, 11)
    assert len(config.masks) == 12
    assert [mask.rule for mask in SMALL.masks] == ["row", "column", "row", "row", "conv_flat"]
    assert dataclasses.replace(SMALL, layers=1).masks[0].rule == "conv_flat"
    assert sum(mask.rule == "column" for mask in PRESETS["12b"].masks) == 16


@pytest.mark.parametrize(("grid", "kernel_size"), [((8, 8), 7), ((12, 30), 11), ((5, 9), 5), ((1, 4), 1), ((2, 2), 1)])
def test_the_kernel_fits_the_grid(grid, kernel_size):
    assert dataclasses.replace(SMALL, grid=grid, kernel_size=11).masks[-1].kernel_size == kernel_size


@pytest.mark.parametrize(("name", "billions"), [("12b", 12.3), ("1b", 1.3), ("medium", 0.345), ("small", 0.063)])
def test_presets_have_the_sizes_of_their_names(name, billions):
    with torch.device("meta"):
        model = fnn.DALLE(name)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.03)


def test_a_config_goes_through_json():
    config = dataclasses.replace(SMALL, rules=("row", "column", "conv_clip", "causal", "axial_row"))
    assert fnn.DALLEConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert [mask.rule for mask in config.masks] == list(config.rules)
    assert fnn.DALLEConfig(grid=8).grid == (8, 8)
    assert json.dumps(dataclasses.replace(config, width=np.int64(24)).width) == "24"


def test_embeddings_and_the_output_matrix_begin_small():
    """With GPT-2's 0.02, as the transformer's."""
    torch.manual_seed(0)
    model = fnn.DALLE("tiny")
    for module in (model.text_embedding, model.text_position, model.image_embedding, model.head):
        assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for module in (model.start, model.row_embedding, model.column_embedding):
        assert module.weight.std().item() == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: fnn.DALLE(dataclasses.replace(SMALL, width=64), gradient_scaling=True),
        lambda: fnn.DiscreteVAE("tiny"),
        lambda: fnn.GumbelCodebook(8, 16, 4),
        lambda: fnn.MultiheadAttention(32, 2, kdim=8, add_bias_kv=True),
    ],
)
@torch.no_grad()
def test_memory_that_was_empty_is_initialised(make):
    """As by a constructor; each module's own reset after that draws other numbers of the same spread."""
    torch.manual_seed(3)
    expected = make()
    with torch.device("meta"):
        model = make()
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(7)
    torch.manual_seed(3)
    model.reset_parameters()
    assert all(torch.equal(x, expected.state_dict()[name]) for name, x in model.state_dict().items())
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for name, x in model.state_dict().items():
        if name == "out_proj.bias":  # torch's attention resets its layer's bias, and then sets it to 0
            continue
        spread, mean = (of(expected.state_dict()[name].double()).item() for of in (torch.std, torch.mean))
        assert x.double().mean().item() == pytest.approx(mean, abs=spread), name
        assert x.numel() < 200 or x.double().std().item() == pytest.approx(spread, rel=0.2), name


def test_matrices_decay_and_nothing_else():
    model = make_model()
    names = {p: name for name, p in model.named_parameters()}
    decays, others = model.decay_groups(0.045)
    assert (decays["weight_decay"], others["weight_decay"]) == (0.045, 0.0)
    assert sorted(map(names.get, decays["params"] + others["params"])) == sorted(names.values())
    layers = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    matrices = {f"transformer.blocks.{index}.{layer}.weight" for index in range(5) for layer in layers}
    assert {names[p] for p in decays["params"]} == matrices | {"head.weight"}


# -- precision, torch.compile ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_parameters_gradients_and_the_loss_in_float32(batch, dtype):
    text, codes, lengths = batch
    model = make_model()
    model = fnn.DALLE(model.config, gradient_scaling=dtype == torch.float16)
    model.load_state_dict(make_model().state_dict())
    expected = model(text, codes, text_lengths=lengths).loss
    expected.backward()
    model.unscale_gradients()
    exact = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", dtype):
        loss = model(text, codes, text_lengths=lengths).loss
    loss.backward()
    model.unscale_gradients()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert (parameter.grad - exact[name]).norm() < 0.1 * exact[name].norm(), name


def test_float16_does_not_lose_the_gradients_of_a_mean(batch):
    """Those of a loss divided by as much as in training are below what float16 holds, were the logits' operands in it."""
    text, codes, lengths = batch
    model = fnn.DALLE(SMALL, gradient_scaling=True)
    model.transformer.gradient_scale.fill_(2.0**24)  # where training would have brought it
    (model(text, codes, text_lengths=lengths).loss * 1e-7).backward()
    model.unscale_gradients()
    exact = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = model(text, codes, text_lengths=lengths).loss
    (loss * 1e-7).backward()
    model.unscale_gradients()
    for name, parameter in model.named_parameters():
        assert (parameter.grad - exact[name]).norm() < 0.05 * exact[name].norm(), name


def test_the_whole_loss_compiles_without_graph_breaks(batch):
    text, codes, lengths = batch
    model, other = make_model(), make_model()
    expected = other(text, codes, text_lengths=lengths)
    expected.loss.backward()
    out = torch.compile(model, backend="aot_eager", fullgraph=True)(text, codes, text_lengths=lengths)
    torch.testing.assert_close(out.loss, expected.loss)
    out.loss.backward()
    for actual, p in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, p.grad)


@pytest.mark.parametrize("strict", [False, True])
def test_the_loss_is_exported_for_any_batch(batch, strict):
    model = make_model().eval().requires_grad_(False)
    text, codes, lengths = batch
    of_batch = {0: torch.export.Dim("B", min=2, max=64)}
    for given in (None, lengths):
        shapes = {"text": of_batch, "codes": of_batch, "text_lengths": None if given is None else of_batch}
        options = {"dynamic_shapes": shapes, "strict": strict}
        exported = torch.export.export(model, (text, codes), {"text_lengths": given}, **options).module()
        text2, codes2 = text.repeat(2, 1), codes.repeat(2, 1, 1)
        given = None if given is None else given.repeat(2)
        actual, expected = (call(text2, codes2, text_lengths=given) for call in (exported, model))
        torch.testing.assert_close(actual.loss, expected.loss)


class Wrapped(torch.nn.Module):
    """As a LoRA wrapper: the layer within, and what is added to its result."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)


class WrappedWithWeight(Wrapped):
    @property
    def weight(self):
        return self.base.weight


def test_what_the_docstring_says_of_modules_that_are_not_called(batch):
    text, codes, lengths = batch

    def loss_of(name, change):
        model = make_model()
        change(model, name)
        return model(text, codes, text_lengths=lengths).loss

    def wrap(kind):
        return lambda model, name: setattr(model, name, kind(getattr(model, name)))

    def parametrize(model, name):
        double = torch.nn.Identity()
        double.forward = lambda x: 2 * x
        torch.nn.utils.parametrize.register_parametrization(getattr(model, name), "weight", double)

    expected = make_model()(text, codes, text_lengths=lengths).loss
    for name in ("head", "start", "text_position", "row_embedding", "column_embedding"):
        with pytest.raises(AttributeError, match="'Wrapped' object has no attribute 'weight'"):
            loss_of(name, wrap(Wrapped))
        assert loss_of(name, wrap(WrappedWithWeight)) == expected, name
        assert loss_of(name, parametrize) != expected, name
    for name in ("text_embedding", "image_embedding"):
        assert loss_of(name, wrap(Wrapped)) != expected, name


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"grid": (4, 0)}, "grid columns must be at least 1, got 0"),
        ({"kernel_size": 2}, "kernel_size must be odd, got 2"),
        ({"text_weight": 1.5}, r"text_weight must be from 0 to 1, got 1\.5"),
        ({"rules": ("row",)}, "rules must name one for each of 5 layers, got 1"),
        ({"rules": ("row",) * 4 + ("diagonal",)}, "rule must be one of causal, .*, got 'diagonal'"),
    ],
    ids=str,
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_configs_of_the_wrong_kind_are_refused():
    with pytest.raises(TypeError, match="rules must be a sequence of a rule for each layer, got the string 'row'"):
        dataclasses.replace(SMALL, rules="row")
    for name, value, what in (
        ("layers", True, "an integer"),
        ("head_dim", 2.0, "an integer"),
        ("text_weight", "a", "a finite number"),
        ("text_weight", True, "a finite number"),
    ):
        with pytest.raises(TypeError, match=f"{name} must be {what}, got {value!r}"):
            dataclasses.replace(SMALL, **{name: value})
    with pytest.raises(TypeError, match="hide_padding must be a bool, got 'no'"):
        dataclasses.replace(SMALL, hide_padding="no")


def test_unknown_presets_are_refused():
    with pytest.raises(ValueError, match="one of 12b, 1b, medium, small, tiny, got 'large'"):
        fnn.DALLE("large")
    with pytest.raises(ValueError, match="one of 12b, 1b, medium, small, tiny, got None"):
        fnn.DALLE(None)
    with pytest.raises(ValueError, match="impl must be one of auto, .*, got 'fast'"):
        fnn.DALLE("tiny", impl="fast")


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("text", lambda x: x.int(), TypeError, "text must be an int64 tensor, got torch.int32"),
        ("text", lambda x: x[:, 1:], ValueError, r"text must have shape \(B, 5\), the model's text_len, got \(3, 4\)"),
        ("text", lambda x: x + V, ValueError, "text must be from 0 to 22, the last of the model's 23 text tokens, got"),
        ("text", lambda x: x.to("meta"), ValueError, "text must be on the model's device cpu, got meta"),
        ("codes", lambda x: x.to("meta"), ValueError, "codes must be on the model's device cpu, got meta"),
        ("codes", lambda x: x.tolist(), TypeError, "codes must be an int64 tensor, got list"),
        ("codes", lambda x: x.mT, ValueError, r"codes must have shape \(3, 12\) or \(3, 4, 3\) .* got \(3, 3, 4\)"),
        ("codes", lambda x: x[:2], ValueError, r"codes must have shape \(3, 12\) .* got \(2, 4, 3\)"),
        ("codes", lambda x: x - 1, ValueError, "codes must be from 0 to 18, the last of the model's 19 codes, got"),
        ("text_lengths", lambda x: x[:2], ValueError, r"text_lengths must have shape \(3,\) and be on cpu, got \(2,\)"),
        ("text_lengths", lambda x: x + 1, ValueError, "text_lengths must be from 0 to 5, the model's text_len, got"),
        ("text_lengths", lambda x: x / 1, TypeError, "text_lengths must be an int64 tensor, got torch.float32"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",  # the same in every process
)
def test_bad_input_is_refused_with_both_sides(batch, name, change, error, message):
    arguments = dict(zip(("text", "codes", "text_lengths"), batch, strict=True))
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=message):
        make_model()(**arguments)


def test_it_may_be_sized_without_memory():
    """Under FakeTensorMode, as memory is estimated; what was asked of a mask there does not stay."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mask = column_mask(4, (3, 3))
    with FakeTensorMode():
        model = fnn.DALLE("tiny")
        model(torch.randint(512, (2, 32)), torch.randint(512, (2, 64))).loss.backward()
        assert model.head.weight.grad.shape == (1024, 128) and len(mask.token_order) == 13
    assert mask.token_order.tolist() == [0, 1, 2, 3, 4, 7, 10, 5, 8, 11, 6, 9, 12]
