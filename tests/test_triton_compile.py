"""The Triton kernels compile for NVIDIA GPUs, without one, into code that is worth running.

Compiled through the package's own launchers: a driver that only knows its target stands in for the GPU, and launches
stop after compiling, so that arguments are specialised (strides of 1, divisibility by 16) exactly as in a real launch.
Nothing here ran on a GPU: these tests prove no spills, shared memory within the limit, and tensor-core instructions.

The default is the cases of every architecture that have the fewest registers to spare, spread over the rules: a minute
or two. DALLE_FAST_COMPILE=all compiles every combination, in one to one and a half hours of a core, and ends with a table of
registers, shared memory and spills. Shown with -s, and after the run when it fails: the same for every kernel.
"""

import collections
import itertools
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from dalle_fast.masks import causal_mask, column_mask, conv_mask, row_mask

triton = pytest.importorskip("triton", reason="the package triton is not installed")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("TRITON_INTERPRET is set: kernels are interpreted, not compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget

from dalle_fast.ops import linear_triton, norm_triton
from dalle_fast.ops.attention.triton import app, bwd, dec, fwd, launch

KERNELS = {
    "forward": fwd._attention_fwd_kernel,
    "grad_query": bwd._attention_grad_query_kernel,
    "grad_key_value": bwd._attention_grad_key_value_kernel,
    "decode_text": dec._attention_decode_text_kernel,
    "decode": dec._attention_decode_kernel,
    "append": app._attention_append_kernel,
    "add_norm": norm_triton._add_norm_kernel,
    "linear": linear_triton._linear_kernel,
}
WITHOUT_PRODUCTS = ("decode", "append", "add_norm")
ARCHITECTURES = (80, 90, 100)
CONSUMERS = (86, 120)  # with half of the shared memory or less; the table of tiles knows nothing of them
SHARED_LIMIT = {80: 163, 86: 99, 90: 227, 100: 227, 120: 99}  # KiB that a program may use, CUDA C++ guide
EVERYTHING = os.environ.get("DALLE_FAST_COMPILE") == "all"
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"  # ships in the Triton wheel
# What a matrix product on tensor cores looks like in machine code. The instructions of sm_90 and sm_100 take 64 rows,
# and tiles of float32 have 32 or 16: these use sm_80's.
TENSOR_CORE = {80: r"\bHMMA\b", 90: r"\bHGMMA\b", 100: r"\bUTC[A-Z]*MMA\b|\bHMMA\b"}
TENSOR_CORE |= dict.fromkeys((*CONSUMERS, "tf32"), r"\bHMMA\b")
MASKS = {
    "row": row_mask(256, 32),
    "axial": row_mask(256, 32, wrap=False),
    "column": column_mask(256, 32),
    "causal": causal_mask(256, 32),
    **{edges: conv_mask(256, 32, 11, edges=edges) for edges in ("flat", "clip", "torus", "corner")},
    **{f"{edges} in patches": conv_mask(256, 64, 11, edges=edges) for edges in ("flat", "clip", "corner")},
}
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "tf32": torch.float32,  # float32 whose products torch's settings allow to run on tensor cores
}


class TargetOnly:
    """As much of a Triton driver as compiling for `arch` needs; the device's number is the architecture."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)


def kernel_usage(kernel, tmp_path):
    """(registers, local memory bytes, shared memory bytes, machine code) of a compiled kernel."""
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    # A spilled register goes to the thread's stack frame, in local memory.
    local = sum(int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("STACK", "LOCAL"))
    code = subprocess.run([CUOBJDUMP, "-sass", binary], capture_output=True, text=True, check=True).stdout
    return registers, local, kernel.metadata.shared, code


@pytest.fixture(scope="module")
def usages(request):
    """[((arch, head size, dtype, kernel), (registers, spilled bytes, shared bytes))]; "all" ends with their table."""
    rows = []
    yield rows
    if not EVERYTHING:
        return
    table = collections.defaultdict(list)
    for where, usage in rows:
        table[where].append(usage)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\narch     D dtype    kernel          compiled  registers  spilled bytes  KiB shared")
        for (arch, head_size, dtype, kernel), kernels in sorted(table.items()):
            registers, local, shared = zip(*kernels)
            print(
                f"sm_{arch:<3} {head_size:3} {dtype:8} {kernel:14} {len(kernels):9}  "
                f"{min(registers):3} - {max(registers):3}  {max(local):13}  {max(shared) / 1024:10.1f}"
            )


def attend(mask, head_size, dtype, text_lengths):
    packed = torch.zeros(1, mask.seq_len, 3, 2, head_size, dtype=dtype)  # a packed projection: (B, S, 3, H, D)
    query, key, value = packed.permute(2, 0, 3, 1, 4)
    out, lse = fwd.attention_forward(query, key, value, text_lengths, mask, 0.125)
    bwd.attention_backward(out, lse, query, key, value, out, lse, text_lengths, mask, 0.125)


def decode(mask, head_size, dtype, text_lengths):
    query = torch.zeros(64, 3, 2, head_size, dtype=dtype)[:, 0]  # of a packed projection: (B, 3, H, D)
    text = torch.zeros(1, 2, mask.text_len, head_size, dtype=dtype)
    image = torch.zeros(64, 2, mask.cache_slots, head_size, dtype=dtype)
    position = torch.tensor(3)
    app.attention_append(image, image, query, query, position, mask)
    dec.attention_decode(query, text, text, image, image, position, text_lengths, mask, 0.125)


@pytest.fixture
def compile_for(monkeypatch, tmp_path):
    """compile_for(arch, mask, head_size, dtype, text_lengths, call) -> {kernel name: compiled kernel}"""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    compiled = {}

    def stop_before_launch(name, run):
        def compile_only(*args, grid, warmup, **kwargs):
            compiled[name] = run(*args, grid=grid, warmup=True, **kwargs)

        return compile_only

    for name, kernel in KERNELS.items():
        monkeypatch.setattr(kernel, "run", stop_before_launch(name, kernel.run))

    def compile_for(arch, mask, head_size, dtype, text_lengths, call):
        compiled.clear()
        monkeypatch.setattr(triton.runtime.driver, "_active", TargetOnly(arch))
        monkeypatch.setattr(launch, "capability_of", lambda tensor: divmod(arch, 10))
        monkeypatch.setattr(launch, "input_precision", lambda _: "tf32" if dtype == "tf32" else "ieee")
        call(mask, head_size, DTYPES[dtype], torch.zeros(1, dtype=torch.int32) if text_lengths else None)
        return dict(compiled)

    return compile_for


ALL = [
    *itertools.product(ARCHITECTURES, MASKS, (64, 128), DTYPES, (False, True)),
    # Smaller heads, and heads that fill no power of two, on the tiles of 64 and of 128.
    *itertools.product(ARCHITECTURES, ("column", "torus"), (16, 32, 48, 96), DTYPES, (True,)),
    *itertools.product(CONSUMERS, ("row", "torus"), (64, 128), DTYPES, (True,)),
]
SUBSET = [
    (80, "column", 128, "bfloat16", True),
    (80, "flat in patches", 128, "float16", False),
    (80, "torus", 64, "float32", True),
    (90, "column", 64, "bfloat16", True),
    (90, "torus", 128, "bfloat16", True),
    (90, "row", 128, "tf32", False),
    (100, "torus", 128, "bfloat16", True),
    (100, "flat", 128, "float16", False),
    (100, "corner", 64, "float32", True),
    (100, "causal", 64, "bfloat16", False),
    (86, "torus", 128, "bfloat16", True),
    (120, "column", 64, "bfloat16", True),
]


DECODING = [
    *((arch, "row", 64, "bfloat16", True) for arch in (*ARCHITECTURES, *CONSUMERS)),
    (90, "column", 128, "float16", True),
    (80, "flat", 128, "bfloat16", True),
    (100, "flat in patches", 128, "float32", True),
    (90, "flat", 64, "float32", True),
    (80, "row", 128, "float32", True),
    (90, "causal", 48, "bfloat16", True),
]


NORMS = [*((arch, "bfloat16") for arch in ARCHITECTURES), (90, "float16"), (90, "float32")]


@pytest.fixture
def shortcomings(compile_for, usages, tmp_path):
    """shortcomings(case, call): what is wrong with the kernels of a call, as a list of words; says how large they are."""

    def shortcomings(case, call):
        arch, name, head_size, dtype, text_lengths = case
        wrong = []
        for kernel_name, kernel in compile_for(arch, MASKS[name], head_size, dtype, text_lengths, call).items():
            registers, local, shared, code = kernel_usage(kernel, tmp_path)
            usages.append(((arch, head_size, dtype, kernel_name), (registers, local, shared)))
            print(
                f"sm_{arch} {name:17} D {head_size:3} {dtype:8} text_lengths {text_lengths:1} {kernel_name:14} "
                f"{kernel.metadata.num_warps} warps {registers:3} registers {shared / 1024:5.1f} KiB shared {local} spilled"
            )
            if local:
                wrong.append(f"{kernel_name} spills {local} bytes")
            if shared > SHARED_LIMIT[arch] << 10:
                wrong.append(
                    f"{kernel_name} needs {shared} bytes of shared memory, {SHARED_LIMIT[arch] << 10} are there"
                )
            # Products of 16 rows, as decode has them, are HMMA on every architecture.
            product = {"decode_text": r"\bHMMA\b"}.get(kernel_name, TENSOR_CORE["tf32" if dtype == "tf32" else arch])
            if kernel_name not in WITHOUT_PRODUCTS and dtype != "float32" and not re.search(product, code):
                wrong.append(f"{kernel_name} has no instruction {product}")
            if dtype == "float32" and kernel_name in SUMS and not sums_of_sums(kernel, SUMS[kernel_name]):
                wrong.append(f"{kernel_name} adds products to a sum one by one")
        return wrong

    return shortcomings


SUMS = {"grad_query": 1, "grad_key_value": 2}


def sums_of_sums(kernel, count):
    """A product that is added to a sum is summed on its own: one chain of 1,280 additions errs several times as much."""
    text = kernel.asm["ttir"]
    zeros = set(re.findall(r"(%\S+) = arith.constant dense<0\.0+e\+00> : tensor<\w+xf32>", text))
    products = re.findall(r"(%\S+) = tt\.dot %\S+, %\S+, (%[^\s,]+)", text)
    added = re.findall(r"arith\.addf (%\S+), (%\S+) :", text)
    summed = {name for name, _ in products if any(name in pair for pair in added)}
    return bool(products) and {start for _, start in products} <= zeros and len(summed) >= count


@pytest.mark.parametrize("case", ALL if EVERYTHING else SUBSET, ids=str)
def test_compiles_well(shortcomings, case):
    assert not shortcomings(case, attend)


@pytest.mark.parametrize("case", ALL if EVERYTHING else DECODING, ids=str)
def test_decoding_compiles_well(shortcomings, case):
    assert not shortcomings(case, decode)


@pytest.mark.parametrize("call", [attend, decode])
@pytest.mark.parametrize("case", [(90, "row", 40, "bfloat16", False), (90, "column", 72, "float16", True)], ids=str)
def test_heads_of_half_a_block_are_read_16_bytes_at_a_time(compile_for, shortcomings, tmp_path, case, call):
    """Multiples of 8 that are none of 16. Read number by number, and not ahead, they spilled up to 192 bytes."""
    assert not shortcomings(case, call)
    arch, name, *rest = case
    for kernel_name, kernel in compile_for(arch, MASKS[name], *rest, call).items():
        *_, code = kernel_usage(kernel, tmp_path)
        assert not re.search(r"\b(LDG|STG)\S*\.U16", code), kernel_name
        assert re.search(r"\bLDG(STS)?\S*\.128", code), kernel_name


@pytest.mark.parametrize("arch, dtype", NORMS, ids=str)
def test_add_norm_compiles_well(compile_for, arch, dtype, tmp_path):
    """A row is read 16 bytes at a time, and kept in registers."""

    def add_norm(mask, width, dtype, with_update):
        row, rows = torch.zeros(width, dtype=dtype), torch.zeros(64, width, dtype=dtype)
        norm_triton.add_norm(rows, None if with_update is None else rows, row, row, 1e-5)

    some = (1000, True), (2048, False), (8192, True)
    for width, with_update in itertools.product((1000, 2048, 8192), (False, True)) if EVERYTHING else some:
        kernel = compile_for(arch, None, width, dtype, with_update, add_norm)["add_norm"]
        registers, local, _, code = kernel_usage(kernel, tmp_path)
        print(f"sm_{arch} {width} {dtype} update {with_update:1} {registers} registers {local} spilled")
        assert local == 0 and re.search(r"\bLDG\.E\.128", code)


# -- linear layers -----------------------------------------------------------------------------------------------------

LAYERS = ((2048, 2048), (8192, 2048), (6144, 2048), (2048, 8192))  # (N, K) of a model of width 2,048
LINEAR = [
    *(
        (arch, rows, N, K)
        for arch in ARCHITECTURES
        for rows in ((8, 32, 64) if EVERYTHING else (8, 64))
        # Of those with 64 rows the others have the same tiles as one of these.
        for N, K in (LAYERS if EVERYTHING else LAYERS[1::2] if rows == 64 else LAYERS[:1])
    ),
    *(
        (arch, rows, *sizes)
        for arch in ARCHITECTURES
        for rows, sizes in ((1, (1, 1)), (3, (1000, 1001)), (64, (33, 2064)))
    ),
]


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_linear_compiles_well(compile_for, tmp_path, case):
    """Rows of 16 numbers, or multiples, are copied by 16 bytes into shared memory, ahead of the products."""
    arch, rows, N, K = case
    activation = "gelu" if N > K else None

    def call(mask, head_size, dtype, text_lengths):
        x, weight, bias = (torch.zeros(*shape, dtype=dtype) for shape in ((rows, K), (N, K), (N,)))
        linear_triton.linear(x, weight, bias, activation)

    (kernel,) = compile_for(arch, None, None, "bfloat16", False, call).values()
    registers, local, shared, code = kernel_usage(kernel, tmp_path)
    print(
        f"sm_{arch} {rows:2} rows {N:4} x {K:4} {kernel.metadata.num_warps} warps {registers:3} registers "
        f"{shared / 1024:5.1f} KiB shared {local} spilled"
    )
    assert local == 0
    assert shared <= SHARED_LIMIT[arch] << 10
    assert re.search(TENSOR_CORE[arch], code)
    if K % 16 == 0:
        copies = re.findall(r"\bLDGSTS\S*", code)
        assert copies and all(".128" in copy for copy in copies)
    assert ("atom.global.gpu.acq_rel" in kernel.asm["ptx"]) == (
        linear_triton.tiles_for(rows, N, K, 132, 227 << 10).splits > 1
    )
