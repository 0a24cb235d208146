"""A step through all blocks in one native call: its results, samples that do not depend on each other, and who serves.

P prompts, B samples, T text positions, W width, H heads, D head size.
"""

import copy

import pytest
import torch

import dalle_fast.nn as fnn
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
    monkeypatch.setattr(blocks_ops, "_most_samples", lambda: (MANY, MANY))


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
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


def test_a_large_mean_does_not_cancel(served):
    """Of a norm, whose rows lie far from 0: no more than in torch's."""
    model, inputs = make_transformer(), make_inputs(3, 48) + 300
    eager = all_steps(make_transformer(impl="reference"), inputs)
    exact = all_steps(make_transformer(impl="reference").double(), inputs)
    assert_as_exact_as_eager("step", all_steps(model, inputs), eager, exact)
    assert served


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
        for count in (1, 2, 3):
            for B in (1, 5, MANY):
                assert torch.equal(steps(inputs[:B], count), alone[:B])
    assert served


def test_nan_stays_in_its_sample(served):
    model, inputs = make_transformer(), make_inputs(3, 48)
    expected = all_steps(model, inputs)
    inputs[1, T + 5, 7] = torch.nan
    actual = all_steps(model, inputs)
    assert torch.equal(actual[::2], expected[::2]) and torch.equal(actual[1, :4], expected[1, :4])
    assert actual[1, 4].isnan().all() and served


def test_weights_may_change_between_steps(served):
    """In place, and for others: nothing of a step is kept."""
    model, inputs = make_transformer(), make_inputs(2, 48)
    plain = one_by_one(copy.deepcopy(model))
    caches = [make_cache(of, inputs, 1) for of in (model, plain)]
    for n in range(1, 4):
        for of in (model, plain):
            if n == 2:
                of.blocks[1].mlp.up.weight.mul_(-2)
            if n == 3:
                of.blocks[0].attention.out = copy.deepcopy(of.blocks[2].attention.out)
                of.blocks[2].attention_norm.bias = torch.nn.Parameter(torch.ones(48), requires_grad=False)
                of.blocks[3].mlp_norm.eps = 0.5
        ours, theirs = (of.step(inputs[:, T + n], cache) for of, cache in zip((model, plain), caches, strict=True))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert len(served) == 3


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


CHANGES = (
    with_hook, with_hook_before, with_adapter, with_forward, with_block, with_attention, with_parametrization,
    without_bias, with_strides, with_subclass, with_reference_layer,
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
    if change not in (with_strides, with_subclass, with_reference_layer, with_parametrization):
        assert not torch.allclose(changed, unchanged, rtol=1e-2)


def test_a_global_hook_is_called(served):
    called = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *arguments: called.append(arguments[0]))
    try:
        all_steps(make_transformer(), make_inputs(1, 48))
    finally:
        handle.remove()
    assert not served and any(type(part) is module.Linear for part in called)


def test_calls_that_are_not_served(served):
    model, inputs = make_transformer(), make_inputs(MANY + 1, 48)
    calls = {
        "many samples": lambda: all_steps(model, inputs),
        "float64": lambda: all_steps(copy.deepcopy(model).double(), inputs[:1]),
        "the reference": lambda: all_steps(make_transformer(impl="reference"), inputs[:1]),
    }
    for call in calls.values():
        call()
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
    with pytest.raises(ValueError, match="text_lengths must be from 0 to the mask's text_len 4, got values from 5"):
        cache = make_cache(model, inputs, 1)
        cache.text_lengths = torch.tensor([5])
        model.step(x, cache)
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


def test_every_instruction_set(run_with_instruction_set):
    """This file with another instruction set."""
    run_with_instruction_set("test_blocks.py", select="not instruction_set and not compiled")
