"""The file of published figures and goals: what it holds, and that a wrong entry is refused by name."""

import copy
import json
import math
import re

import pytest

from bench.report.anchors import ANCHORS, UNITS, load_anchors

STORED = json.loads(ANCHORS.read_text(encoding="utf-8"))


def figures(**wanted):
    """The published values whose entry has these keys, in the order of the file."""
    return [row.value for row in load_anchors().published if all(getattr(row, k) == v for k, v in wanted.items())]


def test_the_published_figures_are_those_of_their_sources():
    fwa = {"by": "flash-window-attention-v2", "unit": "TFLOP/s"}
    assert figures(**fwa, mode="forward") == [13.7, 31.5, 60.3, 68.0]
    assert figures(**fwa, mode="both") == [3.1, 9.2, 17.1, 22.1]
    assert figures(source="fwa2", by="torch.compile, as they measured it") == [5.0, 11.9, 16.8, 17.8]
    assert figures(source="monai") == [2.09]
    assert figures(source="fastertransformer", unit="images/s") == [2918, 1532]
    assert figures(source="fastertransformer", unit="% MFU") == [29, 34]
    assert figures(source="swin_apex") == [282, 352]
    assert figures(source="siglip_kernel", unit="ms") == [48.8, 102]
    assert figures(source="siglip_kernel", unit="GB") == [1.4, 33]
    assert figures(source="inf_cl") + figures(source="inf_cl_offload") == [0.18, 0.36, 0.72, 1.45, 6.53]
    assert figures(source="timm") == [41, 52, 83]


def test_figures_that_follow_from_others_agree_with_them():
    # 64 images in 21.93 and 41.78 ms, and twice 15.47 and 34.53 GMACs over an A100's 312 TFLOP/s.
    for rate, mfu, seconds, gmacs in ((2918, 29, 21.93e-3, 15.47), (1532, 34, 41.78e-3, 34.53)):
        assert rate == round(64 / seconds)
        assert mfu == round(100 * rate * 2 * gmacs * 1e9 / load_anchors().peak("NVIDIA A100-SXM4-80GB"))
    # The contrastive goals are 70% of an H200's peak over 8 B^2 D.
    goals = {goal.where["dim"]: goal.at_most for goal in load_anchors().goals if goal.metric == "milliseconds"}
    assert sorted(goals) == [512, 768, 1024]
    for dim, limit in goals.items():
        assert limit == pytest.approx(8 * 65536**2 * dim / (0.7 * load_anchors().peak("NVIDIA H200")) * 1e3, rel=2e-3)


def test_a_device_without_a_stated_peak_has_none():
    assert load_anchors().peak("NVIDIA H100 80GB HBM3") == load_anchors().peak("NVIDIA H200")
    assert load_anchors().peak("NVIDIA H100 PCIe") is None
    assert load_anchors().peak("CPU, AVX512") is None


def test_a_goal_is_reached_from_its_side():
    at_least = next(goal for goal in load_anchors().goals if goal.at_least == 2.5)
    at_most = next(goal for goal in load_anchors().goals if goal.at_most == 25.4)
    assert (at_least.threshold, at_most.threshold) == (2.5, 25.4)
    assert at_least.reached(5.0) == 2 and at_least.reached(1.25) == 0.5
    assert at_most.reached(12.7) == 2 and at_most.reached(50.8) == 0.5


def spoiled(place: str, value: object) -> dict:
    """The stored file with one value replaced; ``place`` is the path to it."""
    stored = copy.deepcopy(STORED)
    *path, last = [int(word) if word.isdigit() else word for word in place.split(".")]
    entry = stored
    for word in path:
        entry = entry[word]
    if value is KeyError:
        del entry[last]
    else:
        entry[last] = value
    return stored


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("goals", KeyError, "must hold sources, published, peaks and goals, got KeyError"),
        ("published.0", [], "published[0] must be an object, got []"),
        ("published.0.value", KeyError, "published[0] must have value"),
        ("published.0.colour", "red", "published[0] must have no other keys than source, by"),
        ("published.0.value", "13.7", "published[0].value must be a number of at least 0, got '13.7'"),
        ("published.0.value", True, "published[0].value must be a number of at least 0, got True"),
        ("published.0.value", math.nan, "published[0].value must be a number of at least 0, got nan"),
        ("published.0.value", 0, "published[0].value must be above 0, got 0"),
        ("published.0.source", "hearsay", "published[0].source must be one of fwa2, monai"),
        ("published.0.unit", "furlongs", f"published[0].unit must be one of {', '.join(UNITS)}, got 'furlongs'"),
        ("published.0.mode", "sideways", "published[0].mode must be one of forward, backward, both"),
        ("published.0.sizes", 3, "published[0].sizes must be an object, got 3"),
        ("published.0.dtype", 16, "published[0].dtype must be a text or null, got 16"),
        ("sources.fwa2.url", "a friend", "sources.fwa2.url must begin with https://, got 'a friend'"),
        ("peaks.0.flops_per_second", None, "peaks[0].flops_per_second must be a number of at least 0, got None"),
        ("goals.0.metric", "beauty", "goals[0].metric must be one of copy_ratio"),
        ("goals.0.at_most", 1, "goals[0] must have one of at_least and at_most, above 0, got [0.85, 1]"),
        ("goals.0.at_least", KeyError, "goals[0] must have one of at_least and at_most, above 0, got []"),
        ("goals.0.of", "median", "goals[0].of must be worst or best, got 'median'"),
        ("goals.0.mode", "sideways", "goals[0].mode must be one of forward, backward, both"),
        ("goals.0.against", "best", "goals[0].against must be there for a speedup and only then, got 'best'"),
        ("goals.1.against", KeyError, "goals[1].against must be there for a speedup and only then, got None"),
        ("goals.0.plus_bytes", 5, "goals[0].bytes_per_value must be there for memory and only then"),
    ],
)
def test_a_wrong_entry_is_refused_by_name(tmp_path, place, value, message):
    path = tmp_path / "anchors.json"
    path.write_text(json.dumps(spoiled(place, value)), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        load_anchors(path)


def test_a_file_that_is_no_json_is_refused(tmp_path):
    path = tmp_path / "anchors.json"
    path.write_text("[1, 2", encoding="utf-8")
    with pytest.raises(ValueError, match=r"anchors\.json must hold sources"):
        load_anchors(path)
    path.write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(ValueError, match="got TypeError"):
        load_anchors(path)
