"""`accelerate` on blocks laid out as Microsoft's, written here anew, and on blocks that only look so."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from florence_fast.compat.accelerate import accelerate, restore
from tests.compat import third_party
from tests.compat.third_party import assert_as_good_in_bf16, assert_equal_to_rounding, error, randomize, run

calls = third_party.calls
WINDOW = 4


class Attention(nn.Module):
    """Attention among the tokens of windows (B * M, N, C), M of which have a mask each."""

    def __init__(self, width, num_heads, drop=0.0):
        super().__init__()
        self.num_heads, self.scale = num_heads, (width // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * WINDOW - 1) ** 2, num_heads))
        place = torch.stack(torch.meshgrid(torch.arange(WINDOW), torch.arange(WINDOW), indexing="ij")).flatten(1)
        offset = place[:, :, None] - place[:, None, :] + WINDOW - 1
        self.register_buffer("relative_position_index", offset[0] * (2 * WINDOW - 1) + offset[1])
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn_drop, self.proj_drop, self.softmax = nn.Dropout(drop), nn.Dropout(0.0), nn.Softmax(dim=-1)

    def forward(self, x, mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        logits = q * self.scale @ k.mT + self.relative_position_bias_table[self.relative_position_index].permute(
            2, 0, 1
        )
        if mask is not None:
            logits = logits + mask.repeat(len(x) // len(mask), 1, 1)[:, None]
        out = self.attn_drop(self.softmax(logits)) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * (x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(keep) / keep)


def to_windows(x):
    x = x.unflatten(2, (-1, WINDOW)).unflatten(1, (-1, WINDOW)).transpose(2, 3)
    return x.flatten(0, 2).flatten(1, 2)


def from_windows(x, height, width):
    x = x.view(-1, height // WINDOW, width // WINDOW, WINDOW, WINDOW, x.shape[-1])
    return x.transpose(2, 3).reshape(len(x), height, width, -1)


def make_mask(height, width, shift):
    region = torch.zeros(1, height, width, 1)
    for i, rows in enumerate((slice(-WINDOW), slice(-WINDOW, -shift), slice(-shift, None))):
        for j, columns in enumerate((slice(-WINDOW), slice(-WINDOW, -shift), slice(-shift, None))):
            region[:, rows, columns] = 3 * i + j
    region = to_windows(region).squeeze(-1)
    return (region[:, None, :] != region[:, :, None]) * -100.0


class Base(nn.Module):
    def __init__(self, width, num_heads, shift_size, drop_path=0.0, attn_drop=0.0):
        super().__init__()
        self.window_size, self.shift_size = WINDOW, shift_size
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, num_heads, attn_drop), Mlp(width)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def compute(self, x, height, width, mask):
        shortcut, shift = x, self.shift_size
        x = self.norm1(x).unflatten(1, (height, width))
        x = F.pad(x, (0, 0, 0, -width % WINDOW, 0, -height % WINDOW))
        padded = x.shape[1:3]
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
        x = from_windows(self.attn(to_windows(x), mask if shift else None), *padded)
        if shift:
            x = x.roll((shift, shift), (1, 2))
        x = x[:, :height, :width].flatten(1, 2)
        x = shortcut + self.drop_path(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ClassifierBlock(Base):
    """The block for classification, which knows its map and its mask."""

    def __init__(self, *args, resolution=(8, 12), **kwargs):
        super().__init__(*args, **kwargs)
        self.input_resolution = resolution
        self.register_buffer("attn_mask", make_mask(*resolution, self.shift_size) if self.shift_size else None)

    def forward(self, x):
        assert x.shape[1] == self.input_resolution[0] * self.input_resolution[1], "input feature has wrong size"
        return self.compute(x, *self.input_resolution, self.attn_mask)


class DetectorBlock(Base):
    """The block for detection, whose stage says what the map is."""

    H = W = None

    def forward(self, x, mask_matrix):
        return self.compute(x, self.H, self.W, mask_matrix)


class Stage(nn.Module):
    """Blocks of a kind, plain and shifted."""

    def __init__(self, kind, size, **kwargs):
        super().__init__()
        self.size = size
        if kind is ClassifierBlock:
            kwargs["resolution"] = size
        self.blocks = nn.ModuleList([kind(24, 2, shift, **kwargs) for shift in (0, WINDOW // 2)])

    def forward(self, x):
        height, width = self.size
        for block in self.blocks:
            if isinstance(block, ClassifierBlock):
                x = block(x)
            else:
                block.H, block.W = self.size
                x = block(x, make_mask(height + -height % WINDOW, width + -width % WINDOW, WINDOW // 2))
        return x


CASES = {
    "classifier": (ClassifierBlock, (8, 12)),
    "detector-exact": (DetectorBlock, (8, 12)),
    "detector-ragged": (DetectorBlock, (9, 14)),
    "detector-small": (DetectorBlock, (3, 9)),
}


def pair(kind, size, **kwargs):
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(randomize(Stage(kind, size, **kwargs).eval()))
    accelerate(models[0], verbose=False)
    return models


def tokens(size, batch=2):
    return torch.randn(batch, size[0] * size[1], 24)


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
