"""Launch options come from tables, and from the kernel's default where no table knows."""

import json

import pytest
import torch

from florence_fast.kernels import configs, targets
from florence_fast.kernels.configs import Config, config_of


@pytest.fixture
def tables(tmp_path, monkeypatch: pytest.MonkeyPatch):
    entry = {"bfloat16/n64/d32": {"num_stages": 3, "maxnreg": 168}}
    (tmp_path / "sm_90.json").write_text(json.dumps({"window_attention_bwd": entry}))
    monkeypatch.setattr(configs, "__file__", str(tmp_path / "__init__.py"))
    configs._table.cache_clear()
    yield
    configs._table.cache_clear()


def test_a_table_overrides_the_default_where_it_says_something(tables: None) -> None:
    default = Config(num_warps=8, num_stages=1)
    known = config_of("window_attention_bwd", 90, torch.bfloat16, 64, 32, default)
    assert known == Config(num_warps=8, num_stages=3, maxnreg=168)
    assert known.options == {"num_warps": 8, "num_stages": 3, "maxnreg": 168}
    for kernel, arch, dtype, tokens, head_dim in (
        ("window_attention_fwd", 90, torch.bfloat16, 64, 32),
        ("window_attention_bwd", 80, torch.bfloat16, 64, 32),
        ("window_attention_bwd", 90, torch.float16, 64, 32),
        ("window_attention_bwd", 90, torch.bfloat16, 16, 32),
        ("window_attention_bwd", 90, torch.bfloat16, 64, 64),
    ):
        assert config_of(kernel, arch, dtype, tokens, head_dim, default) == default
    assert default.options == {"num_warps": 8, "num_stages": 1}


def test_targets_are_assumed_for_what_is_not_on_a_gpu() -> None:
    device = torch.device("meta")
    assert targets.target_of(device) == targets.INTERPRETER
    with targets.assume(targets.H200):
        assert targets.target_of(device) == targets.H200
        with targets.assume(targets.A100):
            assert targets.target_of(device).arch == 80
    assert targets.target_of(device) == targets.INTERPRETER


def test_a_forced_configuration_wins_over_table_and_default_inside_alone(tables: None) -> None:
    def asked(kernel: str = "window_attention_bwd") -> Config:
        return config_of(kernel, 90, torch.bfloat16, 64, 32, Config())

    usual, other = asked(), asked("window_attention_fwd")
    with configs.forced("window_attention_bwd", Config(1, 1, 1)):
        assert asked() == Config(1, 1, 1) and asked("window_attention_fwd") == other
        with configs.forced("window_attention_bwd", Config(2, 1, 1)):
            assert asked() == Config(2, 1, 1)
        assert asked() == Config(1, 1, 1)
    with pytest.raises(ZeroDivisionError), configs.forced("window_attention_bwd", Config(1, 1, 1)):
        raise ZeroDivisionError
    assert asked() == usual == Config(4, 3, 2, 168)
    with pytest.raises(TypeError, match="config must be a Config, got dict"), configs.forced("x", {"num_warps": 1}):
        asked()


def test_a_watch_sees_keys_and_defaults_whatever_is_forced(tables: None) -> None:
    default = Config(num_warps=8)
    force = configs.forced("window_attention_bwd", Config(1, 1, 1))
    with configs.watched() as outer, configs.watched() as inner, force:
        config_of("window_attention_bwd", 90, torch.bfloat16, 64, 32, default)
    wanted = [configs.Request("window_attention_bwd", 90, "bfloat16/n64/d32", default)]
    assert outer == inner == wanted
    config_of("window_attention_bwd", 90, torch.bfloat16, 64, 32, default)
    assert outer == wanted, "a watch ends with its block"
    with configs.watched() as outer:
        with configs.watched() as inner:
            assert inner == []
        config_of("window_attention_bwd", 90, torch.bfloat16, 64, 32, default)
    assert (outer, inner) == (wanted, [])


def test_a_table_that_was_written_counts_from_the_next_launch_on(tables: None) -> None:
    def asked() -> int:
        return config_of("window_attention_bwd", 90, torch.bfloat16, 64, 32, Config()).num_stages

    assert asked() == 3
    entry = {"bfloat16/n64/d32": {"num_warps": 2, "num_stages": 4, "programs_per_sm": 3, "maxnreg": None}}
    configs.table_path(90).write_text(json.dumps({"window_attention_bwd": entry}))
    assert asked() == 3, "tables are read once"
    configs.forget_tables()
    assert config_of("window_attention_bwd", 90, torch.bfloat16, 64, 32, Config()) == Config(2, 4, 3, None)


def test_a_measured_table_answers_before_that_of_the_package(tables: None) -> None:
    def asked() -> Config:
        return config_of("window_attention_bwd", 90, torch.bfloat16, 64, 32, Config())

    request = configs.Request("window_attention_bwd", 90, "bfloat16/n64/d32", Config())
    entry = {"num_warps": 2, "num_stages": 1, "programs_per_sm": 3, "maxnreg": None}
    table: dict[str, dict[str, dict]] = {}
    with configs.measured(table):
        assert asked() == configs.usual(request) == Config(4, 3, 2, 168), "what it does not know, the package's does"
        table["window_attention_bwd"] = {"bfloat16/n64/d32": entry}
        with configs.forced("window_attention_bwd", Config(1, 1, 1)):
            assert asked() == Config(1, 1, 1) and configs.usual(request) == Config(2, 1, 3)
        assert asked() == Config(2, 1, 3)
    assert asked() == Config(4, 3, 2, 168)
