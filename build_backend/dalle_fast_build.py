"""The PEP 517 build backend: setuptools, plus nvcc from PyPI as a build requirement where the machine has none.

`setup.py` imports this module too, so that both agree on which nvcc is used.
"""

from __future__ import annotations

import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401 (hooks that pip calls)
    build_editable,
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

# All five are pinned: nvcc's own requirements are not, and would mix versions.
NVCC_FROM_PYPI = [
    f"{name}==13.0.*"
    for name in ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime", "nvidia-cuda-cccl")
]
DEFAULT_NVCC = "/usr/local/cuda/bin/nvcc"
# CMake's names for the paths that a build environment, deleted since, may have held.
CACHED_TOOLS = ("CMAKE_COMMAND", "CMAKE_CXX_COMPILER", "CMAKE_CUDA_COMPILER", "CMAKE_MAKE_PROGRAM")
LAUNCHERS = ("ccache", "sccache", "distcc")
PROBE = "__global__ void probe(int* out) { *out = 1; }\n"


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _nvcc_requirements()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _nvcc_requirements()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    # setuptools packs whatever lies there, also modules that an earlier build left and that no longer exist.
    for stale in pathlib.Path("build").glob("lib*"):
        shutil.rmtree(stale)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def cuda_wanted() -> str:
    """The environment variable DALLE_FAST_CUDA.

    "auto" (also when unset): with CUDA where an nvcc works, else without. "0": without. "1": with, or fail. "pypi": with
    the nvcc from PyPI, whatever else is installed, or fail.

    Raises:
        ValueError: it holds anything else.
    """
    value = os.environ.get("DALLE_FAST_CUDA", "").strip().lower() or "auto"
    if value not in ("auto", "0", "1", "pypi"):
        raise ValueError(f"DALLE_FAST_CUDA must be auto, 0, 1 or pypi, got {value!r}")
    return value


def find_nvcc() -> tuple[pathlib.Path | None, str]:
    """The nvcc to build with.

    Looked for in CUDACXX, CUDA_HOME, CUDA_PATH, on PATH, in /usr/local/cuda, and in the `nvidia-cuda-nvcc` package on
    sys.path.

    Returns:
        (nvcc, ""), or (None, why none is used).
    """
    if cuda_wanted() == "0":
        return None, "it was switched off by DALLE_FAST_CUDA=0"
    env = os.environ
    candidates = []
    if cuda_wanted() != "pypi":
        candidates += [shutil.which(env["CUDACXX"]) or ""] if env.get("CUDACXX") else []
        candidates += [pathlib.Path(env[name], "bin/nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if env.get(name)]
        candidates += [shutil.which("nvcc") or "", DEFAULT_NVCC]
    candidates += [pathlib.Path(entry, "nvidia/cu13/bin/nvcc") for entry in sys.path]
    failures = []
    for nvcc in dict.fromkeys(map(pathlib.Path, candidates)):
        if not nvcc.is_file():
            continue
        failure = _why_unusable(nvcc)
        if not failure:
            return nvcc, ""
        failures.append(f"{nvcc} does not work here: {failure}")
    return None, "; ".join(failures) or "no nvcc was found"


def nvcc_environment(nvcc: pathlib.Path) -> dict[str, str]:
    """The environment in which `nvcc` works."""
    env = dict(os.environ)
    if nvcc.parent.parent.name == "cu13":  # the PyPI package has lib, nvcc looks in lib64
        folders = [str(nvcc.parent.parent / "lib"), env.get("LIBRARY_PATH", "")]
        env["LIBRARY_PATH"] = os.pathsep.join(filter(None, folders))
    if compiler := host_compiler():
        env.setdefault("CUDAHOSTCXX", compiler)
    return env


def host_compiler() -> str:
    """The compiler that CXX names, "" for none: CMake takes arguments behind it and a launcher before it, nvcc neither."""
    value = os.environ.get("CXX", "")
    if shutil.which(value):  # a path may have spaces
        return value
    return next((word for word in shlex.split(value) if pathlib.Path(word).name not in LAUNCHERS), "")


def cached_choices(nvcc: pathlib.Path | None) -> dict[str, str]:
    """CMake variables that a build folder keeps and that this build chooses: variable -> value, "" for none.

    CMake reads CXX and CXXFLAGS only where there is no cache, and keeps what CMAKE_ARGS once said.
    """
    environment = {f"DALLE_FAST_{name}_WAS": os.environ.get(name, "") for name in ("CXX", "CXXFLAGS", "CMAKE_ARGS")}
    return {"CMAKE_CUDA_COMPILER": str(nvcc or ""), "Python_EXECUTABLE": sys.executable, **environment}


def forget_stale_cache(folder: pathlib.Path, chosen: dict[str, str]) -> bool:
    """Drop the cache of a CMake build folder where CMake would refuse it or hold on to it.

    That is where it names tools that are gone, as those of an isolated build are by the next one, where the folder was
    moved, and where `chosen` (variable -> value, "" for none) differs. The object files stay: only what changed is
    compiled again. Returns whether there was a stale cache.
    """
    cache = folder / "CMakeCache.txt"
    if not cache.is_file():
        return False
    cached = {}
    for line in cache.read_text(errors="replace").splitlines():
        key, _, value = line.partition("=")
        cached[key.partition(":")[0]] = value
    tools = [cached.get(name, "") for name in CACHED_TOOLS]
    lost = any(os.path.isabs(path) and not os.path.exists(path) for path in tools)
    moved = pathlib.Path(cached.get("CMAKE_CACHEFILE_DIR", folder)).resolve() != folder.resolve()
    if not lost and not moved and all(cached.get(name, "") == value for name, value in chosen.items()):
        return False
    cache.unlink()
    for compilers in folder.glob("CMakeFiles/[0-9]*"):
        shutil.rmtree(compilers)
    return True


def _nvcc_requirements() -> list[str]:
    if (sys.platform, platform.machine()) != ("linux", "x86_64") or cuda_wanted() == "0":
        return []
    return [] if find_nvcc()[0] else NVCC_FROM_PYPI


def _why_unusable(nvcc: pathlib.Path) -> str:
    """Compiles one kernel: an nvcc may be there and yet refuse the host compiler, or be too old for sm_100."""
    env = nvcc_environment(nvcc)
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder, "probe.cu")
        source.write_text(PROBE)
        command = [str(nvcc), "-std=c++17", "-arch=sm_100", "-cubin", "-o", str(source.with_suffix(".cubin"))]
        if env.get("CUDAHOSTCXX"):
            command += ["-ccbin", env["CUDAHOSTCXX"]]
        try:
            run = subprocess.run(
                [*command, str(source)], check=False, env=env, capture_output=True, text=True, timeout=300
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
    if run.returncode == 0:
        return ""
    lines = [line.strip() for line in (run.stderr + run.stdout).splitlines() if "error" in line.lower()]
    return (lines or (run.stderr + run.stdout).split("\n"))[0][:300]
