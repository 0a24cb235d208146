"""The cases of `attn_bench.py` under pytest-benchmark: `pytest benchmarks --benchmark-only`.

The cases and contenders are those of `python benchmarks/attn_bench.py`. That command interleaves them and measures
memory and errors too, so it is the one to quote; here each contender is timed on its own, in pytest-benchmark's format,
and this package's results are held against float64. Select with -k, such as `-k "row and float32"`.
"""

import functools

import attn_bench
import pytest
import torch
from harness import NotRun

ARGS = attn_bench.parse([])
CONTENDERS = attn_bench.make_contenders(ARGS.device, ARGS.impl, ARGS.flex_block)


@functools.lru_cache(maxsize=1)
def inputs_of(case):
    return attn_bench.make_inputs(case, ARGS.device)


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
@pytest.mark.parametrize("case", ARGS.cases, ids=lambda case: case.name)
def test_attention(benchmark, case, contender):
    torch.set_num_threads(ARGS.threads)
    benchmark.group = f"{case.name} ({case.sizes})"
    inputs = inputs_of(case)
    with attn_bench.strict_compile():
        try:
            attn_bench.check_memory(contender, case, attn_bench.free_bytes(ARGS.device))
            call = attn_bench.make_call(contender.build(case, ARGS.device), case, inputs)
            outputs = call()
        except (NotRun, RuntimeError) as reason:
            if contender.name == attn_bench.OURS:
                raise
            pytest.skip(f"{contender.name}: {attn_bench.reason_of(reason)}")
        if contender.name == attn_bench.OURS:
            oracle = attn_bench.Oracle(case, inputs)
            errors, allowed = oracle.errors(outputs), oracle.allowed()
            assert {name: e["max_abs"] for name, e in errors.items() if not e["max_abs"] <= allowed[name]} == {}
        synchronize = torch.cuda.synchronize if ARGS.device == "cuda" else lambda: None
        benchmark.pedantic(lambda: (call(), synchronize()), rounds=7, warmup_rounds=1)
