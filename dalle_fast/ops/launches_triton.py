"""Launching a Triton kernel again by a shorter way than the first time.

Triton looks at all arguments in Python and C++, makes a text of its options and compares every constant that the kernel
knows from outside, each time: twice what a launch takes without (benchmarks/NOTES.md), where a GPU waits for its host.
"""

import torch

__all__ = ["Launches"]

MOST_KEPT = 1024  # compiled kernels by arguments, of one kernel


class Launches:
    """A kernel's launches: `launches(grid, *args, **options)` is `kernel[grid](*args, **options)`.

    The first with such arguments goes through Triton, which compiles. Another one goes to the compiled kernel at once. It
    is the same one where everything that Triton specialises for is the same: of tensors the dtype and whether they begin
    at a multiple of 16 bytes, of tensor descriptors the dtype and the block, of all else, tuples included, the value.
    Triton's hooks on launches are called, but what is set among its knobs for compiling is noticed only where Triton
    compiles.

    Args:
        kernel: of `triton.jit`; one that is interpreted goes through Triton always.
    """

    def __init__(self, kernel):
        self._kernel = kernel
        self._compiled = {}

    def __call__(self, grid, *args, **options):
        """grid: a tuple of one to three numbers of programs. args: all the kernel's, a tensor or a descriptor first."""
        first = args[0]
        key = [(first if isinstance(first, torch.Tensor) else first.base).get_device(), *options.values()]
        for x in args:
            if isinstance(x, torch.Tensor):
                key += x.dtype, x.data_ptr() % 16 == 0
            elif hasattr(x, "block_shape"):
                key += x.base.dtype, *x.block_shape, x.padding
            else:
                key.append(x)
        key = tuple(key)
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[(*grid, 1, 1)[:3]](*args)
            return
        compiled = self._kernel[grid](*args, **options)
        if compiled is not None:  # the interpreter has none
            if len(self._compiled) >= MOST_KEPT:
                self._compiled.clear()
            self._compiled[key] = compiled
