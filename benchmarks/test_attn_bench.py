"""The cases of `attn_bench.py` under pytest-benchmark: `pytest benchmarks --benchmark-only`.

The cases and contenders are those of `python benchmarks/attn_bench.py`. That command interleaves them and measures
memory and errors too, so it is the one to quote; here each contender is timed on its own, in pytest-benchmark's format,
and this package's results are held against float64. Select with -k, such as `-k "row and float32"`.
"""

import attn_bench
import pytest

ARGS = attn_bench.parse([])
CONTENDERS = attn_bench.make_contenders(ARGS.device, ARGS.impl, ARGS.flex_block)


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
@pytest.mark.parametrize("case", ARGS.cases, ids=lambda case: case.name)
def test_attention(time_contender, case, contender):
    time_contender(attn_bench, ARGS, case, contender)
