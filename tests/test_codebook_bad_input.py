"""Bad arguments of the codebook functions get an error that names the argument, what came and what was expected."""

import re

import pytest
import torch

from dalle_fast import _extension
from dalle_fast.nn import functional as F

N, K, I, D = 6, 10, 4, 3
NAN, INF = float("nan"), float("inf")

GOOD = {
    "gumbel_codebook": ("hidden", "weight", "bias", "codebook", "tau"),
    "codebook_argmax": ("hidden", "weight", "bias"),
    "codebook_sample": ("hidden", "weight", "bias"),
    "codebook_cross_entropy": ("hidden", "weight", "bias", "target"),
}


def call(name, **changes):
    values = {
        "hidden": torch.randn(2, 3, I),
        "weight": torch.randn(K, I),
        "bias": torch.randn(K),
        "codebook": torch.randn(K, D),
        "tau": 0.5,
        "target": torch.zeros(2, 3, dtype=torch.int64),
    }
    if name == "gumbel_softmax":
        return F.gumbel_softmax(**{"logits": torch.randn(2, 3), **changes})
    arguments = {key: values[key] for key in GOOD[name]}
    return getattr(F, name)(**{**arguments, **changes})


def ints(*shape):
    return torch.ones(shape, dtype=torch.int64)


# What is changed in a good call, the error, and what its message says: for every function that takes the argument.
PRODUCT_CASES = {
    "hidden no tensor": ({"hidden": [1.0]}, TypeError, ["hidden must be a tensor, got list"]),
    "hidden None": ({"hidden": None}, TypeError, ["hidden must be a tensor, got NoneType"]),
    "hidden rank 0": ({"hidden": torch.tensor(1.0)}, ValueError, ["hidden must have shape (..., Din)"]),
    "hidden integers": ({"hidden": ints(2, 3, I)}, TypeError, ["hidden must be", "got torch.int64"]),
    "hidden booleans": ({"hidden": ints(2, 3, I).bool()}, TypeError, ["hidden must be", "got torch.bool"]),
    "hidden complex": ({"hidden": torch.ones(2, 3, I, dtype=torch.cfloat)}, TypeError, ["hidden must be", "complex64"]),
    "hidden sparse": ({"hidden": torch.randn(2, 3, I).to_sparse()}, TypeError, ["hidden must be a dense", "sparse"]),
    "weight rank": ({"weight": torch.randn(K)}, ValueError, ["weight must have shape (K, 4) with K > 0, got (10,)"]),
    "weight rank 3": ({"weight": torch.randn(1, K, I)}, ValueError, ["weight must have shape (K, 4)", "(1, 10, 4)"]),
    "weight Din": ({"weight": torch.randn(K, 5)}, ValueError, ["weight must have shape (K, 4)", "got (10, 5)"]),
    "weight transposed": ({"weight": torch.randn(I, K)}, ValueError, ["weight must have shape (K, 4)", "got (4, 10)"]),
    "weight no codes": ({"weight": torch.randn(0, I), "bias": None}, ValueError, ["with K > 0, got (0, 4)"]),
    "weight dtype": (
        {"weight": torch.randn(K, I).half()},
        TypeError,
        ["weight must have hidden's dtype torch.float32"],
    ),
    "weight float64": ({"weight": torch.randn(K, I).double()}, TypeError, ["weight must have", "got torch.float64"]),
    "weight integers": ({"weight": ints(K, I)}, TypeError, ["weight must be", "got torch.int64"]),
    "weight device": (
        {"weight": torch.randn(K, I, device="meta")},
        ValueError,
        ["weight must be on hidden's device cpu, got meta"],
    ),
    "bias length": ({"bias": torch.randn(K + 1)}, ValueError, ["bias must have shape (10,), got (11,)"]),
    "bias rank": ({"bias": torch.randn(K, 1)}, ValueError, ["bias must have shape (10,), got (10, 1)"]),
    "bias scalar": ({"bias": torch.tensor(1.0)}, ValueError, ["bias must have shape (10,), got ()"]),
    "bias dtype": (
        {"bias": torch.randn(K).bfloat16()},
        TypeError,
        ["bias must have hidden's dtype", "got torch.bfloat16"],
    ),
    "bias device": ({"bias": torch.randn(K, device="meta")}, ValueError, ["bias must be on hidden's device cpu"]),
    "bias number": ({"bias": 1.0}, TypeError, ["bias must be a tensor, got float"]),
    "impl unknown": ({"impl": "fast"}, ValueError, ["impl must be one of auto, reference, cpu, ", "got 'fast'"]),
    "impl None": ({"impl": None}, ValueError, ["impl must be one of", "got None"]),
    "impl list": ({"impl": ["cpu"]}, ValueError, ["impl must be one of", "got ['cpu']"]),
    "impl cuda": ({"impl": "cuda"}, ValueError, ["impl='cuda' cannot serve", "got hidden on cpu"]),
    "impl triton": (
        {"impl": "triton"},
        ValueError,
        ["impl='triton' cannot serve", "hidden is on cpu", "float16 or bfloat16", "multiple of 16"],
    ),
}
CODEBOOK_CASES = {
    "codebook K": ({"codebook": torch.randn(K - 1, D)}, ValueError, ["codebook must have shape (10, D), got (9, 3)"]),
    "codebook rank": ({"codebook": torch.randn(K)}, ValueError, ["codebook must have shape (10, D), got (10,)"]),
    "codebook dtype": ({"codebook": torch.randn(K, D).half()}, TypeError, ["codebook must have hidden's dtype"]),
    "codebook integers": ({"codebook": ints(K, D)}, TypeError, ["codebook must be", "got torch.int64"]),
    "codebook device": (
        {"codebook": torch.randn(K, D, device="meta")},
        ValueError,
        ["codebook must be on", "got meta"],
    ),
    "codebook None": ({"codebook": None}, TypeError, ["codebook must be a tensor, got NoneType"]),
    "hard number": ({"hard": 1}, TypeError, ["hard must be True or False, got 1"]),
    "hard tensor": ({"hard": torch.tensor(True)}, TypeError, ["hard must be True or False, got tensor(True)"]),
    "hard None": ({"hard": None}, TypeError, ["hard must be True or False, got None"]),
}
RANGE_CASES = {
    "range number": ({"code_range": 3}, TypeError, ["code_range must be a pair (start, stop) or None, got 3"]),
    "range of three": ({"code_range": (0, 1, 2)}, TypeError, ["code_range must be a pair", "got (0, 1, 2)"]),
    "range of floats": (
        {"code_range": (0.0, 2.0)},
        TypeError,
        ["code_range must be a pair of integers, got (0.0, 2.0)"],
    ),
    "range of booleans": ({"code_range": (False, True)}, TypeError, ["code_range must be a pair of integers"]),
    "range slice": ({"code_range": slice(0, 2)}, TypeError, ["code_range must be a pair", "slice"]),
    "range empty": ({"code_range": (3, 3)}, ValueError, ["0 <= start < stop <= 10, got (3, 3)"]),
    "range reversed": ({"code_range": (5, 3)}, ValueError, ["0 <= start < stop <= 10, got (5, 3)"]),
    "range negative": ({"code_range": (-1, 3)}, ValueError, ["0 <= start < stop <= 10, got (-1, 3)"]),
    "range beyond": ({"code_range": (0, 11)}, ValueError, ["0 <= start < stop <= 10, got (0, 11)"]),
}
SEED_CASES = {
    "seed float": ({"seed": 1.0}, TypeError, ["seed must be an integer, an int64 tensor or None, got 1.0"]),
    "seed bool": ({"seed": True}, TypeError, ["seed must be an integer", "got True"]),
    "seed text": ({"seed": "1"}, TypeError, ["seed must be an integer", "got '1'"]),
    "seed negative": ({"seed": -1}, ValueError, ["seed must be from 0 to 2^63 - 1, got -1"]),
    "seed large": ({"seed": 2**63}, ValueError, ["seed must be from 0 to 2^63 - 1, got 9223372036854775808"]),
    "seed int32": ({"seed": torch.tensor(1, dtype=torch.int32)}, TypeError, ["int64 tensor, got torch.int32"]),
    "seed of floats": ({"seed": torch.tensor(1.0)}, TypeError, ["seed must be", "int64 tensor, got torch.float32"]),
    "seed device": (
        {"seed": torch.tensor(1, device="meta")},
        ValueError,
        ["seed must be on hidden's device cpu, got meta"],
    ),
}
ROW_SEED_CASES = {
    "seed shape": ({"seed": ints(6)}, ValueError, ["seed must have shape () or (2, 3), got (6,)"]),
    "seed of one": ({"seed": ints(1)}, ValueError, ["seed must have shape () or (2, 3), got (1,)"]),
    "seed per feature": ({"seed": ints(2, 3, I)}, ValueError, ["seed must have shape () or (2, 3), got (2, 3, 4)"]),
}
SOFTMAX_SEED_CASES = {
    "seed per row": ({"seed": ints(2)}, ValueError, ["seed must have shape (), got (2,)"]),
}
TARGET_CASES = {
    "target list": ({"target": [0] * 6}, TypeError, ["target must be an int64 tensor, got list"]),
    "target int32": ({"target": ints(2, 3).int()}, TypeError, ["target must be an int64 tensor, got torch.int32"]),
    "target of floats": (
        {"target": torch.ones(2, 3)},
        TypeError,
        ["target must be an int64 tensor, got torch.float32"],
    ),
    "target shape": ({"target": ints(6)}, ValueError, ["target must have shape (2, 3), got (6,)"]),
    "target probabilities": ({"target": torch.rand(2, 3, K)}, TypeError, ["target must be an int64 tensor"]),
    "target device": (
        {"target": ints(2, 3).to("meta")},
        ValueError,
        ["target must be on hidden's device cpu, got meta"],
    ),
    "target K": (
        {"target": torch.tensor([[0, 1, 2], [3, 10, 5]])},
        ValueError,
        ["target must be from 0 to 9 or ignore_index (-100), got 10"],
    ),
    "target negative": ({"target": -ints(2, 3)}, ValueError, ["target must be from 0 to 9", "got -1"]),
    "target not ignored": (
        {"target": torch.full((2, 3), -100), "ignore_index": 0},
        ValueError,
        ["target must be from 0 to 9 or ignore_index (0), got -100"],
    ),
    "target below the range": ({"code_range": (2, 8)}, ValueError, ["target must be from 2 to 7", "got 0"]),
    "target beyond the range": (
        {"target": torch.full((2, 3), 8), "code_range": (2, 8)},
        ValueError,
        ["target must be from 2 to 7", "got 8"],
    ),
    "reduction unknown": ({"reduction": "avg"}, ValueError, ["reduction must be 'none', 'mean' or 'sum', got 'avg'"]),
    "reduction None": ({"reduction": None}, ValueError, ["reduction must be 'none', 'mean' or 'sum', got None"]),
    "ignore_index float": ({"ignore_index": 0.0}, TypeError, ["ignore_index must be an integer, got 0.0"]),
    "ignore_index None": ({"ignore_index": None}, TypeError, ["ignore_index must be an integer, got None"]),
}
SOFTMAX_CASES = {
    "impl triton": ({"impl": "triton"}, ValueError, ["impl must be one of auto, reference, cpu, cuda, got 'triton'"]),
    "logits list": ({"logits": [1.0]}, TypeError, ["logits must be a tensor, got list"]),
    "logits integers": ({"logits": ints(2, 3)}, TypeError, ["logits must be", "got torch.int64"]),
    "logits rank 0": ({"logits": torch.tensor(1.0)}, ValueError, ["dim must be a dimension of logits ()", "got -1"]),
    "logits empty": ({"logits": torch.zeros(3, 0)}, ValueError, ["logits must have at least one code in dimension -1"]),
    "dim 2": ({"dim": 2}, ValueError, ["dim must be a dimension of logits (2, 3), got 2"]),
    "dim -3": ({"dim": -3}, ValueError, ["dim must be a dimension of logits (2, 3), got -3"]),
    "impl unknown": ({"impl": "fast"}, ValueError, ["impl must be one of", "got 'fast'"]),
    "impl cuda": ({"impl": "cuda"}, ValueError, ["impl='cuda' cannot serve", "got logits on cpu"]),
}


def number_cases(name, positive):
    low = "positive" if positive else "at least 0"
    cases = {
        f"{name} negative": (-1.0, ValueError, [f"{name} must be {low} and finite, got -1.0"]),
        f"{name} nan": (NAN, ValueError, [f"{name} must be {low} and finite, got nan"]),
        f"{name} inf": (INF, ValueError, [f"{name} must be {low} and finite, got inf"]),
        f"{name} -inf": (-INF, ValueError, [f"{name} must be {low} and finite, got -inf"]),
        f"{name} text": ("1", TypeError, [f"{name} must be a number", "got '1'"]),
        f"{name} bool": (True, TypeError, [f"{name} must be a number", "got True"]),
        f"{name} None": (None, TypeError, [f"{name} must be a number", "got None"]),
        f"{name} complex": (1j, TypeError, [f"{name} must be a number", "got 1j"]),
        f"{name} tensor negative": (torch.tensor(-1.0), ValueError, [f"{name} must be {low} and finite, got -1.0"]),
        f"{name} tensor nan": (torch.tensor(NAN), ValueError, [f"{name} must be {low} and finite, got nan"]),
        f"{name} tensor inf": (torch.tensor(INF), ValueError, [f"{name} must be {low} and finite, got inf"]),
        f"{name} shape": (torch.ones(1), TypeError, [f"{name} must be a number", "without dimensions", "shape (1,)"]),
        f"{name} per row": (torch.ones(2, 3), TypeError, [f"{name} must be a number", "shape (2, 3)"]),
        f"{name} of booleans": (torch.tensor(True), TypeError, [f"{name} must be a number"]),
        f"{name} gradient": (
            torch.tensor(0.5, requires_grad=True),
            ValueError,
            [f"{name} must not require a gradient", f"{name}.detach()"],
        ),
    }
    if positive:
        cases[f"{name} zero"] = (0, ValueError, [f"{name} must be positive and finite, got 0"])
        cases[f"{name} tensor zero"] = (torch.tensor(0.0), ValueError, [f"{name} must be positive and finite, got 0.0"])
    return {case: ({name: value}, error, words) for case, (value, error, words) in cases.items()}


CASES = [
    *(("gumbel_codebook", case) for case in (PRODUCT_CASES | CODEBOOK_CASES | SEED_CASES | ROW_SEED_CASES).items()),
    *(("gumbel_codebook", case) for case in number_cases("tau", True).items()),
    *(("codebook_argmax", case) for case in (PRODUCT_CASES | RANGE_CASES).items()),
    *(("codebook_sample", case) for case in (PRODUCT_CASES | RANGE_CASES | SEED_CASES | ROW_SEED_CASES).items()),
    *(("codebook_sample", case) for case in number_cases("temperature", False).items()),
    *(("codebook_cross_entropy", case) for case in (PRODUCT_CASES | RANGE_CASES | TARGET_CASES).items()),
    *(("gumbel_softmax", case) for case in (SOFTMAX_CASES | SEED_CASES | SOFTMAX_SEED_CASES).items()),
    *(("gumbel_softmax", case) for case in number_cases("tau", True).items()),
]


@pytest.mark.parametrize("name,case", CASES, ids=lambda x: x if isinstance(x, str) else x[0])
def test_message(name, case):
    changes, error, words = case[1]
    with pytest.raises(error) as caught:
        call(name, **changes)
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", [*GOOD, "gumbel_softmax"])
def test_the_good_call_is_good(name):
    call(name)


def test_refusal_lists_every_reason():
    """float64 on a CPU, for CUDA: the device and the dtype are both named, and sizes beyond what was promised."""
    wide = {name: torch.zeros(s, dtype=torch.float64) for name, s in (("hidden", (2, 5000)), ("weight", (K, 5000)))}
    codebook = torch.zeros(K, 2000, dtype=torch.float64)
    with pytest.raises(ValueError, match="impl='cuda' cannot serve") as caught:
        F.gumbel_codebook(**wide, bias=None, codebook=codebook, tau=1.0, impl="cuda")
    for word in ("hidden on cpu", "float64", "Din", "5000", "2000"):
        assert word in str(caught.value), word
    with pytest.raises(ValueError, match=r"impl='cpu' cannot serve.*float64"):
        F.codebook_argmax(**wide, impl="cpu")
    meta = [torch.zeros(s, device="meta") for s in ((2, I), (K, I))]
    assert F.codebook_argmax(*meta, impl="cpu").is_meta  # nothing to serve


def test_refusal_says_how_to_build(monkeypatch):
    monkeypatch.setattr(_extension, "why_missing", lambda: "it was not built; run make build")
    for name in ("gumbel_codebook", "codebook_sample", "codebook_cross_entropy"):
        with pytest.raises(ValueError, match="impl='cpu' cannot serve.*make build"):
            call(name, impl="cpu")
        with pytest.warns(UserWarning, match=f"{name} runs on the dense reference.*make build"):
            call(name)  # auto still computes, and says why it is slow


def test_an_error_leaves_nothing_behind():
    """After a refused call a good one is what it was."""
    hidden, weight = torch.randn(5, I), torch.randn(K, I)
    expected = F.codebook_sample(hidden, weight, seed=1)
    for changes in ({"seed": -1}, {"temperature": -1.0}, {"impl": "cuda"}, {"code_range": (5, 5)}):
        with pytest.raises(ValueError, match=re.escape(next(iter(changes)))):
            F.codebook_sample(hidden, weight, **changes)
        assert torch.equal(F.codebook_sample(hidden, weight, seed=1), expected)


def test_targets_are_not_looked_at_off_the_cpu():
    """There a look would wait for the device: shapes are checked, values are the kernels' to survive."""
    meta = {name: torch.zeros(s, device="meta") for name, s in (("hidden", (6, I)), ("weight", (K, I)))}
    target = torch.full((6,), 99, device="meta")
    assert F.codebook_cross_entropy(**meta, bias=None, target=target).shape == ()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_target_out_of_range_on_a_gpu_is_nan():
    hidden, weight = torch.randn(6, I, device="cuda"), torch.randn(K, I, device="cuda")
    target = torch.tensor([0, 1, K, -1, 2**40, 5], device="cuda")
    loss = F.codebook_cross_entropy(hidden, weight, None, target, reduction="none")
    assert loss.isnan().tolist() == [False, False, True, True, True, False]


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("wrong", [-1, 11])
def test_a_compiled_or_exported_program_refuses_targets_too(impl, reduction, wrong):
    """Their values are not known where it is traced; a kernel would read, and write, beside a row."""

    class Loss(torch.nn.Module):
        def forward(self, hidden, weight, target):
            return F.codebook_cross_entropy(hidden, weight, None, target, reduction=reduction, impl=impl)

    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8)
    target = torch.tensor([0, 1, -100, 3, 10, 5])
    for program in (
        torch.compile(Loss(), backend="aot_eager"),
        torch.export.export(Loss(), (hidden, weight, target)).module(),
    ):
        torch.testing.assert_close(program(hidden, weight, target), Loss()(hidden, weight, target))
        with pytest.raises(ValueError, match="target must hold codes, .*; row 4 does not"):
            program(hidden, weight, target.where(target != 10, wrong))


@pytest.mark.parametrize("wrong", [-1.0, 0.0, NAN])
def test_a_compiled_program_refuses_tau_and_temperature_too(wrong):
    hidden, weight = torch.randn(6, 8), torch.randn(11, 8)

    def both(tau, temperature):
        drawn = F.codebook_sample(hidden, weight, temperature=temperature, seed=1)
        return F.gumbel_codebook(hidden, weight, None, weight, tau, seed=1).embedding, drawn

    compiled = torch.compile(both, backend="aot_eager")
    for a, b in zip(compiled(torch.tensor(0.5), torch.tensor(0.0)), both(0.5, 0.0), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="tau must be positive and finite, got"):
        compiled(torch.tensor(wrong), torch.tensor(1.0))
    if wrong != 0:
        with pytest.raises(ValueError, match="temperature must be at least 0 and finite, got"):
            compiled(torch.tensor(1.0), torch.tensor(wrong))
