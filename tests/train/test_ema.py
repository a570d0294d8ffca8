"""The moving average against its definition, and the swap that an evaluation on it needs."""

import pytest
import torch
from torch import nn

from florence_fast.train.ema import EMA


def _set(model: nn.Linear, value: float) -> None:
    with torch.no_grad():
        model.weight.fill_(value)


def test_updates_follow_the_definition_from_warm_up_to_the_full_decay() -> None:
    model = nn.Linear(2, 3, bias=False)
    _set(model, 1.0)
    ema = EMA(model, decay=0.5)
    expected = 1.0
    for k in range(1, 20):
        _set(model, float(k))
        ema.update(model)
        decay = min(0.5, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * k
    torch.testing.assert_close(ema.average["weight"], torch.full((3, 2), expected))


def test_low_precision_weights_are_averaged_in_fp32() -> None:
    """In bf16 a step of 1e-3 on 1.0 would be rounded away for ever."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    _set(model, 1.0)
    ema = EMA(model, decay=0.999)
    ema.updates = 100_000
    _set(model, 2.0)
    ema.update(model)
    assert ema.average["weight"].dtype == torch.float32
    assert ema.average["weight"].item() == pytest.approx(1.001)


def test_swapped_gives_the_average_and_returns_the_weights_even_after_an_error() -> None:
    model = nn.Linear(1, 1, bias=False)
    _set(model, 0.0)
    ema = EMA(model, decay=0.9)
    _set(model, 4.0)
    with pytest.raises(RuntimeError, match="evaluation failed"), ema.swapped(model):
        assert model.weight.item() == 0.0
        raise RuntimeError("evaluation failed")
    assert model.weight.item() == 4.0


def test_a_resized_table_starts_from_where_it_is_and_others_go_on() -> None:
    model = nn.Linear(2, 2)
    ema = EMA(model, decay=0.9)
    earlier = ema.average["bias"].clone()
    model.weight = nn.Parameter(torch.full((5, 2), 7.0))
    model.bias = nn.Parameter(torch.full((2,), 7.0))
    ema.restart_resized(model)
    assert torch.equal(ema.average["weight"], torch.full((5, 2), 7.0))
    assert torch.equal(ema.average["bias"], earlier)


def test_state_survives_and_another_models_is_refused() -> None:
    model = nn.Linear(2, 2)
    ema = EMA(model, decay=0.9)
    _set(model, 3.0)
    ema.update(model)
    other = EMA(nn.Linear(2, 2), decay=0.9)
    other.load_state_dict(ema.state_dict())
    assert other.updates == 1
    assert torch.equal(other.average["weight"], ema.average["weight"])
    with pytest.raises(ValueError, match="another model; differing names: bias"):
        EMA(nn.Linear(2, 2, bias=False), decay=0.9).load_state_dict(ema.state_dict())
