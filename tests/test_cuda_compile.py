"""The CUDA sources compile for NVIDIA GPUs, without one, into code that keeps everything in registers.

Nothing here ran on a GPU. Shown with -s, and after the run when it fails: registers and shared memory of every kernel.
"""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


@pytest.fixture(scope="module")
def build():
    """The build backend, which knows where nvcc is."""
    pytest.importorskip("setuptools", reason="the build backend is setuptools'")
    sys.path.insert(0, str(ROOT / "build_backend"))
    try:
        import dalle_fast_build
    finally:
        sys.path.pop(0)
    return dalle_fast_build


@pytest.fixture(scope="module")
def nvcc(build):
    path, reason = build.find_nvcc()
    if path is None:
        pytest.skip(f"no nvcc to compile with: {reason}")
    return path


def kernels_in(report):
    """{mangled name: {"registers", "shared", "stack", "spills"}} of what `ptxas -v` prints."""
    kernels = {}
    for part in report.split("Compiling entry function '")[1:]:
        name = part.split("'", 1)[0]
        numbers = {
            "registers": re.search(r"Used (\d+) registers", part),
            "shared": re.search(r"(\d+) bytes smem", part),  # what the launch adds is not in it
            "stack": re.search(r"(\d+) bytes stack frame", part),
            "spills": re.search(r"(\d+) bytes spill stores", part),
        }
        assert all(numbers[n] for n in ("registers", "stack", "spills")), part
        kernels[name] = {n: int(match[1]) if match else 0 for n, match in numbers.items()}
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
    named += [text for mark, text in {"6Sample": "sample", "4Loss": "loss"}.items() if mark in name]
    if arguments.startswith("f"):
        named.insert(0, "float32")
    return f"{found[1]} {', '.join(named)}".strip()


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_compiles_without_spills(build, nvcc, tmp_path, source, arch):
    env = build.nvcc_environment(nvcc)
    command = [nvcc, "-std=c++17", "-O3", f"-arch={arch}", "-Xptxas", "-v", "-cubin", "-o", tmp_path / "out.cubin"]
    if env.get("CUDAHOSTCXX"):
        command += ["-ccbin", env["CUDAHOSTCXX"]]
    run = subprocess.run([*command, source], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    kernels = kernels_in(run.stdout + run.stderr)
    assert len(kernels) >= source.read_text().count("__global__ void")
    wrong = []
    for name, numbers in sorted(kernels.items(), key=lambda item: readable(item[0])):
        print(f"{arch} {readable(name):42} {numbers['registers']:3} registers {numbers['shared']:5} bytes shared")
        if numbers["stack"] or numbers["spills"]:
            wrong.append(f"{readable(name)}: {numbers['stack']} bytes of stack, {numbers['spills']} spilled")
    assert not wrong


def test_the_report_is_read_right():
    report = """
ptxas info    : Compiling entry function '_Z3barIfLb1EEvT_' for 'sm_90'
ptxas info    : Function properties for _Z3barIfLb1EEvT_
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 192 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z3foov' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers
"""
    assert kernels_in(report) == {
        "_Z3barIfLb1EEvT_": {"registers": 255, "shared": 192, "stack": 16, "spills": 8},
        "_Z3foov": {"registers": 8, "shared": 0, "stack": 0, "spills": 0},
    }
