"""`fnn.MultiheadAttention` takes the place of `torch.nn.MultiheadAttention`, inside torch's own layers too.

B batch, S sequence, E embedding, H heads, T text.
"""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import dalle_fast.nn as fnn
from dalle_fast.masks import column_mask, conv_mask, row_mask

MASK = column_mask(5, (3, 7))
B, S, E, H = 3, MASK.seq_len, 32, 4


def pair(mask=MASK, **options):
    """torch's module and ours with its weights; biases are not zero, as those of a trained module."""
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(E, H, **options)
    for name, parameter in theirs.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    ours = fnn.MultiheadAttention(E, H, **options, mask=mask)
    assert str(ours.load_state_dict(theirs.state_dict())) == "<All keys matched successfully>"
    return theirs, ours


def assert_same(theirs, ours, *qkv, mask=MASK, keywords=None, **options):
    """Outputs, weights and gradients of both, theirs with the dense mask."""
    length = qkv[0].shape[1 if theirs.batch_first and qkv[0].dim() == 3 else 0]
    results = []
    for module, extra in ((theirs, {"attn_mask": ~mask.to_dense(seq_len=length)}), (ours, keywords or {})):
        leaves = {id(x): x.detach().clone().requires_grad_() for x in qkv}  # what is one tensor stays one
        out, weights = module(*(leaves[id(x)] for x in qkv), need_weights=True, **options, **extra)
        incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        parameters = [parameter for _, parameter in sorted(module.named_parameters())]
        results.append((out, weights, *torch.autograd.grad(out, [*leaves.values(), *parameters], incoming)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=2e-5)


def inputs(batch_first, length=S, sizes=(E, E, E)):
    generator = torch.Generator().manual_seed(3)
    shape = (B, length) if batch_first else (length, B)
    return [torch.randn(*shape, size, generator=generator) for size in sizes]


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_batch_in_place_of_the_sequence_is_warned_of(batch_first):
    """As where batch_first was forgotten. Once for each place, and not of what fits, nor of a graph that is compiled."""
    _, ours = pair(batch_first=batch_first)
    wrong = inputs(not batch_first)[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for x in (*inputs(batch_first), wrong, wrong):
            ours(x, x, x)
        assert torch.equal(
            torch.compile(ours, fullgraph=True, backend="eager")(wrong, wrong, wrong)[0], ours(wrong, wrong, wrong)[0]
        )
    assert [warning.filename for warning in caught] == [__file__] * 2
    assert f"{B} positions of {S} samples" in str(caught[0].message)
    assert f"use batch_first={not batch_first}" in str(caught[0].message)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_outputs_weights_and_gradients(batch_first, bias, average):
    modules = pair(batch_first=batch_first, bias=bias)
    q, k, v = inputs(batch_first)
    assert_same(*modules, q, q, q, average_attn_weights=average)
    assert_same(*modules, q, k, k, average_attn_weights=average)
    assert_same(*modules, q, k, v, average_attn_weights=average)
    assert_same(*modules, q, q, v, average_attn_weights=average)
    assert_same(*modules, q, k, q, average_attn_weights=average)
    short = inputs(batch_first, 11)[0]
    assert_same(*modules, short, short, short, average_attn_weights=average)


@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched(batch_first):
    modules = pair(batch_first=batch_first)
    x, y = inputs(True)[0][:2]
    assert_same(*modules, x, x, x)
    assert_same(*modules, x, y, y, average_attn_weights=False)


@pytest.mark.parametrize("batch_first", [False, True])
def test_other_feature_sizes(batch_first):
    modules = pair(batch_first=batch_first, kdim=24, vdim=40)
    assert_same(*modules, *inputs(batch_first, sizes=(E, 24, 40)))


@pytest.mark.parametrize("mask", [row_mask(5, (3, 7)), conv_mask(5, (3, 7), 3)], ids=repr)
def test_a_mask_per_call(mask):
    theirs, ours = pair(batch_first=True)
    x = inputs(True)[0]
    assert_same(theirs, ours, x, x, x, mask=mask, keywords={"attn_mask": mask})
    ours.mask = None
    assert_same(theirs, ours, x, x, x, mask=mask, keywords={"attn_mask": mask})
    ours.mask = mask
    assert_same(theirs, ours, x, x, x, mask=mask)


@pytest.mark.parametrize("batch_first", [False, True])
def test_text_lengths(batch_first):
    """The same as torch's key_padding_mask over the text, where every query still sees a key."""
    theirs, ours = pair(batch_first=batch_first)
    x = inputs(batch_first)[0]
    lengths = torch.tensor([1, 5, 3])
    padding = (torch.arange(S) >= lengths[:, None]) & (torch.arange(S) < 5)
    expected, weights = theirs(x, x, x, attn_mask=~MASK.to_dense(), key_padding_mask=padding)
    out, our_weights = ours(x, x, x, text_lengths=lengths, need_weights=True)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(our_weights, weights, rtol=1e-4, atol=2e-5)
    one = x[0] if batch_first else x[:, 0]
    expected = theirs(one, one, one, attn_mask=~MASK.to_dense(), key_padding_mask=padding[0])[0]
    torch.testing.assert_close(ours(one, one, one, text_lengths=lengths[0])[0], expected, rtol=1e-4, atol=2e-5)


def padding_of(lengths, dtype):
    """key_padding_mask that hides the text from these lengths on: booleans, or as torch's encoder layers canonicalise."""
    padding = (torch.arange(S) >= torch.tensor(lengths)[:, None]) & (torch.arange(S) < 5)
    return padding if dtype == torch.bool else torch.zeros(padding.shape, dtype=dtype).masked_fill(padding, -torch.inf)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [[1, 5, 3], [0, 2, 4], [5, 5, 5]], ids=str)
def test_key_padding_mask_of_text(dtype, lengths):
    """What hides the last text positions is the same as text_lengths, bit for bit."""
    _, ours = pair(batch_first=True)
    x = inputs(True)[0]
    padding = padding_of(lengths, dtype)
    expected = ours(x, x, x, text_lengths=torch.tensor(lengths), need_weights=True)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for module in (ours, compiled):
        assert all(map(torch.equal, module(x, x, x, key_padding_mask=padding, need_weights=True), expected))
    one = ours(x[0], x[0], x[0], key_padding_mask=padding[0])[0]
    assert torch.equal(one, ours(x[0], x[0], x[0], text_lengths=torch.tensor(lengths[0]))[0])
    short = x[:, :4]
    expected = ours(short, short, short, text_lengths=torch.tensor(lengths).clamp(max=4))[0]
    assert torch.equal(ours(short, short, short, key_padding_mask=padding[:, :4])[0], expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("places", [[0], [3], [4, 20], [25], slice(5, 7)], ids=str)
def test_key_padding_mask_of_anything_else(dtype, places):
    """Refused; where values are not looked at, as in a compiled graph, that sample's output is NaN."""
    _, ours = pair(batch_first=True)
    x = inputs(True)[0]
    padding = padding_of([5, 5, 2], dtype)
    padding[1, places] = True if dtype == torch.bool else -torch.inf
    with pytest.raises(ValueError, match="key_padding_mask may hide the last of the 5 text positions.* sample 1"):
        ours(x, x, x, key_padding_mask=padding)
    with torch.no_grad():
        out = torch.compile(ours, backend="aot_eager", fullgraph=True)(x, x, x, key_padding_mask=padding)[0]
        mapped = torch.func.vmap(lambda x, p: ours(x, x, x, key_padding_mask=p)[0])(x, padding)
    expected = ours(x, x, x, text_lengths=torch.tensor([5, 5, 2]))[0]
    for found in (out, mapped):
        assert found[1].isnan().all()
        torch.testing.assert_close(found[::2], expected[::2])


@pytest.mark.parametrize("value", [-1e9, 1.0, torch.nan])
def test_key_padding_mask_that_adds_something(value):
    _, ours = pair(batch_first=True)
    x, padding = inputs(True)[0], torch.zeros(B, S)
    padding[2, 4] = value
    with pytest.raises(ValueError, match="0 and -inf; it is not so in sample 2, got .* at position 4"):
        ours(x, x, x, key_padding_mask=padding)


def test_constructor_parameters_and_initialisation_are_torchs():
    ours, theirs = (
        inspect.signature(c.__init__).parameters for c in (fnn.MultiheadAttention, torch.nn.MultiheadAttention)
    )
    assert list(ours) == [*theirs, "mask", "impl"]
    assert all(ours[name].default == theirs[name].default for name in theirs)
    assert ours["mask"].kind is ours["impl"].kind is inspect.Parameter.KEYWORD_ONLY
    calls = [inspect.signature(c.forward).parameters for c in (fnn.MultiheadAttention, torch.nn.MultiheadAttention)]
    assert list(calls[0])[: len(calls[1])] == list(calls[1])
    for options in ({}, {"kdim": 8, "vdim": 9}, {"bias": False}, {"dtype": torch.float64}):
        torch.manual_seed(7)
        theirs = torch.nn.MultiheadAttention(E, H, **options).state_dict()
        torch.manual_seed(7)
        ours = fnn.MultiheadAttention(E, H, **options, mask=MASK).state_dict()
        assert list(theirs) == list(ours) and all(torch.equal(theirs[name], ours[name]) for name in theirs)


@pytest.mark.parametrize("options", [{}, {"kdim": 8, "vdim": 9}, {"bias": False}], ids=str)
def test_parameters_made_on_meta_are_initialised_later(options):
    """As FSDP and others do it: structure first, memory and `_reset_parameters` where the parameters are to live."""
    theirs, ours = (
        c(E, H, device="meta", **options, **mask)
        for c, mask in ((torch.nn.MultiheadAttention, {}), (fnn.MultiheadAttention, {"mask": MASK}))
    )
    for module in (theirs, ours):
        module.to_empty(device="cpu")
        torch.manual_seed(7)
        module._reset_parameters()
        module.out_proj.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
    assert ours.mask is MASK
    q, k, v = inputs(False, sizes=(E, options.get("kdim", E), options.get("vdim", E)))
    expected = theirs(q, k, v, attn_mask=~MASK.to_dense())[0]
    torch.testing.assert_close(ours(q, k, v)[0], expected, rtol=1e-4, atol=2e-5)


def test_without_a_mask_it_is_torchs(monkeypatch):
    theirs, ours = pair(None, batch_first=True, dropout=0.5)
    q, k, v = inputs(True)
    padding = torch.arange(S) >= torch.tensor([3, 9, S])[:, None]
    dense = torch.ones(S, S).tril() == 0
    for options in (
        {},
        {"need_weights": False},
        {"key_padding_mask": padding},
        {"attn_mask": dense, "is_causal": True},
    ):
        for training in (True, False):
            for qkv in ((q, q, q), (q, k, v)):
                results = []
                for module in (theirs.train(training), ours.train(training)):
                    torch.manual_seed(1)
                    results.append(module(*qkv, **options))
                (a, wa), (b, wb) = results
                assert torch.equal(a, b) and (wa is wb is None or torch.equal(wa, wb))
    assert repr(ours) == repr(theirs) and ours._qkv_same_embed_dim


def test_weights_only_where_asked_for():
    _, ours = pair(batch_first=True)
    x = inputs(True)[0]
    assert ours(x, x, x)[1] is None and ours(x, x, x, need_weights=False)[1] is None
    assert ours(x, x, x, need_weights=True)[1].shape == (B, S, S)
    assert ours(x, x, x, None, True, None, False)[1].shape == (B, H, S, S)


@pytest.mark.parametrize("batch_first", [False, True])
def test_one_packed_projection_is_read_in_place(monkeypatch, batch_first):
    from dalle_fast.nn import attention as module

    seen = []
    original = module.attention.sparse_attention
    monkeypatch.setattr(module.attention, "sparse_attention", lambda *a, **k: seen.append(a[:3]) or original(*a, **k))
    _, ours = pair(batch_first=batch_first)
    x = inputs(batch_first)[0]
    ours(x, x, x)
    q, k, v = seen[0]
    assert q.shape == k.shape == v.shape == (B, H, S, E // H)
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert k.data_ptr() - q.data_ptr() == v.data_ptr() - k.data_ptr() == E * 4 and q.stride(-2) % (3 * E) == 0


# -- torch's own layers ----------------------------------------------------------------------------------------------


def layer(mask, **options):
    torch.manual_seed(0)
    made = torch.nn.TransformerEncoderLayer(E, H, 48, dropout=0.0, batch_first=True, **options)
    attention = fnn.MultiheadAttention(E, H, batch_first=True, mask=mask)
    attention.load_state_dict(made.self_attn.state_dict())
    return made, attention


def remade(module, how):
    if how == "pickle":
        return pickle.loads(pickle.dumps(module))
    return copy.deepcopy(module) if how == "deepcopy" else module


@pytest.mark.parametrize("how", ["plain", "deepcopy", "pickle"])
def test_encoder_layer_does_not_drop_the_mask(how):
    """In eval mode without gradients torch's layer computes attention itself, from this module's weights."""
    ours, attention = layer(MASK)
    theirs = copy.deepcopy(ours).eval()
    ours.self_attn = attention
    ours = remade(ours.eval(), how)
    x = inputs(True)[0]
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            masked, free = theirs(x, src_mask=~MASK.to_dense()), theirs(x)
            torch.testing.assert_close(ours(x), masked, rtol=1e-4, atol=2e-5)
            assert (masked - free).abs().max() > 0.01
    assert ours.self_attn.mask == MASK
    ours.self_attn.mask = None  # and without a mask torch's fast path is torch's again
    with torch.no_grad():
        assert ours.self_attn._qkv_same_embed_dim and torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("swapped", ["before", "after"])
def test_encoder_does_not_drop_the_mask(swapped):
    """In every layer, whether the attention was put in before the encoder was made or after."""
    first, attention = layer(MASK)
    theirs = torch.nn.TransformerEncoder(copy.deepcopy(first), 2, enable_nested_tensor=False).eval()
    if swapped == "before":
        first.self_attn = attention
        ours = torch.nn.TransformerEncoder(first, 2, enable_nested_tensor=False).eval()
    else:
        ours = torch.nn.TransformerEncoder(first, 2).eval()
        for each in ours.layers:
            each.self_attn = copy.deepcopy(attention)
    x = inputs(True)[0]
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x, mask=~MASK.to_dense()), rtol=1e-4, atol=5e-5)
        with pytest.raises((TypeError, ValueError), match="text_lengths"):
            ours(x, src_key_padding_mask=torch.arange(S).expand(B, S) >= 20)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_encoder_hides_the_padding_of_captions(training, dtype):
    first, attention = layer(MASK)
    theirs = torch.nn.TransformerEncoder(copy.deepcopy(first), 2, enable_nested_tensor=False).train(training)
    first.self_attn = attention
    ours = torch.nn.TransformerEncoder(first, 2, enable_nested_tensor=False).train(training)
    x, padding = inputs(True)[0], padding_of([1, 5, 3], dtype)
    dense = ~MASK.to_dense()
    if dtype != torch.bool:
        dense = torch.zeros(S, S).masked_fill(dense, -torch.inf)
    with torch.set_grad_enabled(training):
        expected = theirs(x, mask=dense, src_key_padding_mask=padding)
        out = ours(x, src_key_padding_mask=padding)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=5e-5)
        assert (out - ours(x)).abs().max() > 0.01


def test_compiled_encoder_layer():
    ours, attention = layer(MASK)
    theirs = copy.deepcopy(ours).eval()
    ours.self_attn = attention
    ours.eval()
    x = inputs(True)[0]
    with torch.no_grad():
        out = torch.compile(ours, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(out, theirs(x, src_mask=~MASK.to_dense()), rtol=1e-4, atol=2e-5)


def test_weights_of_a_length_that_is_left_open():
    torch._dynamo.reset()
    _, ours = pair(batch_first=True)
    compiled = torch.compile(ours, backend=(counter := CompileCounter()), fullgraph=True, dynamic=True)
    dynamic = {name: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for name in ("query", "key", "value")}
    x = inputs(True)[0]
    exported = torch.export.export(
        ours, (x, x, x), {"need_weights": True}, dynamic_shapes=dynamic | {"need_weights": None}
    )
    for length in (S, S - 1, 7):
        x = inputs(True, length)[0]
        expected = ours(x, x, x, need_weights=True)
        for module in (compiled, exported.module()):
            torch.testing.assert_close(module(x, x, x, need_weights=True), expected)
    assert counter.frame_count == 1


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attn_mask": ~MASK.to_dense()}, ValueError, "attn_mask must be None or an AttentionMask"),
        ({"key_padding_mask": [True]}, TypeError, "key_padding_mask must be a tensor of booleans .*, got list"),
        ({"key_padding_mask": torch.zeros(B, S).int()}, TypeError, "key_padding_mask must be .*, got torch.int32"),
        (
            {"key_padding_mask": torch.zeros(S, B)},
            ValueError,
            r"key_padding_mask must have shape \(3, 26\), got \(26, 3",
        ),
        (
            {"key_padding_mask": torch.zeros(B, S).to("meta")},
            ValueError,
            "key_padding_mask must be on .* cpu, got meta",
        ),
        (
            {"key_padding_mask": torch.zeros(B, S), "text_lengths": torch.ones(B).long()},
            ValueError,
            "key_padding_mask must be None where text_lengths",
        ),
        ({"text_lengths": torch.tensor([1, 2])}, ValueError, r"text_lengths must have shape \(3,\), got \(2,\)"),
        ({"text_lengths": torch.tensor([1, 2, 6])}, ValueError, "text_lengths must be from 0 to .* 5"),
        ({"text_lengths": [1, 2, 3]}, TypeError, "text_lengths must be an integer tensor"),
        ({"query": torch.randn(B, S, E + 1)}, ValueError, r"query must have shape \(3, 26, 32\), got \(3, 26, 33\)"),
        ({"key": torch.randn(B, S - 1, E)}, ValueError, r"key must have shape \(3, 26, 32\), got \(3, 25, 32\)"),
        ({"value": torch.randn(1, S, E)}, ValueError, "value must have shape"),
        ({"query": torch.randn(B, 1, S, E)}, ValueError, "query must have 2 or 3 dimensions"),
        ({"query": torch.ones(B, S, E, dtype=torch.long)}, TypeError, "query must be float32, .*, got torch.int64"),
        ({"query": None}, TypeError, "query must be a tensor, got NoneType"),
        ({"query": torch.randn(B, S, E).to_sparse()}, TypeError, "query must be a dense .* torch.sparse_coo"),
        ({"value": torch.nested.nested_tensor([torch.randn(S, E)] * B)}, TypeError, "value must be a dense .* nested"),
        ({"key": torch.randn(B, S, E).double()}, TypeError, r"key must have .* torch.float32, .* got torch.float64"),
        ({"query": torch.randn(B, S, E).half()}, TypeError, r"query must have .* torch.float32, .* got torch.float16"),
        ({"key": torch.randn(B, S, E).to("meta")}, ValueError, "key must be on the module's device cpu, got meta"),
    ],
)
def test_bad_call(options, error, message):
    _, ours = pair(batch_first=True)
    x = inputs(True)[0]
    with pytest.raises(error, match=message):
        ours(**{"query": x, "key": x, "value": x, **options})


@pytest.mark.parametrize("sizes", [{}, {"kdim": E // 2, "vdim": E + 1}], ids=["packed", "apart"])
def test_dtypes_and_devices_are_the_modules(sizes):
    ours = fnn.MultiheadAttention(E, H, batch_first=True, **sizes, mask=MASK)
    x, y, z = inputs(True, sizes=(E, ours.kdim, ours.vdim))
    for dtype in (torch.float64, torch.float16):
        with pytest.raises(TypeError, match=f"query must have the module's dtype torch.float32, or .* got {dtype}"):
            ours(x.to(dtype), y.to(dtype), z.to(dtype))
    with pytest.raises(ValueError, match="value must be on the module's device cpu, got meta"):
        ours(x, y, z.to("meta"))
    assert ours.to("meta")(*(t.to("meta") for t in (x, y, z)))[0].is_meta


def test_meta_tensors():
    """Weights included, which the dense reference makes."""
    module = fnn.MultiheadAttention(E, H, mask=MASK, batch_first=True, device="meta")
    x = torch.empty(B, S, E, device="meta")
    padding = torch.zeros(B, S, dtype=torch.bool, device="meta")
    for options in ({}, {"key_padding_mask": padding}, {"text_lengths": torch.ones(B, device="meta").long()}):
        out, weights = module(x, x, x, need_weights=True, **options)
        assert out.is_meta and out.shape == x.shape and weights.is_meta and weights.shape == (B, S, S)


def test_autocast_takes_mixed_dtypes_but_float64():
    _, ours = pair(batch_first=True)
    x = inputs(True)[0]
    call = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected = ours(x, x, x)[0]
        assert expected.dtype == torch.bfloat16
        for each in (ours, call):
            torch.testing.assert_close(each(x, x.bfloat16(), x.half())[0], expected, rtol=0.1, atol=0.05)
        with pytest.raises(TypeError, match="value must have the module's dtype torch.float32, .* got torch.float64"):
            ours(x, x, x.double())
        x, ours = x.double(), ours.double()
        assert ours(x, x, x)[0].dtype == torch.float64


@pytest.mark.parametrize("name", ["embed_dim", "num_heads", "kdim", "vdim"])
def test_sizes_are_checked(name):
    for size in (0, -3):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got {size}"):
            fnn.MultiheadAttention(**{"embed_dim": E, "num_heads": H, name: size})
    for size in (True, 2.5, "8"):
        with pytest.raises(TypeError, match=f"{name} must be an integer, got {size!r}"):
            fnn.MultiheadAttention(**{"embed_dim": E, "num_heads": H, name: size})
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads, got 32 and 5"):
        fnn.MultiheadAttention(E, 5)


def test_bad_module():
    with pytest.raises(TypeError, match="mask must be an AttentionMask"):
        fnn.MultiheadAttention(E, H, mask=MASK.to_dense())
    for name in ("add_bias_kv", "add_zero_attn"):
        with pytest.raises(ValueError, match=name):
            fnn.MultiheadAttention(E, H, **{name: True}, mask=MASK)
        x = inputs(False)[0]
        with pytest.raises(ValueError, match=name):
            fnn.MultiheadAttention(E, H, **{name: True})(x, x, x, attn_mask=MASK)


def test_heads_are_not_too_large_for_a_mask():
    """Told where the module is made, of the arguments that were given there."""
    message = r"embed_dim must be at most 128 \* num_heads with an AttentionMask, got 258 and 2 heads"
    with pytest.raises(ValueError, match=message):
        fnn.MultiheadAttention(258, 2, mask=MASK)
    module = fnn.MultiheadAttention(258, 2)
    with pytest.raises(ValueError, match=message):
        module.mask = MASK
    assert module.mask is None and fnn.MultiheadAttention(256, 2, mask=MASK).mask is MASK


def test_dropout_is_refused_not_ignored():
    ours = fnn.MultiheadAttention(E, H, dropout=0.1, mask=MASK)
    x = inputs(False)[0]
    with pytest.raises(ValueError, match="dropout must be 0"):
        ours(x, x, x)
    assert ours.eval()(x, x, x)[0].shape == x.shape


def test_text_lengths_need_a_mask():
    x = inputs(False)[0]
    with pytest.raises(ValueError, match="text_lengths needs an AttentionMask"):
        fnn.MultiheadAttention(E, H)(x, x, x, text_lengths=torch.ones(B, dtype=torch.long))


def test_repr_shows_the_mask():
    assert f"mask={MASK!r}" in repr(fnn.MultiheadAttention(E, H, mask=MASK))


def test_impl_names_who_computes():
    """Which is what a refusal, and the warning of the dense reference, advise."""
    ours = fnn.MultiheadAttention(E, H, mask=MASK, impl="cpu")
    assert repr(ours).startswith(f"MultiheadAttention(\n  mask={MASK!r}, impl='cpu'")
    x = inputs(False)[0].double()
    for module in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        with pytest.raises(ValueError, match="impl='cpu' cannot serve this call.*float64"):
            module.double()(x, x, x)
        module.impl = "reference"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            module(x, x, x)
    with pytest.raises(ValueError, match="impl must be one of auto, .*, got 'fast'"):
        fnn.MultiheadAttention(E, H, mask=MASK, impl="fast")
