"""Compiles csrc/cuda/*.cu for the host, by the headers in tests/simt, and runs it: CUDA's arithmetic without a GPU."""

import os
import pathlib
import shutil
import struct
import subprocess

import pytest
import torch

HERE = pathlib.Path(__file__).parent
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def compile_for_host(name, folder):
    """tests/simt/NAME.cpp as a program in `folder`, with sanitizers where the compiler has them; skips without one."""
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        pytest.skip("no C++ compiler to compile the CUDA source for the host")
    source, probe, program = HERE / "simt" / f"{name}.cpp", folder / "probe.cpp", folder / name
    probe.write_text("int main() { return 0; }\n")
    has_sanitizers = _succeeds(compiler, *SANITIZERS, probe, "-o", folder / "probe") and _succeeds(folder / "probe")
    # No fused products and sums, so that the tests know every rounding up to the exponentials.
    options = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", *(SANITIZERS if has_sanitizers else ())]
    subprocess.run([compiler, *options, f"-I{HERE / 'simt'}", source, "-o", program], check=True)
    return program


def _succeeds(*command):
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


class Same:
    """Stands for the address of buffer number `of`."""

    def __init__(self, of):
        self.of = of


def run_on_host(program, folder, numbers, buffers):
    """Run it with these integers and buffers (tensors, None, or Same); returns what is in the tensors afterwards.

    Every buffer is an allocation of its own, of exactly the tensor's size. Raises RuntimeError with what it printed
    where it ends with an error, be it one of the sanitizers'.
    """
    text = struct.pack(f"<{len(numbers) + 1}q", len(numbers), *numbers)
    for buffer in buffers:
        if isinstance(buffer, torch.Tensor):
            data = buffer.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            text += struct.pack("<q", len(data)) + data
        else:
            text += struct.pack("<q", -1 if buffer is None else -2 - buffer.of)
    (folder / "in").write_bytes(text)
    run = subprocess.run([program, folder / "in", folder / "out"], capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{program.name} ended with {run.returncode}: {run.stderr}")
    out, results = bytearray((folder / "out").read_bytes()), []
    for buffer in buffers:
        if isinstance(buffer, torch.Tensor):
            size = buffer.numel() * buffer.element_size()
            data, out = out[:size], out[size:]
            results.append(torch.frombuffer(data, dtype=buffer.dtype).view(buffer.shape) if size else buffer.clone())
    assert not out
    return results
