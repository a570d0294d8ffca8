"""Types that are written beside the code that they describe: the public names, and the names of models."""

import ast
import json
import typing
from pathlib import Path

import florence_fast as ff
from florence_fast.models import FlorenceConfig, get_model_config
from florence_fast.models.names import DualEncoderName, TowerName

ROOT = Path(__file__).parents[1]
SOURCE = Path(ff.__file__).read_text(encoding="utf-8")


def imported_for_editors() -> dict[str, str]:
    """Name -> the module that the TYPE_CHECKING block takes it from."""
    (block,) = (
        node for node in ast.parse(SOURCE).body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    )
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module or "" for node in imports for alias in node.names}


def test_editors_see_the_names_that_there_are():
    lazy = {name: f"florence_fast.{home}" for name, home in ff._HOMES.items()}
    assert imported_for_editors() == lazy | dict.fromkeys(ff._SUBMODULES, "florence_fast")


def test_every_registered_model_is_a_name_of_the_right_kind():
    dual, towers = typing.get_args(DualEncoderName), typing.get_args(TowerName)
    assert all(isinstance(get_model_config(name), FlorenceConfig) for name in dual)
    assert not any(isinstance(get_model_config(name), FlorenceConfig) for name in towers)
    registered_here = [
        name for name in ff.list_models() if name.startswith(("florence_", "unicl_", "coswin_", "swin_"))
    ]
    assert sorted(registered_here) == sorted([*dual, *towers])


def test_known_type_errors_lie_in_compat_alone():
    baseline = json.loads((ROOT / ".basedpyright" / "baseline.json").read_text(encoding="utf-8"))
    assert {Path(name).parts[1] for name in baseline["files"]} == {"compat"}
