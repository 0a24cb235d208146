"""Decoding a token is what attention over the whole sequence gives at its position, with less in memory.

Held against dense attention in float64 at every position of every mask, with NaN wherever the operation must not look.
The Triton kernel is in test_triton_interpreter.py and test_triton_compile.py.

B samples, P prompts, N = B / P, H heads, T text, D head size, G image tokens, C slots of an image cache.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from dalle_fast.masks import causal_mask, column_mask, conv_mask, row_mask
from dalle_fast.nn import functional as F
from dalle_fast.testing import SMALL_MASKS, assert_as_exact_as_eager, eager_attention, nan_poisoned, output_terms

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROW = row_mask(5, (3, 7))
DECODE = torch.ops.dalle_fast.sparse_attention_decode.default


def sequences(make, mask, P, N, H=2, D=16, dtype=torch.float32, device="cpu", seed=0):
    """query, key, value (P * N, H, S, D); the samples of a prompt have the text's keys and values in common."""
    q, k, v = make((P, N, H, mask.seq_len, D), dtype, device, seed=seed)
    for x in (k, v):
        x[:, :, :, : mask.text_len] = x[:, :1, :, : mask.text_len].clone()
    return [x.flatten(0, 1) for x in (q, k, v)]


class Cache:
    """Caches that begin as NaN and hold the tokens of `sequences`, one after another."""

    def __init__(self, k, v, mask, P, text_lengths=None):
        T, N = mask.text_len, len(k) // max(1, P)
        self.mask, self.k, self.v = mask, k, v
        self.text = [x[:: max(1, N), :, :T].clone() for x in (k, v)]
        if text_lengths is not None:
            for x in self.text:
                for p, length in enumerate(text_lengths):
                    x[p, :, length:] = torch.nan
        self.image = [torch.full((*k.shape[:2], mask.cache_slots, k.shape[3]), torch.nan).to(k) for _ in range(2)]

    def append(self, i):
        """Token i; returns what the operation takes."""
        for image, x in zip(self.image, (self.k, self.v), strict=True):
            image[:, :, self.mask.cache_slot(i)] = x[:, :, self.mask.text_len + i]
        return *self.text, *self.image

    def fill(self, position):
        for i in range(position + 1):
            tensors = self.append(i)
        return tensors


def decode_all(server, q, k, v, mask, P, **options):
    """out (B, H, G, D) of all image positions, one after another."""
    cache = Cache(k, v, mask, P, options.get("text_lengths"))
    outs = []
    for i in range(mask.image_len):
        tensors = cache.append(i)
        with nan_poisoned():
            query = q[:, :, mask.text_len + i]
            outs.append(F.sparse_attention_decode(query, *tensors, mask, i, impl=server.impl, **options))
        assert outs[-1].dtype == q.dtype and outs[-1].shape == query.shape and outs[-1].is_contiguous()
    return torch.stack(outs, 2)


def check(server, q, k, v, mask, P, *, text_lengths=None, scale=None):
    out = decode_all(server, q, k, v, mask, P, text_lengths=text_lengths, scale=scale)
    if text_lengths is not None:
        text_lengths = text_lengths.repeat_interleave(len(q) // P)
    image = slice(mask.text_len, None)
    exact, eager = (
        eager_attention(q_, k_, v_, mask, text_lengths=text_lengths, scale=scale)[0][:, :, image]
        for q_, k_, v_ in ((q.double(), k.double(), v.double()), (q, k, v))
    )
    terms = None
    if q.numel():
        terms = output_terms(q, k, v, mask, text_lengths=text_lengths, scale=scale)[:, :, image]
    assert_as_exact_as_eager("decode", out, eager, exact, terms=terms)
    return out


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", SMALL_MASKS, ids=repr)
def test_every_mask_at_every_position(server, make, mask, dtype):
    T = mask.text_len
    tensors = sequences(make, mask, 3, 3, dtype=dtype, device=server.device)
    check(server, *tensors, mask, 3)
    lengths = torch.tensor([0, T, T // 2], device=server.device)
    check(server, *tensors, mask, 3, text_lengths=lengths, scale=-0.4)


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("D", [1, 2, 15, 16, 17, 40, 64, 72, 100, 127, 128])
def test_every_head_size_of_every_mask_that_stores_otherwise(server, make, D):
    for mask in (row_mask(5, (2, 4)), column_mask(19, (3, 2))):
        for dtype in DTYPES:
            check(server, *sequences(make, mask, 1, 2, 1, D, dtype, server.device), mask, 1)


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("samples", [1, 3, 8, 13])
def test_long_texts_and_wide_grids(server, make, samples):
    """More than one panel, block of samples and part of the text in each direction; every remainder of them."""
    for mask in (row_mask(150, (2, 40)), column_mask(263, (9, 6)), conv_mask(130, (6, 11), 7), causal_mask(90, 8)):
        check(server, *sequences(make, mask, 2, samples, 1, 64, device=server.device), mask, 2)


@pytest.mark.parametrize("mask", [row_mask(70, (7, 13)), column_mask(70, (7, 13)), conv_mask(70, (7, 13), 5)], ids=repr)
def test_as_exact_as_attention_over_the_whole_sequence(server, make, mask):
    q, k, v = sequences(make, mask, 1, 2, D=64, device=server.device)
    out = decode_all(server, q, k, v, mask, 1)
    whole = F.sparse_attention(q, k, v, mask, impl=server.impl)[:, :, mask.text_len :]
    exact = eager_attention(q.double(), k.double(), v.double(), mask)[0][:, :, mask.text_len :]
    terms = output_terms(q, k, v, mask)[:, :, mask.text_len :]
    assert_as_exact_as_eager("decode", out, whole, exact, terms=terms)


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("size", [1e4, 1e6])
def test_large_scores_keep_their_differences(server, make, size):
    """A score that float32 holds exactly is compared with the largest before anything of it is rounded."""
    for scale in (None, -0.25):
        q, k, v = sequences(make, ROW, 2, 3)
        k[..., 0] += size
        q = torch.zeros_like(q)
        q[..., 0] = 1
        out = F.sparse_attention_decode(
            q[:, :, ROW.text_len + 12], *Cache(k, v, ROW, 2).fill(12), ROW, 12, scale=scale, impl=server.impl
        )
        exact, _ = eager_attention(q.double(), k.double(), v.double(), ROW, scale=scale)
        torch.testing.assert_close(out.double(), exact[:, :, ROW.text_len + 12], rtol=0, atol=2e-6)


# -- a sample is its own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [64, 40])
def test_a_sample_does_not_depend_on_its_batch(make, threads, dtype, D):
    """Bit for bit: alone, among any number of samples and prompts, on any number of threads."""
    mask, P, N, i = conv_mask(83, (6, 9), 5), 3, 13, 40
    q, k, v = sequences(make, mask, P, N, 2, D, dtype)
    query = q[:, :, mask.text_len + i]
    text_key, text_value, image_key, image_value = Cache(k, v, mask, P).fill(i)
    lengths = torch.tensor([83, 0, 21])

    def decode(prompts, samples):
        b = torch.arange(P * N).view(P, N)[prompts, samples].flatten()
        tensors = text_key[prompts], text_value[prompts], image_key[b], image_value[b]
        return F.sparse_attention_decode(query[b], *tensors, mask, i, text_lengths=lengths[prompts], impl="cpu")

    threads(2)
    together = decode(slice(0, P), slice(0, N))
    threads(1)
    assert torch.equal(decode(slice(0, P), slice(0, N)), together)
    together = together.unflatten(0, (P, N))
    for p in range(P):
        for n in range(N):
            assert torch.equal(decode(slice(p, p + 1), slice(n, n + 1))[0], together[p, n]), (p, n)
    for n in range(1, N):
        assert torch.equal(decode(slice(1, 3), slice(0, n)), together[1:, :n].flatten(0, 1)), n


def test_nan_stays_in_its_sample_and_its_prompt(server, make):
    P, N, i = 3, 3, 12
    q, k, v = sequences(make, ROW, P, N, device=server.device)
    query = q[:, :, ROW.text_len + i].clone()
    tensors = [x.clone() for x in Cache(k, v, ROW, P).fill(i)]
    clean = F.sparse_attention_decode(query, *tensors, ROW, i, impl=server.impl)
    query[1, 0, 3] = torch.nan  # a query, a prompt's text key, a sample's image value
    tensors[0][1, 1, 2, 0] = torch.nan
    tensors[3][8, 0, ROW.cache_slot(i), 5] = torch.nan
    out = F.sparse_attention_decode(query, *tensors, ROW, i, impl=server.impl)
    hit = torch.zeros_like(out, dtype=torch.bool)
    hit[1, 0], hit[3:6, 1], hit[8, 0, 5] = True, True, True
    assert torch.equal(out.isnan(), hit)
    assert torch.equal(out[~hit], clean[~hit])


# -- strides, sizes, positions -----------------------------------------------------------------------------------------


@pytest.mark.every_instruction_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [64, 40])
def test_every_stride(server, make, dtype, D):
    mask, i = conv_mask(37, (4, 9), 5), 21
    q, k, v = sequences(make, mask, 2, 3, 2, D, dtype, server.device)
    query = q[:, :, mask.text_len + i].contiguous()
    tensors = Cache(k, v, mask, 2).fill(i)
    expected = F.sparse_attention_decode(query, *tensors, mask, i, impl=server.impl)
    exact, eager = (
        eager_attention(*x, mask)[0][:, :, mask.text_len + i] for x in ((q.double(), k.double(), v.double()), (q, k, v))
    )
    terms = output_terms(q, k, v, mask)[:, :, mask.text_len + i]

    def check(out, name):
        if server.device == "cpu":  # strides do not change what is added up, nor in which order
            assert torch.equal(out, expected), name
        else:  # there a tile's elements are dealt to threads as they lie in memory, and a sum's order follows
            assert_as_exact_as_eager(name, out, eager, exact, terms=terms)

    layouts = {
        "transposed": lambda x: x.mT.contiguous().mT,
        "last stride": lambda x: torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0],
        "heads last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "misaligned": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    }
    for name, layout in layouts.items():
        for which in range(4):  # one of the tensors, the others as they were
            changed = [layout(x) if n == which else x for n, x in enumerate(tensors)]
            check(F.sparse_attention_decode(query, *changed, mask, i, impl=server.impl), name)
        check(F.sparse_attention_decode(layout(query), *map(layout, tensors), mask, i, impl=server.impl), name)


@pytest.mark.parametrize(("P", "B", "H"), [(0, 0, 2), (2, 0, 2), (1, 3, 0)])
def test_empty(server, P, B, H):
    text, image = torch.zeros(P, H, 5, 16, device=server.device), torch.zeros(B, H, 8, 16, device=server.device)
    query = torch.zeros(B, H, 16, device=server.device)
    out = F.sparse_attention_decode(query, text, text, image, image, ROW, 3, impl=server.impl)
    assert out.shape == (B, H, 16)


def test_position_as_a_tensor(server, make):
    q, k, v = sequences(make, ROW, 1, 2, device=server.device)
    tensors = Cache(k, v, ROW, 1).fill(12)
    query = q[:, :, ROW.text_len + 12]
    position = torch.tensor(12, device=server.device)
    out = F.sparse_attention_decode(query, *tensors, ROW, position, impl=server.impl)
    assert torch.equal(out, F.sparse_attention_decode(query, *tensors, ROW, 12, impl=server.impl))


def test_arguments_are_not_written(server, make):
    q, k, v = sequences(make, ROW, 1, 2, device=server.device)
    arguments = [q[:, :, 17], *Cache(k, v, ROW, 1).fill(12), ROW, torch.tensor(12, device=server.device)]
    before = [x.clone() for x in arguments if isinstance(x, torch.Tensor)]
    F.sparse_attention_decode(*arguments, text_lengths=torch.tensor([3], device=server.device), impl=server.impl)
    after = [x for x in arguments if isinstance(x, torch.Tensor)]
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True))


# -- torch -------------------------------------------------------------------------------------------------------------


def inputs(make, dtype=torch.float32, device="cpu"):
    q, k, v = sequences(make, ROW, 2, 3, dtype=dtype, device=device)
    return q[:, :, ROW.text_len + 12], *Cache(k, v, ROW, 2).fill(12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(server, make, dtype):
    tensors = [x.nan_to_num() for x in inputs(make, dtype, server.device)]
    tensors[0] = tensors[0].mT.contiguous().mT  # the output has strides of its own
    position = torch.tensor(12, device=server.device)
    for lengths in (None, torch.tensor([2, 5], device=server.device)):
        torch.library.opcheck(DECODE, (*tensors, position, lengths, list(ROW.encode()), 0.3, server.impl))


def test_shapes_that_do_not_fit_are_refused_past_the_public_function(server, make):
    """A program of AOTInductor hands on any shape, and native code would read beyond a tensor, or divide by 0 prompts."""
    query, text_key, *others = inputs(make, device=server.device)
    rest = (torch.tensor(12, device=server.device), None, list(ROW.encode()), 0.3, server.impl)
    for wrong in (
        (query[1:], text_key),
        (query, text_key[:, :, 1:]),
        (query, text_key[:0]),
        (query[..., 1:], text_key),
    ):
        with pytest.raises(ValueError, match=" must have "):
            DECODE(*wrong, *others, *rest)


def test_compiled_once_for_all_positions(server, make):
    torch._dynamo.reset()
    query, *tensors = [x.nan_to_num() for x in inputs(make, device=server.device)]

    def step(query, position):
        return F.sparse_attention_decode(query * 2, *tensors, ROW, position, impl=server.impl).sin()

    compiled = torch.compile(step, backend=(counter := CompileCounter()), fullgraph=True)
    for i in (3, 12, 20):
        position = torch.tensor(i, device=server.device)
        torch.testing.assert_close(compiled(query, position), step(query, position))
    assert counter.frame_count == 1


def test_compiled_with_integers(make):
    torch._dynamo.reset()
    query, *tensors = [x.nan_to_num() for x in inputs(make)]
    compiled = torch.compile(F.sparse_attention_decode, backend="aot_eager", fullgraph=True)
    for i in (3, 12, 20):
        assert torch.equal(compiled(query, *tensors, ROW, i), F.sparse_attention_decode(query, *tensors, ROW, i))


def test_meta_tensors(make):
    query, *tensors = [x.to("meta") for x in inputs(make)]
    out = F.sparse_attention_decode(query, *tensors, ROW, 12)
    assert out.is_meta and out.shape == query.shape


def test_auto_takes_the_kernel(make, recwarn):
    tensors = inputs(make)
    assert torch.equal(
        F.sparse_attention_decode(*tensors, ROW, 12), F.sparse_attention_decode(*tensors, ROW, 12, impl="cpu")
    )
    assert not recwarn.list


def test_no_gradient(make):
    query, *tensors = inputs(make)
    query.requires_grad_()
    with pytest.raises(RuntimeError, match="sparse_attention_decode has no gradient: call it under torch.no_grad"):
        F.sparse_attention_decode(query, *tensors, ROW, 12)
    with torch.no_grad():
        assert not F.sparse_attention_decode(query, *tensors, ROW, 12).requires_grad
    query = query.detach()
    with pytest.raises(RuntimeError, match="sparse_attention_decode has no gradient"):  # which torch takes for one of 0
        torch.func.jvp(lambda x: F.sparse_attention_decode(x, *tensors, ROW, 12), (query,), (query,))


# -- bad arguments -----------------------------------------------------------------------------------------------------

TEXT, IMAGE = torch.zeros(2, 2, 5, 16), torch.zeros(6, 2, 8, 16)
GOOD = {
    "query": torch.zeros(6, 2, 16),
    "text_key": TEXT,
    "text_value": TEXT,
    "image_key": IMAGE,
    "image_value": IMAGE,
    "mask": ROW,
    "position": 3,
}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"query": torch.zeros(6, 2, 1, 16)}, ValueError, r"query must have 3 dimensions .*, got \(6, 2, 1, 16\)"),
        ({"query": torch.zeros(6, 2, 129)}, ValueError, "head size from 1 to 128, got 129"),
        ({"query": GOOD["query"].int()}, TypeError, "query must be float32, .* got torch.int32"),
        ({"query": torch.zeros(5, 2, 16), "image_key": IMAGE[:5], "image_value": IMAGE[:5]}, ValueError,
         "multiple of the prompts, got 5 and 2"),
        ({"text_key": TEXT[:0], "text_value": TEXT[:0]}, ValueError, "multiple of the prompts, got 6 and 0"),
        ({"text_key": torch.zeros(2, 2, 4, 16)}, ValueError, r"text_key must have shape \(2, 2, 5, 16\) .*2, 4, 16\)"),
        ({"text_key": torch.zeros(())}, ValueError, r"text_key must have shape .*, got \(\)"),
        ({"text_value": TEXT[:1]}, ValueError, r"text_value must have shape \(2, 2, 5, 16\) .*, got \(1, 2, 5, 16\)"),
        ({"image_key": IMAGE[:, :, :7]}, ValueError, r"image_key must have shape \(6, 2, 8, 16\) .*cache_slots.*7, 16"),
        ({"image_value": IMAGE[:2]}, ValueError, r"image_value must have shape \(6, 2, 8, 16\)"),
        ({"image_value": IMAGE.half()}, TypeError, "image_value must have query's dtype torch.float32, got"),
        ({"image_value": IMAGE.to("meta")}, ValueError, "image_value must be on query's device cpu, got meta"),
        ({"image_value": None}, TypeError, "image_value must be a tensor, got NoneType"),
        ({"mask": None}, TypeError, "mask must be an AttentionMask .*, got NoneType"),
        ({"position": 21}, ValueError, "position must be from 0 to 20, .* got 21"),
        ({"position": -1}, ValueError, "position must be from 0 to 20, .* got -1"),
        ({"position": torch.tensor(21)}, ValueError, "position must be from 0 to 20, .* got 21"),
        ({"position": True}, TypeError, "position must be an integer .* got True"),
        ({"position": 1.0}, TypeError, "position must be an integer .* got 1.0"),
        ({"position": torch.tensor([1])}, TypeError, r"position must be .* torch.int64 and shape \(1,\)"),
        ({"position": torch.tensor(1.0)}, TypeError, "position must be .* got a tensor of torch.float32"),
        ({"position": torch.tensor(1, device="meta")}, ValueError, "position must be on query's device cpu, got meta"),
        ({"text_lengths": torch.tensor([1, 2, 3])}, ValueError, r"text_lengths must have shape \(2,\), got \(3,\)"),
        ({"text_lengths": torch.tensor([1, 6])}, ValueError, "text_lengths must be from 0 to .* 5, got .* 1 to 6"),
        ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
        ({"impl": "fast"}, ValueError, "impl must be one of .* got 'fast'"),
        ({"impl": "triton"}, ValueError, "impl='triton' cannot serve this call: .*CUDA tensors"),
    ],
)  # fmt: skip
def test_bad_arguments(changes, error, words):
    F.sparse_attention_decode(**GOOD)
    with pytest.raises(error, match=words):
        F.sparse_attention_decode(**{**GOOD, **changes})
