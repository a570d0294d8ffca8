"""`accelerate` on merges laid out as Microsoft's, alone and behind blocks, where each part is switched off alone."""

import copy
import pickle
from collections import Counter

import pytest
import torch

from florence_fast.compat.accelerate import accelerate, restore
from tests.compat import third_party
from tests.compat.microsoft_models import ClassifierMerge, DetectorMerge, WholeClassifier, tokens
from tests.compat.third_party import assert_as_good_in_bf16, assert_equal_to_rounding, error, randomize, run

calls = third_party.calls

MERGES = {
    "classifier": (lambda width: ClassifierMerge(24, (8, 6), width), (8, 6), ()),
    "detector": (lambda width: DetectorMerge(24, None, width), (8, 6), (8, 6)),
    "detector-odd": (lambda width: DetectorMerge(24, None, width), (9, 7), (9, 7)),
}


@pytest.mark.parametrize("norm_width", [4, 2], ids=["v1", "v2"])
@pytest.mark.parametrize("case", MERGES)
def test_merges(case, norm_width, calls):
    build, size, told = MERGES[case]
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(randomize(build(norm_width)))
    ours, theirs = models
    assert accelerate(ours, verbose=False).swapped == {f"Microsoft {type(ours).__name__}": [""]}
    calls.clear()
    x = tokens(size)
    assert error(ours(x, *told), theirs(x, *told)) <= 1e-5
    assert calls == ["patch_merging" if norm_width == 4 else "layer_norm"]
    exact = run(copy.deepcopy(theirs).double(), x.double(), *told)
    assert_equal_to_rounding(run(copy.deepcopy(ours).double(), x.double(), *told), exact, 1e-10)
    found = [run(model.bfloat16(), x.bfloat16(), *told) for model in (ours, theirs)]
    assert_as_good_in_bf16(*found, exact)


class OtherOrder(ClassifierMerge):
    def side_by_side(self, *corners):
        return torch.cat(corners[::-1], -1)


def test_merges_that_are_something_else_are_left_alone():
    merge = OtherOrder(24, (8, 6))
    with pytest.raises(ValueError, match="has the parts of Microsoft's merge and computes something else"):
        accelerate(merge)
    merge = ClassifierMerge(24, (8, 6))
    merge.norm.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="its norm or its reduction has hooks"):
        accelerate(merge)
    with pytest.raises(ValueError, match="its weights are on the meta device"):
        accelerate(ClassifierMerge(24, (8, 6)).to("meta"))
    assert accelerate(ClassifierMerge(24, (8, 6)), verbose=False).swapped


def test_a_map_that_the_merge_is_not_for_is_refused_as_by_theirs():
    merge = ClassifierMerge(24, (8, 6))
    accelerate(merge, verbose=False)
    for resolution in ((8, 8), (7, 7)):
        merge.input_resolution = resolution
        with pytest.raises(AssertionError, match="input feature has wrong size"):
            merge(tokens((7, 7)))


OPTION_CALLS = {
    "attention": {"layer_norm": 4, "mlp": 2, "patch_merging": 1},
    "merging": {"window_attention": 2, "layer_norm": 4, "mlp": 2},
    "mlp": {"window_attention": 2, "layer_norm": 4, "patch_merging": 1},
    "norm": {"window_attention": 2, "mlp": 2, "patch_merging": 1},
}


@pytest.mark.parametrize("part", OPTION_CALLS)
def test_parts_are_switched_off(part, calls):
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(randomize(WholeClassifier((8, 12))))
    ours, theirs = models
    accelerate(ours, verbose=False, **{part: False})
    calls.clear()
    x = tokens((8, 12))
    assert_equal_to_rounding(run(ours, x), run(theirs, x))
    assert Counter(calls) == OPTION_CALLS[part]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_compiled_and_the_way_back(copied, calls):
    model = WholeClassifier((8, 12))
    x = tokens((8, 12))
    expected = model(x)
    accelerate(model, verbose=False)
    twin = copied(model)
    calls.clear()
    assert error(twin(x), expected) <= 1e-5 and "patch_merging" in calls
    torch._dynamo.reset()
    assert error(torch.compile(twin, fullgraph=True, backend="aot_eager")(x), expected) <= 1e-5
    assert restore(twin) == ["first.blocks.0", "first.blocks.1", "merge"]
    assert torch.equal(twin(x), expected)
