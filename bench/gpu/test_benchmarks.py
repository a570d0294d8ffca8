"""The same cases for those who want pytest-benchmark's statistics: ``pytest bench/ --benchmark-only``.

Every op, size, dtype, mode and competitor of ``bench/ops`` is one benchmark; ``-k`` picks some. On a GPU they have the
sizes of ``make gpu``, elsewhere those of its rehearsal. What is too far from float64 fails and gets no time; what is
not installed is skipped with the reason. Needs pytest-benchmark (``pip install 'florence_fast[test]'``).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu.stages import DTYPES, ops
from bench.harness import Group
from bench.machine import Clock, facts
from bench.session import Missing, OpBench, Plan, Session, dtypes_of, modes_of
from bench.store import Store
from florence_fast.verify.timing import call_in_mode

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_CPU = DEVICE.type == "cpu"


def cases() -> Iterator[Any]:
    """Give op, size, dtype, competitor and mode of each benchmark."""
    for op in ops():
        for name, shape in (op.REHEARSAL if ON_CPU else op.SHAPES).items():
            for dtype in dtypes_of(op, shape, ("fp32",) if ON_CPU else DTYPES):
                for competitor in op.COMPETITORS:
                    for mode in modes_of(op):
                        words = f"{op.OP}-{name}-{dtype}-{mode}-{competitor}"
                        yield pytest.param(op, name, shape, dtype, competitor, mode, id=words)


@pytest.fixture(scope="session")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """What the harness needs to know of this run; nothing is stored."""
    folder: Path = tmp_path_factory.mktemp("bench")
    found = facts(DEVICE)
    return Session(DEVICE, found, Store(folder / "rows.json", found["sources"]), folder, Clock(600), Plan(ON_CPU))


@pytest.mark.parametrize(("op", "name", "shape", "dtype", "competitor", "mode"), cases())
def test_benchmark(
    op: OpBench, name: str, shape: Any, dtype: str, competitor: str, mode: str, session: Session, benchmark: Any
) -> None:
    group = Group(op, name, shape, dtype, (competitor,), session)
    benchmark.group = f"{op.OP} {name} {dtype} {mode}"
    group.draw()
    try:
        built = op.COMPETITORS[competitor](group.inputs, session.plan)
    except Missing as reason:
        pytest.skip(str(reason))
    if built.forward_only and mode != "forward":
        pytest.skip(built.forward_only)
    wrong = [judgement.name for judgement in group.judgements(built) if not judgement.passed]
    assert not wrong, f"too far from float64: {', '.join(wrong)}"
    call = call_in_mode(built.function, group.inputs.tensors, group.inputs.grad_out, mode)

    def to_the_end() -> None:
        call()
        if not ON_CPU:
            torch.cuda.synchronize()

    benchmark.extra_info.update(device=session.facts["device"], torch=session.facts["torch"], competitor=competitor)
    benchmark(to_the_end)
