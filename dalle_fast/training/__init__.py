"""Training: one loop for both stages, their objectives, recipes and schedules.

Nothing is imported before it is used.
"""

import importlib

_HOMES = {
    "DALLEObjective": "stage2",
    "DALLERecipe": "recipes",
    "DVAEObjective": "stage1",
    "DVAERecipe": "recipes",
    "LoopSettings": "loop",
    "Objective": "loop",
    "TrainResult": "loop",
    "TrainingError": "loop",
    "train": "loop",
}

__all__ = sorted(_HOMES)


def __getattr__(name):
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
