"""Training killed with SIGKILL at 50 moments, at least 15 of them inside a checkpoint's write, and resumed bit-exactly."""

from __future__ import annotations

from dalle_fast.verify.checkout import must_pass


def case(number: int, device: str) -> dict:
    return must_pass("tests/test_training_kill.py", DALLE_FAST_KILLS="50")
