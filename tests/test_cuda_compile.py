"""The CUDA kernels of the module, for every GPU that it has code for, keep everything in registers.

Nothing here ran on a GPU. Shown with -s, and after the run when it fails: registers and shared memory of every kernel.
"""

import pathlib
import re
import shutil
import subprocess

import pytest

from dalle_fast import _extension

SOURCES = sorted((pathlib.Path(__file__).parent.parent / "csrc/cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


@pytest.fixture(scope="module")
def module():
    if reason := _extension.native().build_info()["why_no_cuda"]:
        pytest.skip(f"the module was built without CUDA: {reason}")
    return _extension.native().__file__


@pytest.fixture(scope="module")
def cuobjdump():
    """Of CUDA, or the one that comes with Triton."""
    path = shutil.which("cuobjdump")
    if path is None:
        triton = pytest.importorskip("triton", reason="cuobjdump is not on PATH, and comes with Triton")
        path = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        if not path.exists():
            pytest.skip("cuobjdump is neither on PATH nor where Triton keeps its own")
    return path


def kernels_in(report):
    """{architecture: {mangled name: {"REG", "STACK", "SHARED", "LOCAL"}}} of `cuobjdump -res-usage`."""
    kernels = {}
    for part in re.split(r"^arch = ", report, flags=re.MULTILINE)[1:]:
        of_part = kernels.setdefault(part.split(None, 1)[0], {})
        for name, numbers in re.findall(r"^ Function (\S+):\n\s*(.*)$", part, re.MULTILINE):
            of_part[name] = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", numbers)}
    return kernels


def readable(name):
    """A kernel's name and template arguments, out of its mangled name."""
    found = re.search(r"\d+([a-z_]+_kernel)(?:I(.*?)E?E[vS])?", name)
    if not found:
        return name
    arguments = found[2] or ""
    named = [text for mark, text in {"__nv_bfloat16": "bfloat16", "__half": "float16"}.items() if mark in arguments]
    flags = ("packed", "noisy" if found[1] == "sample_kernel" else "kept")
    values = re.findall(r"Lb([01])", arguments)
    named += [text if value == "1" else f"not {text}" for text, value in zip(flags, values, strict=False)]
    if arguments.startswith("f"):
        named.insert(0, "float32")
    return f"{found[1]} {', '.join(named)}".strip()


def test_nothing_spills(module, cuobjdump):
    run = subprocess.run([cuobjdump, "-res-usage", module], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    kernels = kernels_in(run.stdout)
    assert kernels.keys() >= set(ARCHITECTURES)
    names = [
        name
        for source in SOURCES
        for name in re.findall(r"__global__ void (?:__\w+__\(.*\) )?(\w+)", source.read_text())
    ]
    wrong = []
    for arch, found in kernels.items():
        assert found.keys() == kernels["sm_80"].keys() and all(any(name in k for k in found) for name in names)
        for name, numbers in sorted(found.items(), key=lambda item: readable(item[0])):
            print(f"{arch} {readable(name):42} {numbers['REG']:3} registers {numbers['SHARED']:5} bytes shared")
            if numbers["STACK"] or numbers["LOCAL"]:
                wrong.append(f"{arch} {readable(name)}: {numbers['STACK']} bytes of stack, {numbers['LOCAL']} local")
    assert not wrong


def test_the_report_is_read_right():
    report = """
Fatbin elf code:
================
arch = sm_80
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _Z3foov:
  REG:8 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90

Resource usage:
 Function _Z3barIfLb1EEvT_:
  REG:255 STACK:16 SHARED:192 LOCAL:0 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    assert kernels_in(report) == {
        "sm_80": {"_Z3foov": {"REG": 8, "STACK": 0, "SHARED": 0, "LOCAL": 0}},
        "sm_90": {"_Z3barIfLb1EEvT_": {"REG": 255, "STACK": 16, "SHARED": 192, "LOCAL": 0}},
    }
