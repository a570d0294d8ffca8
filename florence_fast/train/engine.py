"""The training loop: stages, steps, intervals, checkpoints, and what happens when a step goes wrong (section 2.2)."""

import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import nn

from florence_fast.precision import choose_precision, is_pure, resolve_precision
from florence_fast.provenance import provenance
from florence_fast.ranges import annotate, annotated
from florence_fast.train.checkpoint import CheckpointStore, CorruptCheckpointError
from florence_fast.train.config import RunConfig, Stage, join_settings
from florence_fast.train.counters import Counters
from florence_fast.train.describe import describe_model, model_config, model_name
from florence_fast.train.distributed import on_rank_0, rank, require_equal_on_ranks, world_size
from florence_fast.train.evaluation import is_measured, measure
from florence_fast.train.log import IntervalTimes, RunLog, Stopwatch
from florence_fast.train.optim import learning_rate
from florence_fast.train.reproducible import (
    deterministic_algorithms,
    environment,
    numpy_states,
    rng_state,
    set_rng_state,
    warn_of_differences,
)
from florence_fast.train.resume import CHECKPOINT_FORMAT, check_settings, check_tensors, naming_checkpoint, not_finite
from florence_fast.train.run_lock import RunLock
from florence_fast.train.signals import StopRequest
from florence_fast.train.state import TrainingDivergedError, TrainState, prepare
from florence_fast.train.task import Batch, Task

logger = logging.getLogger(__name__)

OnInterval = Callable[["Trainer", dict[str, Any]], Mapping[str, Any] | None]


class Trainer:
    """Train a task through the stages of a run, and be able to go on from any checkpoint.

    A step's randomness comes from (seed, step) and its data from (seed, position), so a run that was killed and
    resumed has the losses of one that was not, to the bit, on the same machine and thread count.

    Args:
        task: what is trained, and on which data; its model is on its device and is trained in place.
        run: stages and settings.
        out_dir: the run's folder: `checkpoints/`, `out.log`, `params.txt`, `tensorboard/`.
        on_interval: called as `on_interval(trainer, record)` after every interval, on every rank, with the model in
            eval mode; its time is not counted, and a dict that it returns becomes a record of `results.jsonl`. After
            a signal it is not called any more, so that the checkpoint is written without delay. Measurements belong
            into the task's evaluators, which need no trainer.
        generators: NumPy generators that the task or `on_interval` draw from; checkpoints carry their state.
        about: what `params.txt` says besides the settings, the command, the commit and the versions.

    Raises:
        RankMismatchError: this rank and another have different settings, models or data.

    >>> task = ContrastiveTask(model, tokenizer, open_pairs("pairs.csv"))
    >>> Trainer(task, RunConfig(stages=paper_stages(2000)), "logs/a").run(resume="latest")["images_per_second"]
    """

    def __init__(
        self,
        task: Task,
        run: RunConfig,
        out_dir: str | os.PathLike[str],
        *,
        on_interval: OnInterval | None = None,
        generators: Mapping[str, np.random.Generator] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.task, self.device = task, task.device
        self.precision = choose_precision(run.precision, self.device)
        self.config = run = replace(run, precision=resolve_precision(run.precision, self.device))
        self.out_dir = Path(out_dir)
        self.on_interval = on_interval
        self.generators = dict(generators or {})
        self.about = dict(about or {})
        prepare(task, run)
        self.settings = join_settings(run, task.name, task.config)
        self.data = dict(task.describe_data())
        require_equal_on_ranks({"config": self.settings, "model": describe_model(task.model), "data": self.data})
        self.state = TrainState(task, run)
        self.store = CheckpointStore(self.out_dir / "checkpoints", run.keep_checkpoints)
        self.watch = Stopwatch()
        self._times = IntervalTimes()
        self._stage_number: int | None = None
        self._batches: Iterator[Batch] = iter(())
        self._saved: Path | None = None  # the newest checkpoint, written or resumed from
        self._tried_to_save = 0  # the step of the last checkpoint that is there or could not be written
        self._due: dict[str, Any] | None = None  # record of the last interval, until it has been evaluated
        self._drawn: dict[str, str] | None = None  # the generators' state before what is going on drew from them
        self._waiting = False  # for a batch

    @property
    def model(self) -> nn.Module:
        """What is trained."""
        return self.task.model

    @property
    def counters(self) -> Counters:
        """How far the run has come."""
        return self.state.counters

    @property
    def step(self) -> int:
        """Steps taken so far."""
        return self.counters.step

    @property
    def seconds(self) -> float:
        """Seconds of training over all resumed parts, without the time of `on_interval`."""
        return self.watch.seconds

    def run(self, resume: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """Train to the end of the last stage, or until SIGTERM, SIGINT or SIGHUP, which save and return.

        Whatever else ends the run, an error of the data or of `on_interval` among them, the steps taken so far are
        saved first.

        Args:
            resume: "latest" goes on from the newest valid checkpoint of `out_dir`, or starts where there is none; a
                path goes on from that checkpoint; None starts a new run.

        Returns:
            "status" ("finished" or "stopped"), "signal" (its name or None), "images_per_second", "checkpoint" (path,
            None when stopped before the first step), and the counters: "step", "position", "seconds", "loss" (mean of
            the last interval), "skipped_steps", "bad_samples" and so on.

        Raises:
            FileExistsError: a new run would write into the folder of an earlier one.
            RunInUseError: another run that is still alive writes to the folder.
            FileNotFoundError, CorruptCheckpointError: the checkpoint to resume from is missing or not whole.
            ResumeError: the checkpoint belongs to another model, schedule or version.
            TrainingDivergedError: more than `max_skipped_steps` steps in a row had to be skipped, or a weight is NaN
                or Inf.
        """
        require_equal_on_ranks({"resume": None if resume is None else str(resume)})
        with ExitStack() as held:
            on_rank_0(lambda: self._claim_folder(held, resume))
            return self._run(resume)

    def _claim_folder(self, held: ExitStack, resume: str | os.PathLike[str] | None) -> None:
        """Lock the run's folder, and refuse to start a new run beside the checkpoints of an earlier one."""
        held.enter_context(RunLock(self.out_dir))
        if resume is None and (earlier := sorted(self.store.folder.glob("step_*.pt"))):
            raise FileExistsError(
                f"{self.out_dir} holds a run already ({earlier[0].name}): resume='latest' goes on with it, "
                "another out_dir starts anew"
            )

    def _run(self, resume: str | os.PathLike[str] | None) -> dict[str, Any]:
        """Open the log, resume, train, and close everything."""
        config = self.config
        deterministic = self.device.type == "cpu" if config.deterministic is None else config.deterministic
        self.log = RunLog(
            self.out_dir,
            samples_per_epoch=self.task.epoch_size,
            world_size=world_size(),
            progress=config.progress,
            tensorboard=config.tensorboard,
            wandb=config.wandb,
            enabled=rank() == 0,
        )
        with self.log, deterministic_algorithms(deterministic), StopRequest() as stop:
            self._saved = self._resume(resume)
            # A finished run is evaluated once; any other goes on as it would have done, evaluation included.
            if self.step == config.total_steps and on_rank_0(lambda: self.log.records_of(self.step)) > 1:
                self._due = None
            logger.info("%s", self.precision)
            if is_pure(config.precision):
                logger.warning("%s keeps no fp32 copy of its weights: small updates are lost", config.precision)
            self.log.start(self.step, config.total_steps, self._params(), evaluated=self._due is None)
            self.watch = Stopwatch(self.counters.seconds)
            try:
                self._train(stop)
            finally:
                self._leave_stage()
            self.counters.seconds = self.watch.seconds
        return {
            "status": "finished" if self.step == config.total_steps else "stopped",
            "signal": stop.signal.name if stop.signal else None,
            "images_per_second": self.counters.position / self.counters.seconds,
            "checkpoint": None if self._saved is None else str(self._saved),
            **self.counters.to_dict(),
        }

    def _train(self, stop: StopRequest) -> None:
        """Take steps until the end or a signal, and save what has been reached, whatever the end is."""
        self.model.train()
        self._times = IntervalTimes()
        stopping = self._waiting = False
        try:
            self._evaluate()
            while not stopping and self.step < self.config.total_steps:
                stopping = self._take_step(stop)
                self._end_step(stopping)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self._save_before_leaving()
            if not (self._waiting and stop and isinstance(error, Exception)):
                raise
            logger.warning("gave up waiting for the next batch: %s", error)
        if self.step < self.config.total_steps:
            logger.info("stopped by %s after step %d", stop.signal.name if stop.signal else "another rank", self.step)

    def _end_step(self, stopping: bool) -> None:
        """Do what is due between two steps: log, then save, and evaluate only when nothing can be lost by it."""
        step, config = self.step, self.config
        measured, last = is_measured(self.task, config, step), step == config.total_steps
        if last or measured or step % config.log_every_n_steps == 0:
            self._end_interval()
        regular = config.save_every_steps and step % config.save_every_steps == 0
        # A measurement may take longer than a batch system waits between its signal and its kill.
        if stopping or regular or measured or last:
            self._save()
        if not stopping:
            self._evaluate()

    @annotated("train.step")
    def _take_step(self, stop: StopRequest) -> bool:
        """Take one step; return whether some rank was asked to stop."""
        started = time.perf_counter()
        self._drawn = numpy_states(self.generators)
        stage = self._enter_stage(stop)
        self._waiting = True
        with annotate("train.data"):
            batch = next(self._batches)
        self._waiting = False
        self._times.add(time.perf_counter() - started, len(batch) * world_size())
        stopping = self.state.take_step(batch, stage, bool(stop))
        self._drawn = None
        self.log.step()
        return stopping

    def _enter_stage(self, stop: StopRequest) -> Stage:
        """Return the stage of the next step; at a border, let the task prepare and ask it for other batches."""
        number, stage = self.config.stage_at(self.step)
        if number != self._stage_number:
            self.state.enter_stage(number)
            self._stage_number = number
            size = stage.batch_size or self.config.batch_size
            self._batches = iter(self.task.batches(stage, size, self.counters.position, lambda: bool(stop)))
            logger.info("stage %d of %d from step %d: %s", number + 1, len(self.config.stages), self.step, stage)
        return stage

    def _leave_stage(self) -> None:
        """Let go of the batches, and with them of the loader's processes."""
        self._batches, self._stage_number = iter(()), None

    def _end_interval(self) -> None:
        """Write the interval's line and record; its evaluation is due from then on."""
        counters = self.counters
        counters.close_interval()
        record = {
            "step": counters.step,
            "epoch": (counters.position - 1) // self.task.epoch_size,
            "position": counters.position,
            "stage": self._stage_number,
            "loss": counters.loss,
            "last_loss": counters.last_loss,
            "grad_norm": counters.grad_norm,
            "lr": learning_rate(self.config, counters.step - 1),
            **self.task.scalars(),
            "seconds": self.watch.seconds,
            **self._times.averages(),
            "skipped_steps": counters.skipped_steps,
            "bad_samples": counters.bad_samples,
        }
        self._due = record if self._is_evaluated(counters.step) else None
        self.log.interval(record, tuple(self.task.scalars()))
        self._times = IntervalTimes()

    def _is_evaluated(self, step: int) -> bool:
        return self.on_interval is not None or is_measured(self.task, self.config, step)

    def _evaluate(self) -> None:
        """Evaluate what the last interval has come to, if that is due, with the clock stopped."""
        if self._due is None:
            return
        self._drawn = numpy_states(self.generators)
        with self.watch.paused():
            self.model.eval()
            answer = None if self.on_interval is None else self.on_interval(self, self._due)
            if is_measured(self.task, self.config, self.step):
                answer = {**(answer or {}), **measure(self.task, self.state.ema)}
            self.model.train()
        self._drawn = self._due = None
        if answer is not None:
            self.log.evaluation({"step": self.step, "seconds": self.watch.seconds, **answer})
        self._times = IntervalTimes()

    @annotated("train.checkpoint")
    def _save(self) -> None:
        """Write a checkpoint from rank 0; the others wait."""
        self._tried_to_save = self.step
        on_rank_0(self._write)
        self._saved = self.store.path(self.step)

    def _write(self) -> None:
        """Write a checkpoint, unless its weights are of no use to anybody: it would push out one that is."""
        if names := self.state.not_finite():
            raise TrainingDivergedError(
                f"NaN or Inf in {len(names)} weights after step {self.step} ({', '.join(names[:3])}): they are not "
                f"saved; the newest good checkpoint is {self._saved}"
            )
        self.counters.seconds = self.watch.seconds
        self.log.sync()
        self.store.save(self.step, self._checkpoint(), self._write_weights)

    def _save_before_leaving(self) -> None:
        """Save the steps that no checkpoint holds yet, before an error ends the run, where they can be saved."""
        if rank() != 0 or not self.state.whole or self.step in (0, self._tried_to_save):
            return
        try:
            self._write()
        except Exception as error:
            logger.error("step %d could not be saved: %s", self.step, error)
        else:
            self._saved = self.store.path(self.step)
            logger.info("saved step %d: %s", self.step, self._saved)

    def _params(self) -> dict[str, Any]:
        """Return what `params.txt` says."""
        made_by = {**provenance(), "command": shlex.join(sys.argv), "data": self.data, "model": model_name(self.model)}
        task = {"task": self.task.name, **self.task.config.to_dict()}
        return {**made_by, **self.about, **self.config.to_dict(), **task}

    def _checkpoint(self) -> dict[str, Any]:
        return {
            "format": CHECKPOINT_FORMAT,
            **self.state.state_dict(),
            "stage": self._stage_number,
            "rng": {**rng_state(self.generators), **({} if self._drawn is None else {"numpy": self._drawn})},
            "due": self._due,
            "data": self.data,
            "config": self.settings,
            "model_config": model_config(self.model),
            "environment": environment(self.device, world_size()),
        }

    def _write_weights(self, path: Path) -> None:
        """Write the weights for use, with what the task says about them in the header."""
        save_file(self.state.weights(), path, metadata={"format": "pt", **self.task.metadata()})

    def _resume(self, resume: str | os.PathLike[str] | None) -> Path | None:
        """Find the checkpoint that ``resume`` means and take it over; return its path."""
        if resume is None:
            return None
        path = on_rank_0(lambda: self._find_checkpoint(resume))
        if path is None:
            logger.info("no checkpoint in %s yet: starting at step 0", self.store.folder)
            return None
        state = self.store.load(path)
        with naming_checkpoint(path):
            self._restore(state)
        logger.info("resumed from %s: step %d, position %d", path, self.step, self.counters.position)
        if path == self.store.path(self.step):
            self._tried_to_save = self.step
        return path

    def _find_checkpoint(self, resume: str | os.PathLike[str]) -> Path | None:
        """Return the checkpoint that ``resume`` means, or None where "latest" finds none."""
        if resume != "latest":
            return Path(resume)
        self.store.remove_leftovers()
        return self.store.latest_valid(self._refuse_not_finite)

    def _refuse_not_finite(self, path: Path) -> None:
        if names := not_finite(self.store.model_tensors(path)):
            raise CorruptCheckpointError(f"checkpoint {path} holds NaN or Inf in {', '.join(names[:3])}")

    def _restore(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint, after saying in what the run differs from the one that wrote it."""
        defaults = join_settings(RunConfig(self.config.stages), self.task.name, self.task.settings())
        check_settings(state, self.config, self.settings, defaults)
        warn_of_differences("environment", state["environment"], environment(self.device, world_size()))
        warn_of_differences("data", state.get("data", self.data), self.data)
        self.state.enter_stage(state["stage"])
        check_tensors(state, self.model.state_dict(), model_config(self.model))
        self.state.load_state_dict(state)
        self._due = state.get("due") if self._is_evaluated(self.step) else None
        set_rng_state(state["rng"], self.generators)
