"""Worker processes: the same batches as without them, the signals of any process, and an end with their parent."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from florence_fast.data import workers
from florence_fast.data.pair_loader import PairLoader
from florence_fast.data.shards import TarPairs
from florence_fast.data.workers import WorkerError
from tests.data.conftest import ListPairs, sample, write_tar

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.mark.parametrize("crop", ["squash", "random_resized"])
@pytest.mark.parametrize("cache", [True, False])
def test_batches_are_the_same_with_two_workers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, crop: str, cache: bool
) -> None:
    members: dict[str, bytes] = {}
    for n in range(45):
        members |= sample(f"{n}", f"text {n}", keywords=[f"key {n}"])
        members[f"{n}.png"] = noise(n)
    members["7.png"] = b"damaged"
    source = TarPairs([write_tar(tmp_path / "a.tar", members)])
    with_workers, without = (
        PairLoader(source, batch_size=20, image_size=8, crop=crop, cache=cache, num_workers=n, max_bad_share=0.1)
        for n in (2, 0)
    )
    for one, other in islice(zip(with_workers.batches(10), without.batches(10), strict=True), 6):
        assert torch.equal(one.images, other.images) and torch.equal(one.indices, other.indices)
        assert torch.equal(one.labels, other.labels) and one.texts == other.texts and one.skipped == other.skipped
    assert with_workers.samples_bad == without.samples_bad > 0
    assert caplog.text.count("skipping pair 7, ") == 2, "each of the two loaders names it once"


def noise(seed: int) -> bytes:
    """An image of which every part differs, as PNG."""
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


class ProcessPairs(ListPairs):
    """Images that say about the process which decodes them: whether it ignores two signals, and its id."""

    def image(self, index: int) -> Image.Image:
        ignored = [signal.getsignal(s) == signal.SIG_IGN for s in (signal.SIGTERM, signal.SIGINT)]
        image = Image.new("RGB", (2, 1), (ignored[0], ignored[1], 0))
        image.putpixel((1, 0), (os.getpid() % 251, os.getpid() % 253, os.getpid() % 255))
        return image.resize((2, 2), Image.Resampling.NEAREST)


class DeadlyPairs(ListPairs):
    """Decoding ends the process."""

    def image(self, index: int) -> Image.Image:
        os._exit(1)


def test_workers_ignore_signals_and_end_with_the_iterator(list_pairs: Callable[..., ListPairs]) -> None:
    before, others = signal.signal(signal.SIGTERM, lambda *_: None), set(children())
    try:
        batches = PairLoader(ProcessPairs(list_pairs(60).pairs), batch_size=60, image_size=2, num_workers=2).batches(0)
        images = next(batches).images
    finally:
        signal.signal(signal.SIGTERM, before)
    assert images[:, :2, 0, 0].unique().tolist() == [1]
    mine = [os.getpid() % 251, os.getpid() % 253, os.getpid() % 255]
    assert not any(pixel == mine for pixel in images[:, :, 0, 1].tolist())
    assert set(children()) > others
    batches.close()
    assert set(children()) == others


def test_a_worker_that_dies_is_an_error_and_not_a_hang(list_pairs: Callable[..., ListPairs]) -> None:
    others = children()
    batches = PairLoader(DeadlyPairs(list_pairs(8).pairs), batch_size=8, image_size=2, num_workers=1).batches(0)
    with pytest.raises(WorkerError, match=r"a decoding worker died: .* on sample \d \(list\[\d\]\)"):
        next(batches)
    batches.close()
    assert children() == others


def test_when_one_worker_is_killed_the_others_end_though_nobody_waits(list_pairs: Callable[..., ListPairs]) -> None:
    others = set(children())
    batches = PairLoader(list_pairs(60), batch_size=40, image_size=2, num_workers=3).batches(0)
    next(batches)
    first, *_ = set(children()) - others
    os.kill(first, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while set(children()) - others:
        assert time.monotonic() < deadline, "idle workers are left"
        time.sleep(0.05)
    with pytest.raises(WorkerError, match="a decoding worker died"):
        list(islice(batches, 5))


class StuckPairs(ListPairs):
    """Pair 3 stops the process that decodes it, as a dead network drive does; the others are fine."""

    def image(self, index: int) -> Image.Image:
        if index == 3:
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().image(index)


def test_a_stuck_worker_is_an_error_that_names_its_sample(list_pairs: Callable[..., ListPairs]) -> None:
    others = children()
    source = StuckPairs(list_pairs(8).pairs)
    batches = PairLoader(source, batch_size=8, image_size=2, num_workers=2, worker_timeout=0.5).batches(0)
    with pytest.raises(WorkerError, match=r"has finished a sample for .* they are on sample 3 \(list\[3\]\)\. "):
        next(batches)
    assert children() == others, "the stuck worker is killed"


def test_a_stuck_worker_does_not_keep_a_run_that_was_asked_to_stop(
    list_pairs: Callable[..., ListPairs], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "STOPPING_SECONDS", 0.5)
    loader = PairLoader(StuckPairs(list_pairs(8).pairs), batch_size=8, image_size=2, num_workers=1)
    with pytest.raises(WorkerError, match="list"):
        next(loader.batches(0, stopping=lambda: True))


def test_closing_does_not_wait_for_a_stuck_worker(
    list_pairs: Callable[..., ListPairs], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "CLOSING_SECONDS", 0.5)
    others = children()
    loader = PairLoader(StuckPairs(list_pairs(40).pairs), batch_size=2, image_size=2, num_workers=1, cache=False)
    start = next(position for position in range(40) if loader._order(0)[position] == 3) - 2
    batches = loader.batches(max(start, 0))
    next(batches)
    batches.close()
    assert children() == others


class TorchPairs(ListPairs):
    """Decoding computes with torch on tensors that are large enough for threads."""

    def image(self, index: int) -> Image.Image:
        small = F.interpolate(torch.full((1, 3, 600, 600), float(index)), size=(300, 300), mode="bilinear")
        return Image.fromarray(small[0].permute(1, 2, 0).byte().numpy())


def test_workers_compute_with_torch_after_the_parent_has_used_threads(list_pairs: Callable[..., ListPairs]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.randn(1000, 1000).exp().sum()
        source = TorchPairs(list_pairs(4).pairs)
        loader = PairLoader(source, batch_size=4, image_size=2, num_workers=1, worker_timeout=20)
        batches = loader.batches(0)
        batch = next(batches)
        batches.close()
    finally:
        torch.set_num_threads(threads)
    assert batch.images[:, 0, 0, 0].tolist() == batch.indices.tolist()


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf")])
def test_bad_timeouts_are_refused(list_pairs: Callable[..., ListPairs], timeout: float) -> None:
    with pytest.raises(ValueError, match="worker_timeout must be a positive number of seconds"):
        PairLoader(list_pairs(4), batch_size=4, image_size=2, worker_timeout=timeout)


@pytest.mark.dist
def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample("1", "one") | sample("2", "two"))
    script = (
        "import sys, time\n"
        "from florence_fast.data import PairLoader, open_pairs\n"
        "loader = PairLoader(open_pairs(sys.argv[1]), batch_size=2, image_size=8, num_workers=2, cache=False)\n"
        "batches = loader.batches(0)\n"
        "next(batches)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", script, str(tmp_path / "a.tar")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
    try:
        assert parent.stdout.readline() == "ready\n"
        workers = children(parent.pid)
        assert workers
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 10
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline, f"workers {workers} outlive their parent"
        time.sleep(0.05)


def children(parent: int | None = None) -> list[int]:
    """Processes that were started by this one, or by ``parent``; a thread that ends meanwhile has none."""
    found: list[int] = []
    for thread in Path(f"/proc/{parent or os.getpid()}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            found += map(int, (thread / "children").read_text().split())
    return found


def is_running(process: int) -> bool:
    """Whether a process is there and is not only waiting to be reaped."""
    stat = Path(f"/proc/{process}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
