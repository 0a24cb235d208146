"""What the build promises: its native module loads anywhere, its instruction sets can be chosen, and it finds its CUDA
compiler or says why not."""

import functools
import json
import os
import pathlib
import platform
import shutil
import stat
import subprocess
import sys
import tarfile

import pytest

import dalle_fast
from dalle_fast import _extension, _sources

ROOT = pathlib.Path(__file__).parent.parent
native = _extension.native()
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16", "avx512_amx")


def python(code, **variables):
    """Run code in a fresh interpreter with these environment variables; None unsets one."""
    env = {name: value for name, value in {**os.environ, **variables}.items() if value is not None}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300, check=False
    )


def output(code, **variables):
    run = python(code, **variables)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


# -- the module ------------------------------------------------------------------------------------------------------


def test_build_info_says_what_was_built():
    info = native.build_info()
    assert info["version"] == dalle_fast.__version__
    assert info["compiler"] and isinstance(info["openmp"], bool)
    if info["cuda"] is None:
        assert info["why_no_cuda"] and info["cuda_architectures"] is None
    else:
        assert info["why_no_cuda"] is None and hasattr(native, "cuda_sample_chunks")
        assert info["cuda_architectures"].split() == ["sm_80", "sm_90", "sm_100", "compute_100"]


LOAD_ALONE = """
import importlib.machinery, importlib.util, json
loader = importlib.machinery.ExtensionFileLoader("dalle_fast._native", {path!r})
spec = importlib.util.spec_from_loader(loader.name, loader)
module = importlib.util.module_from_spec(spec)
loader.exec_module(module)
"""
LOAD_ALONE = LOAD_ALONE.format(path=native.__file__)
MAPS = """
layout = module.AttentionLayout((0, 2, 1, 2, 1, 1), 4)
print(json.dumps([line.split()[-1] for line in open("/proc/self/maps") if ".so" in line]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_the_module_needs_neither_torch_nor_a_cuda_driver():
    names = {pathlib.Path(path).name for path in output(LOAD_ALONE + MAPS)}
    assert pathlib.Path(native.__file__).name in names
    assert not [name for name in names if name.startswith(("libtorch", "libc10", "libcuda"))]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.skipif("Clang" in native.build_info()["compiler"], reason="Clang's OpenMP is its own, torch's is GCC's")
def test_the_module_shares_the_openmp_runtime_of_torch():
    code = (
        "import json; from dalle_fast import _extension; _extension.native(); "
        "print(json.dumps(sorted({line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line and '.so' in line})))"
    )
    assert len(output(code)) == 1


def test_loading_it_leaves_the_floating_point_mode_alone():
    code = (
        "import json, torch; from dalle_fast import _extension; _extension.native(); x = torch.tensor([1e-40]); "
        "print(json.dumps([x.mul(1.0).item() > 0, torch.tensor(float('nan')).isnan().item()]))"
    )
    assert output(code) == [True, True]


def test_instruction_sets_share_no_code():
    """A function that several of them define for all is linked once, perhaps from one that the CPU does not have."""
    objects = sorted(ROOT.glob("build/cmake-*/CMakeFiles/kernels_*/**/*.o"))
    if shutil.which("nm") is None or not objects:
        pytest.skip("no nm, or the module was built elsewhere")
    found = subprocess.run(["nm", "-A", "--defined-only", *objects], capture_output=True, text=True, check=True).stdout
    for_others = [line for line in found.splitlines() if line.split()[-2] in "TWVuvwi"]  # not their tables, D
    assert found and not for_others


@pytest.fixture
def loaded_anew(monkeypatch):
    """`_extension` looks for the module whenever it is asked."""
    monkeypatch.setattr(_extension, "_load", _extension._load.__wrapped__)
    assert _extension.why_missing() is None
    return _extension


def test_a_missing_module_says_how_to_build_it(loaded_anew, monkeypatch):
    monkeypatch.setitem(sys.modules, "dalle_fast._native", None)
    with pytest.raises(ImportError) as error:
        loaded_anew.native()
    message = str(error.value)
    assert message == loaded_anew.why_missing()
    assert "pip install -e ." in message and "_native" in message


def test_a_module_of_another_version_is_refused(loaded_anew, monkeypatch):
    monkeypatch.setattr(dalle_fast, "__version__", "0.0.7")
    reason = loaded_anew.why_missing()
    assert native.build_info()["version"] in reason and "0.0.7" in reason and "make build" in reason


def test_a_module_of_other_sources_is_refused(loaded_anew, monkeypatch, tmp_path):
    """As after a git pull without a build, or where the module of another checkout is found."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    assert _sources.digest(tmp_path) == native.build_info()["sources"]
    (tmp_path / "csrc" / "mask.h~").write_text("what an editor left")
    assert _sources.digest(tmp_path) == native.build_info()["sources"]
    with open(tmp_path / "csrc" / "mask.h", "a") as file:
        file.write("// changed")
    assert _sources.digest(tmp_path / "csrc") is None  # an installed package has none beside it
    (tmp_path / "site-packages").mkdir()
    shutil.copytree(tmp_path / "csrc", tmp_path / "site-packages" / "csrc")  # or another package's
    assert _sources.digest(tmp_path / "site-packages") is None
    monkeypatch.setattr(_sources, "digest", functools.partial(lambda digest, _: digest(tmp_path), _sources.digest))
    assert "built from other sources" in (reason := loaded_anew.why_missing()) and "make build" in reason


# -- instruction sets ------------------------------------------------------------------------------------------------

# Without torch, which takes seconds to load.
ACTIVE = LOAD_ALONE + "print(json.dumps(module.instruction_set()))"


def test_instruction_sets_begin_with_the_portable_one():
    names = native.instruction_sets()
    assert names[0] == "portable"
    assert names == [name for name in INSTRUCTION_SETS if name in names]


NEWER_INSTRUCTIONS = {"avx512_bf16": {"avx512_bf16"}, "avx512_amx": {"amx_tile", "amx_bf16"}}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="these are x86-64's")
def test_instruction_sets_are_those_of_the_cpu():
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        pytest.skip("reads /proc/cpuinfo")
    flags = set(next(line for line in text.splitlines() if line.startswith("flags")).split())
    needed = {
        "portable": set(),
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
    }
    # Every compiler that can build this package knows these, not every one the others.
    others = {name: needed["avx512"] | instructions for name, instructions in NEWER_INSTRUCTIONS.items()}
    names = native.instruction_sets()
    assert [n for n in names if n in needed] == [n for n in needed if needed[n] <= flags]
    assert all(n in needed or others[n] <= flags for n in names)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_the_environment_chooses_an_instruction_set(name):
    if name in native.instruction_sets():
        assert output(ACTIVE, DALLE_FAST_ISA=name) == name
    else:
        assert "ValueError: DALLE_FAST_ISA" in python(ACTIVE, DALLE_FAST_ISA=name).stderr


@pytest.mark.parametrize("unset", [None, ""])
def test_the_fastest_instruction_set_is_chosen_by_itself(unset):
    names = native.instruction_sets()
    chosen = output(ACTIVE, DALLE_FAST_ISA=unset)
    if "avx512_bf16" in names and "AuthenticAMD" not in pathlib.Path("/proc/cpuinfo").read_text():
        names.remove("avx512_bf16")  # slower than avx512 but on AMD: see dispatch.cpp
    assert chosen == names[-1]


def test_an_unknown_instruction_set_is_an_error_that_lists_the_known():
    run = python(ACTIVE, DALLE_FAST_ISA="sse9")
    assert run.returncode == 1
    message = run.stderr.splitlines()[-1]
    assert message.startswith("ValueError: DALLE_FAST_ISA must be ")
    assert "'sse9'" in message and ", ".join(native.instruction_sets()) in message


def test_an_unknown_instruction_set_stops_the_attention_too():
    code = (
        "import torch, dalle_fast.nn.functional as F; from dalle_fast.masks import row_mask\n"
        "x = torch.zeros(1, 1, 4, 16); F.sparse_attention(x, x, x, row_mask(2, (1, 2)), impl='cpu')"
    )
    assert "ValueError: DALLE_FAST_ISA must be" in python(code, DALLE_FAST_ISA="sse9").stderr


# -- the build backend -----------------------------------------------------------------------------------------------


@pytest.fixture
def backend(monkeypatch, tmp_path):
    """The build backend where no CUDA compiler is to be seen."""
    pytest.importorskip("setuptools", reason="the build backend is setuptools'")
    monkeypatch.syspath_prepend(str(ROOT / "build_backend"))
    import dalle_fast_build

    for name in ("DALLE_FAST_CUDA", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "CXX", "CUDAHOSTCXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setattr(dalle_fast_build, "DEFAULT_NVCC", str(tmp_path / "nothing/nvcc"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "nothing")])
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for hook in ("get_requires_for_build_wheel", "get_requires_for_build_editable"):  # setuptools' would run setup.py
        monkeypatch.setattr(dalle_fast_build.build_meta, hook, lambda config_settings: ["a-need-of-setuptools"])
    return dalle_fast_build


def fake_nvcc(path, failure=""):
    """A compiler that answers every call with success, or with this message and failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n[ -z '{failure}' ] && exit 0\necho '{failure}' >&2\nexit 1\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_without_nvcc_it_is_a_build_requirement(backend):
    assert backend.find_nvcc() == (None, "no nvcc was found")
    for hook in (backend.get_requires_for_build_wheel, backend.get_requires_for_build_editable):
        pins = hook()
        assert pins.pop(0) == "a-need-of-setuptools"
        assert len(pins) == 5 and all(pin.startswith("nvidia-") for pin in pins)
        assert {pin.partition("==")[2] for pin in pins} == {"13.0.*"}


@pytest.mark.parametrize("system, machine", [("darwin", "x86_64"), ("linux", "aarch64"), ("win32", "AMD64")])
def test_elsewhere_it_is_not(backend, monkeypatch, system, machine):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert not [r for r in backend.get_requires_for_build_wheel() if r.startswith("nvidia-")]


@pytest.mark.parametrize("variable", ["CUDACXX", "CUDA_HOME", "CUDA_PATH", "PATH"])
def test_an_nvcc_of_the_machine_is_used(backend, monkeypatch, tmp_path, variable):
    nvcc = fake_nvcc(tmp_path / "toolkit/bin/nvcc")
    value = {"CUDACXX": nvcc, "PATH": f"{nvcc.parent}{os.pathsep}/bin"}.get(variable, nvcc.parent.parent)
    monkeypatch.setenv(variable, str(value))
    assert backend.find_nvcc() == (nvcc, "")
    assert not [r for r in backend.get_requires_for_build_editable() if r.startswith("nvidia-")]


def test_an_nvcc_that_does_not_work_is_passed_over(backend, monkeypatch, tmp_path):
    broken = fake_nvcc(tmp_path / "broken/bin/nvcc", failure="error: unsupported GNU version")
    monkeypatch.setenv("CUDA_HOME", str(broken.parent.parent))
    found, reason = backend.find_nvcc()
    assert found is None
    assert str(broken) in reason and "unsupported GNU version" in reason
    assert len([r for r in backend.get_requires_for_build_wheel() if r.startswith("nvidia-")]) == 5
    from_pypi = fake_nvcc(tmp_path / "site/nvidia/cu13/bin/nvcc")
    sys.path.append(str(tmp_path / "site"))
    assert backend.find_nvcc() == (from_pypi, "")
    assert str(from_pypi.parent.parent / "lib") in backend.nvcc_environment(from_pypi)["LIBRARY_PATH"].split(os.pathsep)


@pytest.mark.parametrize(
    "value, compiler",
    [("", ""), ("g++ -m64 -O2", "g++"), ("ccache g++", "g++"), ("/opt/a\\ b/g++ -m64", "/opt/a b/g++")],
)
def test_nvcc_is_given_the_compiler_alone(backend, monkeypatch, tmp_path, value, compiler):
    monkeypatch.setenv("CXX", value)
    assert backend.nvcc_environment(tmp_path / "bin/nvcc").get("CUDAHOSTCXX", "") == compiler


def test_the_environment_turns_cuda_off(backend, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDACXX", str(fake_nvcc(tmp_path / "bin/nvcc")))
    monkeypatch.setenv("DALLE_FAST_CUDA", "0")
    found, reason = backend.find_nvcc()
    assert found is None and "DALLE_FAST_CUDA=0" in reason
    monkeypatch.delenv("CUDACXX")
    assert not [r for r in backend.get_requires_for_build_wheel() if r.startswith("nvidia-")]


def test_the_environment_asks_for_the_nvcc_from_pypi(backend, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDACXX", str(fake_nvcc(tmp_path / "bin/nvcc")))
    monkeypatch.setenv("DALLE_FAST_CUDA", "pypi")
    assert backend.find_nvcc()[0] is None
    assert len([r for r in backend.get_requires_for_build_wheel() if r.startswith("nvidia-")]) == 5


def test_another_value_is_an_error(backend, monkeypatch):
    monkeypatch.setenv("DALLE_FAST_CUDA", "yes")
    with pytest.raises(ValueError, match="DALLE_FAST_CUDA must be auto, 0, 1 or pypi, got 'yes'"):
        backend.find_nvcc()


@pytest.mark.parametrize(
    "change, stale",
    [
        ({}, False),
        ({"CMAKE_MAKE_PROGRAM": "gone"}, True),  # it was in an isolated build environment
        ({"CMAKE_CUDA_COMPILER": ""}, True),
        ({"CMAKE_CACHEFILE_DIR": "elsewhere"}, True),
    ],
)
def test_a_stale_cmake_cache_is_dropped_and_object_files_kept(backend, tmp_path, change, stale):
    tool = fake_nvcc(tmp_path / "tool")
    cached = {"CMAKE_MAKE_PROGRAM": tool, "CMAKE_CUDA_COMPILER": tool, "CMAKE_CACHEFILE_DIR": tmp_path}
    cached |= {name: value and tmp_path / value for name, value in change.items()}
    cache = tmp_path / "CMakeCache.txt"
    cache.write_text("# This is the CMakeCache file.\n" + "".join(f"{n}:FILEPATH={v}\n" for n, v in cached.items()))
    compilers, objects = tmp_path / "CMakeFiles/4.0.0", tmp_path / "CMakeFiles/cpu.dir"
    compilers.mkdir(parents=True)
    objects.mkdir()
    assert backend.forget_stale_cache(tmp_path, {"CMAKE_CUDA_COMPILER": str(tool)}) is stale
    assert cache.exists() is compilers.exists() is not stale
    assert objects.exists()


@pytest.mark.parametrize("name", ["CXX", "CXXFLAGS", "CMAKE_ARGS"])
def test_another_compiler_or_other_arguments_make_a_cache_stale(backend, monkeypatch, tmp_path, name):
    def build():
        """Whether there was a stale cache. What CMake does with -D: it keeps it."""
        chosen = backend.cached_choices(None)
        stale = backend.forget_stale_cache(tmp_path, chosen)
        cached = chosen | {"CMAKE_CACHEFILE_DIR": str(tmp_path)}
        (tmp_path / "CMakeCache.txt").write_text("".join(f"{n}:UNINITIALIZED={v}\n" for n, v in cached.items() if v))
        return stale

    assert [build(), build()] == [False, False]
    for value in ("clang++ -DX=1", "g++"):
        monkeypatch.setenv(name, value)
        assert [build(), build()] == [True, False]
    monkeypatch.delenv(name)
    assert [build(), build()] == [True, False]


@pytest.mark.parametrize("isa", ["portable", "avx512_amx"])
def test_clang_takes_the_kernels(isa):
    """GCC, which builds them elsewhere in the tests, has extensions of its own."""
    clang = next(filter(None, map(shutil.which, ("clang++", *(f"clang++-{x}" for x in range(25, 11, -1))))), None)
    if clang is None:
        pytest.skip("there is no clang++ here")
    if isa != "portable" and platform.machine() != "x86_64":
        pytest.skip(f"{isa} is x86's")
    flags = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mavx512vbmi -mamx-tile -mamx-bf16 -mf16c -mfma"
    command = [clang, "-std=c++17", "-fsyntax-only", "-w"]  # what it warns of differs from one Clang to the next
    command += [f"-DDALLE_FAST_ISA={isa}", *(flags.split() if isa != "portable" else [])]
    kernels = sorted((ROOT / "csrc/cpu").glob("*_kernels.cpp"))
    assert len(kernels) > 4
    for kernel in kernels:
        done = subprocess.run([*command, str(kernel)], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:2000]


# -- the package -----------------------------------------------------------------------------------------------------


def test_every_folder_of_the_package_is_a_package():
    folders = {path.parent for path in (ROOT / "dalle_fast").rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_no_cuda_header_in_cpp_files():
    texts = {path: path.read_text() for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h")}
    assert texts
    assert [str(path) for path, text in texts.items() if "cuda_runtime" in text or ".cuh" in text] == []


def test_a_source_distribution_has_what_its_tests_and_benchmarks_need(tmp_path):
    pytest.importorskip("setuptools", reason="the build backend is setuptools'")
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("needs git and its checkout, to know what belongs to it")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    copy = tmp_path / "copy"  # the build leaves files behind
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    command = [sys.executable, "setup.py", "-q", "sdist", "--formats=tar", "-d", str(tmp_path)]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert sorted(set(tracked) - names) == [".gitignore"]
    subprocess.run([*command[:3], "build_py", "-d", "built"], cwd=copy, check=True, capture_output=True)
    packaged = {path for path in tracked if path.startswith("dalle_fast/")}
    built = {f"dalle_fast/{path.relative_to(copy / 'built/dalle_fast')}" for path in (copy / "built").rglob("*.*")}
    assert sorted(packaged - built) == []  # what a wheel holds: modules, and `py.typed`
