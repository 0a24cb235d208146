"""The figures of `dalle-fast verify`: what is counted, how many cases there are, and which function tries one.

A figure is a numbered list of cases, each a function of its number and the devices alone, so that a failure can be
repeated by its number and an interrupted figure goes on where it stopped. A case that raises has failed; of the numbers
that it returns the largest are kept, and of whole numbers, which count something, the sums. `NotRun` says that it cannot
be tried here, and why.

The modules are imported when a figure is tried, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import importlib

__all__ = ["FIGURES", "Figure", "NotRun"]


class NotRun(Exception):
    """A case that cannot be tried on this machine; its text is the reason."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """One line of the evidence.

    Attributes:
        name: of the figure, and of the module in `dalle_fast.verify` whose `case(number, device)` tries one case.
        title: what it counts.
        total: number of cases.
        seconds: after which a case is taken to hang.
        about: how many seconds a case takes, where they are many: with less of the budget left none is begun.
        device: "cpu", or "cuda" for what needs a GPU.
        gpu_total: number of cases on a GPU, 0 where there are none. Where each case has a mask of its own they are
            few: its kernels take seconds to compile.
    """

    name: str
    title: str
    total: int
    seconds: float = 120
    about: float = 0
    device: str = "cpu"
    gpu_total: int = 0

    def case(self, number: int) -> dict | None:
        """Try one case: returns numbers to keep, by their names, and raises what went wrong, or `NotRun`."""
        if self.device == "cuda":
            import torch

            if not torch.cuda.is_available():
                raise NotRun("torch finds no CUDA device here")
        return importlib.import_module(f"dalle_fast.verify.{self.name}").case(number, self.device)


# The most important first: where the budget ends, what comes later is not run.
FIGURES = {
    figure.name: figure
    for figure in (
        Figure("diff", "random calls whose results differ from float64's", 5000, gpu_total=40),
        Figure(
            "error",
            "worst error over that of eager torch in the same dtype, at most 2, at the paper's sizes",
            18,
            gpu_total=18,
        ),
        Figure("causal", "tokens whose change reaches an earlier output", 457, gpu_total=457),
        Figure("decode", "masks whose decoded tokens differ from the full forward pass", 42, gpu_total=42),
        Figure("gradcheck", "gradients of the reference against finite differences in float64", 200),
        Figure("badinput", "wrong arguments that crash, hang or give an answer", 500),
        Figure("repeat", "repeats that differ in a bit, alone or in another batch", 1000, gpu_total=40),
        Figure("guard", "accesses outside of a tensor that is given, with unreadable pages around each", 400),
        Figure("large", "wrong results with offsets beyond 2^31 elements", 6, gpu_total=6),
        Figure("sampler", "groups of contrasts passed, and flawed samplers rejected", 21, 300, gpu_total=21),
        Figure("noise", "slices of all 2^32 words whose noise is not finite or not in order", 256),
        Figure(
            "kill",
            "tens of kills after which a resumed training run differs, 3 inside a checkpoint's write",
            5,
            600,
            40,
        ),
        Figure("mutants", "faults seeded one at a time that no test catches", 35, 600, 30),
        Figure("native", "findings of the sanitizers in C++ and host-compiled CUDA", 4, 1800, 250),
        Figure("static", "GPU kernels that spill, compiled for sm_80, sm_90 and sm_100", 3, 14400, 3000),
    )
}
