"""What the documents for users show can be copied: each block of Python in README.md runs by itself, those of TRAINING.md
together, and each `dalle-fast` command is one."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dalle_fast import cli

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "TRAINING.md", "CONTRIBUTING.md", "benchmarks/RESULTS.md", "benchmarks/NOTES.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
BLOCKS = {name: re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) for name, text in TEXTS.items()}
SNIPPETS = {name: [text for language, text in blocks if language == "python"] for name, blocks in BLOCKS.items()}
# Drawing stands before training, whose model it takes.
TOGETHER = "\n".join(reversed(SNIPPETS.pop("TRAINING.md")))
SNIPPETS = [*(snippet for of_document in SNIPPETS.values() for snippet in of_document), TOGETHER]


def commands():
    """Every call of dalle-fast in a block, and those in the text that are whole."""
    lines = "\n".join(
        text.replace("\\\n", " ") for blocks in BLOCKS.values() for language, text in blocks if language == "sh"
    ).splitlines()
    for text in TEXTS.values():
        lines += re.findall(r"`(dalle-fast [^`]+ --out [^`]+)`", text.replace("\n", " "))
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


def anchors(text):
    """What the headings of a document are called in links, as GitHub makes it."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", TEXTS[name]):
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), path
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), (path, anchor)


def test_results_that_are_named_are_there():
    text = TEXTS["README.md"] + TEXTS["benchmarks/RESULTS.md"]
    names = set(re.findall(r"`([a-z]\w+\.json)`", text))
    assert (
        len(names) > 15 and [name for name in sorted(names) if not (ROOT / "benchmarks/results" / name).exists()] == []
    )
