"""Four processes that are started once and then run whatever the tests ask for, in groups of 1, 2, 3 or 4.

Starting a process costs seconds, nearly all of it importing torch; running a test in it costs milliseconds.
"""

import pickle
import queue
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp

NUM_PROCESSES = 4
TIMEOUT_SECONDS = 60
START_SECONDS = 300
"""Importing may have to share its cores; what runs afterwards is tiny."""


class Processes:
    """The processes joined by gloo through a file in ``folder``; one that waits over 60 s for another fails."""

    def __init__(self, folder: Path) -> None:
        context = mp.get_context("spawn")
        self.tasks = [context.SimpleQueue() for _ in range(NUM_PROCESSES)]
        self.results = context.Queue()
        self.processes = [
            context.Process(target=_serve, args=(rank, folder, tasks, self.results), daemon=True)
            for rank, tasks in enumerate(self.tasks)
        ]
        for process in self.processes:
            process.start()
        self._collect("starting", NUM_PROCESSES, START_SECONDS)

    def run(self, function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
        """Run ``function(group, *args)`` in the first ``world_size`` processes; return the results in their order."""
        assert all(process.is_alive() for process in self.processes), "the processes ended in an earlier test"
        for tasks in self.tasks[:world_size]:
            tasks.put((function, world_size, args))
        return self._collect(function.__name__, world_size, TIMEOUT_SECONDS)

    def _collect(self, what: str, world_size: int, seconds: float) -> list[Any]:
        """Wait for the answer of every rank, so that none is left for the next test, then fail if one failed."""
        found, failures = {}, ""
        for _ in range(world_size):
            try:
                rank, result, failure = self.results.get(timeout=seconds)
            except queue.Empty:
                self.stop()
                failures += f"\nwithin {seconds} s only these ranks answered: {sorted(found)}"
                break
            failures += f"\nrank {rank} of {world_size}: {failure}" if failure else ""
            found[rank] = None if failure else pickle.loads(result)
        assert not failures, f"{what}: {failures}"
        return [found[rank] for rank in range(world_size)]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, folder: Path, tasks: mp.SimpleQueue, results: mp.Queue) -> None:
    import torch._dynamo  # DDP imports it when it wraps its first model, which takes seconds

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=NUM_PROCESSES,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    groups = {size: dist.new_group(range(size)) for size in range(1, NUM_PROCESSES + 1)}
    results.put((rank, pickle.dumps(None), None))
    while True:
        function, world_size, args = tasks.get()
        try:
            # Pickled here, tensors travel as bytes and not as shared memory that ends with this process.
            results.put((rank, pickle.dumps(function(groups[world_size], *args)), None))
        except Exception:
            results.put((rank, None, traceback.format_exc()))
