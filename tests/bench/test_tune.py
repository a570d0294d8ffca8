"""Tuning: the search with a clock that lies as it is told, what the budget excludes, and what a stop leaves behind."""

import json
import os
from types import SimpleNamespace

import pytest
import torch

from bench import machine
from bench.gpu import tune, tune_record, tune_search, tune_static
from bench.gpu.tune_record import Record
from bench.ops import layer_norm
from bench.session import DeviceLost, OutOfTime, Plan, Session
from bench.store import Store
from florence_fast.kernels import configs
from florence_fast.kernels.configs import Config
from florence_fast.kernels.configs.search import candidates
from florence_fast.timing import Timing

FORWARD, BACKWARD = "layer_norm_fwd", "layer_norm_bwd"


@pytest.fixture
def session(tmp_path) -> Session:
    facts = machine.facts(torch.device("cpu"))
    store = Store(tmp_path / "gpu_here.json", facts["sources"])
    return Session(torch.device("cpu"), facts, store, tmp_path, machine.Clock(5), Plan(rehearse=True), seconds=0.0)


@pytest.fixture
def clock(monkeypatch):
    """Seconds by kernel and number of warps in force, in place of the true ones; also what was timed."""

    def start(seconds: dict[tuple[str, int], float]) -> list[tuple[str, Config]]:
        timed = []

        def lie(calls, device, seconds_of_each):
            kernel, config = configs._forced[-1]
            timed.append((kernel, config))
            (name,) = calls
            second = seconds.get((kernel, config.num_warps), 1.0)
            return {name: Timing(second, second, second, 3, 1)}

        monkeypatch.setattr(tune_search, "time_calls", lie)
        monkeypatch.setattr(tune_search, "MOST_REHEARSED", 5)
        return timed

    return start


class Excluded:
    """A static budget that excludes what it is told."""

    def __init__(self, **reasons: dict[Config, str]) -> None:
        self.reasons = reasons

    def of(self, kernel: str, key: str, seconds: float) -> dict[Config, str]:
        return self.reasons.get(kernel, {})


def tuner(session: Session, **reasons: dict[Config, str]) -> tune_search.Tuner:
    folder = session.store.path.parent
    record = Record(folder / "tuning" / "sm_80.json")
    return tune_search.Tuner(session, record, folder / "sm_80.json", Excluded(**reasons), machine.Clock(5))


def rows(session: Session) -> dict[str, dict]:
    stored = json.loads((session.store.path.parent / "tuning" / "sm_80.json").read_text())
    return {row["kernel"]: row for row in stored["rows"]}


def test_the_winner_goes_into_the_table_and_launches_read_it(session, clock, monkeypatch):
    clock({(FORWARD, 2): 0.5, (FORWARD, 8): 0.8, (BACKWARD, 4): 0.995})
    ours = tuner(session)
    monkeypatch.setattr(configs, "table_path", lambda arch: ours.table)
    configs.forget_tables()
    ours.tune(layer_norm, "tiny", "fp32")
    found = rows(session)
    assert {kernel: row["status"] for kernel, row in found.items()} == {FORWARD: "tuned", BACKWARD: "kept"}
    winner, row = found[FORWARD]["config"], found[FORWARD]
    assert winner["num_warps"] == 2 and row["gain"] == 0.5 and (row["mode"], row["seconds"]) == ("forward", 0.5)
    assert row["default_seconds"] == 1.0 and found[BACKWARD]["gain"] == pytest.approx(0.005), "below MIN_GAIN"
    assert {"device", "driver", "torch", "triton", "commit", "date", "sources"} <= set(row)
    assert json.loads(ours.table.read_text()) == {FORWARD: {row["key"]: winner}}
    default = Config(**row["default"])
    key = row["key"].split("/")
    tokens, head_dim = int(key[1][1:]), int(key[2][1:])
    read = configs.config_of(FORWARD, 80, torch.float32, tokens, head_dim, default)
    configs.forget_tables()
    assert read == Config(**winner) != default


def test_what_the_budget_excludes_is_not_launched(session, clock):
    default = Config(4, 1, 8)
    out = {config: "spills" for config in candidates(default) if config.num_warps == 2}
    timed = clock({(FORWARD, 2): 0.1})
    tuner(session, **{FORWARD: out}).tune(layer_norm, "tiny", "fp32")
    assert out and not [config for kernel, config in timed if kernel == FORWARD and config in out]
    trials = rows(session)[FORWARD]["trials"]
    assert [Config(**t["config"]) for t in trials if t["status"] == "excluded"] == list(out)
    assert {t["reason"] for t in trials if t["status"] == "excluded"} == {"spills"}


def test_a_candidate_with_other_values_is_not_timed(session, clock, monkeypatch):
    timed = clock({(FORWARD, 2): 0.1})
    real = tune_search.Bucket.results

    def spoiled(bucket):
        found = real(bucket)
        kernel, config = configs._forced[-1]
        if kernel == FORWARD and config.num_warps == 2:
            found["out"].view(-1)[0] = float("nan")
        return found

    monkeypatch.setattr(tune_search.Bucket, "results", spoiled)
    tuner(session).tune(layer_norm, "tiny", "fp32")
    trials = {t["config"]["num_warps"]: t for t in rows(session)[FORWARD]["trials"]}
    assert (trials[2]["status"], trials[2]["reason"]) == ("wrong", "too far from the default: out")
    assert trials[8]["status"] == "timed" and (FORWARD, 2) not in [(k, c.num_warps) for k, c in timed]


def test_a_default_that_is_wrong_gets_no_candidate(session, clock, monkeypatch):
    timed = clock({})
    real = tune_search.Group.judgements
    wrong = SimpleNamespace(name="dx", passed=False)
    monkeypatch.setattr(tune_search.Group, "judgements", lambda group, built: [*real(group, built), wrong])
    tuner(session).tune(layer_norm, "tiny", "fp32")
    assert {row["status"] for row in rows(session).values()} == {"wrong"} and not timed
    assert rows(session)[FORWARD]["reason"] == "the default is too far from float64: dx"


def test_a_run_that_was_stopped_goes_on_behind_the_last_kernel(session, clock, monkeypatch):
    timed = clock({(FORWARD, 2): 0.5})
    ours = tuner(session)
    real = ours.searched

    def stopped(bucket, request, mode):
        if request.kernel == BACKWARD:
            raise OutOfTime
        return real(bucket, request, mode)

    monkeypatch.setattr(ours, "searched", stopped)
    with pytest.raises(OutOfTime):
        ours.tune(layer_norm, "tiny", "fp32")
    assert set(rows(session)) == {FORWARD} and json.loads(ours.table.read_text())
    timed.clear()
    second = tuner(session)
    assert not second.record.bucket_finished("layer_norm tiny fp32")
    second.tune(layer_norm, "tiny", "fp32")
    assert {kernel for kernel, _ in timed} == {BACKWARD} and set(rows(session)) == {FORWARD, BACKWARD}
    assert tuner(session).record.bucket_finished("layer_norm tiny fp32")
    monkeypatch.setattr(tune_record, "sources", lambda: "of other kernels")
    assert not tuner(session).record.bucket_finished("layer_norm tiny fp32") and not tuner(session).record.finished()


def test_a_lost_device_is_recorded_before_the_stage_ends(session, clock, monkeypatch):
    clock({})
    ours = tuner(session)

    def lose(*args):
        raise RuntimeError("an illegal memory access")

    def lost(error):
        raise DeviceLost(str(error))

    monkeypatch.setattr(ours, "tried", lose)
    monkeypatch.setattr(ours, "after", lost)
    with pytest.raises(DeviceLost):
        ours.tune(layer_norm, "tiny", "fp32")
    assert rows(session)[FORWARD]["status"] == "lost" and "illegal" in rows(session)[FORWARD]["reason"]
    assert len(tuner(session).record.finished()) == 1, "the next start goes round it"


def test_candidates_differ_from_the_default_and_registers_fit(session):
    default = Config(4, 2, 4)
    found = candidates(default)
    assert default not in found and len(set(found)) == len(found)
    assert {config.num_warps for config in found} == {2, 4, 8} and {c.num_stages for c in found} == {1, 2, 3}
    assert {config.programs_per_sm for config in found} == {2, 4, 5, 8}
    limited = [config for config in found if config.maxnreg is not None]
    assert {(c.programs_per_sm, c.maxnreg) for c in limited} == {(4, 128), (5, 96), (8, 64)}
    for config in limited:
        assert config.maxnreg * 32 * config.num_warps * config.programs_per_sm <= 65536


def test_the_budget_excludes_errors_memory_spills_and_what_is_there_already():
    fine = {"registers": 90, "stack": 0, "shared": 1024, "code": "a"}
    assert tune_static.excluded(fine, 80, 0, {"b"}) is None
    assert tune_static.excluded(fine, 80, 0, {"a"}) == "the same code as another"
    assert tune_static.excluded({**fine, "stack": 8}, 80, 0) == "8 bytes of stack, at most 0"
    assert tune_static.excluded({**fine, "stack": 8}, 80, 8) is None
    large = {**fine, "shared": 200 << 10}
    assert "204,800 bytes of shared memory, at most 166,912" in tune_static.excluded(large, 80, 0)
    assert tune_static.excluded(large, 90, 0) is None
    assert tune_static.excluded({"error": "PTXASError: no"}, 80, 0) == "PTXASError: no"


def test_the_rehearsal_compiles_ahead_searches_and_changes_no_table(tmp_path, capsys, monkeypatch):
    before = configs.table_path(80).exists()
    monkeypatch.setenv("FLORENCE_FAST_AUTOTUNE", "1")
    assert tune.main(["--rehearse", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert FORWARD in shown and BACKWARD in shown
    stored = json.loads((tmp_path / "tuning" / "sm_80.json").read_text())
    assert stored["buckets"].keys() == {"layer_norm tiny fp32"}
    assert {row["status"] for row in stored["rows"]} <= {"tuned", "kept"}
    assert configs.table_path(80).exists() == before
    assert "FLORENCE_FAST_AUTOTUNE" not in os.environ, "what is measured here is no user's cache"


def test_a_child_that_fails_fails_the_rehearsal(session):
    budget = tune_static.Exclusions(80, words=("--most", "many"))
    try:
        with pytest.raises(RuntimeError, match=r"bench\.gpu\.tune_static failed\n(.*\n)*.*'many'"):
            budget.wait(60)
        assert budget.of("layer_norm_fwd", "bfloat16/n16/d128", 60) == {}
    finally:
        budget.close()


def test_verdicts_are_read_while_the_child_writes(tmp_path):
    budget = object.__new__(tune_static.Exclusions)
    budget.out, budget.child = tmp_path / "out", SimpleNamespace(poll=lambda: None)
    assert budget.read() == (None, {})
    verdict = {"kernel": "k", "key": "a", "rows": [{"config": vars(Config(8, 1, 1)), "reason": "spills"}]}
    verdict["rows"].append({"config": vars(Config(4, 1, 1)), "reason": None})
    budget.out.write_text(json.dumps({"plan": [["k", "a"], ["k", "b"]]}) + "\n" + json.dumps(verdict) + '\n{"ker')
    assert budget.of("k", "a", 9) == {Config(8, 1, 1): "spills"}
    assert budget.of("k", "c", 9) == {}, "not in the plan: nothing to wait for"
    assert budget.of("k", "b", 0.01) == {}, "waited in vain"


def test_apply_writes_the_winners_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(configs, "table_path", lambda arch: tmp_path / f"table_{arch}.json")
    assert tune.main(["--apply", "--out", str(tmp_path)]) == 2
    record = Record(tmp_path / "tuning" / "sm_90.json")
    record.put({"kernel": "k", "key": "a", "status": "tuned", "config": {"num_warps": 2}})
    record.put({"kernel": "k", "key": "b", "status": "kept", "config": None})
    assert tune.main(["--apply", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "table_90.json").read_text()) == {"k": {"a": {"num_warps": 2}}}
    assert not tune_record.write_table(tmp_path / "table_90.json", record.table()), "nothing new"
    (tmp_path / "tuning" / "sm_80.json").write_text('{"rows": 3}')
    with pytest.raises(ValueError, match=r"must hold a record of bench\.gpu\.tune, got TypeError"):
        tune.main(["--apply", "--out", str(tmp_path)])


def test_without_a_gpu_one_sentence_says_what_would_be_tuned(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 0
    assert capsys.readouterr().out.startswith("No GPU that PyTorch can use, so nothing was tuned")
    assert tune.main(["--op", "windows"]) == 2
    assert "known: window_attention" in capsys.readouterr().err
