"""Builds the native module with CMake and Ninja. Everything else about the package is in pyproject.toml.

Variables: DALLE_FAST_CUDA (see build_backend/dalle_fast_build.py), CMAKE_BUILD_PARALLEL_LEVEL, CMAKE_ARGS, CXX, CXXFLAGS.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))

import dalle_fast_build

# Not imported: its folder has modules of names that others have too.
digest_of_sources = runpy.run_path(str(ROOT / "dalle_fast" / "_sources.py"))["digest"]
CUDA_ARCHITECTURES = "80-real;90-real;100"  # and PTX of the last, for what comes after


def find_tool(name: str) -> str:
    """Path of cmake or ninja: from this environment's package, which may not be on PATH, else from PATH."""
    try:
        module = importlib.import_module(name)
        path = Path(getattr(module, "CMAKE_BIN_DIR" if name == "cmake" else "BIN_DIR")) / name
        if path.is_file():
            return str(path)
    except (ImportError, AttributeError):
        pass
    path = shutil.which(name)
    if path is None:
        raise SystemExit(f"{name} was not found: `pip install {name}`, or build without --no-build-isolation")
    return path


def pybind11_folder() -> str:
    try:
        import pybind11
    except ImportError:
        raise SystemExit(
            "pybind11 was not found: `pip install pybind11`, or build without --no-build-isolation"
        ) from None
    return pybind11.get_cmake_dir()


@contextlib.contextmanager
def one_at_a_time(folder: Path):
    """Two environments of one Python that install this checkout share the folder; the second one waits."""
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class CMakeBuild(build_ext):
    def build_extension(self, extension):
        if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
            raise SystemExit(
                f"the headers of Python {sys.version_info[0]}.{sys.version_info[1]} were not found in "
                f"{sysconfig.get_path('include')}: install them (python3-dev on Debian and Ubuntu)"
            )
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        nvcc, why_no_cuda = dalle_fast_build.find_nvcc()
        if nvcc is None and dalle_fast_build.cuda_wanted() in ("1", "pypi"):
            raise SystemExit(f"DALLE_FAST_CUDA={dalle_fast_build.cuda_wanted()} asks for CUDA, but {why_no_cuda}")
        folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        folder.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(folder):
            self.build_in(folder, extension, cmake, ninja, nvcc, why_no_cuda)

    def build_in(self, folder, extension, cmake, ninja, nvcc, why_no_cuda):
        chosen = dalle_fast_build.cached_choices(nvcc)
        dalle_fast_build.forget_stale_cache(folder, chosen)
        arguments = [
            f"-S{ROOT}",
            f"-B{folder}",
            "-GNinja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-Dpybind11_DIR={pybind11_folder()}",
            f"-DDALLE_FAST_VERSION={self.distribution.get_version()}",
            f"-DDALLE_FAST_SOURCES={digest_of_sources(ROOT)}",
            f"-DDALLE_FAST_NO_CUDA_REASON={why_no_cuda}",
        ]
        arguments += [f"-D{name}={value}" for name, value in chosen.items() if value]
        if nvcc:
            arguments.append(f"-DCMAKE_CUDA_ARCHITECTURES={CUDA_ARCHITECTURES}")
        arguments += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        env = dalle_fast_build.nvcc_environment(nvcc) if nvcc else None
        subprocess.run([cmake, *arguments], check=True, env=env)
        subprocess.run([cmake, "--build", str(folder)], check=True, env=env)

        # Into place in one step: a process that has the old module loaded keeps the old file.
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copy2(folder / target.name, fresh)
        os.replace(fresh, target)
        print(f"dalle_fast: built {target.name} " + (f"with {nvcc}" if nvcc else f"without CUDA: {why_no_cuda}"))


setup(
    license="Apache-2.0",
    ext_modules=[Extension("dalle_fast._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
