"""Logging of a run: a progress bar, open_clip's log line, ``results.jsonl``, and TensorBoard where installed.

The folders are open_clip's: ``out.log``, ``params.txt`` and ``tensorboard/`` in the run's folder, ``results.jsonl``
beside the checkpoints.
"""

import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tqdm.auto import tqdm

from florence_fast.files import write_text
from florence_fast.printable import printable
from florence_fast.strict_json import format_json, parse_json
from florence_fast.train.boards import Board, open_boards

logger = logging.getLogger(__name__)
_PACKAGE = logging.getLogger("florence_fast")


def train_line(
    record: Mapping[str, Any], samples_per_epoch: int, world_size: int = 1, scalars: Sequence[str] = ("logit_scale",)
) -> str:
    """Write an interval as open_clip does, so that its users' scripts read our logs.

    Args:
        record: an interval's record, as it stands in ``results.jsonl``.
        samples_per_epoch: size of the data set.
        world_size: number of processes.
        scalars: entries of ``record`` that the task adds.

    >>> train_line(record, samples_per_epoch=8666)
    'Train Epoch: 0 [ 512/8666 (6%)] Data (t): 0.010 Batch (t): 1.000, 512.000/s, 512.000/s/gpu LR: 0.000500 ...'
    """
    seen = (record["position"] - 1) % samples_per_epoch + 1
    rate = record["samples_per_second"]
    added = "".join(f"{name.replace('_', ' ').title()}: {record[name]:.3f} " for name in scalars)
    return (
        f"Train Epoch: {record['epoch']} "
        f"[{seen:>{len(str(samples_per_epoch))}}/{samples_per_epoch} ({100 * seen / samples_per_epoch:.0f}%)] "
        f"Data (t): {record['data_time']:.3f} Batch (t): {record['batch_time']:.3f}, "
        f"{rate:#g}/s, {rate / world_size:#g}/s/gpu LR: {record['lr']:5f} "
        f"{added}Loss: {record['last_loss']:#.5g} ({record['loss']:#.5g})"
    )


def truncate_results(path: Path, step: int, *, evaluated: bool = True) -> int:
    """Drop the records of ``results.jsonl`` after ``step``, and lines that were never finished.

    Args:
        path: of ``results.jsonl``.
        step: the last step whose records stay.
        evaluated: False drops the evaluation of ``step`` too, which is the second record of that step.

    Returns:
        How many lines were dropped.
    """
    if not path.is_file():
        return 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= step]
    if not evaluated:
        kept = [line for number, line in enumerate(kept) if number == 0 or _step_of(kept[number - 1]) < step]
    if len(kept) < len(lines):
        write_text(path, "".join(kept))
    return len(lines) - len(kept)


def _step_of(line: str) -> float:
    """Read a record's step; what is no record counts as after every step."""
    try:
        return parse_json(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


class Stopwatch:
    """Seconds of training: it can be paused, and goes on from an earlier run's seconds."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._before = seconds
        self._since = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds so far, pauses left out."""
        return self._before + time.perf_counter() - self._since

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time of the ``with`` block."""
        self._before = self.seconds
        try:
            yield
        finally:
            self._since = time.perf_counter()


class IntervalTimes:
    """Where the time of an interval went; the clock starts when it is made."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._waited = 0.0
        self._steps = 0
        self._samples = 0

    def add(self, waited: float, samples: int) -> None:
        """Count a step whose batch of ``samples`` (all ranks) was waited for during ``waited`` seconds."""
        self._waited += waited
        self._steps += 1
        self._samples += samples

    def averages(self) -> dict[str, float]:
        """Return "data_time" and "batch_time" in seconds a step, and "samples_per_second"."""
        passed = time.perf_counter() - self._since
        return {
            "data_time": self._waited / self._steps,
            "batch_time": passed / self._steps,
            "samples_per_second": self._samples / passed,
        }


class RunLog:
    """The log of one run, written by rank 0; on other ranks every method does nothing.

    Args:
        out_dir: the run's folder.
        samples_per_epoch, world_size: for the line.
        progress: show a bar, and the log in the terminal.
        tensorboard: write event files where TensorBoard is installed.
        wandb: report to Weights & Biases.
        enabled: False on ranks other than 0.
    """

    def __init__(
        self,
        out_dir: Path,
        *,
        samples_per_epoch: int,
        world_size: int = 1,
        progress: bool = True,
        tensorboard: bool = True,
        wandb: bool = False,
        enabled: bool = True,
    ) -> None:
        self.out_dir = out_dir
        self.results_path = out_dir / "checkpoints" / "results.jsonl"
        self.enabled = enabled
        self._samples_per_epoch = samples_per_epoch
        self._world_size = world_size
        self._progress = progress and enabled
        self._wanted = {"tensorboard": tensorboard, "wandb": wandb}
        self._open = ExitStack()
        self._bar = tqdm(disable=True)
        self._boards: list[Board] = []
        self._results: TextIO | None = None
        self._handlers: list[logging.Handler] = []
        self._earlier_level = _PACKAGE.level
        if enabled:
            self.results_path.parent.mkdir(parents=True, exist_ok=True)
            self._attach(logging.FileHandler(out_dir / "out.log", encoding="utf-8", errors="backslashreplace"))
            if progress and not logging.getLogger().handlers:
                self._attach(_AboveBar())
            if _PACKAGE.getEffectiveLevel() > logging.INFO:
                _PACKAGE.setLevel(logging.INFO)

    def start(self, step: int, total_steps: int, settings: Mapping[str, Any], *, evaluated: bool = True) -> None:
        """Begin at ``step``: results after it are dropped, ``settings`` go to ``params.txt``, the bar appears.

        ``evaluated`` is False when the evaluation of ``step`` will be made again, as `truncate_results` takes it.
        """
        if not self.enabled:
            return
        if dropped := truncate_results(self.results_path, step, evaluated=evaluated):
            logger.info("dropped %d records of %s after step %d", dropped, self.results_path.name, step)
        lines = [f"{name}: {settings[name]}\n" for name in sorted(settings)]
        write_text(self.out_dir / "params.txt", "".join(lines))
        self._results = self._open.enter_context(self.results_path.open("a", encoding="utf-8"))
        self._boards = open_boards(self.out_dir, step, settings, **self._wanted)
        for board in self._boards:
            self._open.callback(board.close)
        bar = tqdm(
            total=total_steps,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            disable=not self._progress,
            file=_Unread(sys.stderr),
        )
        self._bar = self._open.enter_context(bar)

    def records_of(self, step: int) -> int:
        """Count the records of ``step`` in ``results.jsonl``: 2 where an evaluation followed its interval."""
        if not self.results_path.is_file():
            return 0
        lines = self.results_path.read_text(encoding="utf-8", errors="replace").splitlines()
        return sum(_step_of(line) == step for line in lines)

    def step(self) -> None:
        """Move the bar by one step."""
        self._bar.update()

    def interval(self, record: Mapping[str, Any], scalars: Sequence[str] = ("logit_scale",)) -> None:
        """Write an interval everywhere: line, bar, ``results.jsonl``, TensorBoard; ``scalars`` are the task's."""
        if not self.enabled:
            return
        logger.info("%s", train_line(record, self._samples_per_epoch, self._world_size, scalars))
        self._bar.set_postfix_str(f"loss {record['loss']:.4f}, {record['samples_per_second']:.0f}/s", refresh=False)
        self.record(record)
        names = ("loss", "lr", *scalars, "grad_norm", "data_time", "batch_time", "samples_per_second")
        self._draw({f"train/{name}": record[name] for name in names}, record["step"])

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Write figures of an evaluation, with the key "step": ``results.jsonl`` and boards."""
        self.record(record)
        numbers = {f"evaluate/{name}": value for name, value in record.items() if isinstance(value, float | int)}
        self._draw(numbers, record["step"])

    def _draw(self, numbers: Mapping[str, float], step: int) -> None:
        for board in self._boards if self.enabled else ():
            board.add(numbers, step)

    def record(self, record: Mapping[str, Any]) -> None:
        """Append a line to ``results.jsonl``, with its key "step"; NaN and Inf, which JSON lacks, become null."""
        if self.enabled:
            try:
                results = self._opened()
                results.write(format_json(record) + "\n")
                results.flush()
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.results_path)) from error

    def _opened(self) -> TextIO:
        assert self._results is not None, "the log is open inside its with block only"
        return self._results

    def sync(self) -> None:
        """Bring ``results.jsonl`` to the disk, before a checkpoint that counts on it."""
        if self.enabled:
            os.fsync(self._opened().fileno())

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            logger.error("the run ended with %s: %s", type(error).__name__, error)
        self._open.close()
        for handler in self._handlers:
            _PACKAGE.removeHandler(handler)
            handler.close()
        _PACKAGE.setLevel(self._earlier_level)

    def _attach(self, handler: logging.Handler) -> None:
        handler.setFormatter(_OnePerLine("%(asctime)s | %(levelname)s | %(message)s", "%Y-%m-%d,%H:%M:%S"))
        _PACKAGE.addHandler(handler)
        self._handlers.append(handler)


class _OnePerLine(logging.Formatter):
    """Escape what could act on a terminal: names and captions in a message come from the data."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


class _AboveBar(logging.Handler):
    """Print log lines above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=_Unread(sys.stdout))


class _Unread:
    """A stream whose reader may go away (a pipe into `head`, a closed terminal): what it said stands in the log.

    All of them are equal, because they are one terminal: by that tqdm knows which bar to move out of a line's way.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        if self.stream is not None:  # there is none under pythonw
            with suppress(OSError, ValueError):
                self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        if self.stream is not None:
            with suppress(OSError, ValueError):
                self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["stream"], name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Unread)

    __hash__ = None  # pyright: ignore[reportAssignmentType]
