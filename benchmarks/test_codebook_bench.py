"""The cases of `codebook_bench.py` under pytest-benchmark, as `test_attn_bench.py` has those of attention.

Select with -k, such as `-k "argmax and float32"`.
"""

import codebook_bench
import pytest

ARGS = codebook_bench.parse([])
PAIRS = [(case, contender) for case in ARGS.cases for contender in codebook_bench.contenders_of(case, ARGS)]


@pytest.mark.parametrize("case, contender", PAIRS, ids=[f"{case.name}-{contender.name}" for case, contender in PAIRS])
def test_codebook(time_contender, case, contender):
    time_contender(codebook_bench, ARGS, case, contender)
