"""Tries cases of one figure, a line of JSON for each: `python -m dalle_fast.verify.worker NAME DEVICE START STOP [FLAG]`.

The runner's child, and the way to repeat a failure by its number. With --strict the exit status is 1 where a case failed
or was not run, for tools that watch it, as a sanitizer does. With --guarded it ends, and all processes of its group, once
stdin does: with the runner, also where that is killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import warnings

from dalle_fast.verify.figures import FIGURES, NotRun


def main(name: str, device: str, start: int, stop: int) -> bool:
    """Try the cases from `start` to before `stop`; returns whether all were tried and none failed."""
    import dataclasses

    import torch

    if device == "cpu":
        torch.set_num_threads(1)  # several figures run side by side
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a case prints is no answer
    figure, fine = dataclasses.replace(FIGURES[name], device=device), stop > start
    for number in range(start, stop):
        try:
            answer = {"numbers": figure.case(number) or {}}
        except NotRun as reason:
            answer = {"not run": str(reason)}
        except Exception as error:  # noqa: BLE001 - a failed comparison or a crash alike
            answer = {"error": f"{type(error).__name__}: {str(error)[:1000]}"}
        fine = fine and "numbers" in answer
        print(json.dumps(answer), file=answers, flush=True)
    return fine


def _end_with_stdin() -> None:
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    name, device, start, stop, *flags = sys.argv[1:]
    if "--guarded" in flags:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    fine = main(name, device, int(start), int(stop))
    sys.exit(0 if fine or "--strict" not in flags else 1)
