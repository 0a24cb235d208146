"""Tries cases of one figure, a line of JSON for each: `python -m dalle_fast.verify.worker NAME DEVICE START STOP`.

The runner's child, and the way to repeat a failure by its number.
"""

from __future__ import annotations

import json
import os
import sys
import warnings

from dalle_fast.verify.figures import FIGURES, NotRun


def main(name: str, device: str, start: int, stop: int) -> None:
    import dataclasses

    import torch

    if device == "cpu":
        torch.set_num_threads(1)  # several figures run side by side
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a case prints is no answer
    figure = dataclasses.replace(FIGURES[name], device=device)
    for number in range(start, stop):
        try:
            answer = {"numbers": figure.case(number) or {}}
        except NotRun as reason:
            answer = {"not run": str(reason)}
        except Exception as error:  # noqa: BLE001 - a failed comparison or a crash alike
            answer = {"error": f"{type(error).__name__}: {str(error)[:1000]}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
