"""Processes that decode ahead of the training step, and what happens when one of them dies or does not answer."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext

import torch

from florence_fast.data.decoding import Decoded, Decoder, Key

CHUNK = 16  # images that a worker takes at a time
NAMED_IN_ERROR = 5
POLL_SECONDS = 0.2
STOPPING_SECONDS = 10.0  # without progress, once the run has been asked to stop
CLOSING_SECONDS = 5.0  # that a worker has to finish its chunk when nobody wants it any more


class WorkerError(RuntimeError):
    """A decoding worker died, or none of them makes progress; the message names the samples that they were on."""


class Workers:
    """Decode in other processes, which work on the next batches while this one is used.

    Args:
        decoder: what each worker calls.
        num_workers: number of processes.
        timeout: seconds without any finished sample after which `WorkerError` is raised.
        stopping: whether the run has been asked to stop; from then on 10 seconds without progress are enough.
    """

    batches_ahead = 2

    def __init__(
        self, decoder: Decoder, num_workers: int, timeout: float, stopping: Callable[[], bool] = lambda: False
    ) -> None:
        self._source, self._timeout, self._stopping = decoder.source, timeout, stopping
        context = _Context()
        self._progress = _Progress(context, num_workers)
        self._pool = ProcessPoolExecutor(num_workers, context, _start_worker, (decoder, os.getpid(), self._progress))

    def start(self, keys: Sequence[Key]) -> Callable[[], Decoded]:
        """Begin to decode ``keys``; calling the result waits for it.

        The call raises `WorkerError` when a worker died or none of them makes progress.
        """
        chunks = [keys[first : first + CHUNK] for first in range(0, len(keys), CHUNK)]
        try:
            futures = [self._pool.submit(_decode_chunk, chunk) for chunk in chunks]
        except BrokenProcessPool as error:
            raise self._died() from error
        return lambda: {key: image for future in futures for key, image in self._result(future).items()}

    def close(self) -> None:
        """End the workers; one that does not end by itself is killed."""
        killer = threading.Timer(CLOSING_SECONDS, self._progress.kill_workers)
        killer.daemon = True
        killer.start()
        self._pool.shutdown(wait=True, cancel_futures=True)
        killer.cancel()

    def _result(self, future: Future) -> Decoded:
        """Wait for one chunk as long as some worker makes progress."""
        # Polls are counted, not the clock: a run that was suspended and continued has not waited meanwhile.
        done, idle_seconds = self._progress.samples_done(), 0.0
        while not wait([future], POLL_SECONDS).done:
            idle_seconds += POLL_SECONDS
            if (now_done := self._progress.samples_done()) != done:
                done, idle_seconds = now_done, 0.0
            allowed = min(self._timeout, STOPPING_SECONDS) if self._stopping() else self._timeout
            if idle_seconds >= allowed:
                on = self._describe_current()
                self._progress.kill_workers()
                raise WorkerError(
                    f"no decoding worker has finished a sample for {idle_seconds:.0f} s; they are on {on}. Is the "
                    f"drive still there? worker_timeout={self._timeout:g} is the longest wait"
                )
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise self._died() from error

    def _died(self) -> WorkerError:
        on = self._describe_current()
        # The pool asks the other workers to end and waits for them: one that is stuck would never do so.
        self._progress.kill_workers()
        return WorkerError(
            f"a decoding worker died: it was killed, or the machine is out of memory (fewer workers need less); "
            f"the workers were on {on}"
        )

    def _describe_current(self) -> str:
        indices = self._progress.current_samples()
        named = [f"sample {index} ({self._source.describe(index)})" for index in indices[:NAMED_IN_ERROR]]
        more = len(indices) - len(named)
        return ", ".join(named) + (f" and {more} more" if more else "") or "no sample"


# Forked where that exists: scripts need no `if __name__ == "__main__"`, and the source is not copied.
_METHOD = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")


class _Process(_METHOD.Process):  # pyright: ignore[reportAttributeAccessIssue]
    """A worker ignores SIGTERM, by which the pool ends the others when one has died: it would wait for ever."""

    def terminate(self) -> None:
        """End the process by SIGKILL; it has nothing to save."""
        self.kill()


class _Context(type(_METHOD)):
    Process = _Process


class _Progress:
    """What each worker is doing, in memory that all of them share: its process, its sample (or -1), samples done."""

    def __init__(self, context: BaseContext, num_workers: int) -> None:
        self._started = context.Value("q", 0)
        self._process_ids, self._current, self._done = (context.RawArray("q", num_workers) for _ in range(3))
        self._row = -1

    def enter(self) -> None:
        """Take a row of its own for this worker."""
        with self._started.get_lock():
            self._row = self._started.value
            self._started.value += 1
        self._process_ids[self._row], self._current[self._row] = os.getpid(), -1

    def begin(self, index: int) -> None:
        """Note that this worker is on sample ``index``."""
        self._current[self._row] = index

    def finish(self) -> None:
        """Note that this worker's sample is done."""
        self._current[self._row] = -1
        self._done[self._row] += 1

    def samples_done(self) -> int:
        """Return how many samples all workers have finished."""
        return sum(self._done)

    def current_samples(self) -> list[int]:
        """Return the samples that the workers are on."""
        return list(dict.fromkeys(index for index in self._current[: self._started.value] if index >= 0))

    def kill_workers(self) -> None:
        """End the workers at once, stopped ones too."""
        mine = set(self._process_ids)
        for process in multiprocessing.active_children():
            if process.pid in mine:
                process.kill()


_decoder: Decoder | None = None
_progress: _Progress | None = None


def _start_worker(decoder: Decoder, parent: int, progress: _Progress) -> None:
    """Set up a worker: its decoder, one thread, no signals, an end when its parent is gone."""
    global _decoder, _progress
    _decoder, _progress = decoder, progress
    progress.enter()
    # OpenMP's threads do not survive a fork, and a second thread would wait for them for ever.
    torch.set_num_threads(1)
    # Ctrl-C and a batch system's SIGTERM reach every process of a run: the parent still needs this one's samples to
    # come to the end of its step and save, and ends it afterwards.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process soon after ``parent`` was killed, which tells its children nothing."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _decode_chunk(keys: Sequence[Key]) -> Decoded:
    """Decode in a worker."""
    assert _decoder is not None and _progress is not None, "_start_worker runs before any chunk"
    decoded = {}
    for key in keys:
        _progress.begin(key[0])
        decoded[key] = _decoder(key)
        _progress.finish()
    return decoded
