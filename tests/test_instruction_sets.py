"""The CPU kernels of every instruction set, not only of the one that this CPU would choose.

A process keeps the instruction set that it begins with, so that each has one of its own, for the tests of all files
that are marked `every_instruction_set`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dalle_fast import _extension

MARK = "every_instruction_set"
# What is asked of one: of avx512 what names bfloat16. All else is compiled from the same lines for avx512_bf16, which
# every machine that gets here has, and to whose own instructions tests of any name may come.
WHICH = {"avx512": "bfloat16 and not reference"}
FILES = sorted(file for file in Path(__file__).parent.glob("test_*.py") if f"pytest.mark.{MARK}" in file.read_text())


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16", "avx512_amx"])
def test_the_kernels_of(isa):
    native = _extension.native()
    if isa not in native.instruction_sets():
        available = ", ".join(native.instruction_sets())
        pytest.skip(f"instruction set {isa} is not in this build or CPU, which has {available}")
    if isa == native.instruction_set():
        pytest.skip(f"{isa} is in use: the other tests run with it")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", MARK, "-k"]
    command += [WHICH.get(isa, "not reference")]
    command += [str(file) for file in FILES]
    environment = {**os.environ, "DALLE_FAST_ISA": isa}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "failed" not in done.stdout
