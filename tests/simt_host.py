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


class Host:
    """A program that serves calls, see tests/simt/serve.h."""

    def __init__(self, program):
        self.program, self.process = program, None
        self.errors = program.with_suffix(".errors")

    def __call__(self, numbers, *buffers):
        """Call with these integers and buffers (tensors, None, or Same); returns what is in the tensors afterwards.

        Every buffer is an allocation of its own, of exactly the tensor's size. Raises RuntimeError with the message of
        an error, be it one of the sanitizers'.
        """
        if self.process is None:
            with self.errors.open("w") as errors:
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
                self.process = subprocess.Popen([self.program], **pipes)
        request = [struct.pack(f"<{len(numbers) + 2}q", len(numbers), len(buffers), *numbers)]
        for buffer in buffers:
            if isinstance(buffer, torch.Tensor):
                data = buffer.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                request += [struct.pack("<q", len(data)), data]
            else:
                request.append(struct.pack("<q", -1 if buffer is None else -2 - buffer.of))
        try:
            self.process.stdin.write(b"".join(request))
            self.process.stdin.flush()
            (length,) = struct.unpack("<q", self._read(8))
            if length:
                raise RuntimeError(self._read(length).decode())
            return [self._read_like(buffer) for buffer in buffers if isinstance(buffer, torch.Tensor)]
        except (OSError, EOFError):
            self.close()
            raise RuntimeError(f"{self.program.name} ended: {self.errors.read_text()}") from None

    def close(self):
        if self.process is not None:
            self.process.stdout.close()
            self.process.kill()
            self.process.wait()
        self.process = None

    def _read(self, size):
        data = self.process.stdout.read(size)
        if len(data) < size:
            raise EOFError
        return data

    def _read_like(self, tensor):
        size = tensor.numel() * tensor.element_size()
        return torch.frombuffer(bytearray(self._read(size)), dtype=tensor.dtype).view(tensor.shape) if size else tensor


@pytest.fixture(scope="module")
def serve_on_host(tmp_path_factory):
    """serve_on_host(name): tests/simt/NAME.cpp, compiled and running."""
    hosts = []

    def serve(name):
        hosts.append(Host(compile_for_host(name, tmp_path_factory.mktemp("simt"))))
        return hosts[-1]

    yield serve
    for host in hosts:
        host.close()
