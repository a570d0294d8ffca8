"""A rank that no longer answers ends the others with an error, within the timeout of the group and not by a hang."""

import queue
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from florence_fast.train.loss import ContrastiveLoss
from florence_fast.train.ring import circulate

TIMEOUT_SECONDS = 2.0
PATIENCE_SECONDS = 120.0
CALLS = ("all_gather", "ring", "the ring itself")


def left_alone(rank: int, folder: Path, results: mp.Queue) -> None:
    """Join a group of two and put what each call comes to; rank 1 joins and then does nothing any more."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    groups = [dist.new_group([0, 1], timeout=timedelta(seconds=TIMEOUT_SECONDS)) for _ in CALLS]
    if rank == 1:
        time.sleep(PATIENCE_SECONDS)
    features = torch.eye(3)
    for name, group in zip(CALLS, groups, strict=True):
        start = time.monotonic()
        try:
            if name == "the ring itself":
                list(circulate(features, [3, 3], group))
            else:
                ContrastiveLoss(gather=name, process_group=group)(features, features, 5.0)
            failure = None
        except RuntimeError as error:
            failure = str(error)
        results.put((name, time.monotonic() - start, failure))


@pytest.mark.dist
def test_a_rank_that_is_silent_is_an_error_within_the_timeout(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=left_alone, args=(rank, tmp_path, results), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    try:
        answers = [results.get(timeout=PATIENCE_SECONDS) for _ in CALLS]
    except queue.Empty:
        pytest.fail("rank 0 hangs")
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert [name for name, _, _ in answers] == list(CALLS)
    for name, seconds, failure in answers:
        assert failure is not None, f"{name}: no error"
        assert seconds < 5 * TIMEOUT_SECONDS, f"{name}: {seconds:.1f} s"
