"""The models: CoSwin and Swin, the text tower, the dual encoder Florence, and the names under which they are made."""

from florence_fast.models.config import FlorenceConfig, ImageConfig, TextConfig
from florence_fast.models.coswin import CoSwin
from florence_fast.models.factory import (
    create_model,
    create_model_and_transforms,
    create_model_from_pretrained,
    get_tokenizer,
)
from florence_fast.models.florence import Florence
from florence_fast.models.pretrained import list_pretrained, load_checkpoint
from florence_fast.models.registry import (
    add_model_config,
    get_model_config,
    list_models,
    num_parameters,
    register_model_config,
)
from florence_fast.models.swin import Swin
from florence_fast.models.text import TextTower
from florence_fast.models.tower import FeatureExtractor, ImageTower

__all__ = [
    "CoSwin",
    "FeatureExtractor",
    "Florence",
    "FlorenceConfig",
    "ImageConfig",
    "ImageTower",
    "Swin",
    "TextConfig",
    "TextTower",
    "add_model_config",
    "create_model",
    "create_model_and_transforms",
    "create_model_from_pretrained",
    "get_model_config",
    "get_tokenizer",
    "list_models",
    "list_pretrained",
    "load_checkpoint",
    "num_parameters",
    "register_model_config",
]
