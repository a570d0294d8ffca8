"""``pytest bench/ --benchmark-only`` runs the cases of the harness, and a wrong competitor gets no time."""

import json
import os
import subprocess
import sys
from pathlib import Path

from bench.gpu.stages import ops
from bench.gpu.test_benchmarks import cases

ROOT = Path(__file__).parents[2]


def test_every_competitor_of_every_op_is_a_case():
    found = {(case.values[0].OP, case.values[4]) for case in cases()}
    assert found == {(op.OP, competitor) for op in ops() for competitor in op.COMPETITORS}


def test_a_case_is_measured_with_the_statistics_of_pytest_benchmark(tmp_path):
    words = [
        "bench/gpu/test_benchmarks.py",
        "--benchmark-only",
        "--benchmark-max-time=0.05",
        "--benchmark-min-rounds=2",
    ]
    chosen = ["-q", "-p", "no:cacheprovider", "-k", "l2_normalize and forward and (eager or torch)"]
    path = tmp_path / "benchmark.json"
    command = [sys.executable, "-m", "pytest", *words, *chosen, f"--benchmark-json={path}"]
    # pytest-benchmark measures nothing in a process of pytest-xdist, which these tests may run in.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(path.read_text())["benchmarks"]
    assert {row["extra_info"]["competitor"] for row in rows} >= {"eager", "ours (torch)"}
    assert all(row["stats"]["median"] > 0 and row["group"].startswith("l2_normalize") for row in rows)
