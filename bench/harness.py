"""How an op is measured: one setup, the same tensors for all, values before times, every row with its provenance.

An op's file in ``bench/ops`` gives sizes, competitors and formulas (see ``OpBench``); everything else is here.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch._functorch.config

from bench.budget.predicted import predicted_clocks
from bench.machine import clocks_under_load
from bench.session import Built, DeviceLost, Missing, OpBench, Session, dtypes_of, entry_of, modes_of
from bench.store import Row
from florence_fast.ops.cases import Function, each
from florence_fast.timing import Timing, time_calls
from florence_fast.verify import exact_results
from florence_fast.verify.compare import Judgement, judge, results
from florence_fast.verify.timing import call_in_mode

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Group:
    """One op at one size in one dtype: the competitors share its tensors."""

    op: OpBench
    name: str
    shape: Any
    dtype: str
    competitors: tuple[str, ...]
    session: Session

    def key(self, competitor: str, mode: str) -> str:
        return "|".join((self.op.OP, self.name, self.dtype, mode, competitor))

    def pending(self) -> dict[str, list[str]]:
        """Competitors with the modes that no stored row answers."""
        finished, made = self.session.store.finished, self.session.made
        keys = {(c, m): self.key(c, m) for c in self.competitors for m in modes_of(self.op)}
        left: dict[str, list[str]] = {}
        for (competitor, mode), key in keys.items():
            if key not in made and not finished(key):
                left.setdefault(competitor, []).append(mode)
        return left

    def run(self) -> None:
        """Make every row that is still missing."""
        pending = self.pending()
        if not pending:
            return
        self.session.check_time()
        try:
            self.draw()
        except Exception as error:
            self.put_all(pending, self.failure(error))
            return
        # On a CPU the competitors take turns; on a GPU one is finished before the next, which frees what it compiled.
        rounds = [{c: m} for c, m in pending.items()] if self.session.device.type == "cuda" else [pending]
        for competitors in rounds:
            self.session.check_time()
            self.run_round(competitors)
            torch._dynamo.reset()

    def draw(self) -> None:
        """Make the tensors, the float64 results that decide, and the plain ones that say what may be expected."""
        self.inputs = self.op.setup(self.shape, DTYPES[self.dtype], str(self.session.device), 0)
        judged = self.inputs.smaller or self.inputs
        plain = self.op.COMPETITORS["eager"](judged, self.session.plan).function
        self.exact, self.plain = (
            self.inputs.enlarged(found)
            for found in (
                exact_results(entry_of(self.op), judged),
                results(plain, judged.tensors, judged.grad_out),
            )
        )

    def run_round(self, competitors: dict[str, list[str]]) -> None:
        """Judge these competitors, then time those whose values are right."""
        ready: dict[str, tuple[Built, list[Judgement]]] = {}
        for competitor, modes in competitors.items():
            outcome = self.prepare(competitor)
            if isinstance(outcome, dict):
                self.put_all({competitor: modes}, outcome)
            else:
                ready[competitor] = outcome
        for mode in modes_of(self.op):
            chosen = {c: ready[c] for c, modes in competitors.items() if mode in modes and c in ready}
            if chosen:
                self.session.check_time()
                self.time(mode, chosen)

    def prepare(self, competitor: str) -> tuple[Built, list[Judgement]] | Row:
        """Build a competitor and compare it with float64; what comes back instead of it is the end of its rows."""
        try:
            built = self.op.COMPETITORS[competitor](self.inputs, self.session.plan)
            judgements = self.judgements(built)
        except Missing as reason:
            return {"status": "missing", "reason": str(reason)}
        except Exception as error:
            return self.failure(error)
        wrong = [j.name for j in judgements if not j.passed]
        errors = [j.to_dict() for j in judgements]
        if wrong:
            return {"status": "wrong", "reason": "too far from float64: " + ", ".join(wrong), "errors": errors}
        return built, judgements

    def judgements(self, built: Built) -> list[Judgement]:
        """Hold the gate: the distance from float64 of each result."""
        if built.forward_only is None:
            return judge(results(built.function, self.inputs.tensors, self.inputs.grad_out), self.plain, self.exact)
        with torch.no_grad():
            found = results(built.function, self.inputs.tensors, None)
        return judge(found, self.plain, {name: self.exact[name] for name in found})

    def time(self, mode: str, ready: dict[str, tuple[Built, list[Judgement]]]) -> None:
        """Time some competitors in one mode and store their rows."""
        calls: dict[str, Any] = {}
        for competitor, (built, _) in ready.items():
            if mode != "forward" and built.forward_only:
                self.put(competitor, mode, {"status": "missing", "reason": built.forward_only})
                continue
            try:
                calls[competitor] = list(self.copies(built.function, mode))
            except Exception as error:
                self.put(competitor, mode, self.failure(error))
        try:
            timings = time_calls(calls, self.session.device, self.session.seconds)
        except Exception as error:
            self.put_all({competitor: [mode] for competitor in calls}, self.failure(error))
            return
        for competitor, timing in timings.items():
            errors = [judgement.to_dict() for judgement in ready[competitor][1]]
            try:
                outcome = {"status": "timed", "errors": errors, **self.measured(mode, timing, calls[competitor][0])}
            except Exception as error:
                outcome = self.failure(error)
            self.put(competitor, mode, outcome)

    def copies(self, function: Function, mode: str) -> Iterator[Callable[[], Any]]:
        """Give the call on as many copies of the tensors as push each other out of the cache."""
        tensors, grad_out = self.inputs.tensors, self.inputs.grad_out
        yield call_in_mode(function, tensors, grad_out, mode)
        if self.session.device.type == "cuda":
            cache = getattr(torch.cuda.get_device_properties(self.session.device), "L2_cache_size", 64 << 20)
            moved = self.op.bytes_moved(self.shape, DTYPES[self.dtype], mode)
            for _ in range(min(64, math.ceil(2 * cache / moved)) - 1):
                clones = {name: x.clone() for name, x in tensors.items()}
                grads = None if grad_out is None else tuple(grad.clone() for grad in each(grad_out))
                yield call_in_mode(function, clones, grads, mode)

    def measured(self, mode: str, timing: Timing, call: Callable[[], Any]) -> Row:
        """Set a time beside the bytes, the FLOPs and the clocks that it ought to take."""
        session, moved = self.session, self.op.bytes_moved(self.shape, DTYPES[self.dtype], mode)
        flops = self.op.flops(self.shape, mode)
        row = {
            **asdict(timing),
            "bytes_per_second": moved / timing.median,
            "flops_per_second": flops / timing.median,
            "copy_ratio": moved / timing.median / session.copy_rate,
            "matrix_ratio": flops / timing.median / session.matrix_rate,
        }
        if session.device.type != "cuda":
            return row
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        row |= clocks_under_load(call, timing.median)
        if row["sm_clock_mhz"]:
            clocks = timing.median * row["sm_clock_mhz"] * 1e6 * session.facts["num_sms"]
            row["measured_clocks"] = clocks / self.op.units(self.shape)
        return row

    def failure(self, error: Exception) -> Row:
        """Describe an error; running out of memory is one, and the next competitor may need less."""
        with contextlib.suppress(RuntimeError):  # of a device that is lost, which ``put`` finds out
            torch.cuda.empty_cache()
        return {"status": "error", "reason": f"{type(error).__name__}: {str(error).strip()[:600]}"}

    def put_all(self, competitors: dict[str, list[str]], outcome: Row) -> None:
        """Store the same outcome for several rows; one line shows those of a competitor."""
        for competitor, modes in competitors.items():
            for mode in modes:
                self.put(competitor, mode, outcome, show=mode == modes[0])

    def put(self, competitor: str, mode: str, outcome: Row, show: bool = True) -> None:
        """Complete a row, store it and show it.

        Raises:
            DeviceLost: the row's error has left the device unusable.
        """
        session, dtype = self.session, DTYPES[self.dtype]
        predictions = [
            predicted_clocks(c, session.facts["arch"]) for c in self.op.budget_cases(self.shape, self.dtype, mode)
        ]
        row = row_of(
            session,
            outcome,
            key=self.key(competitor, mode),
            op=self.op.OP,
            shape=self.name,
            sizes=asdict(self.shape),
            dtype=self.dtype,
            mode=mode,
            competitor=competitor,
            bytes_moved=self.op.bytes_moved(self.shape, dtype, mode),
            flops=self.op.flops(self.shape, mode),
            predicted_clocks=None if None in predictions else sum(predictions) or None,
        )
        session.store.put(row)
        session.made.add(row["key"])
        if show:
            named = mode if row["status"] == "timed" else ""
            session.show(f"  {self.name} {self.dtype} {named:8} {competitor:26} {shown(row)}")
        if row["status"] == "error" and not _usable(session.device):
            raise DeviceLost(row["reason"])


def row_of(
    session: Session,
    outcome: Row,
    *,
    key: str,
    op: str,
    shape: str,
    sizes: Row,
    dtype: str,
    mode: str,
    competitor: str,
    bytes_moved: int | None = None,
    flops: int | None = None,
    predicted_clocks: float | None = None,
) -> Row:
    """Return a row with all that every row has."""
    return {
        **{"key": key, "stage": op, "op": op, "shape": shape, "sizes": sizes, "dtype": dtype, "mode": mode},
        **{"competitor": competitor, **dict.fromkeys(OUTCOME), "bytes_moved": bytes_moved, "flops": flops},
        "copy_bytes_per_second": session.copy_rate,
        "matrix_flops_per_second": session.matrix_rate,
        "predicted_clocks": predicted_clocks,
        **outcome,
        **session.facts,
    }


OUTCOME = (
    *("status", "reason", "errors", "median", "q20", "q80", "samples", "repeats", "peak_bytes"),
    *("bytes_per_second", "flops_per_second", "copy_ratio", "matrix_ratio"),
    *("measured_clocks", "sm_clock_mhz", "temperature", "power_watts"),
)
"""The entries of a row that only a time fills; None otherwise."""


def shown(row: Row) -> str:
    """Say in half a line what a row holds."""
    if row["status"] != "timed":
        return f"{row['status']}: {' '.join(str(row['reason']).split())[:110]}"
    milliseconds = [row[name] * 1e3 for name in ("median", "q20", "q80")]
    text = "{:9.3f} ms ({:.3f}-{:.3f})".format(*milliseconds) + f", {row['copy_ratio']:.0%} of copy"
    if row["peak_bytes"] is not None:
        text += f", {row['peak_bytes'] / 2**20:,.0f} MiB"
    if row["measured_clocks"] is not None:
        expected = row["predicted_clocks"]
        text += f", {row['measured_clocks']:,.0f} clocks" + (f" (budget {expected:,.0f})" if expected else "")
    return text


def run_op(op: OpBench, session: Session, dtypes: tuple[str, ...]) -> None:
    """Measure an op: dtype by dtype, and in each the competitors that build quickly at every shape first."""
    # A compiled backward is walked again and again, so it must not give its saved memory away.
    torch._functorch.config.donated_buffer = False
    shapes = op.REHEARSAL if session.plan.rehearse else op.SHAPES
    quick = tuple(competitor for competitor in op.COMPETITORS if competitor not in op.SLOW_TO_BUILD)
    for dtype, competitors in itertools.product(dtypes, (quick, op.SLOW_TO_BUILD)):
        for name, shape in shapes.items():
            if dtype in dtypes_of(op, shape, dtypes):
                Group(op, name, shape, dtype, competitors, session).run()


def _usable(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
