"""timm and transformers find our models whichever package comes first; each order in a process of its own."""

import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import florence_fast as ff

ROOT = Path(__file__).resolve().parents[2]
ORDERS = ["before", "after"]
# What makes torchvision importable asks for our ops first, and the order of imports is what is tested.
DECLARE_TORCHVISION = """
import sys, types
sys.modules["florence_fast"] = types.SimpleNamespace(ops=None)
from tests.compat import third_party
third_party._declare_torchvision_ops()
del sys.modules["florence_fast"]
"""


def child(code, *folders):
    """Run code in a process that looks for packages in ``folders`` first; its warnings are errors."""
    path = ":".join(map(str, [*folders, ROOT, *filter(None, sys.path)]))
    command = [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env={"PYTHONPATH": path}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.fixture
def stand_in_for_timm(tmp_path):
    """A package with what the registration asks of timm."""
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text("NAMES = {}\nis_model = NAMES.__contains__\n")
    (tmp_path / "timm" / "models.py").write_text(
        "import timm\ngenerate_default_cfgs = dict\n"
        "def register_model(entry):\n    assert timm.NAMES.setdefault(entry.__name__, entry) is entry\n"
    )
    return tmp_path


@pytest.mark.parametrize("order", ORDERS)
def test_a_stand_in_for_timm(order, stand_in_for_timm):
    first, second = ("timm", "florence_fast") if order == "after" else ("florence_fast", "timm")
    code = f"""
        import sys
        import {first}
        assert "{second}" not in sys.modules and "torch" not in sys.modules
        import {second}
        import timm
        assert timm.is_model("coswin_tiny") and not timm.is_model("florence_tiny")
        assert timm.NAMES["coswin_nano"](img_size=64, window_size=4).num_features == 384
    """
    child(code, stand_in_for_timm)


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
@pytest.mark.parametrize("order", ORDERS)
def test_timm_itself(order):
    first, second = ("timm", "florence_fast") if order == "after" else ("florence_fast", "timm")
    code = f"""
        import {first}, {second}, timm, torch
        model = timm.create_model("coswin_tiny.florence", features_only=True, img_size=64, window_size=4)
        assert [m.shape[1] for m in model(torch.randn(1, 3, 64, 64))] == model.feature_info.channels()
    """
    child(DECLARE_TORCHVISION + textwrap.dedent(code))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    pytest.importorskip("transformers")
    from florence_fast.compat.transformers_registry import save_for_transformers

    return save_for_transformers(ff.create_model("florence_nano"), tmp_path_factory.mktemp("nano"))


@pytest.mark.parametrize("order", ORDERS)
def test_the_auto_classes_of_transformers(order, saved):
    auto = "from transformers import AutoModel, AutoConfig, AutoImageProcessor, AutoTokenizer, SwinModel"
    first, second = (auto, "import florence_fast") if order == "after" else ("import florence_fast", auto)
    code = f"""
        {first}
        {second}
        tokenizer = AutoTokenizer.from_pretrained({str(saved)!r})
        processor = AutoImageProcessor.from_pretrained({str(saved)!r})
        config = AutoConfig.from_pretrained({str(saved)!r})
        model = AutoModel.from_pretrained({str(saved)!r})
        made = [type(made).__name__ for made in (tokenizer, processor, config, model)]
        assert made == ["FlorenceFast" + kind for kind in ("Tokenizer", "ImageProcessor", "Config", "Model")], made
        assert type(AutoModel.from_config(config)) is type(model)
    """
    child(DECLARE_TORCHVISION + textwrap.dedent(code))


def test_transformers_alone_brings_nothing_of_ours():
    """What `import transformers` loads stays what it loads without us; each Auto class brings its own part at most."""
    pytest.importorskip("transformers")
    child("""
        import sys
        import transformers
        without = set(sys.modules)
        import florence_fast
        ours = {"florence_fast", "florence_fast.on_import", "florence_fast.version"}
        assert {name for name in set(sys.modules) - without if "florence_fast" in name} == ours
    """)
    child("""
        import sys
        import florence_fast
        ours = {name for name in sys.modules if name.startswith("florence_fast")}
        import transformers
        assert {name for name in sys.modules if name.startswith("florence_fast")} == ours
        from transformers import AutoTokenizer
        assert "florence_fast.compat.transformers_tokenizer" in sys.modules
        assert "florence_fast.compat.transformers_model" not in sys.modules
    """)
