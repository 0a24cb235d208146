"""Importing the package is cheap: no Triton, no matplotlib, no CUDA, and well under a second beyond torch's own import."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import dalle_fast

IMPORT_ALL = "import dalle_fast, dalle_fast.masks, dalle_fast.nn, dalle_fast.nn.functional"
REPORT = """
import json, sys, time
import torch
started = time.perf_counter()
{statement}
seconds = time.perf_counter() - started
unwanted = [name for name in ("triton", "matplotlib", "torch._inductor", "torch._dynamo") if name in sys.modules]
print(json.dumps({{"seconds": seconds, "unwanted": unwanted, "cuda": torch.cuda.is_initialized()}}))
"""


def fresh_python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout


def report_of(statement: str) -> dict:
    return json.loads(fresh_python(REPORT.format(statement=statement)))


def test_import_loads_no_accelerator_and_takes_under_a_second():
    reports = []
    while len(reports) < 5 and not any(report["seconds"] < 1 for report in reports):  # a busy machine takes longer
        reports.append(report_of(IMPORT_ALL))
    assert reports[0]["unwanted"] == []
    assert not reports[0]["cuda"]
    assert min(report["seconds"] for report in reports) < 1, reports


def test_the_report_sees_what_it_looks_for():
    report = report_of("import torch._dynamo; time.sleep(0.2)")
    assert "torch._dynamo" in report["unwanted"]
    assert report["seconds"] >= 0.2


def test_the_package_itself_and_its_masks_do_not_need_torch():
    code = "import sys, dalle_fast.masks as m; m.row_mask(4, (2, 3)).seq_len; print('torch' in sys.modules)"
    assert fresh_python(code).strip() == "False"


def test_the_data_package_itself_and_its_scenes_do_not_need_torch():
    code = (
        "import sys, dalle_fast.data as data; heavy = ['torch', 'PIL', 'tokenizers', 'webdataset', 'numpy']; "
        "before = [name for name in heavy if name in sys.modules]; "
        "data.open_source('shapes', image_size=32)[0]; print(before, [name for name in heavy if name in sys.modules])"
    )
    assert fresh_python(code).strip() == "[] ['numpy']"


def test_parts_load_when_first_used():
    code = (
        "import sys, dalle_fast; before = 'dalle_fast.nn' in sys.modules; dalle_fast.nn.functional; dalle_fast.masks; "
        "print(before, 'dalle_fast.nn' in sys.modules, set(dir(dalle_fast)) >= {'nn', 'masks', '__version__'})"
    )
    assert fresh_python(code).split() == ["False", "True", "True"]


PARTS = ("checkpoint", "data", "masks", "nn", "ops", "sampling", "training")


def test_every_part_that_users_import_is_an_attribute():
    code = (
        "import os, sys, torch, dalle_fast\n"  # torch, which most of them import, once
        f"for name in {PARTS}:\n"
        "    if os.fork() == 0:\n"
        "        before = f'dalle_fast.{name}' in sys.modules\n"
        "        print(before, getattr(dalle_fast, name).__name__, flush=True)\n"
        "        os._exit(0)\n"
        "    os.wait()\n"
    )
    assert fresh_python(code).split() == [word for name in PARTS for word in ("False", f"dalle_fast.{name}")]
    assert set(PARTS) <= set(dir(dalle_fast))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'dalle_fast' has no attribute 'transformer'"):
        _ = dalle_fast.transformer


@pytest.mark.parametrize("name", ["data", "training"])
def test_names_that_load_when_first_used_are_seen_before(name):
    """By dir, and by type checkers, which read the imports that never run."""
    package = importlib.import_module(f"dalle_fast.{name}")
    assert set(package.__all__) <= set(dir(package))
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    (seen,) = (node for node in tree.body if isinstance(node, ast.If) and node.test.id == "TYPE_CHECKING")
    found = {alias.asname: line.module for line in seen.body for alias in line.names}
    assert found == {x: f"{package.__name__}.{home}" for x, home in package._HOMES.items()}
