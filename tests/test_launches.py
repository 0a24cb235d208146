"""Launching a Triton kernel again hands the compiled kernel what Triton itself would.

A driver that knows its target and writes down what it is asked to launch stands in for the GPU; nothing here ran on one.
"""

import os

import pytest
import torch

from dalle_fast.masks import column_mask, row_mask

triton = pytest.importorskip("triton", reason="the package triton is not installed")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("TRITON_INTERPRET is set: kernels are interpreted, not compiled", allow_module_level=True)

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

from dalle_fast.ops import linear_triton, norm_triton
from dalle_fast.ops.attention.triton import app, bwd, dec, fwd, launch
from dalle_fast.ops.codebook import gradients_triton, gumbel_triton, streaming_triton
from dalle_fast.ops.launches_triton import MOST_KEPT, Launches


def comparable(x):
    """Of a tensor what stays the same where other memory is allocated."""
    if isinstance(x, TensorDescriptor):
        return (comparable(x.base), *x.block_shape)
    return (x.dtype, x.shape, x.stride(), x.data_ptr() % 16) if isinstance(x, torch.Tensor) else x


class Driver:
    """As much of a driver as compiling and launching need. launched: the arguments of every launch since `clear`ed.

    Triton keeps what it compiled, with the launcher of the driver of that time, so there is one of these.
    """

    BEFORE_ARGUMENTS = 9  # grid, stream, function, packed metadata, what is told about the launch, hooks

    def __init__(self):
        self.launched, self.utils, self.device = [], self, 0

    def launcher_cls(self, source, metadata):
        def write_down(*args):
            *where, about, enter, leave = args[: Driver.BEFORE_ARGUMENTS]  # about is made anew each time, for the hooks
            about = None if about is None else {**about.data}
            self.launched.append((metadata.name, *where, about, enter, leave, *map(comparable, args[len(where) + 3 :])))

        return write_down

    def load_binary(self, name, kernel, shared, device):
        return object(), (name, device), 0, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 << 10}

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 7

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


DRIVER = Driver()


@pytest.fixture
def driver(monkeypatch, tmp_path):
    driver = DRIVER
    driver.launched.clear()
    monkeypatch.setattr(driver, "device", 0)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(launch, "capability_of", lambda tensor: (9, 0))
    return driver


@triton.jit(do_not_specialize=["n"])
def _scale_kernel(x_ptr, strides, n, factor, ADD: tl.constexpr):
    i = tl.arange(0, 16)
    x = tl.load(x_ptr + i * strides[0], mask=i < n)
    tl.store(x_ptr + i * strides[0], x * factor + ADD, mask=i < n)


@pytest.fixture
def scale(driver, monkeypatch):
    """(launches, kernel, times): how often the kernel went through Triton."""
    kernel = triton.jit(_scale_kernel.fn, do_not_specialize=["n"])
    times, run = [], kernel.run
    monkeypatch.setattr(kernel, "run", lambda *args, **kwargs: times.append(1) or run(*args, **kwargs))
    return Launches(kernel), kernel, times


def test_a_launch_after_the_first_is_as_triton_makes_it(scale, driver):
    launches, kernel, times = scale
    x = torch.zeros(32)
    arguments = x, x.stride(), 5, 0.5, 3
    for grid in ((4,), (4, 2), (4, 2, 3)):
        for _ in range(2):
            launches(grid, *arguments, num_warps=2)
        kernel[grid](*arguments, num_warps=2)
    assert len(times) == 1 + 3  # one of ours, three of Triton's
    first, again, reference = driver.launched[1], driver.launched[0], driver.launched[2]
    assert first == again == reference and first[1:4] == (4, 1, 1)
    assert driver.launched[3:6] == [driver.launched[5]] * 3 and driver.launched[6:] == [driver.launched[8]] * 3


@pytest.mark.parametrize(
    "other",
    [
        lambda x: ((x.double(), (1,), 5, 0.5, 3), {"num_warps": 2}),
        lambda x: ((x[1:], (1,), 5, 0.5, 3), {"num_warps": 2}),  # begins at no multiple of 16 bytes
        lambda x: ((x, (2,), 5, 0.5, 3), {"num_warps": 2}),
        lambda x: ((x, (1,), 5, 0.5, 4), {"num_warps": 2}),
        lambda x: ((x, (1,), 5, 0.5, 3), {"num_warps": 4}),
    ],
    ids=["dtype", "alignment", "stride", "constant", "option"],
)
def test_what_is_compiled_anew(scale, driver, other):
    launches, kernel, times = scale
    x = torch.zeros(32)
    launches((1,), x, (1,), 5, 0.5, 3, num_warps=2)
    arguments, options = other(x)
    launches((1,), *arguments, **options)
    assert len(times) == 2
    kernel[(1,)](*arguments, **options)
    assert driver.launched[1] == driver.launched[2] != driver.launched[0]


@triton.jit(do_not_specialize=["n"])
def _first_kernel(x, out_ptr, n):
    tl.store(out_ptr, tl.sum(x.load([n, 0])))


def test_descriptors_are_told_apart_by_dtype_and_block(driver):
    def arguments(x, *block):
        return (TensorDescriptor.from_tensor(x, list(block)), torch.zeros(1), 3)

    launches = Launches(_first_kernel)
    halves, floats = torch.zeros(64, 64, dtype=torch.bfloat16), torch.zeros(64, 64)
    different = (halves, 16, 16), (halves, 16, 32), (halves, 32, 16), (floats, 16, 16)
    for case in (*different, *different, (halves[8:, :32], 16, 16)):
        launches((1,), *arguments(*case), num_warps=2)
        _first_kernel[(1,)](*arguments(*case), num_warps=2)
    assert len(launches._compiled) == 4
    assert driver.launched[::2] == driver.launched[1::2] and driver.launched[:8] == driver.launched[8:16]


def test_each_device_has_a_kernel_of_its_own(scale, driver, monkeypatch):
    launches, _, times = scale
    x = torch.zeros(32)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: driver.device)
    for driver.device in (0, 1, 0, 1):
        launches((1,), x, (1,), 5, 0.5, 3)
    functions = [next(x for x in launch if isinstance(x, tuple)) for launch in driver.launched]
    assert [device for _, device in functions] == [0, 1, 0, 1] and len(times) == 2


def test_hooks_on_launches_are_called(scale, driver, monkeypatch):
    launches, _, _ = scale
    x = torch.zeros(32)
    launches((1,), x, (1,), 5, 0.5, 3)
    hook = object()
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", hook)
    launches((1,), x, (1,), 5, 0.5, 3)
    assert [any(x is hook for x in launch) for launch in driver.launched] == [False, True]


def test_no_more_are_kept_than_a_process_needs(scale, monkeypatch):
    launches, _, times = scale
    monkeypatch.setattr("dalle_fast.ops.launches_triton.MOST_KEPT", 3)
    assert MOST_KEPT >= 1000
    x = torch.zeros(32)
    for n in (*range(5), 4):
        launches((1,), x, (1,), n, 0.5, 3)
    assert len(launches._compiled) <= 3 and len(times) == 5


def attend(mask):
    query, key, value = torch.zeros(1, mask.seq_len, 3, 2, 64, dtype=torch.bfloat16).permute(2, 0, 3, 1, 4)
    out, lse = fwd.attention_forward(query, key, value, None, mask, 0.125)
    bwd.attention_backward(out, None, query, key, value, out, lse, None, mask, 0.125)


def step(mask):
    query = torch.zeros(8, 3, 2, 64, dtype=torch.bfloat16)[:, 0]
    text = torch.zeros(1, 2, mask.text_len, 64, dtype=torch.bfloat16)
    image = torch.zeros(8, 2, mask.cache_slots, 64, dtype=torch.bfloat16)
    position = torch.tensor(3)
    app.attention_append(image, image, query, query, position, mask)
    dec.attention_decode(query, text, text, image, image, position, None, mask, 0.125)
    x, weight, row = torch.zeros(8, 512), torch.zeros(1024, 512, dtype=torch.bfloat16), torch.zeros(512)
    norm_triton.add_norm(x, None, row, row, 1e-5)
    linear_triton.linear(x.bfloat16(), weight, None, None)


def codebook(mask):
    hidden, weight, table = (torch.zeros(n, 32, dtype=torch.bfloat16) for n in (70, 100, 100))
    bias, one, seed = torch.zeros(100), torch.ones(1), torch.zeros(1, dtype=torch.int64)
    target, stats = torch.zeros(70, dtype=torch.int64), torch.zeros(2, 70)
    embedding, kl, _, kept = gumbel_triton.gumbel_forward(hidden, weight, bias, table, one, seed, seed_per_row=False)
    of = embedding, kl, hidden, weight, bias, table, one, seed, kl, kept
    gradients_triton.gumbel_gradients(*of, seed_per_row=False, needs=(False, True, True, True))
    streaming_triton.sample_streaming(hidden, weight, bias, seed, one, seed_per_row=False)
    streaming_triton.cross_entropy_streaming(hidden, weight, bias, target, -100, stats=stats)
    needs = False, True, True
    gradients_triton.loss_gradients(hidden, weight, bias, target, -100, one, stats, needs=needs)


@pytest.mark.parametrize("mask", [row_mask(20, (4, 6)), column_mask(20, (4, 6))], ids=repr)
@pytest.mark.parametrize("calls", [attend, step, codebook])
def test_the_packages_kernels_go_through_triton_once(driver, monkeypatch, calls, mask):
    modules = (fwd, bwd, app, dec, norm_triton, linear_triton, gumbel_triton, gradients_triton, streaming_triton)
    for module in (gumbel_triton, gradients_triton, streaming_triton):
        monkeypatch.setattr(module, "capability_of", lambda tensor: (9, 0))
    ours = [x for module in modules for x in vars(module).values() if isinstance(x, Launches)]
    assert len(ours) == 17
    for launches in ours:
        monkeypatch.setattr(launches, "_compiled", {})
    calls(mask)
    first, driver.launched[:] = list(driver.launched), []
    triton_runs = []
    for launches in ours:
        monkeypatch.setattr(launches._kernel, "run", lambda *args, **kwargs: triton_runs.append(args))
    calls(mask)
    assert not triton_runs
    assert len(first) == len(driver.launched) == {attend: 3, step: 5, codebook: 12}[calls]
    assert first == driver.launched
