"""How the fastest configuration of a kernel is found: values first, then times, then a duel with the default.

A bucket is a size of ``bench/ops`` in a dtype. It says by itself which kernels it launches and under which keys of
``florence_fast.kernels.configs``; a key that several buckets share is tuned by the first.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench import machine
from bench.gpu.tune_record import Record, Row, write_table
from bench.gpu.tune_static import SHARED_BYTES, Exclusions
from bench.harness import Group
from bench.machine import Clock
from bench.session import Built, DeviceLost, Missing, OutOfTime, Session, dtypes_of
from florence_fast.kernels import configs
from florence_fast.kernels.configs import Config, Request, forced, watched
from florence_fast.kernels.configs.search import MIN_GAIN, candidates, lead
from florence_fast.kernels.targets import target_of
from florence_fast.timing import Timing, time_calls
from florence_fast.verify.compare import Judgement, relative_error, results

REHEARSED = ("layer_norm",)
SECONDS = 0.1
"""How long a candidate is timed, warm-up not counted."""
WAIT = 60.0
"""How many seconds the verdicts of the static budget are waited for, for one kernel."""
MOST_REHEARSED = 1
"""Candidates of a kernel in a rehearsal."""
STAGE_MINUTES = 4.0
"""What one start of ``bench.gpu`` gives to tuning."""

OURS = "ours (triton)"


def run(session: Session, names: tuple[str, ...] = (), minutes: float = STAGE_MINUTES, fresh: bool = False) -> Row:
    """Tune every bucket that is not done, and return how many kernels have a new configuration.

    The record lies beside the session's results, in ``tuning``; the table where launches read it, or in a rehearsal
    beside the results too.

    Raises:
        OutOfTime: the session's time is over, or ``minutes``; what is written stands.
        RuntimeError: the process that compiles ahead failed in a rehearsal.
    """
    arch, rehearse = target_of(session.device).arch, session.plan.rehearse
    folder = session.store.path.parent
    record = Record(folder / "tuning" / f"sm_{arch}.json")
    if fresh:
        record.forget()
    table = (folder / "configs" / f"sm_{arch}.json") if rehearse else configs.table_path(arch)
    wanted = names or (REHEARSED if rehearse else tuple(tuned()))
    chosen = [tuned()[name] for name in wanted]
    before = len(record.finished())
    try:
        with excluding(arch, record, session) as budget:
            tuner = Tuner(session, record, table, budget, Clock(minutes))
            for op, name, dtype in buckets(chosen, rehearse):
                if not record.bucket_finished(tuner.title(op, name, dtype)):
                    tuner.tune(op, name, dtype)
            compiled = budget.wait(tuner.clock.left()) if rehearse and budget else None
    finally:
        if not rehearse:
            # The table is a source of every row of the harness: what was measured without it is out of date.
            machine.sources.cache_clear()
            session.facts["sources"] = session.store.sources = machine.sources()
    statuses = [row["status"] for row in record.rows.values()]
    counts = {status: statuses.count(status) for status in ("tuned", "kept", "wrong", "lost")}
    session.show(f"  {counts['tuned']} kernels have a configuration of their own, {counts['kept']} keep the default")
    return {**counts, "measured": len(record.finished()) - before, "compiled_ahead": compiled}


def tuned() -> dict[str, ModuleType]:
    """Return the files of ``bench/ops`` whose kernels take a ``Config``, the most valuable first."""
    from bench.gpu.stages import ops

    return {op.OP: op for op in ops() if getattr(op, "TUNED", True)}


def buckets(ops: list[ModuleType], rehearse: bool) -> Iterator[tuple[ModuleType, str, str]]:
    """Yield op, size and dtype: on a GPU bfloat16 is what counts, and the interpreter has float32."""
    for dtype, op in itertools.product(("fp32",) if rehearse else ("bf16", "fp16", "fp32"), ops):
        shapes = dict(list(op.REHEARSAL.items())[:1]) if rehearse else op.SHAPES
        for name, shape in shapes.items():
            if dtypes_of(op, shape, (dtype,)):
                yield op, name, dtype


@contextmanager
def excluding(arch: int, record: Record, session: Session) -> Iterator[Exclusions | None]:
    """Start the compiler beside us; None for an architecture that the static budget does not know."""
    if arch not in SHARED_BYTES:
        session.show(f"  the static budget knows no sm_{arch}: every candidate is measured")
        yield None
        return
    words = ("--kernels", "layer_norm_fwd", "--most", "1") if session.plan.rehearse else ()
    budget = Exclusions(arch, record.finished(), words)
    try:
        yield budget
    finally:
        budget.close()


@dataclass
class Tuner:
    """Tunes bucket by bucket; record and table are written after every kernel."""

    session: Session
    record: Record
    table: Path
    budget: Exclusions | None
    clock: Clock

    @property
    def wait(self) -> float:
        """How many seconds the verdicts on one kernel are waited for; those of a rehearsal are of other shapes."""
        return 0.0 if self.session.plan.rehearse else WAIT

    def title(self, op: ModuleType, name: str, dtype: str) -> str:
        return f"{op.OP} {name} {dtype}"

    def check_time(self) -> None:
        """Stop between two measurements when the run's time is over, or ours."""
        self.session.check_time()
        if self.clock.left() <= 0:
            raise OutOfTime

    def tune(self, op: ModuleType, name: str, dtype: str) -> None:
        """Tune every kernel that a bucket launches and that no other has tuned; an error is told and stops no other."""
        self.check_time()
        title = self.title(op, name, dtype)
        shape = (op.REHEARSAL if self.session.plan.rehearse else op.SHAPES)[name]
        try:
            bucket = self.opened(Group(op, name, shape, dtype, (), self.session))
        except Missing as reason:
            self.session.show(f"  {title}: {reason}")
            return
        except Exception as error:
            if self.session.plan.rehearse:
                raise
            self.after(error)
            self.session.show(f"  {title}: {type(error).__name__}: {' '.join(str(error).split())[:150]}")
            return
        for request, mode in bucket.requests.items():
            if (request.kernel, request.key) not in self.record.finished():
                self.put(title, mode, request, self.searched(bucket, request, mode))
        self.record.put_bucket(title)

    def opened(self, group: Group) -> "Bucket":
        """Draw the tensors of a bucket and hold the default configurations against float64."""
        group.draw()
        built = group.op.COMPETITORS[OURS](group.inputs, self.session.plan)
        with watched() as all_of_them:
            judgements = group.judgements(built)
        with watched() as first, torch.no_grad():
            built.function(**group.inputs.tensors)
        forward = {(request.kernel, request.key) for request in first}
        requests = {r: "forward" if (r.kernel, r.key) in forward else "backward" for r in all_of_them}
        return Bucket(group, built, judgements, requests)

    def searched(self, bucket: "Bucket", request: Request, mode: str) -> Row:
        """Measure the candidates of one kernel and return what is to be recorded."""
        wrong = [judgement.name for judgement in bucket.judgements if not judgement.passed]
        if wrong:
            return {"status": "wrong", "reason": "the default is too far from float64: " + ", ".join(wrong)}
        reasons = self.budget.of(request.kernel, request.key, self.wait) if self.budget else {}
        seconds = min(SECONDS, self.session.seconds)
        usual = bucket.time(request.kernel, request.default, mode, seconds)
        trials: list[Row] = []
        chosen = candidates(request.default)
        for config in chosen[:MOST_REHEARSED] if self.session.plan.rehearse else chosen:
            self.check_time()
            trial = {"config": asdict(config), "status": "excluded", "reason": reasons.get(config), "median": None}
            trials.append(trial)
            if trial["reason"] is not None:
                continue
            try:
                trial |= self.tried(bucket, request.kernel, config, mode, seconds)
            except OutOfTime:
                raise
            except Exception as error:
                trial |= {"status": "error", "reason": f"{type(error).__name__}: {str(error).strip()[:300]}"}
                try:
                    self.after(error)
                except DeviceLost:
                    # The next start goes round what has brought this one down.
                    lost = {"status": "lost", "reason": trial["reason"], "trials": trials}
                    self.put(bucket.title, mode, request, lost)
                    raise
        found = {"default_seconds": usual.median, "trials": trials}
        timed = [trial for trial in trials if trial["status"] == "timed"]
        best = min(timed, key=lambda trial: trial["median"], default=None)
        if best is None or best["median"] >= usual.median:
            return {"status": "kept", **found}
        gain = lead(
            lambda config: bucket.time(request.kernel, config, mode, seconds).median,
            Config(**best["config"]),
            request.default,
        )
        if gain < MIN_GAIN:
            return {"status": "kept", "gain": gain, **found}
        return {"status": "tuned", "config": best["config"], "seconds": best["median"], "gain": gain, **found}

    def tried(self, bucket: "Bucket", kernel: str, config: Config, mode: str, seconds: float) -> Row:
        """Compare the values of one candidate with those of the default, and time it if they agree."""
        wrong = bucket.disagreeing(kernel, config)
        if wrong:
            return {"status": "wrong", "reason": "too far from the default: " + ", ".join(wrong)}
        return {"status": "timed", "median": bucket.time(kernel, config, mode, seconds).median}

    def put(self, title: str, mode: str, request: Request, found: Row) -> None:
        """Record one kernel, with its provenance, and bring the table up to date."""
        empty = dict.fromkeys(("reason", "config", "seconds", "gain", "default_seconds", "trials"))
        row = {"kernel": request.kernel, "key": request.key, "bucket": title, "mode": mode}
        row |= {"default": asdict(request.default), **empty, **found, **self.session.facts}
        self.record.put(row)
        if write_table(self.table, self.record.table()):
            configs.forget_tables()
        said = {"tuned": f"{found.get('gain') or 0:.1%} faster with {found.get('config')}", "kept": "the default stays"}
        shown = said.get(found["status"]) or f"{found['status']}: {found['reason']}"
        self.session.show(f"  {request.kernel} {request.key} ({mode}): {' '.join(shown.split())[:170]}")

    def after(self, error: Exception) -> None:
        """Free memory after an error, and find out whether the device is still there.

        Raises:
            DeviceLost: it is not.
        """
        if self.session.device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as lost:
                raise DeviceLost(str(error)) from lost


class Bucket:
    """The tensors of one bucket, the results with every default, and the calls that are timed."""

    def __init__(self, group: Group, built: Built, judgements: list[Judgement], requests: dict[Request, str]) -> None:
        self.group, self.built, self.judgements, self.requests = group, built, judgements, requests
        self.title = f"{group.op.OP} {group.name} {group.dtype}"
        self.calls: dict[str, list[Callable[[], Any]]] = {}
        with usual_configs(requests):
            self.usual = {name: x.to(torch.promote_types(x.dtype, torch.float32)) for name, x in self.results().items()}

    def results(self) -> dict[str, torch.Tensor]:
        """Run our kernels, forward and backward."""
        inputs = self.group.inputs
        return results(self.built.function, inputs.tensors, None if self.built.forward_only else inputs.grad_out)

    def disagreeing(self, kernel: str, config: Config) -> list[str]:
        """Name the results that are farther from the default's than those may be from float64; NaN always is."""
        with usual_configs(self.requests), forced(kernel, config):
            found = self.results()
        limits = {judgement.name: judgement.limit for judgement in self.judgements}
        errors = {name: relative_error(found[name], self.usual[name]) for name in limits}
        return [name for name, error in errors.items() if not error <= limits[name]]

    def time(self, kernel: str, config: Config, mode: str, seconds: float) -> Timing:
        """Time the op in one mode with one kernel launched so, all others by default."""
        with usual_configs(self.requests), forced(kernel, config):
            if mode not in self.calls:
                self.calls = {mode: list(self.group.copies(self.built.function, mode))}
            timing = time_calls({self.title: self.calls[mode]}, self.group.session.device, seconds)[self.title]
        assert math.isfinite(timing.median) and timing.median > 0, timing
        return timing


@contextmanager
def usual_configs(requests: dict[Request, str]) -> Iterator[None]:
    """Launch every kernel of a bucket by its default, whatever a table from before says."""

    with ExitStack() as stack:
        for request in requests:
            stack.enter_context(forced(request.kernel, request.default))
        yield
