"""``AutoModel`` of ``model_type: florence_fast``; see transformers_registry.py.

Letters: B images · T texts · N tokens · D embedding dim
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from florence_fast import ops
from florence_fast.compat.transformers_config import FlorenceFastConfig
from florence_fast.models import Florence, FlorenceConfig


@dataclass
class FlorenceFastOutput(ModelOutput):
    """CLIPModel's names: the loss if asked, logits of images against texts and back, normalised features."""

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None


class FlorenceFastModel(PreTrainedModel):
    """`Florence` with transformers' surface; parameters have the names that they have there."""

    config_class = FlorenceFastConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = False

    encode_image = Florence.encode_image
    encode_text = Florence.encode_text
    _normalized = Florence._normalized

    def __init__(self, config: FlorenceFastConfig) -> None:
        super().__init__(config)
        model = Florence(FlorenceConfig.from_dict(config.florence))
        for name, child in model.named_children():
            self.add_module(name, child)
        self.logit_scale = model.logit_scale
        self.post_init()

    @classmethod
    def from_florence(cls, model: Florence) -> FlorenceFastModel:
        """Build the twin of a model of ours, with copies of its weights."""
        twin = cls(FlorenceFastConfig(model.config.to_dict()))
        twin.load_state_dict(model.state_dict())
        return twin.eval()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Do nothing: towers draw their own weights when they are made."""

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to features (B, D), not normalised."""
        return self.encode_image(pixel_values)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Map token ids (T, N) to features (T, D), not normalised; what stands behind a text's end changes nothing."""
        return self.encode_text(input_ids)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_loss: bool = False,
        return_dict: bool = True,
    ) -> FlorenceFastOutput | tuple[Tensor, ...]:
        """Compare images (B, 3, H, W) with texts (T, N), or encode whichever is given.

        Args:
            return_loss: add CLIP's loss, for which row i of both belongs together.
            return_dict: False gives a tuple of what there is.

        Raises:
            ValueError: neither is given, or a loss is asked of one alone.
        """
        if pixel_values is None and input_ids is None:
            raise ValueError("give pixel_values, input_ids or both")
        images = None if pixel_values is None else self.encode_image(pixel_values, normalize=True)
        texts = None if input_ids is None else self.encode_text(input_ids, normalize=True)
        found = {"image_embeds": images, "text_embeds": texts}
        if images is not None and texts is not None:
            scale = self.logit_scale.exp() if self.config.florence["logit_scale_kind"] == "log" else self.logit_scale
            logits = scale * images @ texts.T
            found |= {"logits_per_image": logits, "logits_per_text": logits.T}
            if return_loss:
                found["loss"] = ops.contrastive_loss(images, texts, scale)
        elif return_loss:
            raise ValueError("return_loss needs pixel_values and input_ids")
        output = FlorenceFastOutput(**found)
        return output if return_dict else output.to_tuple()
