"""The command `dalle-fast`, also as `python -m dalle_fast`."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import dalle_fast
from dalle_fast import _extension, cli, info
from dalle_fast.verify.figures import FIGURES


def run_module(*arguments, **environment):
    command = [sys.executable, "-m", "dalle_fast", *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, env=env)


def test_info_as_json_tells_what_torch_and_the_native_module_tell(capsys):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["dalle_fast"] == dalle_fast.__version__
    assert facts["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert facts["threads"] == torch.get_num_threads()
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert facts["attention"]["cpu"]["reference"] == []
    native = _extension.native()
    assert facts["native"]["available"] == native.instruction_sets()
    assert facts["native"]["active"] == native.instruction_set()
    assert (facts["native"]["cuda"] is None) == bool(facts["native"]["why_no_cuda"])


def test_info_as_text_has_a_line_for_each_fact(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for name in ("dalle_fast", "torch", "native module", "instruction sets", "CUDA kernels", "GPU", "attention, cpu"):
        assert any(line.startswith(name + " ") for line in text.splitlines()), name
    assert f"{_extension.native().instruction_set()} in use" in text


def test_info_says_why_the_native_module_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(_extension, "why_missing", lambda: "it was never built")
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert any(line.split("  ")[0] == "native module" and "it was never built" in line for line in text.splitlines())
    assert " cpu: it was never built" in text


def test_info_says_why_there_is_no_cuda():
    facts = {**info.collect(), "native": {"compiler": "x", "openmp": False, "available": ["portable"]}}
    facts["native"] |= {"active": "portable", "isa_error": None, "cuda": None, "why_no_cuda": "no nvcc was found"}
    text = info.as_text(facts)
    assert "none, built for CPUs only: no nvcc was found" in text
    assert "without OpenMP" in text


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (0, "built for CUDA 13.0, and the machine's driver is missing"),
        (12080, "built for CUDA 13.0, and the machine's driver is of CUDA 12.8: a newer driver will do, or an nvcc of"),
        (13000, None),
        (14010, None),
    ],
)
def test_info_compares_the_driver_with_the_modules_cuda(monkeypatch, driver, reason):
    """A driver serves runtimes of its own major version and of older ones."""
    built = {"version": dalle_fast.__version__, "compiler": "x", "openmp": True, "cuda": "13.0", "why_no_cuda": None}
    built["cuda_architectures"] = "sm_80"
    names = {"build_info": lambda: built, "cuda_versions": lambda: (driver, 13000)}
    names |= {"instruction_sets": lambda: ["portable"], "instruction_set": lambda: "portable"}
    monkeypatch.setattr(_extension, "native", lambda: SimpleNamespace(**names))
    monkeypatch.setattr(_extension, "why_missing", lambda: None)
    monkeypatch.setattr(_extension, "why_no_cuda", _extension.why_no_cuda.__wrapped__)
    native = info._native()
    if reason is None:
        assert native["why_cuda_cannot_run"] is None
    else:
        assert reason in native["why_cuda_cannot_run"]
    facts = {**info.collect(), "native": native}
    assert ("they cannot run here: the native module was " in info.as_text(facts)) == (reason is not None)


def test_a_wrong_instruction_set_is_reported():
    run = run_module("info", DALLE_FAST_ISA="abacus")
    assert run.returncode == 0, run.stderr
    assert "DALLE_FAST_ISA must be" in run.stdout and "portable" in run.stdout and "'abacus'" in run.stdout
    assert " cpu: DALLE_FAST_ISA must be" in run.stdout


def test_the_instruction_set_can_be_chosen():
    run = run_module("info", "--json", DALLE_FAST_ISA="portable")
    assert json.loads(run.stdout)["native"]["active"] == "portable"


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "info"])  # which has none
def test_help_shows_defaults(name, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([name, "--help"])
    assert exit_.value.code == 0
    assert "(default:" in capsys.readouterr().out


def test_the_figures_of_verify_are_a_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main(["verify", "--help"])
    lines = capsys.readouterr().out.partition("\nfigures:\n")[2].splitlines()
    assert {line.split()[0] for line in lines if line[2] != " "} == {*FIGURES, "gpu"}
    assert max(map(len, lines)) < 80 and all(line[:12].isspace() for line in lines if line[2] == " ")


def test_help_and_version_do_not_import_torch():
    code = "import sys; from dalle_fast import cli; cli.make_parser(); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=300)
    assert run.stdout.strip() == "False", run.stderr
    assert run_module("--version").stdout.strip() == f"dalle-fast {dalle_fast.__version__}"


def test_a_command_is_required():
    run = run_module()
    assert run.returncode == 2
    assert "COMMAND" in run.stderr


def test_ctrl_c_ends_a_command_with_one_line(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    for module, name in ((info, "collect"), (cli, "make_parser")):
        monkeypatch.setattr(module, name, interrupt)
        assert cli.main(["info"]) == 130
        assert capsys.readouterr().err == "dalle-fast: interrupted\n"
        monkeypatch.undo()


@pytest.mark.parametrize("closed", ["1", "2"])
def test_a_stream_that_was_closed_is_no_error(closed):
    """As by `dalle-fast info >&-`. Errors keep their exit status, and do not go to the other stream."""
    for arguments, status in ((["info"], 0), (["train-dvae", "--data", "shapes", "--out", "/dev/null"], 2)):
        command = ["sh", "-c", f'exec "$0" -m dalle_fast "$@" {closed}>&-', sys.executable, *arguments]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
        assert done.returncode == status and "Traceback" not in done.stderr and "error" not in done.stdout


def test_a_reader_that_stops_reading_is_no_error_message():
    """As `dalle-fast info | head -1`: the pipe is closed before anything is written to it."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        command = [sys.executable, "-m", "dalle_fast", "info"]
        done = subprocess.run(command, check=False, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr == ""
