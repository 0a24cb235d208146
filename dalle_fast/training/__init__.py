"""Training: one loop for both stages, their objectives, and schedules."""

from dalle_fast.training.loop import LoopSettings, Objective, TrainingError, TrainResult, train

__all__ = ["LoopSettings", "Objective", "TrainResult", "TrainingError", "train"]
