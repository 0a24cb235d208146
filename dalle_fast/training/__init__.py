"""Training: one loop for both stages, their objectives, recipes and schedules.

Nothing is imported before it is used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for type checkers and editors, which do not see what is imported when it is used
    from dalle_fast.training.codes import Encoded as Encoded
    from dalle_fast.training.codes import encode_source as encode_source
    from dalle_fast.training.loop import LoopSettings as LoopSettings
    from dalle_fast.training.loop import Objective as Objective
    from dalle_fast.training.loop import TrainingError as TrainingError
    from dalle_fast.training.loop import TrainResult as TrainResult
    from dalle_fast.training.loop import train as train
    from dalle_fast.training.recipes import DALLERecipe as DALLERecipe
    from dalle_fast.training.recipes import DVAERecipe as DVAERecipe
    from dalle_fast.training.stage1 import DVAEObjective as DVAEObjective
    from dalle_fast.training.stage2 import DALLEObjective as DALLEObjective

_HOMES = {
    "DALLEObjective": "stage2",
    "DALLERecipe": "recipes",
    "DVAEObjective": "stage1",
    "DVAERecipe": "recipes",
    "Encoded": "codes",
    "LoopSettings": "loop",
    "Objective": "loop",
    "TrainResult": "loop",
    "TrainingError": "loop",
    "encode_source": "codes",
    "train": "loop",
}

__all__ = sorted(_HOMES)


def __getattr__(name):
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_HOMES])
