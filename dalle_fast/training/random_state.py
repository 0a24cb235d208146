"""The states of the random generators a run may use (torch's, Python's, NumPy's), as JSON can hold them."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import torch


def seed(number: int) -> None:
    """Seed all of them, so that two processes that begin a run have the same."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)


def get() -> dict:
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": [state.numpy().tobytes().hex() for state in _cuda_states()],
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
    }


def put(state: dict) -> None:
    """Set them to what `get` returned. Generators of GPUs that are not here now are left out."""
    torch.set_rng_state(_bytes(state["torch"]))
    for index, words in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_bytes(words), index)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))


@contextlib.contextmanager
def untouched():
    """What happens within it draws its numbers, and those after it do not notice."""
    state = get()
    try:
        yield
    finally:
        put(state)


def _cuda_states():
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _bytes(words: str):
    return torch.frombuffer(bytearray.fromhex(words), dtype=torch.uint8)
