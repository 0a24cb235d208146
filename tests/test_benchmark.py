"""The benchmarks say what they promise: every contender, every number, every refusal.

The commands run at a tiny size, where nothing they measure means anything but everything they write has its form.
"""

import copy
import functools
import importlib
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import dalle_fast.nn as fnn
from dalle_fast import provenance
from dalle_fast.checkpoint import write_json
from dalle_fast.ops import blocks
from dalle_fast.ops import linear as linear_ops
from dalle_fast.ops.attention import decode

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"
sys.path.insert(0, str(FOLDER))  # no package
import attn_bench  # noqa: E402
import codebook_bench  # noqa: E402
import exactness  # noqa: E402
import generate_bench  # noqa: E402
import harness  # noqa: E402
import measuring  # noqa: E402
import redraw  # noqa: E402
import reporting  # noqa: E402
import train_bench  # noqa: E402

TINY = ["--quick", "--seconds", "0.05", "--grid", "3x5", "--text-len", "6", "--heads", "2", "--head-dim", "16"]
CONTENDERS = (
    "dalle_fast",
    "SDPA causal",
    "SDPA mask, boolean",
    "SDPA mask, added",
    "FlexAttention, block 128",
    "eager",
)
CODEBOOK_TINY = ["--quick", "--seconds", "0.02", "--threads", "1"]  # threads cost more than they give at these sizes
CODEBOOK_TINY += ["--rows", "24", "--codes", "100", "--embedding-dim", "8", "--din", "16"]
GENERATE_TINY = ["--quick", "--seconds", "0.02", "--threads", "1", "--preset", "tiny", "--text-len", "6"]
GENERATE_TINY += ["--grid", "4", "--layers", "3", "--batch", "2", "--device", "cpu"]
TRAIN_TINY = ["--quick", "--seconds", "0.02", "--threads", "1", "--text-len", "6", "--layers", "3", "--width", "64"]
TRAIN_TINY += ["--grid", "3x4", "--device", "cpu"]
CODEBOOK_CONTENDERS = {
    ("gumbel", "forward"): ["dalle_fast", "products alone", "eager", "compiled"],
    ("gumbel", "forward+backward"): ["dalle_fast", "eager", "compiled"],
    ("argmax", "forward"): ["dalle_fast", "eager", "compiled"],
    ("sample", "forward"): ["dalle_fast", "eager, multinomial", "eager, Gumbel argmax", "compiled, Gumbel argmax"],
    ("cross_entropy", "forward"): ["dalle_fast", "eager", "compiled", "Liger", "cut-cross-entropy"],
    ("cross_entropy", "forward+backward"): ["dalle_fast", "eager", "compiled", "Liger", "cut-cross-entropy"],
}


def environment(folders=()):
    path = os.pathsep.join(filter(None, [*map(str, folders), str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}


RUN = """
import importlib, json, sys
for name, flags in json.loads(sys.argv[1]).items():
    sys.argv = [f"benchmarks/{name}.py", *flags]
    code = importlib.import_module(name).main(None)
    print("ended with", code, flush=True)
"""


def reports_of(folder, runs, **variables):
    """Run benchmarks, {name: flags}, in one process, as importing torch takes longer than they do.

    What each wrote to its results file, and what it printed.
    """
    draws = importlib.util.find_spec("matplotlib") is not None
    flags = {}
    for name in runs:
        flags[name] = [*runs[name], "--json", str(folder / f"{name}.json")]
        flags[name] += ["--plot", str(folder / f"{name}.png")] if draws else []
    run = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(flags)],
        check=False, capture_output=True, text=True, timeout=600,
        env=environment([FOLDER]) | variables,
    )  # fmt: skip
    *printed, rest = run.stdout.split("ended with 0\n")
    assert run.returncode == 0 and not rest and len(printed) == len(runs), run.stdout + run.stderr
    reports = []
    for name in runs:
        if draws:
            assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        text = (folder / f"{name}.json").read_text()
        report = json.loads(text)
        assert report["complete"] is True
        assert report["machine"]["cpu"] and report["machine"]["cores"] >= 1
        assert report["versions"]["torch"] == torch.__version__ and report["versions"]["python"]
        assert str(folder) not in text and f"python benchmarks/{name}.py" in report["command"]
        assert f"--json {name}.json" in report["command"] and report["environment"] == variables_of_ours()
        reports.append(report)
    return list(zip(reports, printed, strict=True))


def variables_of_ours():
    return {name: value for name, value in os.environ.items() if name.startswith("DALLE_FAST_")}


def check_timing(entry, ours):
    assert 0 < entry["q1_s"] <= entry["median_s"] <= entry["q3_s"] and entry["repetitions"] >= 3
    assert entry["ratio"] == pytest.approx(entry["median_s"] / ours["median_s"])
    assert entry["extra_bytes"] is None or 0 <= entry["extra_bytes"] < 64 << 20


def test_runs_write_everything(tmp_path):
    attention = [*TINY, "--mask", "conv:3:clip", "--dtype", "float32", "--batch", "2"]
    runs = {"attn_bench": attention, "generate_bench": GENERATE_TINY, "train_bench": TRAIN_TINY}
    for check, (report, printed) in zip(
        (check_attention, check_generation, check_training), reports_of(tmp_path, runs), strict=True
    ):
        check(report, printed)


def check_attention(report, printed):
    assert report["benchmark"] == "attention"
    assert [case["pass"] for case in report["cases"]] == ["forward", "forward+backward"]
    for case in report["cases"]:
        assert case["complete"] and case["mask"].startswith("conv_mask(text_len=6, grid=(3, 5), kernel_size=3")
        assert (case["seq_len"], case["batch"], case["heads"], case["head_dim"]) == (21, 2, 2, 16)
        check_case(case, printed)


def check_case(case, printed):
    entries = {entry["name"]: entry for entry in case["contenders"]}
    assert tuple(entries) == CONTENDERS
    for name, entry in entries.items():
        assert name in printed
        if entry["status"] == "not run":  # FlexAttention: no compiler here, or no backward on a CPU
            assert name.startswith("FlexAttention") and f"{name}: not run ({entry['reason']})" in printed
            continue
        check_timing(entry, entries["dalle_fast"])
        tensors = ["out"] if case["pass"] == "forward" else ["out", "grad_query", "grad_key", "grad_value"]
        assert list(entry["error"]) == tensors
        assert all(0 < e["max_abs"] < 1e-5 and 0 < e["rms_relative"] < 1e-5 for e in entry["error"].values())
    assert entries["dalle_fast"]["exact"] is True
    if case["pass"] == "forward+backward":
        assert entries["FlexAttention, block 128"]["status"] == "not run"


def test_a_codebook_run_writes_everything(tmp_path):
    """Without torch.compile, whose contenders say so: compiling takes ten times as long as all the rest."""
    ((report, printed),) = reports_of(tmp_path, {"codebook_bench": CODEBOOK_TINY}, TORCH_COMPILE_DISABLE="1")
    assert report["benchmark"] == "codebook"
    found = {(case["op"], case["pass"]): [e["name"] for e in case["contenders"]] for case in report["cases"]}
    assert found == CODEBOOK_CONTENDERS
    for case in report["cases"]:
        assert case["complete"] and (case["rows"], case["codes"], case["embedding_dim"], case["din"]) == (
            24,
            100,
            8,
            16,
        )
        entries = {entry["name"]: entry for entry in case["contenders"]}
        assert entries["dalle_fast"]["exact"] is True
        assert "eager" in case["ratios"] and "products" not in case["ratios"]
        for name, entry in entries.items():
            if entry["status"] == "not run":
                reason = "switched off" if name.startswith("compiled") else "not installed|needs a GPU"
                assert re.search(reason, entry["reason"]) and f"{name}: not run ({entry['reason']})" in printed
            else:
                assert not name.startswith(("compiled", "Liger", "cut"))
                check_timing(entry, entries["dalle_fast"])
                check_codebook_errors(case, entry)


def check_codebook_errors(case, entry):
    errors = entry["error"]
    if entry["name"] == "products alone":
        assert errors == {} and entry["extra_bytes"] is None
    elif case["op"] == "sample":
        assert case["samples"] == 4 * 24 and len(errors) == 4
        assert all(0 <= error["z"] < 5 for error in errors.values())
    elif case["op"] == "argmax":
        assert errors["codes"]["max_abs"] < 1e-5 and errors["codes"]["rows_that_differ"] <= 1 / 24
    else:
        gumbel, backward = case["op"] == "gumbel", case["pass"] == "forward+backward"
        grads = ["grad_hidden", "grad_weight", "grad_bias"] + ["grad_codebook"] * gumbel
        assert list(errors) == (["embedding", "kl"] if gumbel else ["loss"]) + grads * backward
        assert all(0 <= error["max_abs"] < 1e-4 * error["largest"] for error in errors.values())


def test_compiled_torch_takes_part(monkeypatch, capsys, threads):
    """Compiled by the backend that compiles nothing, at both of its signatures: with its own noise, and with ours."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(harness, "measure_memory", every_memory_is_zero)
    flags = [*CODEBOOK_TINY, "--device", "cpu", "--op", "gumbel", "--pass", "forward", "--dtype", "bfloat16"]
    assert codebook_bench.main(flags) == 0
    printed = capsys.readouterr().out
    assert "gumbel, forward, bfloat16, Din 16" in printed and "compiled: not run" not in printed


def check_generation(report, printed):
    assert report["benchmark"] == "generation"
    (case,) = report["cases"]
    entries = {entry["name"]: entry for entry in case["contenders"]}
    assert list(entries) == ["dalle_fast", "dense cache, SDPA", "no cache"] and set(case["ratios"]) == {
        "dense cache",
        "no cache",
    }
    assert case["complete"] and case["batch"] == 2 and case["positions"] == [3, 11] and case["caption_s"] > 0
    for name, entry in entries.items():
        assert name in printed and entry["error"].keys() == {"token 3", "token 11"}
        assert all(0 < error["max_abs"] < 1e-4 for error in entry["error"].values())
        check_timing(entry, entries["dalle_fast"])
    assert entries["dalle_fast"]["exact"] is True
    # 7 text positions once, and what a layer's mask can see: 2 * 4 heads * 32 numbers of 4 bytes a key
    config = fnn.DALLEConfig(**case["config"])
    keys = sum(7 + 2 * mask.cache_slots for mask in config.masks) / 2
    assert case["cache_bytes_per_image"] == {"dalle_fast": keys * 1024, "dense cache": 3 * (7 + 16) * 1024}


def test_peers_of_generation_are_plain_torch(monkeypatch):
    """All but the way to draw: neither our steps, nor our attention, nor our linear layers serve them."""
    monkeypatch.setattr(linear_ops, "_rows", lambda: (range(1, 17),) * 3)  # with any instruction set
    monkeypatch.setattr(blocks, "_most_samples", lambda: (16,) * 3)
    case = generate_bench.parse(GENERATE_TINY).cases[0]
    inputs = generate_bench.make_inputs(case, "cpu")
    calls = {
        contender.name: generate_bench.make_call(contender.build(case, "cpu"), case, inputs)
        for contender in generate_bench.contenders_of(case, generate_bench.parse(GENERATE_TINY))
    }
    expected = {name: call.exact() for name, call in calls.items()}
    served = []
    for place, name in ((linear_ops, "_linear_op"), (decode, "_decode"), (blocks, "_step")):
        real = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *args, real=real, name=name: served.append(name) or real(*args))
    for name, call in calls.items():
        served.clear()
        for one, other, ours in zip(call.exact(), expected[name], expected["dalle_fast"]):
            assert torch.equal(one, other)
            torch.testing.assert_close(one, ours)
        assert "_step" in served if name == "dalle_fast" else not served


def check_training(report, printed):
    assert report["benchmark"] == "training"
    (case,) = report["cases"]
    entries = {entry["name"]: entry for entry in case["contenders"]}
    sdpa = ["SDPA mask, boolean", "SDPA mask, added"]
    assert list(entries) == ["dalle_fast", *sdpa, "FlexAttention, block 64", "FlexAttention, block 128"]
    kinds = 3  # row, column and conv
    assert case["mask_bytes"] == dict(zip(sdpa, (kinds * (6 + 12) ** 2, 4 * kinds * (6 + 12) ** 2), strict=True))
    assert case["complete"] and case["tokens"] == 6 + 12 and case["pass"] == "forward+backward"
    for name, entry in entries.items():
        if name.startswith("FlexAttention"):
            assert entry["status"] == "not run" and f"{name}: not run (FlexAttention has no backward on CPU)" in printed
            continue
        check_timing(entry, entries["dalle_fast"])
        assert list(entry["error"]) == ["loss", "grad of the first layer's qkv", "grad of the image embedding"]
        assert all(0 <= error["max_abs"] < 1e-5 for error in entry["error"].values())
    assert entries["dalle_fast"]["exact"] is True and set(case["ratios"]) == {"SDPA mask"}


@pytest.mark.parametrize("name", ["generate_bench", "train_bench"])
def test_a_wrong_result_of_the_transformer_fails(name, monkeypatch, capsys, threads):
    """A last weight that is off by a thousandth."""
    module = importlib.import_module(name)
    monkeypatch.setattr(harness, "measure_memory", every_memory_is_zero)
    real = module.build_ours

    def spoiled(case, device, *, impl):
        make = real(case, device, impl=impl)

        def spoil(model):
            model = copy.deepcopy(model)
            with torch.no_grad():
                model.transformer.norm.weight[0] += 1e-3
            return model

        if name == "train_bench":
            return lambda model: make(spoil(model))
        return lambda case, inputs: make(case, (spoil(inputs[0]), *inputs[1:]))

    monkeypatch.setattr(module, "build_ours", spoiled)
    assert module.main(GENERATE_TINY if name == "generate_bench" else TRAIN_TINY) == 1
    printed = capsys.readouterr()
    assert "dalle_fast: TOO INEXACT" in printed.out and "too inexact: " in printed.err


def test_the_default_cases_of_the_transformer():
    cases = generate_bench.parse(["--device", "cpu"]).cases
    assert [(case.batch, case.dtype) for case in cases] == [(1, "float32"), (8, "float32")]
    assert all(case.config == fnn.DALLEConfig() for case in cases)  # the preset "small": text 256, grid 32 x 32
    cases = train_bench.parse(["--device", "cpu"]).cases
    assert [case.config.grid for case in cases] == [(16, 16), (32, 32), (64, 64)]
    assert all(case.config.text_len == 256 for case in cases)


def every_memory_is_zero(benchmark, case, contenders, *_):
    return dict.fromkeys((contender.name for contender in contenders), 0)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--op", "softmax"], "argument --op: invalid choice: 'softmax'"),
        (["--rows", "0"], "argument --rows: expected an integer of at least 1, got '0'"),
        (["--codes", "1"], "argument --codes: expected an integer of at least 2, got '1'"),
        (["--embedding-dim", "x"], "argument --embedding-dim: expected an integer of at least 1, got 'x'"),
        (["--din", "-2"], "argument --din: expected an integer of at least 1, got '-2'"),
        (["--op", "argmax", "--pass", "forward+backward"], "argument --pass: argmax has no backward pass"),
        (["--op", "sample", "--op", "gumbel", "--pass", "forward+backward"], "argument --pass: sample has no backward"),
        (["--impl", "fast"], "argument --impl: invalid choice: 'fast'"),
        (["--json", "a.txt"], "argument --json: expected a file name ending in .json, got 'a.txt'"),
    ],
)
def test_a_bad_flag_of_the_codebook_is_named(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        codebook_bench.parse(flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_default_cases_of_the_codebook():
    cases = codebook_bench.parse(["--device", "cpu"]).cases
    assert {(case.rows, case.codes, case.embedding_dim) for case in cases} == {(1024, 8192, 128)}
    kinds = [(case.op, case.pass_, case.dtype, case.din) for case in cases]
    assert kinds.count(("gumbel", "forward", "bfloat16", 512)) == 1
    for op, pass_ in CODEBOOK_CONTENDERS:
        assert {(op, pass_, "float32", din) for din in (512, 2048)} <= set(kinds)
    assert len(kinds) == 2 * len(CODEBOOK_CONTENDERS) + 1


def test_a_median_of_the_codebook_is_one_of_nine_at_least():
    assert codebook_bench.MIN_ROUNDS >= 9


@pytest.mark.parametrize("op", ["gumbel", "argmax", "sample", "cross_entropy"])
def test_a_wrong_codebook_result_fails(monkeypatch, capsys, threads, op):
    """A little more than rounding, codes that are off by one, samples that prefer even codes, NaN."""
    monkeypatch.setattr(harness, "measure_memory", every_memory_is_zero)
    real = codebook_bench.build_ours
    rows = "1024" if op == "sample" else "24"
    flags = [*CODEBOOK_TINY, "--op", op, "--pass", "forward", "--device", "cpu", "--rows", rows]

    def spoiled(case, device, noise=None, *, impl):
        function = real(case, device, noise, impl=impl)

        def call(inputs):
            first, *rest = function(inputs)
            if op == "argmax":
                return ((first + 1) % case.codes,)
            if op == "sample":
                return (torch.where(torch.rand(first.shape) < 0.1, first - first % 2, first),)
            return (first * (1 + offset), *rest)

        return call

    monkeypatch.setattr(codebook_bench, "build_ours", spoiled)
    for offset in (1e-4, math.nan) if op in ("gumbel", "cross_entropy") else (0,):
        with torch._dynamo.config.patch(disable=True):
            assert codebook_bench.main(flags) == 1
        printed = capsys.readouterr()
        assert "dalle_fast: TOO INEXACT" in printed.out and "too inexact: " in printed.err


def test_the_codebook_oracle_sees_blocks_of_rows(monkeypatch):
    """The same truth in one block of rows and in several; small errors are found in any tensor."""
    for op in ("gumbel", "cross_entropy"):
        case = codebook_bench.Case(op, "forward+backward", "float32", 5, 7, 11, 3)
        inputs = codebook_bench.make_inputs(case, "cpu")
        whole = codebook_bench.Oracle(case, inputs)._expected()
        monkeypatch.setattr(codebook_bench, "BLOCK_PAIRS", 3 * 11)
        parts = codebook_bench.Oracle(case, inputs)._expected()
        monkeypatch.undo()
        assert len(whole) == len(parts) == (6 if op == "gumbel" else 4)
        for one, other in zip(whole, parts):
            assert one.dtype == torch.float64 and torch.allclose(one, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--grid", "0x3"], "argument --grid: expected ROWSxCOLUMNS or one integer, such as 32x48 or 32, got '0x3'"),
        (
            ["--flex-autotune", "--device", "cpu"],
            "argument --flex-autotune: inductor has no tuner for FlexAttention on a CPU",
        ),
        (["--grid", "4x4x4"], "argument --grid: expected ROWSxCOLUMNS"),
        (["--grid", "50000"], "argument --grid, --text-len or --mask: text_len + rows * columns must be below 2**31"),
        (["--text-len", "-1"], "argument --text-len: expected an integer of at least 0, got '-1'"),
        (["--heads", "two"], "argument --heads: expected an integer of at least 1, got 'two'"),
        (["--mask", "diagonal"], "argument --mask: expected row, axial_row, column, causal or conv"),
        (["--mask", "conv:4"], "kernel_size must be odd, got 4"),
        (["--mask", "row:3"], "got 'row:3'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--pass", "backward"], "argument --pass: invalid choice: 'backward'"),
        (["--impl", "fast"], "argument --impl: invalid choice: 'fast'"),
        (
            ["--impl", "cuda", "--device", "cpu"],
            "argument --impl: impl must be one of auto, reference, cpu, triton, got",
        ),
        (["--impl", "triton", "--device", "cpu"], "argument --impl: impl='triton' cannot serve this call: "),
        (["--seconds", "0"], "argument --seconds: expected a positive number of seconds, got '0'"),
        (["--json", "no/such/folder/a.json"], "argument --json: expected a writable file in an existing folder"),
        (["--json", "/proc/a.json"], "argument --json: expected a writable file in an existing folder"),
        (["--plot", "/proc/a.png"], "argument --plot: expected a writable file in an existing folder"),
        (["--json", "a.txt"], "argument --json: expected a file name ending in .json, got 'a.txt'"),
        (["--plot", "a.jpeg"], "argument --plot: expected a file name ending in .png, got 'a.jpeg'"),
    ],
)
def test_a_bad_flag_is_named(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        attn_bench.parse(flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("impl", ["triton", "cuda"])
@pytest.mark.parametrize("name", ["codebook_bench", "generate_bench", "train_bench"])
def test_what_cannot_serve_is_refused_before_peers_are_measured(name, capsys, impl, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).parse(["--impl", impl])
    assert stop.value.code == 2 and "argument --impl: impl" in capsys.readouterr().err


@pytest.fixture
def tuner(monkeypatch):
    """benchmarks/tune_attention.py where a GPU seems to be there, without its work on one."""
    pytest.importorskip("triton")
    import tune_attention

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune_attention, "compile_all", lambda jobs, args: {})
    monkeypatch.setattr(tune_attention, "describe_run", lambda name, argv: {"benchmark": name})
    monkeypatch.setattr(tune_attention, "Attention", lambda *_: None)
    return tune_attention


def test_where_the_tuners_results_go_is_asked_first(tuner, capsys, monkeypatch):
    monkeypatch.setattr(tuner, "compile_all", lambda jobs, args: pytest.fail("it has begun"))
    with pytest.raises(SystemExit) as stop:
        tuner.main(["--json", "no/such/folder/a.json"])
    assert stop.value.code == 2
    assert "argument --json: expected a writable file in an existing folder" in capsys.readouterr().err


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_tuner_keeps_what_it_has_measured(tuner, tmp_path, monkeypatch, capsys, interrupted):
    measured = []

    def measure(attention, mask, kernel, jobs, failures):
        if interrupted and len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(kernel)
        return [{"kernel": kernel}]

    monkeypatch.setattr(tuner, "measure", measure)
    flags = ["--mask", "row", "--grid", "4", "--text-len", "8", "--json", str(tmp_path / "tiles.json")]
    assert tuner.main(flags) == (130 if interrupted else 0)
    report = json.loads((tmp_path / "tiles.json").read_text())
    assert report["complete"] is not interrupted
    assert [row["kernel"] for row in report["results"]] == measured and len(measured) == (2 if interrupted else 3)
    assert ("interrupted: 2 of" in capsys.readouterr().err) == interrupted


def test_a_picture_that_cannot_be_written_is_refused(capsys):
    import mask_picture

    with pytest.raises(SystemExit) as stop:
        mask_picture.main(["/proc/a.png"])
    assert stop.value.code == 2
    assert "expected a writable file in an existing folder, got '/proc/a.png'" in capsys.readouterr().err


def test_help_shows_the_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        attn_bench.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for value in ("32", "256", "16", "row, column, conv:11", "auto"):
        assert f"(default: {value})" in text
    assert "default: None" not in text and "default: False" not in text


def test_the_default_cases_are_the_papers():
    args = attn_bench.parse(["--device", "cpu"])
    assert {case.shape for case in args.cases} == {(1, 16, 1280, 64)}
    kinds = {(case.mask.rule, case.dtype, case.pass_) for case in args.cases}
    masks = ("row", "column", "conv_flat")
    assert kinds >= {(mask, dtype, "forward") for mask in masks for dtype in ("float32", "bfloat16")}
    assert kinds >= {(mask, "float32", "forward+backward") for mask in ("row", "column")}


def test_an_inexact_result_fails(monkeypatch, capsys):
    """The verdict has teeth: an output that is off by a little more than rounding is refused, NaN too."""
    real = attn_bench.build_eager
    flags = [*TINY, "--mask", "row", "--dtype", "float32", "--pass", "forward", "--device", "cpu"]

    def build_flex(*_, **__):
        raise attn_bench.NotRun("left out of this test")

    monkeypatch.setattr(attn_bench, "build_flex", build_flex)
    monkeypatch.setattr(harness, "measure_memory", every_memory_is_zero)
    for offset, code in ((0.0, 0), (1e-5, 1), (math.nan, 1)):

        def build_ours(case, device, *, impl, offset=offset):
            return lambda *qkv: real(case, device)(*qkv) + offset

        monkeypatch.setattr(attn_bench, "build_ours", build_ours)
        assert attn_bench.main(flags) == code
        printed = capsys.readouterr()
        assert ("TOO INEXACT" in printed.out) == bool(code)
        assert ("too inexact: row, forward" in printed.err) == bool(code)
        assert "FlexAttention, block 128: not run (left out of this test)" in printed.out


def test_the_oracle_is_the_mask():
    """Against torch's own attention in float64, on all heads and, with little to spend, on the first and the last."""
    mask = attn_bench.conv_mask(5, (4, 6), 3)
    case = attn_bench.Case(mask, "float32", attn_bench.FORWARD_BACKWARD, 2, 3, 8)
    inputs = attn_bench.make_inputs(case, "cpu")
    qkv = [x.detach().double().requires_grad_() for x in inputs[:3]]
    out = torch.nn.functional.scaled_dot_product_attention(*qkv, attn_mask=mask.to_dense())
    exact = (out.detach(), *torch.autograd.grad(out, qkv, inputs[3].double()))
    for pairs, block, heads in ((1 << 26, 1 << 25, [0, 1, 2, 3, 4, 5]), (2 * mask.seq_len**2, 64, [0, 5])):
        attn_bench.ORACLE_PAIRS, before = pairs, attn_bench.ORACLE_PAIRS
        attn_bench.BLOCK_PAIRS, block_before = block, attn_bench.BLOCK_PAIRS
        try:
            oracle = attn_bench.Oracle(case, inputs)
            assert oracle.heads == heads
            errors = oracle.errors(exact)
        finally:
            attn_bench.ORACLE_PAIRS, attn_bench.BLOCK_PAIRS = before, block_before
        assert exactness.worst(errors, "max_abs") < 1e-13
        off = [x + 1e-3 * (x == x[-1, -1, -1, -1]) for x in exact]
        assert all(e["max_abs"] == pytest.approx(1e-3) for e in oracle.errors(off).values())


def test_an_error_of_most_elements_is_beyond_the_limits():
    """A few rows that see little, and so err most, must not be all that is judged."""
    exact = torch.randn(100, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact[0] *= 8
    allowed = exactness.limits(exactness.compare(["out"], [exact.bfloat16()], [exact]), torch.finfo(torch.bfloat16).eps)
    smaller = exact.clone()
    smaller[1:] *= 0.95
    for out, judged in ((exact.bfloat16(), set()), (smaller.bfloat16(), {"out"}), (exact * torch.nan, {"out"})):
        assert exactness.beyond(exactness.compare(["out"], [out], [exact]), allowed).keys() == judged
    assert exactness.compare(["out"], [smaller], [exact])["out"]["max_abs"] < allowed["out"]["max_abs"]


def test_an_error_over_eagers_is_that_of_the_worst_tensor():
    """No tensor hides behind one of larger numbers, nor one that is 0 throughout decides."""

    def errors(**sizes):
        return {name: {"max_abs": error, "largest": largest} for name, (error, largest) in sizes.items()}

    ours = errors(out=(3e-6, 1.0), grad_value=(1e-5, 9.0), grad_key=(1e-9, 0.0))
    eager = errors(out=(2e-6, 1.0), grad_value=(2e-5, 9.0), grad_key=(0.0, 0.0))
    entries = {"dalle_fast": {"error": ours}, "eager": {"error": eager}}
    assert attn_bench.error_over_eager({}, entries) == "1.50"
    assert reporting.error_over(ours, eager, least=1e-5) == "0.30"
    assert reporting.error_over(errors(out=(None, 1.0)), errors(out=(1e-6, 1.0))) == "nan"  # as a results file has it
    assert attn_bench.error_over_eager({}, entries | {"eager": {}}) == "-"


def test_a_plot_is_drawn_once_more(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="plots are matplotlib's")
    results, picture = FOLDER / "results", tmp_path / "a.png"
    for name in ("codebook_h200", "generate_cpu"):
        assert redraw.main([str(results / f"{name}.json"), str(picture)]) == 0
        assert picture.read_bytes().startswith(b"\x89PNG")
        picture.unlink()
    with pytest.raises(SystemExit):
        redraw.main([str(results / "verify.json"), str(picture)])
    assert "is not a results file of a benchmark with a plot" in capsys.readouterr().err


def test_memory_is_what_a_call_takes():
    found = measuring.isolated(take_memory, {size: (size,) for size in (0, 8, 40)}, workers=2)
    if any(isinstance(extra, measuring.NotRun) for extra in found.values()):
        pytest.skip(f"this system cannot say: {found[0]}")
    for size, extra in found.items():
        assert extra / measuring.MIB == pytest.approx(size, abs=1.5)


def take_memory(mebibytes):
    def call(scratch):
        scratch = torch.ones(scratch, dtype=torch.uint8)
        return torch.ones(16 << 20, dtype=torch.uint8), len(scratch)

    call(1)  # loads code
    return measuring.cpu_extra_bytes(lambda: call(mebibytes << 20))


def test_processes_have_the_compiler_and_have_not_run_it():
    """A name that is no longer there would be left out in silence, and each process import it anew."""
    missing, threads = measuring.isolated(what_a_process_has, {"one": (measuring.PRELOADED,)}, workers=1)["one"]
    assert missing == [] and threads == 1


def what_a_process_has(names):
    tasks = Path("/proc/self/task")
    return [name for name in names if name not in sys.modules], len(list(tasks.iterdir())) if tasks.exists() else 1


def test_a_process_that_dies_is_reported():
    found = measuring.isolated(die, {"killed": ("kill",), "raises": ("raise",), "fine": ("",)}, workers=2)
    assert isinstance(found["killed"], measuring.Died) and "-9" in str(found["killed"])
    assert isinstance(found["raises"], measuring.NotRun) and "ValueError: no" in str(found["raises"])
    assert found["fine"] == "lives"


def die(how):
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raise":
        raise ValueError("no")
    return "lives"


def test_timing_takes_turns():
    calls = []
    timings = measuring.time_interleaved(
        {"slow": lambda: (calls.append("slow"), time.sleep(0.01)), "fast": lambda: calls.append("fast")},
        device="cpu", seconds=1e-3, min_rounds=5,
    )  # fmt: skip
    assert all(sorted(calls[n : n + 2]) == ["fast", "slow"] for n in range(0, 10, 2)) and len(calls) == 10
    assert timings["slow"].median >= 0.01 > timings["fast"].median and timings["fast"].repetitions == 5


def test_what_the_host_takes_stands_beside_a_gpus_time(monkeypatch):
    monkeypatch.setattr(measuring, "_cuda_timer", lambda: lambda call: (call(), 7e-3))
    timings = measuring.time_interleaved({"dalle_fast": lambda: 2e-3}, device="cuda", seconds=1e-3, min_rounds=3)
    entry = {"name": "dalle_fast", "peer": "dalle_fast", "status": "ok", "exact": True, "extra_bytes": 0, "error": {}}
    result = harness.finish_case({"name": "a case"}, {"dalle_fast": entry}, (), timings)
    header, (row,) = reporting.summary_rows({}, [result])
    assert dict(zip(header, row, strict=True)) == {
        "case": "a case", "ours, ms": "2.00", "host, ms": "7.00", "extra MiB": "0.00"
    }  # fmt: skip
    entry["error"] = {"out": {"max_abs": 1.0, "rms_relative": 1.0}}
    monkeypatch.setattr(attn_bench, "case_title", lambda result: result["name"])
    text = reporting.case_text(attn_bench, result)
    assert "host ms" in text and "7.000" in text
    other = {"name": "SDPA, fused", "peer": "SDPA", "median_s": 6e-3, "host_s": 1e-3}
    result = {
        "contenders": [entry, other, {**other, "median_s": 1e-3, "host_s": 14e-3}],
        "ratios": {"SDPA": {"ratio": 3.0}},
    }
    assert reporting.ratio_cell(result, "SDPA") == "3.00x (0.86x)"  # 6 of 7
    del entry["host_s"]
    assert reporting.ratio_cell(result, "SDPA") == "3.00x"
    result = harness.finish_case({"name": "a case"}, {"dalle_fast": entry}, (), timings)
    del entry["host_s"]
    assert reporting.summary_rows({}, [result])[0] == ["case", "ours, ms", "extra MiB"]


@pytest.mark.parametrize(
    ("where", "end"),  # an oracle's want of memory is caught nowhere
    [("a case", KeyboardInterrupt), ("a case", MemoryError), ("a write", KeyboardInterrupt)],
)
def test_what_ends_a_run_leaves_what_was_measured(monkeypatch, capsys, tmp_path, where, end):
    results, writes = [], []

    def write(path, report):
        writes.append(path)
        if where == "a write" and len(writes) == 1:
            raise end
        write_json(path, report)

    def measure(benchmark, case, *_):
        if len(results) == 1:
            raise end
        results.append(case)
        entry = {"name": "eager", "peer": "eager", "status": "ok", "ratio": 2.0, "median_s": 2.0}
        entry |= {
            "q1_s": 2.0,
            "q3_s": 2.0,
            "repetitions": 3,
            "error": {"out": {"max_abs": 1.0, "rms_relative": 1.0, "largest": 1.0}},
            "extra_bytes": 0,
        }
        ours = entry | {"name": "dalle_fast", "peer": "dalle_fast", "median_s": 1.0, "ratio": 1.0, "exact": True}
        ratios = {"eager": {"ratio": 2.0, "contender": "eager"}}
        return {"name": case.name, "complete": True, "pairs_of_causal": 0.5, "heads_checked": "1 of 1",
                "contenders": [ours, entry], "ratios": ratios}  # fmt: skip

    monkeypatch.setattr(harness, "measure_case", measure)
    monkeypatch.setattr(harness, "write_json", write)
    path = tmp_path / "r.json"
    argv = [*TINY, "--mask", "row", "--mask", "column", "--json", str(path), "--device", "cpu"]
    if end is KeyboardInterrupt:
        assert attn_bench.main(argv) == 130
        assert "vs eager" in (out := capsys.readouterr().out) and "2.00x" in out
    else:
        with pytest.raises(end):
            attn_bench.main(argv)
    report = json.loads(path.read_text())
    assert report["complete"] is False and len(report["cases"]) == 1


def test_json_is_whole_or_absent(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": math.nan, "y": [1.5, math.inf]})
    assert json.loads(path.read_text()) == {"x": None, "y": [1.5, None]}
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert json.loads(path.read_text())["y"] == [1.5, None] and list(tmp_path.iterdir()) == [path]


def test_a_results_file_shows_no_folder(monkeypatch, tmp_path):
    build = {"version": "0.1.0", "cuda": None, "why_no_cuda": f"{tmp_path}/nvcc does not work here: no g++"}
    monkeypatch.setattr(provenance, "_native", lambda function: build if function == "build_info" else None)
    monkeypatch.setenv("DALLE_FAST_EMOJI_FONT", f"{tmp_path}/NotoColorEmoji.ttf")
    monkeypatch.setenv("DALLE_FAST_ISA", "avx2")
    head = reporting.describe_run("a benchmark", ["--json", f"{tmp_path}/a.json", f"--plot={tmp_path}/a.png"])
    assert str(tmp_path) not in json.dumps(head)
    assert {"DALLE_FAST_EMOJI_FONT": "NotoColorEmoji.ttf", "DALLE_FAST_ISA": "avx2"}.items() <= head[
        "environment"
    ].items()
    assert head["versions"]["dalle_fast_build"] == {"version": "0.1.0", "cuda": None}
