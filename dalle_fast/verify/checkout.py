"""Figures that need the sources: they run test files of this checkout, at full size or against a changed copy of it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from importlib.util import find_spec
from pathlib import Path

from dalle_fast.provenance import ROOT
from dalle_fast.verify.figures import NotRun

COPIED = ("build_backend", "benchmarks", "csrc", "dalle_fast", "tests", "CMakeLists.txt", "README.md", "pyproject.toml")


def sources() -> Path:
    """The checkout's folder; NotRun where the package was installed without its sources."""
    if not all((ROOT / name).exists() for name in COPIED):
        raise NotRun("it needs a checkout of the sources, and the package was installed without")
    return ROOT


def copy_of_sources() -> tempfile.TemporaryDirectory:
    """A folder with the sources and what was built from them, to be changed; removed when it is closed."""
    root, folder = sources(), tempfile.TemporaryDirectory(prefix="dalle_fast_verify_")
    for name in (*COPIED, "setup.py", "LICENSE"):
        source, target = root / name, Path(folder.name) / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target)
    return folder


def rebuild(folder: Path, **environment: str) -> None:
    """Build the native module of `folder` in place, for CPUs only; with the portable kernels alone, but for CMAKE_ARGS.

    Raises:
        RuntimeError: it does not build, with the end of what the compiler said.
        NotRun: there is nothing to build with.
    """
    missing = [name for name in ("setuptools", "pybind11") if find_spec(name) is None]
    missing += [name for name in ("cmake", "ninja") if find_spec(name) is None and shutil.which(name) is None]
    if missing:
        raise NotRun(f"the build needs {' and '.join(missing)} (pip install {' '.join(missing)})")
    if not os.environ.get("CXX") and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise NotRun("there is no C++ compiler")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    env = {**os.environ, "DALLE_FAST_CUDA": "0", "CMAKE_ARGS": "-DDALLE_FAST_INSTRUCTION_SETS=", **environment}
    built = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    if built.returncode:
        raise RuntimeError(f"the build failed: {(built.stdout + built.stderr)[-1500:]}")


def run_tests(*tests: str, folder: Path | None = None, keyword: str = "", **environment: str) -> dict[str, int]:
    """Run these test files (or ids) in `folder` up to the first failure; returns how many passed, failed and were skipped.

    With a failure also what the first one said and the failed test's id. A crash is a failure without an id.

    Raises:
        RuntimeError: pytest did not come to run tests.
        NotRun: there is no pytest; every test was skipped, with the first one's reason; pytest was killed from outside.
    """
    if find_spec("pytest") is None:
        raise NotRun("it needs pytest (pip install pytest)")
    folder = sources() if folder is None else folder
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-qsx", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
        command += ["-o", "junit_family=xunit1"]  # which names each test's file
        command += ["-k", keyword] if keyword else []
        # -m puts the folder first on the path; what pytest's own children import must come from there as well.
        env = {**os.environ, "PYTHONPATH": str(folder), **environment}
        ran = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
        if ran.returncode == -signal.SIGKILL:  # which no code of ours raises
            raise NotRun(f"pytest for {', '.join(tests)} was ended by SIGKILL, as the system does when memory is short")
        if ran.returncode < 0:
            died = f"pytest died of signal {-ran.returncode}"
            return {"passed": 0, "failed": 1, "skipped": 0, "first failure": died, "failed test": ""}
        if ran.returncode > 1 or not report.exists():
            said = ran.stdout + ran.stderr
            # What a sanitizer has to say, before it ends the process, is followed by a long stack.
            at = max(said.find("runtime error:"), said.find("ERROR: AddressSanitizer"))
            said = said[max(0, at - 200) : at + 800] if at >= 0 else said[-1000:]
            raise RuntimeError(f"pytest ended with {ran.returncode}: {said}")
        suite = xml.parse(report).getroot().find("testsuite")
    failed = int(suite.get("failures")) + int(suite.get("errors"))
    skipped = int(suite.get("skipped"))
    counts = {"passed": int(suite.get("tests")) - failed - skipped, "failed": failed, "skipped": skipped}
    if not counts["passed"] and not failed:
        reasons = [element.get("message") for element in suite.iter("skipped")]
        raise NotRun(f"every test was skipped: {reasons[0] if reasons else 'there is none'}")
    for test in suite.iter("testcase"):
        found = [element for element in test if element.tag in ("failure", "error")]
        if found:
            counts |= {"first failure": found[0].get("message", "")}
            counts |= {"failed test": f"{test.get('file')}::{test.get('name')}" if test.get("file") else ""}
            break
    return counts


def must_pass(*tests: str, **options) -> dict[str, int]:
    """`run_tests`, where a failure is one; returns the numbers to report."""
    counts = run_tests(*tests, **options)
    if counts["failed"]:
        raise AssertionError(f"{', '.join(tests)}: {counts['first failure'][:800]}")
    return {"tests passed": counts["passed"], "tests skipped": counts["skipped"]}
