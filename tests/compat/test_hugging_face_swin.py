"""Our Swin against transformers.SwinModel, whole, with random weights, at sizes that nothing divides."""

import re

import pytest
import torch

from florence_fast.models import Swin
from florence_fast.models.layouts import to_our_layout
from florence_fast.models.pretrained import load_state
from tests.models.tiny import SWIN

transformers = pytest.importorskip("transformers")


@pytest.fixture
def theirs():
    config = transformers.SwinConfig(
        embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4, image_size=32, drop_path_rate=0.0
    )
    model = transformers.SwinModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


# the last row of maps: 18x23 and 9x12, 11x16 and 6x8, 8x8 and 4x4 (no shift), 4x13 in 16x51 (no shift on either axis)
@pytest.mark.parametrize("size", [(70, 91), (43, 62), (32, 32), (33, 51)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_equal_to_hugging_face(theirs, size):
    ours = Swin(SWIN).eval()
    load_state(ours, to_our_layout(theirs.state_dict()))
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = theirs(image)
        features = ours.forward_features(image)
    assert features.abs().max() > 0.5, "the comparison needs features that are not all near zero"
    torch.testing.assert_close(features.flatten(1, 2), expected.last_hidden_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(image), expected.pooler_output, rtol=1e-5, atol=1e-5)


def test_one_axis_as_long_as_the_window_stops_the_shift_on_both(theirs):
    ours = Swin(SWIN).eval()
    load_state(ours, to_our_layout(theirs.state_dict()))
    image = torch.randn(1, 3, 32, 72)  # maps 8x18 and 4x9, window 4
    with torch.no_grad():
        expected = theirs(image).pooler_output
        torch.testing.assert_close(ours(image), expected, rtol=1e-5, atol=1e-5)


OLD_NAMES = [
    (r"attention\.q_proj", "attention.self.query"),
    (r"attention\.k_proj", "attention.self.key"),
    (r"attention\.v_proj", "attention.self.value"),
    (r"attention\.o_proj", "attention.output.dense"),
    (r"attention\.relative_position_bias\.", "attention.self."),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
    (r"^", "swin."),
]


def test_names_of_the_published_files_are_read(theirs):
    new = theirs.state_dict()
    old = {}
    for name, tensor in new.items():
        for pattern, replacement in OLD_NAMES:
            name = re.sub(pattern, replacement, name, count=1)
        old[name] = tensor
    assert "swin.encoder.layers.0.blocks.1.attention.self.query.weight" in old
    expected, found = to_our_layout(new), to_our_layout(old)
    assert expected.keys() == found.keys() == Swin(SWIN).state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
