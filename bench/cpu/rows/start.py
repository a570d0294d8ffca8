"""Start-up time: the import, and the first features of one image, in fresh processes."""

import statistics
import subprocess
import sys
import time

from bench.cpu.rows.base import Run, Subject
from bench.machine import ROOT

PROGRAMS = {
    ("import", "a fresh process"): {
        "ours": "import florence_fast",
        "torch alone": "import torch",
    },
    ("first_call", "Swin-T, one image"): {
        "ours": "import florence_fast as ff, torch; ff.create_model('swin_tiny').eval()(torch.randn(1, 3, 224, 224))",
        "ours (torch.compile)": (
            "import florence_fast as ff, torch; "
            "torch.compile(ff.create_model('swin_tiny').eval())(torch.randn(1, 3, 224, 224))"
        ),
    },
}
REPEATS = 5


def measure(run: Run) -> None:
    """Make the rows; programs take turns, and one that takes over 10 s runs once."""
    for (op, shape), programs in PROGRAMS.items():
        subject = Subject(op, shape, {"cache": "files in memory"}, "fp32", "forward")
        pending = [name for name in programs if not run.store.finished(subject.key(name))]
        if not pending or run.clock.left() <= 0:
            continue
        times: dict[str, list[float]] = {name: [] for name in pending if not (run.tiny and "compile" in name)}
        for _ in range(1 if run.tiny else REPEATS):
            for name, seconds in times.items():
                if not seconds or seconds[0] < 10:
                    start = time.perf_counter()
                    subprocess.run([sys.executable, "-c", programs[name]], cwd=ROOT, check=True)
                    seconds.append(time.perf_counter() - start)
        for name, seconds in times.items():
            q20, q80 = min(seconds), max(seconds)
            if len(seconds) > 1:
                q20, *_, q80 = statistics.quantiles(seconds, n=5, method="inclusive")
            median = statistics.median(seconds)
            outcome = {"median": median, "q20": q20, "q80": q80, "samples": len(seconds), "repeats": 1}
            run.put(subject, name, {"status": "timed", **outcome})
