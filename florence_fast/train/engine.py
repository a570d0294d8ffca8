"""The training loop: stages, steps, intervals, checkpoints, and what happens when a step goes wrong (section 2.2)."""

import logging
import math
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
from torch import Tensor, nn

from florence_fast.data.loader import Batch, PairLoader
from florence_fast.models.config import FlorenceConfig
from florence_fast.models.factory import cast_weights
from florence_fast.models.saving import CONFIG_KEY
from florence_fast.precision import check_same_weights, choose_precision, gradient_scaler, is_pure, resolve_precision
from florence_fast.provenance import provenance
from florence_fast.ranges import annotate, annotated
from florence_fast.strict_json import format_json
from florence_fast.train.checkpoint import CheckpointStore, CorruptCheckpointError
from florence_fast.train.config import Stage, TrainConfig
from florence_fast.train.counters import Counters
from florence_fast.train.describe import describe_data, describe_model, model_name
from florence_fast.train.distributed import on_rank_0, rank, require_equal_on_ranks, world_size
from florence_fast.train.ema import EMA
from florence_fast.train.log import IntervalTimes, RunLog, Stopwatch
from florence_fast.train.masters import MasterWeights
from florence_fast.train.optim import carry_state, create_optimizer, learning_rate, set_learning_rate
from florence_fast.train.reproducible import (
    deterministic_algorithms,
    environment,
    numpy_states,
    rng_state,
    seed_step,
    set_rng_state,
    warn_of_differences,
)
from florence_fast.train.resume import (
    CHECKPOINT_FORMAT,
    check_entries,
    check_schedule,
    check_tensors,
    naming_checkpoint,
    not_finite,
    schedule,
)
from florence_fast.train.run_lock import RunLock
from florence_fast.train.signals import StopRequest
from florence_fast.train.step import Augment, ContrastiveStep, agree

logger = logging.getLogger(__name__)

OnInterval = Callable[["Trainer", dict[str, Any]], Mapping[str, Any] | None]


class TrainingDivergedError(RuntimeError):
    """Too many steps in a row had a loss or a gradient that is NaN or Inf, or the weights have come to hold one."""


class Trainer:
    """Train a Florence on pairs, through the stages of a config, and be able to go on from any checkpoint.

    A step's randomness comes from (seed, step) and its data from (seed, position), so a run that was killed and
    resumed has the losses of one that was not, to the bit, on the same machine and thread count.

    Args:
        model: a Florence on its device; it is trained in place.
        tokenizer: turns a list of texts into zero-padded ids.
        source: the pairs, a `PairSource`.
        config: stages and settings.
        out_dir: the run's folder: `checkpoints/`, `out.log`, `params.txt`, `tensorboard/`.
        augment: picture augmentation, as `ContrastiveStep` takes it; None only resizes and normalises.
        on_interval: called as `on_interval(trainer, record)` after every interval, on every rank, with the model in
            eval mode; its time is not counted, and a dict that it returns becomes a record of `results.jsonl`. After
            a signal it is not called any more, so that the checkpoint is written without delay.
        generators: NumPy generators that `augment` or `on_interval` draw from; checkpoints carry their state.
        about: what `params.txt` says besides the config, the command, the commit and the versions.

    Raises:
        RankMismatchError: this rank and another have different configs, models or data.

    >>> trainer = Trainer(model, tokenizer, open_pairs("pairs.csv"), TrainConfig(stages=paper_stages(2000)), "logs/a")
    >>> trainer.run(resume="latest")["images_per_second"]
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        source: Any,
        config: TrainConfig,
        out_dir: str | os.PathLike[str],
        *,
        augment: Augment | None = None,
        on_interval: OnInterval | None = None,
        generators: Mapping[str, np.random.Generator] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.precision = choose_precision(config.precision, self.device)
        self.config = config = replace(config, precision=resolve_precision(config.precision, self.device))
        self.out_dir = Path(out_dir)
        self.on_interval = on_interval
        self.generators = dict(generators or {})
        self.about = dict(about or {})
        cast_weights(model, config.precision)
        if config.grad_checkpointing:
            model.set_grad_checkpointing(True)
        self.samples_per_epoch = len(source)
        model.config = _with_resize_mode(model.config, config.crop)
        self.data = describe_data(source)
        require_equal_on_ranks({"config": config.to_dict(), "model": describe_model(model), "data": self.data})
        self.loader = _create_loader(source, config, model.config)
        self.contrastive_step = ContrastiveStep(model, tokenizer, config, augment)
        self.masters = MasterWeights(model, config.precision)
        self.optimizer = create_optimizer(model, config, self.masters)
        self.scaler = gradient_scaler(config.precision, self.device)
        self.ema = EMA(model, config.ema_decay) if config.ema_decay is not None else None
        self.store = CheckpointStore(self.out_dir / "checkpoints", config.keep_checkpoints)
        self.counters = Counters()
        self.watch = Stopwatch()
        self._times = IntervalTimes()
        self._stage_number: int | None = None
        self._batches: Iterator[Batch] = iter(())
        self._saved: Path | None = None  # the newest checkpoint, written or resumed from
        self._tried_to_save = 0  # the step of the last checkpoint that is there or could not be written
        self._due: dict[str, Any] | None = None  # record of the last interval, until it has been evaluated
        self._whole = True  # weights, optimiser and counters belong to the same step
        self._drawn: dict[str, str] | None = None  # the generators' state before what is going on drew from them
        self._waiting = False  # for a batch

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
            samples_per_epoch=self.samples_per_epoch,
            world_size=world_size(),
            progress=config.progress,
            tensorboard=config.tensorboard,
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
        if step % config.log_every_n_steps == 0 or step == config.total_steps:
            self._end_interval()
        regular = config.save_every_steps and step % config.save_every_steps == 0
        if stopping or regular or step == config.total_steps:
            self._save()
        if not stopping:
            self._evaluate()

    @annotated("train.step")
    def _take_step(self, stop: StopRequest) -> bool:
        """Take one step; return whether some rank was asked to stop."""
        counters, started = self.counters, time.perf_counter()
        self._drawn = numpy_states(self.generators)
        stage = self._enter_stage(stop)
        self._waiting = True
        with annotate("train.data"):
            batch = next(self._batches)
        self._waiting = False
        samples = len(batch.images) * world_size()
        self._times.add(time.perf_counter() - started, samples)
        seed_step(self.config.seed, counters.step, rank())
        set_learning_rate(self.optimizer, learning_rate(self.config, counters.step))
        self.optimizer.zero_grad(set_to_none=True)
        with annotate("train.gradients"):
            loss = self.contrastive_step(batch, stage.image_size, counters.step, self.scaler)
        self.masters.take_gradients()
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.masters.named.values() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        loss_value, norm_value, finite, stopping = agree(loss, norm, bool(stop))
        self._whole = False
        if finite:
            if self.config.grad_clip_norm is not None:
                nn.utils.clip_grads_with_norm_(parameters, self.config.grad_clip_norm, norm)
            with annotate("train.optimizer"):
                self.scaler.step(self.optimizer)
                self.masters.give_weights()
            self.model.clamp_logit_scale_()
            if self.ema is not None:
                self.ema.update(self.model, self.masters.copies)
            counters.good_step(loss_value, norm_value)
        else:
            self._skip(loss_value, norm_value, batch)
        self.scaler.update()
        counters.step += 1
        counters.position += samples
        counters.bad_samples += batch.skipped
        self._whole, self._drawn = True, None
        self.log.step()
        return stopping

    def _skip(self, loss: float, norm: float, batch: Batch) -> None:
        """Count a step without an update, name its cause, and end the run when there were too many in a row."""
        self.counters.skipped_step()
        names = [n for n, p in self.masters.named.items() if p.grad is not None and not p.grad.isfinite().all()]
        cause = f"the gradient's norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        described = (
            f"step {self.step} skipped: {cause}; NaN or Inf in the gradients of {len(names)} parameters "
            f"({', '.join(names[:3]) or 'none'}); first samples {batch.indices[:4].tolist()}"
        )
        logger.warning("%s", described)
        if self.counters.skipped_in_a_row > self.config.max_skipped_steps:
            raise TrainingDivergedError(
                f"{self.counters.skipped_in_a_row} steps in a row were skipped, more than max_skipped_steps="
                f"{self.config.max_skipped_steps}; the last one: {described}"
            )

    def _enter_stage(self, stop: StopRequest) -> Stage:
        """Return the stage of the next step; at a border, set window, sizes and texts anew."""
        number, stage = self.config.stage_at(self.step)
        if number != self._stage_number:
            self._set_window(number)
            self.loader.configure(
                batch_size=stage.batch_size or self.config.batch_size,
                image_size=stage.image_size,
                augment_text=stage.augment_text,
            )
            self._batches = iter(self.loader.batches(self.counters.position, stopping=lambda: bool(stop)))
            logger.info("stage %d of %d from step %d: %s", number + 1, len(self.config.stages), self.step, stage)
        return stage

    def _leave_stage(self) -> None:
        """Let go of the batches, and with them of the loader's processes."""
        self._batches, self._stage_number = iter(()), None

    def _set_window(self, number: int) -> None:
        """Give the model the picture size and window of stage ``number``; new tables get a new optimiser."""
        self._whole = False
        before = set(self.model.parameters())
        windows = [stage.window_size for stage in self.config.stages[: number + 1] if stage.window_size]
        image_size = self.config.stages[number].image_size
        self.model.set_input_size(img_size=image_size, window_size=windows[-1] if windows else None)
        if set(self.model.parameters()) != before:
            self.masters = MasterWeights(self.model, self.config.precision, self.masters)
            optimizer = create_optimizer(self.model, self.config, self.masters)
            carry_state(self.optimizer, optimizer)
            self.optimizer = optimizer
            if self.ema is not None:
                self.ema.restart_resized(self.model)
            self.contrastive_step.wrap(self.model)
        self._stage_number, self._whole = number, True

    def _end_interval(self) -> None:
        """Write the interval's line and record; its evaluation is due from then on."""
        counters = self.counters
        counters.close_interval()
        record = {
            "step": counters.step,
            "epoch": (counters.position - 1) // self.samples_per_epoch,
            "position": counters.position,
            "stage": self._stage_number,
            "loss": counters.loss,
            "last_loss": counters.last_loss,
            "grad_norm": counters.grad_norm,
            "lr": self.optimizer.param_groups[0]["lr"],
            "logit_scale": self.model.logit_factor().item(),
            "seconds": self.watch.seconds,
            **self._times.averages(),
            "skipped_steps": counters.skipped_steps,
            "bad_samples": counters.bad_samples,
        }
        self._due = record if self.on_interval is not None else None
        self.log.interval(record)
        self._times = IntervalTimes()

    def _evaluate(self) -> None:
        """Let the caller evaluate what the last interval has come to, if that is due, with the clock stopped."""
        if self._due is None:
            return
        self._drawn = numpy_states(self.generators)
        with self.watch.paused():
            self.model.eval()
            answer = self.on_interval(self, self._due)
            self.model.train()
        self._drawn = self._due = None
        if answer is not None:
            self.log.record({"step": self.step, "seconds": self.watch.seconds, **answer})
        self._times = IntervalTimes()

    @annotated("train.checkpoint")
    def _save(self) -> None:
        """Write a checkpoint from rank 0; the others wait."""
        self._tried_to_save = self.step
        on_rank_0(self._write)
        self._saved = self.store.path(self.step)

    def _write(self) -> None:
        """Write a checkpoint, unless its weights are of no use to anybody: it would push out one that is."""
        names = not_finite(dict(self.model.named_parameters()))
        if names := names or not_finite(self.ema.average if self.ema is not None else {}):
            raise TrainingDivergedError(
                f"NaN or Inf in {len(names)} weights after step {self.step} ({', '.join(names[:3])}): they are not "
                f"saved; the newest good checkpoint is {self._saved}"
            )
        self.counters.seconds = self.watch.seconds
        self.log.sync()
        self.store.save(self.step, self._state(), self._write_weights)

    def _save_before_leaving(self) -> None:
        """Save the steps that no checkpoint holds yet, before an error ends the run, where they can be saved."""
        if rank() != 0 or not self._whole or self.step in (0, self._tried_to_save):
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
        return {**made_by, **self.about, **self.config.to_dict()}

    def _state(self) -> dict[str, Any]:
        return {
            "format": CHECKPOINT_FORMAT,
            "counters": self.counters.to_dict(),
            "stage": self._stage_number,
            "model": self.model.state_dict(),
            "masters": self.masters.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "rng": {**rng_state(self.generators), **({} if self._drawn is None else {"numpy": self._drawn})},
            "due": self._due,
            "data": self.data,
            "config": self.config.to_dict(),
            "model_config": self.model.config.to_dict(),
            "environment": environment(self.device, world_size()),
        }

    def _write_weights(self, path: Path) -> None:
        """Write the weights for use, with the model's configuration inside: the moving average where one is kept."""
        weights = {**self.model.state_dict(), **(self.ema.average if self.ema is not None else {})}
        tensors = {name: weight.cpu().contiguous() for name, weight in weights.items()}
        save_file(tensors, path, metadata={"format": "pt", CONFIG_KEY: format_json(self.model.config.to_dict())})

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
        check_entries(state)
        check_schedule(state, self.config)
        check_same_weights(state["config"]["precision"], self.config.precision)
        warn_of_differences("setting", schedule(state["config"]), schedule(self.config.to_dict()))
        warn_of_differences("environment", state["environment"], environment(self.device, world_size()))
        warn_of_differences("data", state.get("data", self.data), self.data)
        self._set_window(state["stage"])
        self._stage_number = None
        check_tensors(state, self.model.state_dict(), self.model.config.to_dict())
        self.counters = Counters(**state["counters"])
        self._due = state.get("due") if self.on_interval is not None else None
        self.model.load_state_dict(state["model"])
        self.masters.load_state_dict(state.get("masters", {}))
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if (self.ema is None) != (state["ema"] is None):
            logger.warning("the moving average of the weights is %s", "dropped" if self.ema is None else "started here")
        elif self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        set_rng_state(state["rng"], self.generators)


def _with_resize_mode(model_config: FlorenceConfig, crop: str | None) -> FlorenceConfig:
    """Let the model's evaluation resize images as its training does; a random part says nothing about that."""
    if crop in (None, "random_resized"):
        return model_config
    return replace(model_config, resize_mode="shortest" if crop == "center" else crop)


def _create_loader(source: Any, config: TrainConfig, model_config: FlorenceConfig) -> PairLoader:
    return PairLoader(
        source,
        batch_size=config.batch_size,
        image_size=max(stage.image_size for stage in config.stages),
        seed=config.seed,
        keyword_prob=config.keyword_prob,
        template_prob=config.template_prob,
        pictures_per_text=config.pictures_per_text,
        cache=config.cache,
        num_workers=config.num_workers,
        worker_timeout=config.worker_timeout,
        rank=rank(),
        world_size=world_size(),
        max_bad_share=config.max_bad_share,
        crop=config.crop or model_config.resize_mode,
        interpolation=model_config.interpolation,
    )
