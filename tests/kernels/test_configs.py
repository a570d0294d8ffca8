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
