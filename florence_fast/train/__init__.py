"""Training: losses, the gradient cache, process groups, and the engine, which runs any task and resumes a run."""

from florence_fast.train.checkpoint import CheckpointStore, CorruptCheckpointError
from florence_fast.train.config import PAPER_STAGES, RunConfig, Stage, paper_stages
from florence_fast.train.distributed import RankMismatchError, init_distributed
from florence_fast.train.ema import EMA
from florence_fast.train.engine import Trainer, TrainingDivergedError
from florence_fast.train.grad_cache import GradCache
from florence_fast.train.loss import ContrastiveLoss
from florence_fast.train.optim import create_optimizer, learning_rate
from florence_fast.train.resume import ResumeError
from florence_fast.train.run_lock import RunInUseError
from florence_fast.train.task import Evaluator, Task

__all__ = [
    "EMA",
    "PAPER_STAGES",
    "CheckpointStore",
    "ContrastiveLoss",
    "CorruptCheckpointError",
    "Evaluator",
    "GradCache",
    "RankMismatchError",
    "ResumeError",
    "RunConfig",
    "RunInUseError",
    "Stage",
    "Task",
    "Trainer",
    "TrainingDivergedError",
    "create_optimizer",
    "init_distributed",
    "learning_rate",
    "paper_stages",
]
