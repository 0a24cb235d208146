"""Training on a CPU keeps the memory of a step for the next one, instead of having it cleared by the system again."""

import subprocess
import sys

import pytest

COUNT_FAULTS = """
import ctypes, resource, sys, torch
from dalle_fast.training import malloc
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert malloc.keep_freed_memory()
else:  # what glibc does for a tensor until it has met some of its size, and then more or less often
    assert ctypes.CDLL(None).mallopt(malloc.M_MMAP_THRESHOLD, 1 << 20)
def step():  # tensors of 8 MiB, as an activation is
    x = torch.ones(2 << 20)
    for _ in range(3):
        x = x * 2 + 1
for _ in range(10):  # until the heap has the size that it needs
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how):
    command = [sys.executable, "-c", COUNT_FAULTS, how]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_steps_fault_in_little_memory_that_earlier_ones_freed():
    """Of 80 tensors mostly none, and once in many runs one: the heap may grow late. Mapped anew, all of them."""
    pages_of_one_tensor = (8 << 20) // 4096
    assert faults("keep") < 4 * pages_of_one_tensor
    assert faults("map") >= 79 * pages_of_one_tensor
