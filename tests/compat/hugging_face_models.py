"""Small Swins of transformers with random weights, what they compute, and how far apart two of them are."""

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

# maps and windows of 4: 18x23 and 9x12, ragged; 8x8 and 4x4, where the last stage is one window
RAGGED, EXACT = (70, 91), (32, 32)


def build(kind=None, seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"embed_dim": 24, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4, "image_size": 32}
    config = transformers.SwinConfig(**{**sizes, "drop_path_rate": 0.0, **changes})
    model = (kind or transformers.SwinModel)(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def blocks(model):
    return [m for m in model.modules() if type(m).__name__ == "SwinLayer"]


OLD_NAMES = {
    "mlp": "intermediate",
    "mlp.fc1": "intermediate.dense",
    "mlp.activation_fn": "intermediate.intermediate_act_fn",
    "mlp.fc2": "output.dense",
    "attention.q_proj": "attention.self.query",
    "attention.k_proj": "attention.self.key",
    "attention.v_proj": "attention.self.value",
    "attention.o_proj": "attention.output.dense",
    "attention.relative_position_bias": "attention.self",
    "attention.relative_position_bias.relative_position_bias_table": "attention.self.relative_position_bias_table",
}
OLD_LAYOUT = not hasattr(blocks(build())[0], "mlp")
not_in_old_layout = pytest.mark.skipif(OLD_LAYOUT, reason="transformers' Swin got this with the layout of some 5.x")


def owner_and_name(layer, part):
    """Find the module that holds a part of a SwinLayer, and its name there, in either layout of transformers."""
    owner, _, name = (OLD_NAMES.get(part, part) if OLD_LAYOUT else part).rpartition(".")
    return layer.get_submodule(owner), name


def get_part(layer, part):
    """Get a part of a SwinLayer by its name in the present layout."""
    return getattr(*owner_and_name(layer, part))


def run(model, image):
    """Outputs and gradients by name, of a loss in which no two outputs count alike.

    The gradient of k's bias is zero but for rounding, since a softmax does not see what is added to a whole row: it
    stands beside that of q's bias, on whose scale its error is then measured.
    """
    model.zero_grad()
    features = model(image).last_hidden_state
    weights = torch.linspace(-1, 1, features.numel(), dtype=features.dtype).view_as(features)
    (features * weights.sin()).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for name in [name for name in grads if name.endswith(("k_proj.bias", "key.bias"))]:
        beside = name.replace("k_proj", "q_proj").replace("key", "query")
        grads[beside] = torch.stack([grads.pop(name), grads[beside]])
    return {"output": features.detach(), **grads}


def error(found, expected):
    """The largest error of a tensor, relative to the largest value, in float64."""
    found, expected = found.double(), expected.double()
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def assert_equal_to_rounding(found, expected, bound=1e-5):
    assert found.keys() == expected.keys()
    worst = max(expected, key=lambda name: error(found[name], expected[name]))
    assert error(found[worst], expected[worst]) <= bound, f"{worst}: {error(found[worst], expected[worst]):.2e}"
