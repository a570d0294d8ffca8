"""`accelerate` on blocks laid out as Microsoft's, and on blocks that only look so."""

import copy
import pickle
import warnings
from collections import Counter

import pytest
import torch
from torch import nn

from florence_fast.compat.accelerate import accelerate, restore
from tests.compat import third_party
from tests.compat.microsoft_models import CASES, ClassifierBlock, DetectorBlock, Stage, tokens
from tests.compat.third_party import assert_as_good_in_bf16, assert_equal_to_rounding, error, randomize, run

calls = third_party.calls


def pair(kind, size, **kwargs):
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(randomize(Stage(kind, size, **kwargs).eval()))
    accelerate(models[0], verbose=False)
    return models


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_same_output_and_gradients(case, training, calls):
    ours, theirs = (model.train(training) for model in pair(*CASES[case]))
    calls.clear()
    x = tokens(CASES[case][1])
    assert_equal_to_rounding(run(ours, x), run(theirs, x))
    on_kernels = 1 if case == "detector-small" else 2  # theirs shifts even a single window
    assert calls.count("window_attention") == calls.count("mlp") == on_kernels


@pytest.mark.parametrize("case", ["classifier", "detector-ragged"])
def test_as_good_in_bf16(case):
    ours, theirs = pair(*CASES[case])
    x = tokens(CASES[case][1])
    exact = run(copy.deepcopy(theirs).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = [run(model, x) for model in (ours, theirs)]
    assert_as_good_in_bf16(*found, exact)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_their_own_attention_among_our_norms_and_mlp(case, training, calls):
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(randomize(Stage(*CASES[case], attn_drop=0.3, drop_path=0.3).train(training)))
    ours, theirs = models
    accelerate(ours, attention=False, verbose=False)
    calls.clear()
    found, x = [], tokens(CASES[case][1], batch=4)
    for model in (ours, theirs):
        torch.manual_seed(3)
        found.append(run(model, x))
    assert_equal_to_rounding(*found)
    assert Counter(calls) == {"layer_norm": 4, "mlp": 2}
    ours.blocks[1].attn.qkv.register_forward_hook(lambda module, args, out: 2 * out)
    theirs.blocks[1].attn.qkv.register_forward_hook(lambda module, args, out: 2 * out)
    assert error(ours.eval()(x), theirs.eval()(x)) <= 1e-5


def test_drop_path_draws_the_same_numbers():
    found, x = [], tokens((8, 12), batch=8)
    for model in pair(*CASES["classifier"], drop_path=0.5):
        torch.manual_seed(3)
        found.append(run(model.train(), x))
    assert_equal_to_rounding(*found)


def test_attention_dropout_in_training_runs_their_forward(calls):
    models = pair(*CASES["classifier"], attn_drop=0.3)
    calls.clear()
    found = []
    x = tokens((8, 12))
    for model in models:
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(run(model.train(), x))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0]) and not calls


def test_what_theirs_refuses_is_refused():
    ours = pair(*CASES["classifier"])[0]
    with pytest.raises(AssertionError, match="input feature has wrong size"):
        ours(tokens((8, 8)))


class Scaled(ClassifierBlock):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gamma = nn.Parameter(torch.ones(24))

    def forward(self, x):
        return x + self.gamma * (super().forward(x) - x)


class PostNorm(ClassifierBlock):
    def compute(self, x, height, width, mask):
        return x + self.norm1(super().compute(x, height, width, mask))


class Returning(ClassifierBlock):
    def forward(self, x):
        return super().forward(x), None


class Asking(ClassifierBlock):
    def forward(self, x, size, mask, other):
        return super().forward(x)


IMPOSTORS = [
    (Scaled, "has the parts of Microsoft's block and computes something else"),
    (PostNorm, "has the parts of Microsoft's block and computes something else"),
    (Returning, "returns something else"),
    (Asking, "its forward takes x, size, mask, other"),
]


@pytest.mark.parametrize(("kind", "reason"), IMPOSTORS, ids=[kind.__name__ for kind, _ in IMPOSTORS])
def test_blocks_that_only_look_so_are_left_alone(kind, reason):
    block = kind(24, 2, 2)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=reason):
        accelerate(block)
    assert torch.equal(torch.get_rng_state(), before)
    assert "forward" not in vars(block)


def test_a_trial_leaves_weights_and_mode_as_they_were():
    torch.manual_seed(0)
    block = DetectorBlock(24, 2, 2).train()
    before = {name: value.clone() for name, value in block.state_dict().items()}
    accelerate(block, verbose=False)
    assert block.training and block.attn.training and "H" not in vars(block)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_compiles_into_one_graph():
    ours, theirs = pair(*CASES["classifier"])
    torch._dynamo.reset()
    x = tokens((8, 12))
    assert error(torch.compile(ours, fullgraph=True, backend="aot_eager")(x), theirs(x)) <= 1e-5


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_and_the_way_back(copied, calls):
    ours, theirs = pair(*CASES["detector-ragged"])
    x = tokens((9, 14))
    expected = ours(x)
    twin = copied(ours)
    calls.clear()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert torch.equal(twin(x), expected) and "window_attention" in calls
    assert list(twin.state_dict()) == list(theirs.state_dict())
    assert restore(twin) == ["blocks.0", "blocks.1"]
    calls.clear()
    assert torch.equal(twin(x), theirs(x)) and not calls
