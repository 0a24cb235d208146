"""Lets `pytest benchmarks --benchmark-only` import what lies beside it, whatever pytest's import mode, and time it."""

import functools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@functools.lru_cache(maxsize=1)
def _inputs_of(module, case, device):
    return module.make_inputs(case, device)


@pytest.fixture
def time_contender(benchmark):
    """time_contender(module, args, case, contender): time one contender of a benchmark module by pytest-benchmark.

    Skips what cannot run here, and holds this package's results against float64.
    """
    import exactness
    import flags
    import harness
    import measuring
    import torch

    from dalle_fast.nn.memory import free_memory

    def time_contender(module, args, case, contender):
        torch.set_num_threads(args.threads)
        benchmark.group = f"{case.name} ({case.sizes})"
        inputs = _inputs_of(module, case, args.device)
        with harness.strict_compile():
            try:
                harness.check_memory(contender, case, free_memory(torch.device(args.device)))
                call = module.make_call(contender.build(case, args.device), case, inputs)
                call()
            except (measuring.NotRun, RuntimeError) as reason:
                if contender.name == flags.OURS:
                    raise
                pytest.skip(f"{contender.name}: {measuring.reason_of(reason)}")
            if contender.name == flags.OURS:
                oracle = module.Oracle(case, inputs)
                assert exactness.beyond(oracle.judge(contender, call), oracle.allowed()) == {}
            synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None
            benchmark.pedantic(lambda: (call(), synchronize()), rounds=module.MIN_ROUNDS, warmup_rounds=1)

    return time_contender
