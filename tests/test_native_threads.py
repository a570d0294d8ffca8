"""Memory that runs out in a native task, and a thread that cannot start, raise and do not end the process."""

import subprocess
import sys

import pytest

from florence_fast import native

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(native.extension() is None, reason="the native extension was not built"),
]

OUT_OF_MEMORY = """
import resource, numpy as np, torch
from florence_fast.data import dhash, near_duplicates
near_duplicates(np.arange(200_000, dtype=np.uint64), 1, threads=2)  # starts the threads
wide = np.zeros((1, 2**22, 3), np.uint8)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 30 * 2**20,) * 2)
try:
    dhash([wide, wide], threads=2)
except MemoryError:
    print("MemoryError")
"""
TOO_MANY_THREADS = """
import resource, numpy as np
from florence_fast.data import near_duplicates
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30,) * 2)  # a stack of 8 MB each
try:
    near_duplicates(np.arange(200_000, dtype=np.uint64), 1, threads=4096)
except RuntimeError as error:
    print(error)
print(len(near_duplicates(np.arange(1000, dtype=np.uint64), 0, threads=2)))
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-500:]}"
    return done.stdout


def test_memory_that_runs_out_in_a_thread_is_a_memory_error():
    assert run(OUT_OF_MEMORY) == "MemoryError\n"


def test_threads_that_cannot_start_are_named_and_the_process_goes_on():
    error, pairs = run(TOO_MANY_THREADS).splitlines()
    assert "of 4096 threads could be started" in error and "torch.set_num_threads" in error
    assert pairs == "0"
