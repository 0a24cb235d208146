"""The decoding cache: what a step gives is what the whole sequence gives, and no more is kept than the masks can see.

P prompts, N images of each, B = P * N, T text positions, G image positions, K codes, H heads, D head size.
"""

import copy
import dataclasses

import pytest
import torch

import dalle_fast.nn as fnn
from dalle_fast.masks import causal_mask, column_mask, conv_mask, row_mask
from dalle_fast.nn.dalle import PRESETS
from dalle_fast.testing import every_mask, nan_poisoned

P, N, T, K = 2, 3, 4, 11
GRID = (7, 5)
G = 35
PAPER = ("row", "column", "row", "row", "row", "column", "conv_flat")
MIXTURES = [(rule, "row", rule) for rule in every_mask(1, 1)] + [PAPER, ("column", "conv_clip", "causal", "axial_row")]


def make_model(rules, impl, **changes):
    torch.manual_seed(0)
    config = fnn.DALLEConfig(
        vocab_size=13, text_len=T, num_codes=K, grid=GRID, layers=len(rules), width=32, num_heads=2, head_dim=16,
        rules=rules, kernel_size=3,
    )  # fmt: skip
    model = fnn.DALLE(dataclasses.replace(config, **changes), impl=impl).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def make_cache(model, num_images=N, text_lengths=None, num_prompts=P, **options):
    config = model.config
    return fnn.KVCache(
        config.masks, num_prompts=num_prompts, num_images=num_images, num_heads=config.num_heads,
        head_dim=config.head_dim, text_lengths=model.attention_lengths(text_lengths), **options,
    )  # fmt: skip


def cached_hidden(model, text, codes, text_lengths, known, num_images=N):
    """hidden (B, G + 1 - known, W), from the row that predicts code `known` on: known codes at once, the rest in steps."""
    prompts = text[::num_images], codes[::num_images, :known]  # one of each prompt's images
    lengths = None if text_lengths is None else text_lengths[::num_images]
    with nan_poisoned():
        cache = make_cache(model, num_images, lengths, len(prompts[0]))
        first = model.hidden(*prompts, text_lengths=lengths, cache=cache)[:, -1]
        rows = [first.repeat_interleave(num_images, 0)]
        for position in range(known, codes.shape[1]):
            rows.append(model.step(codes[:, position], cache))
    return torch.stack(rows, 1)


def make_batch(known, num_images=N):
    """Captions and codes of B images; those of a prompt share the caption and the first `known` codes."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(13, (P, T), generator=generator).repeat_interleave(num_images, 0)
    codes = torch.randint(K, (P * num_images, G), generator=generator)
    codes[:, :known] = codes[::num_images, :known].repeat_interleave(num_images, 0)
    return text, codes


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("rules", MIXTURES, ids="-".join)
def test_cached_logits_are_those_of_the_whole_sequence(rules, impl):
    """At every position, with padding seen and hidden, from no known codes and from some, of one image and of three."""
    for hide_padding, lengths, known, num_images in (
        (False, None, 0, N),
        (False, (2, 0), 13, 1),
        (True, (3, 0), 0, N),
        (True, (1, 4), 6, N),
        (True, None, G - 1, 1),
    ):
        model = make_model(rules, impl, hide_padding=hide_padding)
        text, codes = make_batch(known, num_images)
        lengths = None if lengths is None else torch.tensor(lengths).repeat_interleave(num_images)
        whole = model.hidden(text, codes, text_lengths=lengths)[:, T + known :] @ model.image_weight.T
        cached = cached_hidden(model, text, codes, lengths, known, num_images) @ model.image_weight.T
        assert cached.shape == (P * num_images, G + 1 - known, K)
        assert whole.std() > 0.5  # so that 1e-5 is little
        torch.testing.assert_close(cached, whole, rtol=0, atol=1e-5)


def test_a_cache_without_one_token_does_not_pass_for_a_whole_one():
    """The comparison above sees a single wrong slot."""
    model = make_model(PAPER, "cpu")
    text, codes = make_batch(0)
    whole = model.hidden(text, codes)[:, T:]
    cache = make_cache(model)
    model.hidden(text[::N], codes[::N, :0], cache=cache)
    for position in range(6):
        hidden = model.step(codes[:, position], cache)
        cache.layer(1).image_key[:, :, 0] = 0  # the column's first token
        error = (hidden - whole[:, position + 1]).abs().max()
        assert (error > 1e-3) == (position == 5)  # the second row's first token is the first to see it


def test_a_samples_steps_do_not_depend_on_the_batch():
    model = make_model(PAPER, "cpu")
    text, codes = make_batch(0)
    together = cached_hidden(model, text, codes, None, 0)
    for sample in (0, 4):
        alone = cached_hidden(model, text[[sample]], codes[[sample]], None, 0, num_images=1)
        torch.testing.assert_close(alone[0], together[sample], rtol=0, atol=1e-5)


def test_16_bit_caches(make):
    model = make_model(PAPER, "cpu").bfloat16()
    text, codes = make_batch(0)
    whole = model.hidden(text, codes)[:, T:].float()
    cache = make_cache(model, dtype=torch.bfloat16)
    rows = [model.hidden(text[::N], codes[::N, :0], cache=cache)[:, -1].repeat_interleave(N, 0)]
    rows += [model.step(codes[:, position], cache) for position in range(G)]
    assert cache.layer(0).text_key.dtype == torch.bfloat16
    assert (torch.stack(rows, 1).float() - whole).norm() < 0.03 * whole.norm()


# -- sizes ------------------------------------------------------------------------------------------------------------


def sizes_against_dense(masks, num_images):
    """(allocated, read a step) of a cache of `masks` over those of one that keeps the whole stream of each sample."""
    options = {"num_prompts": 1, "num_images": num_images, "num_heads": 62, "head_dim": 64}
    cache = fnn.KVCache(masks, **options, device="meta", dtype=torch.float16)
    stream = masks[0].seq_len
    key_bytes = 2 * 62 * 64 * 2 * num_images * len(masks)
    # A dense step reads the text and the image so far, on average half of it, for each sample.
    text_len, image_len = masks[0].text_len, masks[0].image_len
    read = key_bytes * (text_len + (image_len + 1) / 2)
    return cache.nbytes / (key_bytes * stream), cache.nbytes_read / read


def test_the_papers_mixture_takes_and_reads_a_fraction_of_a_dense_cache():
    masks = PRESETS["12b"].masks
    assert (masks[0].text_len, masks[0].grid, len(masks)) == (257, (32, 32), 64)
    allocated, read = sizes_against_dense(masks, 1)
    assert allocated <= 1 / 2.3
    assert read <= 1 / 2.6
    allocated, read = sizes_against_dense(masks, 64)
    assert allocated <= 1 / 4.3
    assert read <= 1 / 20


def test_causal_layers_are_a_dense_cache():
    assert sizes_against_dense([causal_mask(256, 32)] * 2, 1) == (1, 1)


@pytest.mark.parametrize("mask", [row_mask(3, (4, 5)), column_mask(3, (4, 5)), conv_mask(3, (4, 5), 3)], ids=repr)
def test_what_a_step_reads_is_counted_key_by_key(mask):
    T = mask.text_len
    cache = fnn.KVCache([mask], num_prompts=2, num_images=3, num_heads=2, head_dim=8, device="meta")
    seen = mask.to_dense()[T:]  # (G, T + G)
    image_keys = seen[:, T:].sum(1).double().mean().item()
    assert cache.nbytes_read == pytest.approx((2 * T + 6 * image_keys) * 2 * (2 * 8) * 4)


def test_the_allocator_agrees():
    """What is counted is what is allocated: a text for each prompt, not for each image."""
    masks = PRESETS["tiny"].masks
    small, large = (fnn.KVCache(masks, num_prompts=2, num_images=count, num_heads=4, head_dim=32) for count in (1, 16))
    for cache in (small, large):
        tensors = [tensor for index in range(len(masks)) for tensor in cache.layer(index).tensors]
        assert cache.nbytes == sum(x.untyped_storage().nbytes() for x in tensors)
    text = 2 * len(masks) * 2 * 33 * 4 * 32 * 4
    assert large.nbytes - text == 16 * (small.nbytes - text)
    slots = [layer.image_key.shape[2] for layer in map(large.layer, range(4))]
    assert slots == [9, 64, 9, 3 * 9 + 1]  # row, column, row, conv 7 x 7 on 8 x 8


def test_the_named_implementation_attends(make, no_kernels):
    cache = fnn.KVCache([row_mask(2, (3, 2))], num_prompts=1, num_images=1, num_heads=2, head_dim=8)
    layer, (key, query, _) = cache.layer(0), make((1, 2, 3, 8))
    layer.prefill(key, key)
    layer.attend(query[:, :, 0], impl="reference")
    with pytest.raises(AssertionError, match="a kernel was asked for"):
        layer.attend(query[:, :, 0], impl="cpu")


def test_the_tensors_stay_where_they_are():
    model = make_model(PAPER, "cpu")
    text, codes = make_batch(0)
    cache = make_cache(model)
    tensors = [tensor for index in range(len(PAPER)) for tensor in cache.layer(index).tensors] + [cache.position]
    before = [tensor.data_ptr() for tensor in tensors]
    model.hidden(text[::N], codes[::N, :3], cache=cache)
    model.step(codes[:, 3], cache)
    after = [tensor for index in range(len(PAPER)) for tensor in cache.layer(index).tensors] + [cache.position]
    assert before == [tensor.data_ptr() for tensor in after]
    assert (cache.length, int(cache.position)) == (4, 4)


@torch.no_grad()
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_text_that_came_to_some_layers_only_is_not_there(error):
    """A step is refused, and the same cache takes the text after all."""
    model = make_model(PAPER, "cpu")
    text, codes = make_batch(0)
    cache = make_cache(model)

    def interrupt(*_):
        raise error

    hook = model.transformer.blocks[2].attention.out.register_forward_hook(interrupt)
    with pytest.raises(error):
        model.hidden(text[::N], codes[::N, :0], cache=cache)
    hook.remove()
    with pytest.raises(ValueError, match="cache must hold the text before the first image token"):
        model.step(codes[:, 0], cache)
    model.hidden(text[::N], codes[::N, :0], cache=cache)
    whole = model.hidden(text, codes)[:, T + 1]
    torch.testing.assert_close(model.step(codes[:, 0], cache), whole, rtol=0, atol=1e-5)


def test_a_cache_keeps_nothing_of_a_graph():
    """It is copied with gradients on, and its second text stands on no first one."""
    model = make_model(PAPER, "cpu").requires_grad_(True)
    text, codes = make_batch(0)
    cache = make_cache(model)
    hidden = model.hidden(text[::N], codes[::N, :3], cache=cache)
    assert hidden.requires_grad
    copied = copy.deepcopy(cache)
    for index in range(len(PAPER)):
        for tensor, other in zip(cache.layer(index).tensors, copied.layer(index).tensors, strict=True):
            assert not tensor.requires_grad and torch.equal(tensor.nan_to_num(), other.nan_to_num())


def test_a_backward_pass_with_checkpointing_leaves_the_cache_alone():
    """The blocks that checkpointing computes again would take the text's keys, and the first tokens', once more."""
    model = make_model(PAPER, "cpu").requires_grad_(True)
    model.transformer.activation_checkpointing = True
    text, codes = make_batch(3)
    cache = make_cache(model)
    for index in range(len(PAPER)):
        for tensor in cache.layer(index).tensors:
            tensor.zero_()  # what no token comes to may be NaN, which equals nothing
    hidden = model.hidden(text[::N], codes[::N, :3], cache=cache)
    with torch.no_grad():
        for position in range(3, G - 1):
            model.step(codes[:, position], cache)
    before = [tensor.clone() for index in range(len(PAPER)) for tensor in cache.layer(index).tensors]
    hidden.sum().backward()
    assert all(parameter.grad is not None for parameter in model.transformer.parameters())
    after = [tensor for index in range(len(PAPER)) for tensor in cache.layer(index).tensors]
    assert all(map(torch.equal, before, after))


def test_a_caches_lengths_are_its_own():
    model = make_model(PAPER, "cpu", hide_padding=True)
    lengths = torch.tensor([3, 1])
    cache = fnn.KVCache(model.config.masks, num_prompts=P, num_images=N, num_heads=2, head_dim=16, text_lengths=lengths)
    lengths += 1
    assert cache.text_lengths.tolist() == [3, 1]


def test_a_cache_of_a_model_on_meta_is_sized_without_memory():
    with torch.device("meta"):
        model = fnn.DALLE("tiny")
    expected = fnn.DALLE("tiny").new_cache(2, 3).nbytes
    for device in ("meta", None):
        assert model.new_cache(2, 3, device=device).nbytes == expected
    assert model.bfloat16().new_cache(2, 3).nbytes == expected / 2


# -- bad use ----------------------------------------------------------------------------------------------------------


def test_appending_past_capacity_is_refused():
    model = make_model(PAPER, "cpu")
    text, codes = make_batch(0)
    cache = make_cache(model)
    model.hidden(text[::N], codes[::N, : G - 1], cache=cache)
    model.step(codes[:, G - 1], cache)
    before = [tensor.clone() for index in range(len(PAPER)) for tensor in cache.layer(index).tensors]
    with pytest.raises(ValueError, match="the cache holds 35 image tokens, all of a grid of 7 x 5: no more can be"):
        model.step(codes[:, 0], cache)
    after = [tensor for index in range(len(PAPER)) for tensor in cache.layer(index).tensors]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("mask", [row_mask(2, (3, 2)), column_mask(2, (3, 2))], ids=str)
def test_more_than_an_image_is_refused(mask):
    cache = fnn.KVCache([mask], num_prompts=1, num_images=1, num_heads=1, head_dim=1)
    key = torch.zeros(1, 1, 9, 1)
    with pytest.raises(ValueError, match=r"key must have at most 2 \+ 6 tokens, got 9"):
        cache.layer(0).prefill(key, key)
    assert not cache.has_text
    cache.layer(0).prefill(key[:, :, :8], key[:, :, :8])


def test_a_cache_of_another_size_is_refused():
    model = make_model(PAPER, "cpu")
    text, codes = make_batch(0)
    with pytest.raises(ValueError, match=r"key must have shape \(2, 2, 5 \+ n, 16\) .*, got \(6, 2, 8, 16\)"):
        model.hidden(text, codes[:, :3], cache=make_cache(model))
    cache = make_cache(model)
    model.hidden(text[::N], codes[::N, :0], cache=cache)
    with pytest.raises(ValueError, match=r"codes must have shape \(6,\), one for each .*samples, got \(2,\)"):
        model.step(codes[::N, 0], cache)
    with pytest.raises(ValueError, match=r"key must have shape \(6, 2, 16\), got \(2, 2, 16\)"):
        model.transformer.step(torch.zeros(P, 32), cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": 0}, "num_images must be at least 1, got 0"),
        ({"num_prompts": 0}, "num_prompts must be at least 1, got 0"),
        ({"num_prompts": "1"}, "num_prompts must be an integer, got '1'"),
        ({"head_dim": True}, "head_dim must be an integer, got True"),
        ({"masks": [1]}, "masks must hold AttentionMasks, got int"),
        ({"masks": []}, r"masks must hold at least one, all of one text_len and grid, got \(\)"),
        (
            {"masks": [row_mask(3, 4), row_mask(4, 4)]},
            "masks must hold at least one, all of one text_len and grid, got",
        ),
        ({"text_lengths": [3]}, r"text_lengths must be an integer tensor or None, got list"),
        ({"text_lengths": torch.tensor([3, 4])}, r"text_lengths must have shape \(1,\), got \(2,\)"),
    ],
    ids=str,
)
def test_bad_sizes_are_refused(options, message):
    options = {"masks": [row_mask(3, 4)], "num_prompts": 1, "num_images": 1, "num_heads": 1, "head_dim": 8, **options}
    with pytest.raises((TypeError, ValueError), match=message):
        fnn.KVCache(**options)
