"""Training objectives, one file each. A task makes batches and a loss for the engine in `florence_fast.train`.

A new task is a file here and a line in TASKS.
"""

from florence_fast.tasks.classification import ClassificationConfig, ClassificationTask
from florence_fast.tasks.contrastive import ContrastiveConfig, ContrastiveTask
from florence_fast.train.task import Task

TASKS: dict[str, type[Task]] = {
    "contrastive": ContrastiveTask,
    "classification": ClassificationTask,
}

__all__ = ["TASKS", "ClassificationConfig", "ClassificationTask", "ContrastiveConfig", "ContrastiveTask"]
