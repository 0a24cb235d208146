"""What README.md shows can be copied: each block of Python runs by itself, and each `dalle-fast` command is one."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dalle_fast import cli

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
SNIPPETS = [text for language, text in BLOCKS if language == "python"]


def commands():
    """Every call of dalle-fast in a block, and those in the text that are whole."""
    lines = "\n".join(text.replace("\\\n", " ") for language, text in BLOCKS if language == "sh").splitlines()
    lines += re.findall(r"`(dalle-fast [^`]+ --out [^`]+)`", README.read_text(encoding="utf-8").replace("\n", " "))
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("dalle-fast ")]


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_runs_by_itself(number, tmp_path):
    pytest.importorskip("matplotlib", reason="a snippet draws a mask")
    done = subprocess.run(
        [sys.executable, "-c", SNIPPETS[number]], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "row.png").exists() == ("plot(" in SNIPPETS[number])


def test_commands_are_commands():
    found = commands()
    assert {"train-dvae", "train-dalle", "generate", "reconstruct", "convert", "verify"} <= {line[0] for line in found}
    for line in found:
        cli.make_parser().parse_args(["x" if word == "..." else word for word in line])


def test_files_that_are_named_are_there():
    text = README.read_text(encoding="utf-8")
    names = set(re.findall(r"\((\w[\w/.]+\.(?:md|png))[)#]", text)) | set(
        re.findall(r"`(benchmarks/results/[\w.]+)`", text)
    )
    names |= {
        f"benchmarks/results/{name}" for name in re.findall(r"`([a-z]\w+\.json)`", text) if name != "evidence.json"
    }
    assert len(names) > 20 and [name for name in sorted(names) if not (README.parent / name).exists()] == []
