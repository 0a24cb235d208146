"""Training killed with SIGKILL at random moments, some inside a checkpoint's write, and resumed bit-exactly."""

from __future__ import annotations

import tempfile

from dalle_fast.kill_tests import kill_and_resume

KILLS, INSIDE = 10, 3  # of each case


def case(number: int, device: str) -> dict:
    with tempfile.TemporaryDirectory(prefix="dalle_fast_verify_") as folder:
        report = kill_and_resume(folder, kills=KILLS, inside=INSIDE, seed=number)
    if report.failures or report.kills < KILLS or report.inside_writes < INSIDE or report.runs < 1:
        raise AssertionError(f"{report}: {'; '.join(report.failures) or 'too few'}")
    where = {place: count for place, count in report.places.items() if count}
    return {"kills": report.kills, "inside a write": report.inside_writes, "runs compared": report.runs, **where}
