"""What a demo takes: predictions add up, minutes become steps, a plan is read back or refused."""

import pytest
import torch

from florence_fast.demo.plan import (
    ENDING,
    EVALUATION,
    Plan,
    measure_speed,
    predict_seconds,
    say_minutes,
    steps_in,
)
from florence_fast.demo.recipe import QUICK, evaluation_interval
from florence_fast.models import Florence
from florence_fast.tasks import ContrastiveConfig
from florence_fast.train.config import RunConfig, Stage
from tests.models.test_text import texts
from tests.models.tiny import FLORENCE

CONFIG = RunConfig(stages=(Stage(20, 32), Stage(10, 64)), batch_size=4)
SPEED = {32: 1.0, 64: 3.0}


def test_prediction_counts_steps_evaluations_and_the_end():
    ending = 3 * ENDING
    assert predict_seconds(CONFIG, SPEED, 10) == 20 + 30 + EVALUATION * (2 * 1 + 3) + ending
    assert predict_seconds(CONFIG, SPEED, 10, done=10) == 10 + 30 + EVALUATION * (1 + 3) + ending
    assert predict_seconds(CONFIG, SPEED, 10, done=25) == 15 + EVALUATION * 3 + ending
    assert predict_seconds(CONFIG, SPEED, 10, done=30) == ending


def test_steps_that_fit_into_minutes_take_them_and_keep_their_proportions():
    steps = steps_in(60, CONFIG, SPEED, evaluations=3)
    assert steps[0] == pytest.approx(2 * steps[1], abs=2)
    taken = steps[0] * 1 + steps[1] * 3 + (ENDING + 3 * EVALUATION) * 3
    assert taken == pytest.approx(3600, rel=0.01)
    assert steps_in(0.01, CONFIG, SPEED, evaluations=3) == (1, 1)


def test_minutes_as_they_are_said():
    assert [say_minutes(s) for s in (5, 61, 431)] == ["less than a minute", "about a minute", "about 7 minutes"]


def test_the_quick_recipe_evaluates_where_it_logs_and_saves():
    config = QUICK.run(seed=0)
    interval = evaluation_interval(config.total_steps)
    assert config.save_every_steps == interval and interval % config.log_every_n_steps == 0
    assert config.log_every_n_steps == 10


@pytest.mark.parametrize(
    "content",
    ['{"recipe": "quick", "steps": [1, 2, 3]}', '{"recipe": "long", "steps": [1, 2]}', "[]", '{"steps": [true, -1]}'],
)
def test_what_is_no_plan_of_this_recipe_is_refused(tmp_path, content):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ValueError, match=r"holds a run of the recipe|is not the plan of a demo"):
        Plan.read(tmp_path / "plan.json", "quick", 2)


def test_a_plan_comes_back(tmp_path):
    plan = Plan("quick", (12, 5), 2.5)
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json", "quick", 2) == plan
    assert [stage.steps for stage in plan.stages(CONFIG.stages)] == [12, 5]


def test_measuring_the_speed_leaves_the_model_alone():
    model = Florence(FLORENCE)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    seconds = measure_speed(
        model, lambda words: texts(*[4] * len(words)), ["a", "b"], CONFIG, ContrastiveConfig(), None
    )
    assert seconds.keys() == {32, 64} and all(value > 0 for value in seconds.values())
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
