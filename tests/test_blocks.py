"""A step through all blocks in one native call: its results, samples that do not depend on each other, and who serves.

P prompts, B samples, T text positions, W width, H heads, D head size.
"""

import copy
import pickle
import warnings

import pytest
import torch

import dalle_fast.nn as fnn
from dalle_fast import _extension
from dalle_fast.masks import causal_mask, column_mask, conv_mask, row_mask
from dalle_fast.nn import transformer as module
from dalle_fast.nn.kv_cache import KVCache
from dalle_fast.ops import blocks as blocks_ops
from dalle_fast.testing import assert_as_exact_as_eager, nan_poisoned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
T, GRID, G = 4, (5, 3), 15
MASKS = (row_mask(T, GRID), column_mask(T, GRID), conv_mask(T, GRID, 3), causal_mask(T, GRID))
# (W, H, D): vectors of 4, 8 and 16, around them, one, and enough weights for all threads
SIZES = [(48, 3, 16), (13, 3, 5), (33, 2, 17), (1, 1, 1), (192, 2, 64)]
MANY = 16


@pytest.fixture(autouse=True)
def any_number_of_samples(monkeypatch):
    """As many as these tests have, whatever is best on this CPU."""
    monkeypatch.setattr(blocks_ops, "_most_samples", lambda: (MANY,) * 3)


@pytest.fixture
def served(monkeypatch):
    """The steps that one native call has taken."""
    steps, real = [], blocks_ops._step
    monkeypatch.setattr(blocks_ops, "_step", lambda *arguments: steps.append(arguments) or real(*arguments))
    return steps


def make_transformer(sizes=SIZES[0], dtype=torch.float32, masks=MASKS, **options):
    """With biases and gains that show: as initialised, the one are 0 and the other 1."""
    torch.manual_seed(0)
    W, H, D = sizes
    model = fnn.Transformer(masks, W, H, D, **options).requires_grad_(False)
    for name, parameter in model.named_parameters():
        spread = 0.5 / max(1, parameter.shape[-1]) ** 0.5 if parameter.dim() > 1 else 0.2
        torch.nn.init.normal_(parameter, mean=float("norm.weight" in name), std=spread)
    return model.to(dtype)


def make_cache(model, inputs, P, lengths=None):
    """A cache that holds T text positions and one image token."""
    attention = model.blocks[0].attention
    B, dtype = len(inputs), model.norm.weight.dtype
    cache = KVCache(
        model.masks, num_prompts=P, num_images=B // P, num_heads=attention.num_heads, head_dim=attention.head_dim,
        dtype=dtype, text_lengths=lengths,
    )  # fmt: skip
    model(inputs[:: B // P, : T + 1].to(dtype), lengths, cache)
    return cache


def make_inputs(B, W, P=1):
    """(B, T + G, W); the first T + 1 of the samples of a prompt are the same."""
    inputs = torch.randn(B, T + G, W, generator=torch.Generator().manual_seed(1))
    inputs[:, : T + 1] = inputs[:: B // P, : T + 1].repeat_interleave(B // P, 0)
    return inputs


def all_steps(model, inputs, P=1, lengths=None):
    """What `step` gives for every image token but the first, (B, G - 1, W)."""
    return steps_from(make_cache(model, inputs, P, lengths), model, inputs)


def steps_from(cache, model, inputs):
    inputs = inputs.to(model.norm.weight.dtype)
    return torch.stack([model.step(inputs[:, T + n], cache) for n in range(1, G)], 1)


def one_by_one(model):
    """The same modules, with steps of one operation after another."""
    plain = copy.copy(model)
    plain._step_at_once = lambda x, cache: None
    return plain


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [  # with every instruction set each size and each dtype, but not all of both
        pytest.param(
            sizes,
            dtype,
            id=f"{sizes}-{dtype}",
            marks=[pytest.mark.every_instruction_set] * (dtype == torch.float32 or sizes == SIZES[0]),
        )
        for sizes in SIZES
        for dtype in DTYPES
    ],
)
def test_steps_are_as_exact_as_one_operation_after_another(served, sizes, dtype):
    for P, B, lengths in ((1, 1, None), (2, 6, (3, 0)), (1, 9, (4,)), (16, 16, None)):
        inputs = make_inputs(B, sizes[0], P)
        lengths = None if lengths is None else torch.tensor(lengths)
        model = make_transformer(sizes, dtype)
        eager = all_steps(make_transformer(sizes, dtype, impl="reference"), inputs, P, lengths)
        assert not served
        exact = all_steps(make_transformer(sizes, dtype, impl="reference").double(), inputs.to(dtype), P, lengths)
        with nan_poisoned():
            actual = all_steps(model, inputs, P, lengths)
        assert len(served) == G - 1 and actual.dtype == dtype
        served.clear()
        assert_as_exact_as_eager("step", actual, eager, exact)


@pytest.mark.every_instruction_set
def test_a_large_mean_does_not_cancel(served):
    """Of a norm, whose rows lie far from 0: no more than in torch's."""
    model, inputs = make_transformer(), make_inputs(3, 48) + 300
    eager = all_steps(make_transformer(impl="reference"), inputs)
    exact = all_steps(make_transformer(impl="reference").double(), inputs)
    assert_as_exact_as_eager("step", all_steps(model, inputs), eager, exact)
    assert served


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("W", [13, 512, 1000, 2048])
def test_norms_are_as_exact_as_torchs(served, make, W):
    """With weights of 0 a step is its last norm, here of rows that little or one number sets apart."""
    masks, D = (row_mask(1, (3, 3)),), 4
    noise = make((6, W), count=1)[0]
    rows = torch.stack(
        [
            noise[0],
            torch.full((W,), 1e4 + 0.1),
            torch.full((W,), 3e5 / 7),
            1e4 + 0.01 * noise[3],
            noise[4],
            1e-20 * noise[5],
        ]
    )
    rows[4, W // 2] = 1e6

    def last_norm(rows, dtype=torch.float32, impl="auto"):
        model = make_transformer((W, 1, D), masks=masks, impl=impl)
        for parameter in model.blocks.parameters():
            parameter.zero_()
        sizes = {"num_prompts": 1, "num_images": len(rows), "num_heads": 1, "head_dim": D}
        cache = KVCache(masks, **sizes, dtype=dtype)
        text = torch.zeros(1, 1, 1, D, dtype=dtype)  # 0 times what memory holds may be NaN
        cache.layer(0).prefill(text, text)
        cache.advance(0)
        for tensor in cache.layer(0).tensors:
            tensor.zero_()
        return model.to(dtype).step(rows.to(dtype), cache)

    ours, eager, exact = last_norm(rows), last_norm(rows, impl="reference"), last_norm(rows, torch.float64, "reference")
    for row, name in enumerate(("normal", "constant", "constant", "narrow", "outlier", "tiny")):
        assert_as_exact_as_eager(f"{name}, W {W}", ours[row], eager[row], exact[row])
    assert not last_norm(1e30 * noise[:1]).isfinite().any()  # of squares that no float holds
    assert len(served) == 2


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_does_not_depend_on_the_others_nor_on_the_threads(served, threads, dtype):
    """Bit for bit, so that an image does not depend on its batch."""
    for sizes in (SIZES[2], SIZES[4]):
        model, inputs = make_transformer(sizes, dtype), make_inputs(MANY, sizes[0])

        def steps(inputs, count, model=model):
            threads(1)  # of torch's products, by which the cache begins, results depend on them
            cache = make_cache(model, inputs, 1)
            threads(count)
            return steps_from(cache, model, inputs)

        alone = torch.cat([steps(sample[None], 1) for sample in inputs])
        for B, count in ((5, 1), (MANY, 1), (1, 2), (MANY, 2), (5, 3)):
            assert torch.equal(steps(inputs[:B], count), alone[:B])
    assert served


@pytest.mark.every_instruction_set
def test_nan_stays_in_its_sample(served):
    model, inputs = make_transformer(), make_inputs(3, 48)
    expected = all_steps(model, inputs)
    inputs[1, T + 5, 7] = torch.nan
    actual = all_steps(model, inputs)
    assert torch.equal(actual[::2], expected[::2]) and torch.equal(actual[1, :4], expected[1, :4])
    assert actual[1, 4].isnan().all() and served


@pytest.mark.every_instruction_set
def test_weights_may_change_between_steps(served):
    """In place, for others, and to other memory."""
    model, inputs = make_transformer(), make_inputs(2, 48)
    plain = one_by_one(copy.deepcopy(model))
    caches = [make_cache(of, inputs, 1) for of in (model, plain)]
    for n in range(1, 5):
        for of in (model, plain):
            if n == 2:
                of.blocks[1].mlp.up.weight.mul_(-2)
            if n == 3:
                of.blocks[0].attention.out.weight = copy.deepcopy(of.blocks[2].attention.out.weight)
                of.blocks[2].attention_norm.bias = torch.nn.Parameter(torch.ones(48), requires_grad=False)
                of.blocks[3].mlp_norm.eps = 0.5
            if n == 4:
                of.blocks[1].mlp.down.weight.data = -3 * of.blocks[1].mlp.down.weight.data
        ours, theirs = (of.step(inputs[:, T + n], cache) for of, cache in zip((model, plain), caches, strict=True))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert len(served) == 4


def test_modules_are_looked_at_once_for_a_text(served, monkeypatch):
    """And anew for another text, by another model and in a copy, which holds nothing of the model."""
    model, inputs, looks = make_transformer(), make_inputs(1, 48), []
    real = module.Transformer._parts_as_made
    monkeypatch.setattr(module.Transformer, "_parts_as_made", lambda *given: looks.append(given) or real(*given))
    cache = make_cache(model, inputs, 1)
    for n in range(1, 4):
        model.step(inputs[:, T + n], cache)
    assert len(looks) == 1
    with_hook(model)
    model.step(inputs[:, T + 4], copy.deepcopy(cache))
    assert len(looks) == 2 and len(served) == 3 and pickle.loads(pickle.dumps(cache)).plan is None
    make_transformer().step(inputs[:, T + 4], cache)
    assert len(looks) == 3 and len(served) == 4
    cache.reset()
    model(inputs[:, : T + 1], None, cache)
    model.step(inputs[:, T + 1], cache)
    assert len(looks) == 4 and len(served) == 4


def copied(cache):
    return copy.deepcopy(cache)


def unpickled(cache):
    return pickle.loads(pickle.dumps(cache))


def elsewhere(cache):
    """The same cache, whose tensors have gone to other memory."""
    for layer in range(len(MASKS)):
        for tensor in cache.layer(layer).tensors:
            tensor.data = tensor.data.clone()
    return cache


@pytest.mark.parametrize("another", [copied, unpickled, elsewhere], ids=lambda another: another.__name__)
def test_a_cache_may_be_copied_between_steps(served, another):
    """And the copy is filled, not what it is of."""
    inputs = make_inputs(2, 48)
    results = []
    for model in (make_transformer(), one_by_one(make_transformer())):
        first = make_cache(model, inputs, 1)
        outs = [model.step(inputs[:, T + 1], first)]
        second = another(first)
        outs += [model.step(inputs[:, T + 2], second)]
        outs += [model.step(inputs[:, T + n], cache) for cache in {first, second} for n in (3, 4)]
        results.append(sorted(outs, key=lambda out: float(out.sum())))
        assert torch.equal(first.position, torch.tensor(first.length))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert served


def test_a_shared_cache_is_found_again(served):
    model, inputs = make_transformer(), make_inputs(2, 48)
    cache, plain = make_cache(model, inputs, 1), make_cache(model, inputs, 1)
    model.step(inputs[:, T + 1], cache)
    for layer in range(len(MASKS)):
        for tensor in cache.layer(layer).tensors:
            tensor.share_memory_()
    ours = model.step(inputs[:, T + 2], cache)
    for n in (1, 2):
        theirs = one_by_one(model).step(inputs[:, T + n], plain)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert len(served) == 2


def test_autograd_learns_that_a_cache_was_written(served):
    model, inputs = make_transformer(), make_inputs(1, 48)
    cache = make_cache(model, inputs, 1)
    weight = torch.ones(1, requires_grad=True)
    product = (weight * cache.layer(0).image_key).sum()
    with torch.no_grad():
        model.step(inputs[:, T + 1], cache)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    assert served


def test_a_cache_of_inference_mode_is_not_half_written(served):
    model, inputs = make_transformer(), make_inputs(1, 48)
    with torch.inference_mode():
        cache = make_cache(model, inputs, 1)
        model.step(inputs[:, T + 1], cache)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        model.step(inputs[:, T + 2], cache)
    assert cache.length == int(cache.position) == 2 and len(served) == 1


class Subclass(torch.Tensor):
    """Parameters with operations of their own, as of quantized or distributed ones."""


class Adapter(module.Linear):
    """Anything that someone puts in a linear layer's place."""

    def forward(self, x, activation=None):
        return 2 * super().forward(x, activation)


def double(module_, arguments, out):
    return 2 * out


def with_hook(model):
    model.blocks[1].attention.out.register_forward_hook(double)


def with_hook_before(model):
    model.blocks[2].mlp_norm.register_forward_pre_hook(lambda module_, arguments: (arguments[0].roll(1, -1),))


def with_adapter(model):
    adapter = Adapter(192, 48, "auto").requires_grad_(False)
    adapter.load_state_dict(model.blocks[1].mlp.down.state_dict())
    model.blocks[1].mlp.down = adapter


def with_forward(model):
    up = model.blocks[0].mlp.up
    up.forward = lambda x, activation=None: 3 * module.Linear.forward(up, x, activation)


def with_block(model):
    class Louder(module.Block):
        def step(self, x, update, cache):
            x, update = super().step(x, update, cache)
            return x, 2 * update

    model.blocks[3].__class__ = Louder


def with_attention(model):
    class Louder(module.Attention):
        def step(self, x, cache):
            return 2 * super().step(x, cache)

    model.blocks[3].attention.__class__ = Louder


def with_parametrization(model):
    torch.nn.utils.parametrizations.weight_norm(model.blocks[0].attention.qkv)


def without_bias(model):
    model.blocks[2].mlp.up.bias = None


def with_strides(model):
    qkv = model.blocks[0].attention.qkv
    qkv.weight = torch.nn.Parameter(qkv.weight.T.contiguous().T, requires_grad=False)


def with_subclass(model):
    up = model.blocks[0].mlp.up
    up.weight = torch.nn.Parameter(up.weight.as_subclass(Subclass), requires_grad=False)


def with_reference_layer(model):
    model.blocks[0].mlp.up.impl = "reference"


def with_compiled(model):
    model.blocks[1].mlp = torch.compile(model.blocks[1].mlp, backend="eager")


def with_tensor(model):
    up = model.blocks[1].mlp.up
    weight = 2 * up.weight.data
    del up.weight
    up.weight = weight


def with_buffer(model):
    up = model.blocks[1].mlp.up
    weight = 2 * up.weight.data
    del up.weight
    up.register_buffer("weight", weight)


def with_sparse(model):
    up = model.blocks[1].mlp.up
    up.weight = torch.nn.Parameter(2 * up.weight.to_sparse_csr(), requires_grad=False)


def with_step(model):
    block = model.blocks[1]
    block.step = lambda x, update, cache: [2 * tensor for tensor in module.Block.step(block, x, update, cache)]


def with_attention_step(model):
    attention = model.blocks[1].attention
    attention.step = lambda x, cache: 2 * module.Attention.step(attention, x, cache)


def with_heads(model):
    attention = model.blocks[1].attention
    attention._heads = lambda x: 2 * module.Attention._heads(attention, x)


CHANGES = (
    with_hook, with_hook_before, with_adapter, with_forward, with_block, with_attention, with_parametrization,
    without_bias, with_strides, with_subclass, with_reference_layer, with_compiled, with_tensor, with_buffer, with_sparse,
    with_step, with_attention_step, with_heads,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_not_as_made_is_called_itself(served, change):
    """And as before where it is."""
    inputs = make_inputs(2, 48)
    model = make_transformer()
    unchanged = all_steps(model, inputs)
    assert len(served) == G - 1
    change(model)
    changed = all_steps(model, inputs)
    assert len(served) == G - 1
    torch.testing.assert_close(changed, all_steps(one_by_one(model), inputs))
    if change not in (with_strides, with_subclass, with_reference_layer, with_parametrization, with_compiled):
        assert not torch.allclose(changed, unchanged, rtol=1e-2)


class Lora(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear, self.down = linear, torch.nn.Linear(48, 2).requires_grad_(False)
        self.up = torch.nn.Linear(2, 192, bias=False).requires_grad_(False)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


def plain_linear(mlp):
    linear = torch.nn.Linear(48, 192).requires_grad_(False)
    linear.load_state_dict(mlp.up.state_dict())
    mlp.up = linear


PERCEPTRONS = {
    "another activation": lambda mlp: setattr(mlp, "gelu", torch.nn.SiLU()),
    "another GELU": lambda mlp: setattr(mlp, "gelu", torch.nn.GELU("tanh")),
    "a module more": lambda mlp: mlp.add_module("last", torch.nn.Tanh()),
    "a wrapper": lambda mlp: setattr(mlp, "up", Lora(mlp.up)),
    "torch's layer": plain_linear,
    "a forward of its own": lambda mlp: setattr(mlp, "forward", lambda x: mlp.down(mlp.up(x))),
    "a hook": lambda mlp: mlp.register_forward_hook(double),
    "a hook before": lambda mlp: mlp.register_forward_pre_hook(lambda module_, x: (2 * x[0],)),
    "the activation's hook": lambda mlp: mlp.gelu.register_forward_hook(double),
    "the first layer's hook": lambda mlp: mlp.up.register_forward_hook(double),
    "the last layer's hook": lambda mlp: mlp.down.register_forward_hook(double),
}


@pytest.mark.parametrize("change", PERCEPTRONS)
def test_a_changed_perceptron_is_stepped_through_as_it_is(served, change):
    """Steps give what the whole forward pass gives."""
    model, inputs = make_transformer(), make_inputs(2, 48, P=2)
    unchanged = all_steps(model, inputs, P=2)
    torch.testing.assert_close(unchanged, model(inputs)[:, T + 1 :], rtol=1e-4, atol=1e-4)
    assert len(served) == G - 1
    PERCEPTRONS[change](model.blocks[1].mlp)
    changed = all_steps(model, inputs, P=2)
    torch.testing.assert_close(changed, model(inputs)[:, T + 1 :], rtol=1e-4, atol=1e-4)
    assert len(served) == G - 1 and (change == "torch's layer" or not torch.equal(changed, unchanged))


class OwnForward(module.Block):
    def forward(self, *arguments):
        return 2 * super().forward(*arguments)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda model: model.register_forward_hook(double), "the transformer has"),
        (lambda model: model.blocks[2].register_forward_hook(double), "the transformer's blocks.2 has"),
        (
            lambda model: model.blocks[0].attention.register_forward_pre_hook(print),
            "the transformer's blocks.0.attention has",
        ),
        (lambda model: setattr(model.blocks[1], "__class__", OwnForward), "the transformer's blocks.1 has"),
        (lambda model: setattr(model.blocks[1], "forward", print), "the transformer's blocks.1 has"),
    ],
)
def test_what_steps_do_not_go_through_is_told(change, name):
    """Once, as a cache takes the text, and not to who has a step that fits."""
    model = make_transformer()
    change(model)
    cache = KVCache(model.masks, num_prompts=1, num_images=1, num_heads=3, head_dim=16)
    with pytest.warns(UserWarning, match=f"{name} forward hooks, or a forward of its own, which image tokens"):
        model._check_new(cache, None)
    for part in model.modules():
        part.step = lambda *arguments: None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model._check_new(cache, None)


def test_a_global_hook_is_called(served):
    called = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *arguments: called.append(arguments[0]))
    try:
        all_steps(make_transformer(), make_inputs(1, 48))
    finally:
        handle.remove()
    assert not served and any(type(part) is module.Linear for part in called)


def other_dtype(model):
    model.blocks[2].mlp.up.bias.data = model.blocks[2].mlp.up.bias.data.bfloat16()


def signs_to_come(model):
    qkv = model.blocks[2].attention.qkv
    qkv.weight = torch.nn.Parameter(torch._neg_view(-qkv.weight.data), requires_grad=False)


@pytest.mark.every_instruction_set
def test_calls_that_are_not_served(served):
    model, inputs = make_transformer(), make_inputs(MANY + 1, 48)
    all_steps(model, inputs)  # many samples
    all_steps(make_transformer(impl="reference"), inputs[:1])
    all_steps(make_transformer(dtype=torch.float64), inputs[:1])
    with torch.autograd.forward_ad.dual_level():
        all_steps(model, inputs[:1])
    with torch.overrides.BaseTorchFunctionMode():
        all_steps(model, inputs[:1])
    assert not served


@pytest.mark.every_instruction_set
def test_signs_that_are_yet_to_come_are_seen(served):
    inputs = make_inputs(2, 48)
    expected = all_steps(make_transformer(), inputs)
    model = make_transformer()
    signs_to_come(model)
    torch.testing.assert_close(all_steps(model, inputs), expected, rtol=1e-5, atol=1e-5)


class OwnCache(KVCache):
    """With layers of its own."""


@pytest.mark.every_instruction_set
def test_operands_that_the_kernels_would_misread_are_not_served(served):
    inputs = make_inputs(2, 48)
    x = inputs[:, T + 1]
    model = make_transformer()
    cache = make_cache(model, inputs, 1)
    cache.__class__ = OwnCache
    model.step(x, cache)
    attempts = {
        "a bias of another dtype": (other_dtype, x, {}),
        "three dimensions": (None, x[None], {}),
        "another width": (None, x[:, :40], {}),
        "a cache in 16 bits": (None, x, {"dtype": torch.bfloat16}),
        "a cache of other heads": (None, x, {"num_heads": 6, "head_dim": 8}),
        "a cache elsewhere": (None, x, {"device": "meta"}),
    }
    for name, (change, x_, options) in attempts.items():
        model = make_transformer()
        sizes = {"num_prompts": 1, "num_images": 2, "num_heads": 3, "head_dim": 16} | options
        if change is not None:
            change(model)
        with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError)):
            model.step(x_, KVCache(MASKS, **sizes))
            pytest.fail(name)
    assert not served


def test_autocast_and_gradients_are_left_to_others(served):
    model, inputs = make_transformer(), make_inputs(2, 48)
    attention = model.blocks[0].attention
    cache = KVCache(
        model.masks, num_prompts=1, num_images=2, num_heads=attention.num_heads, head_dim=16, dtype=torch.bfloat16
    )
    with torch.autocast("cpu", torch.bfloat16):
        model(inputs[:1, : T + 1], None, cache)
        model.step(inputs[:, T + 1], cache)
        with pytest.raises(TypeError, match="text_key must have query's dtype torch.bfloat16, got torch.float32"):
            model.step(inputs[:, T + 1], make_cache(model, inputs, 1))
    model.blocks[1].mlp.up.weight.requires_grad_()
    cache = make_cache(model, inputs, 1)
    with pytest.raises(RuntimeError, match="sparse_attention_decode has no gradient"):
        model.step(inputs[:, T + 1], cache)
    assert not served
    with torch.no_grad():
        model.step(inputs[:, T + 1], make_cache(model, inputs, 1))
    assert len(served) == 1


def test_a_transformation_is_left_to_others(served):
    model, inputs = make_transformer(), make_inputs(1, 48)
    x = inputs[:, T + 1]
    with pytest.raises(RuntimeError, match="sparse_attention_decode has no gradient"):
        torch.func.jvp(lambda y: model.step(y, make_cache(model, inputs, 1)), (x,), (x,))
    assert not served


@pytest.mark.parametrize("served_", [True, False])
def test_errors_are_those_of_one_operation_after_another(served_):
    model, inputs = make_transformer(), make_inputs(2, 48)
    model = model if served_ else one_by_one(model)
    x = inputs[:, T + 1]
    with pytest.raises(
        ValueError, match=r"key must have shape \(2, 3, 16\) for|must have shape \(2, 3, 16\), got \(1, 3"
    ):
        model.step(x[:1], make_cache(model, inputs, 1))
    for lengths, kind, message in (
        (torch.tensor([5]), ValueError, "text_lengths must be from 0 to the mask's text_len 4, got values from 5"),
        (torch.tensor([3], device="meta"), ValueError, "text_lengths must be on query's device cpu, got meta"),
        (torch.tensor([3, 3]), ValueError, r"text_lengths must have shape \(1,\), got \(2,\)"),
        (torch.tensor([3.7]), TypeError, "text_lengths must be an integer tensor .*, got torch.float32"),
        ([3], TypeError, "text_lengths must be an integer tensor or None, got list"),
    ):
        cache = make_cache(model, inputs, 1)
        cache.text_lengths = lengths
        with pytest.raises(kind, match=message):
            model.step(x, cache)
    before = make_cache(model, inputs, 1)
    before.length = -1
    with pytest.raises(ValueError, match="the cache holds -1 image tokens"):
        model.step(x, before)
    full = make_cache(model, inputs, 1)
    full.advance(G - 1)
    with pytest.raises(ValueError, match="the cache holds 15 image tokens, all of a grid of 5 x 3"):
        model.step(x, full)
    assert full.length == G


def test_a_cache_for_other_masks_is_refused():
    model, inputs = make_transformer(), make_inputs(2, 48)
    for masks in (MASKS[::-1], MASKS[:3], (*MASKS, MASKS[0])):
        cache = make_cache(make_transformer(masks=masks), inputs, 1)
        for call in (lambda c=cache: model.step(inputs[:, T + 1], c), lambda c=cache: model(inputs[:1, :T], None, c)):
            with pytest.raises(
                ValueError, match="cache must be made for the transformer's masks .*row.*, got one for "
            ):
                call()


def test_weights_of_other_shapes_are_refused_by_torch(served):
    """Not read beyond their end."""
    for name in ("attention.qkv", "attention.out", "mlp.up", "mlp.down"):
        for dimension in (0, 1):
            model, inputs = make_transformer(), make_inputs(1, 48)
            cache = make_cache(model, inputs, 1)
            linear = model.blocks[2].get_submodule(name)
            linear.weight = torch.nn.Parameter(linear.weight.narrow(dimension, 0, 40).contiguous(), requires_grad=False)
            with pytest.raises(RuntimeError):
                model.step(inputs[:, T + 1], cache)
    assert not served


def test_lists_that_are_not_of_as_many_blocks_are_refused():
    native, sizes, norm = _extension.native(), (1, 1, 8, 1, 8, 1, 8), torch.zeros(8)
    for parameters, epsilons, slots in (
        ([], [1e-5], []),
        ([norm.data_ptr()] * 2, [], []),
        ([norm.data_ptr()] * 2, [1e-5], [0]),
    ):
        with pytest.raises(ValueError, match="must be of as many blocks"):
            native.blocks_step(
                sizes, 0, 1.0, 0, parameters, epsilons, [], [], slots, 0, norm.data_ptr(), norm.data_ptr(), 1
            )


def test_it_is_a_good_torch_operation():
    model, inputs = make_transformer(), make_inputs(2, 48)
    cache = make_cache(model, inputs, 1, torch.tensor([3]))
    x, parameters, epsilons, caches, position, lengths = model._operands_of_step(inputs[:, T + 1], cache)
    flat = [tensor for tensors in caches.tensors for tensor in tensors]
    masks = [number for mask in caches.masks for number in mask.encode()]
    arguments = x, parameters, epsilons, flat, masks, position, lengths.to(torch.int32)
    torch.library.opcheck(torch.ops.dalle_fast.blocks_step.default, arguments)


def test_a_profiler_sees_it():
    model, inputs = make_transformer(), make_inputs(1, 48)
    cache, plain = make_cache(model, inputs, 1), make_cache(model, inputs, 1)
    with torch.profiler.profile() as profile:
        out = model.step(inputs[:, T + 1], cache)
    assert "dalle_fast::blocks_step" in {event.name for event in profile.events()}
    assert torch.equal(out, model.step(inputs[:, T + 1], plain)) and cache.length == plain.length == 2


def test_compiled_steps_are_the_compilers(served):
    model, inputs = make_transformer(), make_inputs(2, 48)
    cache, plain = make_cache(model, inputs, 1), make_cache(model, inputs, 1)
    compiled = torch.compile(model.step, backend="eager")
    for n in range(1, 3):
        torch.testing.assert_close(
            compiled(inputs[:, T + n], cache), one_by_one(model).step(inputs[:, T + n], plain), rtol=1e-5, atol=1e-5
        )
    assert not served
