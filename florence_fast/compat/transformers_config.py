"""``AutoConfig`` of ``model_type: florence_fast``; see transformers_registry.py.

transformers may be in the middle of importing its own models when it imports this, so that the head of this file asks
for none of them.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from florence_fast.compat import transformers_registry
from florence_fast.models import get_model_config


class FlorenceFastConfig(PretrainedConfig):
    """Our configuration as a dictionary, under ``florence``; without one, that of florence_nano."""

    model_type = "florence_fast"

    def __init__(self, florence: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.florence = florence or get_model_config("florence_nano").to_dict()
        self.projection_dim = self.florence["embed_dim"]
        transformers_registry.register_model()
