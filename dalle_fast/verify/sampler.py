"""Samples have the distribution that they should, and samplers with the flaws that kernels have had are rejected."""

from __future__ import annotations

from dalle_fast.sampler_tests import FLAWS, GROUPS, codebook_sampler, contrasts, flawed_sampler, rejections
from dalle_fast.verify.random_calls import IMPLEMENTATIONS

CASES = [*(("exact", group) for group in GROUPS), *(("flawed", flaw) for flaw in FLAWS)]


def case(number: int, device: str) -> dict | None:
    kind, name = CASES[number]
    if kind == "flawed":
        sample, group = flawed_sampler(name)
        if not rejections(contrasts(sample, groups=[group])):
            raise AssertionError(f"a sampler with {name} passes")
        return None
    found = contrasts(codebook_sampler(IMPLEMENTATIONS["codebook"][device], device), groups=[name])
    if rejected := rejections(found):
        raise AssertionError(f"{name}: {rejected}")
    return {"deviations": max(abs(value) for value in found.values())}
