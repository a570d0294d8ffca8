"""The groups of AdamW, the learning rate of every step, and what a config refuses."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from florence_fast.tasks import TASKS, ContrastiveConfig
from florence_fast.train.config import PAPER_STAGES, RunConfig, Stage, paper_stages, split_settings
from florence_fast.train.optim import (
    carry_state,
    create_optimizer,
    layer_decay,
    learning_rate,
    parameter_groups,
    set_learning_rate,
    split_by_decay,
)

STAGES = (Stage(steps=6, image_size=32), Stage(steps=4, image_size=64, augment_text=False, peak_lr=0.5))

_fields = dataclasses.fields
ALL_SETTINGS = [RunConfig, *(task.settings for task in TASKS.values())]


class Little(nn.Module):
    """A matrix, a bias, a norm, a table, a temperature and a frozen weight."""

    def __init__(self, table_rows: int = 9) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.table = nn.Parameter(torch.randn(table_rows, 2))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.frozen = nn.Parameter(torch.randn(3, 3), requires_grad=False)

    def no_weight_decay(self) -> set[str]:
        return {"table"}

    def loss(self) -> torch.Tensor:
        return (self.norm(self.linear(self.linear.weight)).sum() + self.table.square().sum()) * self.logit_scale


def _optimizer(model: nn.Module, config: RunConfig, **options: object) -> torch.optim.AdamW:
    return create_optimizer(parameter_groups(model, **options), config, dict(model.named_parameters()))


def test_only_matrices_outside_no_weight_decay_are_decayed() -> None:
    decayed, kept = split_by_decay(Little())
    assert list(decayed) == ["linear.weight"]
    assert set(kept) == {"linear.bias", "norm.weight", "norm.bias", "table", "logit_scale"}


def test_a_name_that_the_model_lacks_is_refused() -> None:
    model = Little()
    model.no_weight_decay = lambda: {"tabel"}
    with pytest.raises(ValueError, match="does not have: tabel"):
        split_by_decay(model)


def test_decay_is_decoupled_and_of_its_group_only() -> None:
    """With a gradient of zero, AdamW's step is the decay alone: p (1 - lr * weight_decay)."""
    model = Little()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = _optimizer(model, RunConfig(stages=STAGES, lr=0.25, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.25 * 0.5 if name == "linear.weight" else 1.0
        torch.testing.assert_close(parameter, before[name] * factor, msg=name)


def test_a_new_optimizer_takes_over_every_state_but_that_of_resized_tables() -> None:
    config = RunConfig(stages=STAGES)
    old_model, new_model = Little(), Little(table_rows=25)
    old = _optimizer(old_model, config)
    old_model.loss().backward()
    old.step()
    new = _optimizer(new_model, config)
    assert carry_state(old, new) == ["table"]
    assert torch.equal(new.state[new_model.linear.weight]["exp_avg"], old.state[old_model.linear.weight]["exp_avg"])
    assert new_model.table not in new.state


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        pytest.param(0, 0.5, id="warm-up-starts-above-zero"),
        pytest.param(1, 1.0, id="warm-up-ends-at-the-peak"),
        pytest.param(2, 1.0, id="cosine-starts-at-the-peak"),
        pytest.param(6, 0.1 + 0.4 * 0.5, id="second-stage-has-its-own-peak"),
        pytest.param(9, 0.1 + 0.4 * 0.5 * (1 + math.cos(math.pi * 7 / 8)), id="last-step"),
        pytest.param(10, 0.1, id="the-end-is-the-minimum"),
    ],
)
def test_learning_rate(step: int, expected: float) -> None:
    config = RunConfig(stages=STAGES, lr=1.0, min_lr=0.1, warmup=2)
    assert learning_rate(config, step) == pytest.approx(expected, abs=1e-12)


def test_learning_rate_of_the_cosine_against_torch() -> None:
    config = RunConfig(stages=(Stage(steps=50, image_size=32),), lr=0.3, min_lr=0.01, warmup=0)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.01)
    for step in range(50):
        assert learning_rate(config, step) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("word", ["constant", "const"])
def test_a_constant_learning_rate(word: str) -> None:
    config = RunConfig(stages=STAGES, lr=1.0, min_lr=0.1, warmup=2, lr_scheduler=word)
    assert [learning_rate(config, step) for step in range(10)] == [0.5] + [1.0] * 5 + [0.5] * 4


@pytest.mark.parametrize("word", ["wsd", "const-cooldown"])
def test_warm_up_stable_decay(word: str) -> None:
    stages = (Stage(steps=10, image_size=32),)
    config = RunConfig(stages=stages, lr=1.0, min_lr=0.2, warmup=2, cooldown=4, lr_scheduler=word)
    falling = [1.0, 0.8, 0.6, 0.4, 0.2]
    found = [learning_rate(config, step) for step in range(11)]
    assert found == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 1.0, *falling])
    assert RunConfig(stages=stages, lr_scheduler=word).cooldown_steps == 2
    assert RunConfig(stages=(Stage(1, 32),), lr_scheduler=word).cooldown_steps == 0
    assert learning_rate(RunConfig(stages=(Stage(1, 32),), lr=1.0, lr_scheduler=word), 0) == 1.0


def test_the_papers_stages_keep_their_shares() -> None:
    assert [stage.steps for stage in paper_stages(1260)] == [1000, 180, 80]
    assert [stage.steps for stage in paper_stages(3)] == [1, 1, 1]
    assert [(s.image_size, s.augment_text, s.window_size) for s in PAPER_STAGES] == [
        (224, True, None),
        (224, False, None),
        (384, False, 12),
    ]
    assert sum(stage.steps for stage in paper_stages(1001)) == 1001


def test_stage_at_changes_at_the_border() -> None:
    config = RunConfig(stages=STAGES)
    assert [config.stage_at(step)[0] for step in (0, 5, 6, 9, 10)] == [0, 0, 1, 1, 1]


def test_config_survives_a_round_trip() -> None:
    config = RunConfig(stages=STAGES, ema_decay=0.99, warmup=3)
    assert RunConfig.from_dict(config.to_dict()) == config
    task = ContrastiveConfig(loss="clip", micro_batch_size=3)
    nested, flat = {**config.to_dict(), "task": task.to_dict()}, {**config.to_dict(), **task.to_dict()}
    for values in (nested, {**nested, "task": {"name": "contrastive", **task.to_dict()}}, flat):
        run, own = split_settings(values, ContrastiveConfig)
        assert (RunConfig.from_dict(run), ContrastiveConfig.from_dict(own)) == (config, task)
    with pytest.raises(ValueError, match=r"task\.loss is given twice"):
        split_settings({**flat, "task": {"loss": "clip"}}, ContrastiveConfig)


@pytest.mark.parametrize("config", ALL_SETTINGS)
def test_every_setting_is_described(config: type) -> None:
    """The command line shows these lines."""
    assert config.descriptions().keys() == {field.name for field in _fields(config)}
    assert all(text.endswith(".") and len(text) > 8 for text in config.descriptions().values())


def test_learning_rates_fall_with_depth() -> None:
    model = Little()
    layers = {name: {"linear": 0, "norm": 1}.get(name.split(".")[0], 3) for name, _ in model.named_parameters()}
    config = RunConfig(stages=STAGES, lr=0.25)
    optimizer = _optimizer(model, config, lr_factors=layer_decay(layers, 0.5))
    set_learning_rate(optimizer, 0.8)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert rates["linear.weight"] == rates["linear.bias"] == pytest.approx(0.1)
    assert rates["norm.weight"] == pytest.approx(0.2)
    assert rates["table"] == rates["logit_scale"] == pytest.approx(0.8)
    decays = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["names"]}
    assert {name for name, decay in decays.items() if decay} == {"linear.weight"}


def _configs(**settings: object) -> tuple[RunConfig, ContrastiveConfig]:
    """Build the settings of a run and of its task, each from those that it knows."""
    run, task = split_settings({"stages": STAGES, **settings}, ContrastiveConfig)
    return RunConfig(**run), ContrastiveConfig(**task)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "amp_bf61"}, "unknown precision 'amp_bf61' \\(did you mean 'amp_bf16'\\?\\)"),
        ({"loss": "siglap"}, "unknown loss 'siglap' \\(did you mean 'siglip'\\?\\)"),
        ({"lr_scheduler": "cosin"}, "unknown lr_scheduler 'cosin' \\(did you mean 'cosine'\\?\\)"),
        ({"warmup": 4, "cooldown": 7}, "cooldown must not exceed the run's 6 steps after the warm-up, got 7"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"micro_batch_size": 1.5}, "micro_batch_size must be a whole number"),
        ({"lr": 0.0}, "lr must be a positive number, got 0.0"),
        ({"min_lr": 1.0}, "min_lr must lie in \\[0, lr=0.0005\\], got 1.0"),
        ({"warmup": 11}, "warmup must not exceed the run's 10 steps, got 11"),
        ({"ema_decay": 1.0}, "ema_decay must lie between 0 and 1"),
        ({"stages": ()}, "stages must hold at least one Stage"),
        ({"grad_clip_norm": -1.0}, "grad_clip_norm must be positive or None"),
        ({"beta1": 1.0}, "beta1 must lie in \\[0, 1\\), got 1.0"),
        ({"eps": 1e-50}, "eps must be a number of at least 1.18e-38"),
        ({"seed": 1 << 70}, "seed must be a whole number of at most"),
        ({"cache": "false"}, "cache must be true or false, got 'false'"),
        ({"stages": ({"steps": 1, "image_size": 8},)}, "stages must hold Stages, got {'steps'"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _configs(**settings)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "0.1", True, [1.0], 1j])
def test_no_number_of_a_config_is_nan_or_infinite_or_of_another_type(value: object) -> None:
    """Every field that holds a float, found by its annotation, so that a new one is tested as well."""
    names = [(c, field.name) for c in ALL_SETTINGS for field in _fields(c) if field.type in (float, float | None)]
    wanted = {"lr", "weight_decay", "grad_clip_norm", "ema_decay", "max_bad_share", "keyword_prob"}
    assert wanted <= {name for _, name in names}
    for config, name in names:
        with pytest.raises(ValueError, match=rf"{name} must .*, got "):
            config(**({"stages": STAGES} if config is RunConfig else {}), **{name: value})
    with pytest.raises(ValueError, match=r"Stage\.peak_lr must be a positive number, got "):
        Stage(steps=1, image_size=8, peak_lr=value)


@pytest.mark.parametrize("value", [math.nan, 1.0, "1", True, [1]])
def test_no_count_of_a_config_is_of_another_type(value: object) -> None:
    counts = [(c, field.name) for c in ALL_SETTINGS for field in _fields(c) if field.type in (int, int | None)]
    assert {"batch_size", "seed", "save_every_steps", "micro_batch_size"} <= {name for _, name in counts}
    for config, name in counts:
        with pytest.raises(ValueError, match=f"{name} must be a whole number"):
            config(**({"stages": STAGES} if config is RunConfig else {}), **{name: value})


@pytest.mark.parametrize("values", [[], 3, {"stages": 3}, {"stages": [3]}, {"stages": {"steps": 1}}])
def test_a_config_of_another_shape_is_refused(values: object) -> None:
    with pytest.raises(ValueError, match="must be"):
        RunConfig.from_dict(values)


def test_an_unknown_setting_is_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="RunConfig has no setting 'warmpu' \\(did you mean 'warmup'\\?\\)"):
        RunConfig.from_dict({"stages": [], "warmpu": 3})
    with pytest.raises(ValueError, match="Stage has no setting 'size'"):
        RunConfig.from_dict({"stages": [{"steps": 1, "size": 32}]})
    with pytest.raises(ValueError, match=r"Stage.steps must be a whole number of at least 1, got 0"):
        Stage(steps=0, image_size=32)
