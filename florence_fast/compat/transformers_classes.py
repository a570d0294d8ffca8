"""What transformers' Auto classes make of ``model_type: florence_fast``; see transformers_registry.py.

Letters: B images · T texts · N tokens · D embedding dim
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor, BatchFeature, PretrainedConfig, PreTrainedModel, PreTrainedTokenizer
from transformers.utils import ModelOutput

from florence_fast import ops
from florence_fast.data.tokenizer import END, START, Tokenizer, _load
from florence_fast.data.transforms import image_transform
from florence_fast.models import Florence, FlorenceConfig, get_model_config

__all__ = [
    "FlorenceFastConfig",
    "FlorenceFastImageProcessor",
    "FlorenceFastModel",
    "FlorenceFastTokenizer",
]


class FlorenceFastConfig(PretrainedConfig):
    """Our configuration as a dictionary, under ``florence``; without one, that of florence_nano."""

    model_type = "florence_fast"

    def __init__(self, florence: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.florence = florence or get_model_config("florence_nano").to_dict()
        self.projection_dim = self.florence["embed_dim"]


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


class FlorenceFastImageProcessor(BaseImageProcessor):
    """The evaluation transform of a model, on Pillow and torch alone.

    Args:
        size: height and width of what the model reads.
        image_mean: subtracted from each channel.
        image_std: by which it is then divided.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 - transformers' own form

    def __init__(
        self,
        size: int = 224,
        image_mean: Iterable[float] = (0.485, 0.456, 0.406),
        image_std: Iterable[float] = (0.229, 0.224, 0.225),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.size, self.image_mean, self.image_std = size, list(image_mean), list(image_std)

    def preprocess(self, images: Any, return_tensors: str | None = "pt") -> BatchFeature:
        """Turn one PIL picture or several into ``pixel_values``, (B, 3, size, size)."""
        transform = image_transform(self.size, False, tuple(self.image_mean), tuple(self.image_std))
        pictures = [images] if isinstance(images, Image.Image) else list(images)
        pixels = torch.stack([transform(picture) for picture in pictures])
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)


class FlorenceFastTokenizer(PreTrainedTokenizer):
    """`florence_fast.data.Tokenizer` with transformers' surface; rows are filled with end-of-text, as CLIP's are there.

    The vocabulary comes with florence_fast, so that nothing is written but the settings.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 - transformers' own form
    vocab_files_names: dict[str, str] = {}  # noqa: RUF012 - transformers' own form

    def __init__(self, model_max_length: int = 77, **kwargs: Any) -> None:
        self._ours = Tokenizer(model_max_length)
        self._ids = _load().get_vocab()
        self._tokens = {number: token for token, number in self._ids.items()}
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
        super().__init__(model_max_length=model_max_length, **{**special, **kwargs})

    @property
    def vocab_size(self) -> int:
        """49,408."""
        return self._ours.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Return token -> id."""
        return dict(self._ids)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self._tokens[number] for number in self._ours.encode(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, self._ours.eot_token_id)

    def _convert_id_to_token(self, index: int) -> str:
        return self._tokens[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join tokens to the text that they stand for; case and spacing stay normalised."""
        return self._ours.decode([self._ids[token] for token in tokens if token not in (START, END)])

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Put start-of-text before the ids and end-of-text behind them."""
        return [self._ours.sot_token_id, *token_ids_0, *(token_ids_1 or []), self._ours.eot_token_id]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write nothing."""
        return ()
