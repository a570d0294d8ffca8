"""A folder belongs to one living run; what a dead one leaves keeps nobody out."""

import errno
import fcntl
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from florence_fast.train.run_lock import RunInUseError, RunLock

# It forks, as decoding workers are forked, and waits to be killed.
HOLDER = """
import os, sys, time
from florence_fast.train.run_lock import RunLock
with RunLock(sys.argv[1]):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    worker = int(holder.stdout.readline())
    try:
        with pytest.raises(RunInUseError, match=f"still alive: process {holder.pid} on "), RunLock(tmp_path):
            pass
        holder.kill()
        holder.wait()
        os.kill(worker, 0)
        with RunLock(tmp_path):
            pass
    finally:
        os.kill(worker, 9)
        holder.kill()
        holder.communicate()


def test_a_process_excludes_itself_by_any_path(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with RunLock(tmp_path / "run"):
        for path in (tmp_path / "run", tmp_path / "link"):
            with pytest.raises(RunInUseError, match="in use by another run of this process"), RunLock(path):
                pass
    with RunLock(tmp_path / "link"):
        pass


def test_a_drive_without_locks_is_said_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(descriptor: int, command: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with caplog.at_level(logging.WARNING), RunLock(tmp_path):
        pass
    assert f"{tmp_path} cannot be locked (No locks available)" in caplog.text
