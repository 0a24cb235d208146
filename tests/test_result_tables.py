"""`benchmarks/result_tables.py` puts a results file between a document's markers and touches nothing else."""

import copy
import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BEFORE = "# Title\n\ntext `<!-- attn_bench:begin -->` in a sentence\n<!-- attn_bench:begin -->\n"
AFTER = "<!-- attn_bench:end -->\nthe rest\n\n"


def contender(name, peer, median, error, **more):
    errors = {"out": {"max_abs": error, "rms_relative": error, "largest": 1.0}}
    timing = {"median_s": median, "q1_s": median, "q3_s": median, "repetitions": 7, "ratio": median / 0.002}
    return {"name": name, "peer": peer, "status": "ok", "error": errors, "extra_bytes": 3 << 20, **timing, **more}


def refusal(name, peer, reason):
    return {"name": name, "peer": peer, "status": "not run", "reason": reason}


REPORT = {
    "benchmark": "attention",
    "date": "2026-02-03T04:05:06Z",
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "command": "python benchmarks/attn_bench.py",
    "machine": {"cpu": "A CPU", "cores": 2, "dalle_fast_isa": "avx512", "gpu": {"name": "A GPU"}},
    "versions": {"torch": "2.15.0", "python": "3.11.7"},
    "settings": {"device": "cpu", "threads": 2, "sizes": "text 256, grid 32x32"},
    "complete": True,
    "cases": [
        {
            "name": "row, forward, float32",
            "contenders": [
                {**contender("dalle_fast", "dalle_fast", 0.002, 1e-6), "exact": True},
                contender("SDPA causal", "SDPA causal", 0.006, 1e-6),
                contender("SDPA mask", "SDPA mask", 0.009, 1e-6),
                refusal("FlexAttention, block 64", "FlexAttention", "no compiler"),
                refusal("FlexAttention, block 128", "FlexAttention", "no compiler"),
                contender("eager", "eager", 0.02, 2e-6),
            ],
            "ratios": {
                "SDPA causal": {"ratio": 3.0, "contender": "SDPA causal"},
                "SDPA mask": {"ratio": 4.5, "contender": "SDPA mask"},
                "eager": {"ratio": 10.0, "contender": "eager"},
            },
        }
    ],
}


def codebook_contender(name, peer, median, error):
    entry = contender(name, peer, median, error)
    return entry | {"error": {"embedding": entry["error"]["out"]}}


CODEBOOK_REPORT = {
    **REPORT,
    "benchmark": "codebook",
    "settings": {"device": "cpu", "threads": 2, "sizes": "1024 rows, 8192 codes, embedding 128"},
    "cases": [
        {
            "name": "gumbel, forward, float32, Din 512",
            "op": "gumbel",
            "dtype": "float32",
            "contenders": [
                {**codebook_contender("dalle_fast", "dalle_fast", 0.002, 1e-6), "exact": True},
                {**codebook_contender("products alone", "products", 0.0016, 0), "error": {}},
                codebook_contender("eager", "eager", 0.008, 4e-6),
                codebook_contender("compiled", "compiled", 0.003, 2e-6),
            ],
            "ratios": {
                "eager": {"ratio": 4.0, "contender": "eager"},
                "compiled": {"ratio": 1.5, "contender": "compiled"},
            },
        },
        {
            "name": "sample, forward, float32, Din 512",
            "op": "sample",
            "dtype": "float32",
            "contenders": [
                {**contender("dalle_fast", "dalle_fast", 0.002, 0), "error": {"parity": {"z": 1.25}}, "exact": True},
                refusal("compiled", "compiled", "no compiler"),
            ],
            "ratios": {},
        },
    ],
}


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("result_tables")


@pytest.fixture
def files(tmp_path):
    document, results = tmp_path / "RESULTS.md", tmp_path / "cpu.json"
    document.write_text(BEFORE + "what was here\n| old |\n" + AFTER)
    results.write_text(json.dumps(REPORT))
    return document, results


def run(tool, document, results, *more):
    return tool.main([str(results), "--into", str(document), *more])


def refused(tool, capsys, *arguments):
    """What is said where the command ends with a usage error."""
    with pytest.raises(SystemExit) as ended:
        run(tool, *arguments)
    assert ended.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def cells(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_only_what_is_between_the_markers_is_replaced(tool, files):
    document, results = files
    assert run(tool, document, results) == 0
    text = document.read_text()
    assert text.startswith(BEFORE) and text.endswith(AFTER) and "what was here" not in text and "old" not in text
    assert run(tool, document, results) == 0
    assert document.read_text() == text  # writing again changes nothing


def test_the_table_says_what_was_measured(tool, files):
    document, results = files
    run(tool, document, results)
    text = document.read_text()
    for fact in ("2026-02-03", "commit 0123456789 ", "A CPU", "2 threads", "avx512", "torch 2.15.0", "grid 32x32"):
        assert fact in text
    assert "A GPU" not in text
    header, _, row = cells(text)
    shown = dict(zip(header, row))
    assert row[0] == "row, forward, float32"
    assert shown["ours, ms"] == "2.00"
    ratios = {name.split(" ", 1)[1]: value for name, value in shown.items() if name.startswith(("vs ", "against "))}
    assert ratios == {"SDPA causal": "3.00x", "SDPA mask": "4.50x", "FlexAttention": "-", "eager": "10.00x"}
    assert "0.50" in row and "3.00" in row  # the error over eager's, and MiB
    assert "Not run: FlexAttention, block 64 and FlexAttention, block 128: no compiler (1 of 1 cases)." in text
    assert "interrupted" not in text


def test_the_codebooks_table(tool, files):
    """Its markers have the name of the benchmark that wrote the file."""
    document, results = files
    results.write_text(json.dumps(CODEBOOK_REPORT))
    document.write_text(document.read_text() + "<!-- codebook_bench:begin -->\nold\n<!-- codebook_bench:end -->\n")
    assert run(tool, document, results) == 0
    text = document.read_text()
    assert "what was here" in text and "1024 rows" in text and "\nold\n" not in text
    header, _, gumbel, sample = cells(text)[-4:]
    shown = dict(zip(header, gumbel))
    assert (shown["ours, ms"], shown["/ products"], shown["error / eager's"]) == ("2.00", "1.25x", "0.25")
    assert (shown["vs eager"], shown["vs compiled"]) == ("4.00x", "1.50x")
    assert shown["vs fastest other"] == "1.50x (compiled)"
    shown = dict(zip(header, sample))
    assert shown["error / eager's"] == "z 1.2" and shown["vs eager"] == "-" and shown["/ products"] == "-"
    assert "Not run: compiled: no compiler (1 of 2 cases)." in text


def test_a_gpu_an_interruption_and_a_changed_tree_are_named(tool):
    report = copy.deepcopy(REPORT)
    report["settings"]["device"] = "cuda"
    report["complete"] = False
    report["commit"] += "+changes"
    text = tool.render(report)
    assert "A GPU" in text and "A CPU" not in text
    assert "interrupted" in text and "commit 0123456789+changes " in text


def test_two_tables_stand_in_one_file(tool, files):
    document, results = files
    document.write_text(document.read_text() + "<!-- gpu:begin -->\n<!-- gpu:end -->\n")
    assert run(tool, document, results, "--name", "gpu") == 0
    assert "what was here" in document.read_text()
    assert document.read_text().index("A CPU") > document.read_text().index("<!-- gpu:begin -->")


def test_check_writes_nothing(tool, files, capsys):
    document, results = files
    before = document.read_bytes()
    assert run(tool, document, results, "--check") == 1
    assert document.read_bytes() == before
    assert run(tool, document, results) == 0
    assert run(tool, document, results, "--check") == 0


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "No such file or directory"),
        ("{", "is not JSON"),
        ("[]", "is not a results file of attn_bench.py"),
        ("{}", "is not a results file of attn_bench.py"),
        ('{"benchmark": "training"}', "is not a results file of attn_bench.py or codebook_bench.py"),
        ('{"benchmark": "codebook"}', "holds no measured case"),
        ('{"benchmark": "attention", "cases": []}', "holds no measured case"),
        ('{"benchmark": "attention", "cases": [{}]}', "not as this version of attn_bench.py writes them"),
        ('{"benchmark": "codebook", "cases": [{}]}', "not as this version of codebook_bench.py writes them"),
    ],
)
def test_unusable_results_are_refused(tool, files, capsys, content, words):
    document, results = files
    before = document.read_bytes()
    results.unlink() if content is None else results.write_text(content)
    assert words in refused(tool, capsys, document, results)
    assert document.read_bytes() == before


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "No such file or directory"),
        ("nothing\n", "found the first on no line and the second on no line"),
        ("a\n<!-- attn_bench:begin -->\n", "found the first on line 2 and the second on no line"),
        ("<!-- attn_bench:end -->\n<!-- attn_bench:begin -->\n", "found the first on line 2 and the second on line 1"),
        (2 * (BEFORE + AFTER), "found the first on line 4, 11 and the second on line 5, 12"),
    ],
)
def test_a_file_without_markers_is_left_alone(tool, files, capsys, text, words):
    document, results = files
    document.unlink() if text is None else document.write_text(text)
    message = refused(tool, capsys, document, results)
    assert words in message
    assert text is None or ("<!-- attn_bench:begin -->" in message and document.read_text() == text)


def test_a_bad_marker_name_is_named(tool, files, capsys):
    message = refused(tool, capsys, *files, "--name", "a b")
    assert "argument --name: expected letters, digits, _ and -, got 'a b'" in message
