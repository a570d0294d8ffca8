"""Florence (arXiv 2111.11432, sections 2.2 and 2.3): an image tower and a text tower with a shared embedding space.

A bias-free linear map takes each tower's pooled features to the shared width D; features are compared by their cosine
times a learned factor. ``florence_huge`` has 637,368,368 + 248,291,712 + (2048 + 1152) * 1024 + 1 = 888,936,881
parameters; the paper says 893M.
B batch · N tokens · D embedding dim
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from florence_fast.models.config import FlorenceConfig, ImageConfig
from florence_fast.models.coswin import CoSwin
from florence_fast.models.saving import SavePretrained
from florence_fast.models.swin import Swin
from florence_fast.models.text import TextTower
from florence_fast.models.tower import ImageTower


def build_tower(config: ImageConfig) -> ImageTower:
    """Build the image tower of the family that ``config`` names."""
    return (CoSwin if config.kind == "coswin" else Swin)(config)


class Florence(SavePretrained, nn.Module):
    """The dual encoder, with open_clip's surface.

    >>> model, tokenizer = create_model("florence_nano"), get_tokenizer("florence_nano")
    >>> model.encode_text(tokenizer(["a cat", "a dog"]), normalize=True).shape
    torch.Size([2, 256])
    """

    def __init__(self, config: FlorenceConfig, output_dict: bool = False) -> None:
        super().__init__()
        self.config = config
        self.output_dict = output_dict
        self.visual = build_tower(config.image)
        self.text = TextTower(config.text)
        self.image_projection = nn.Linear(self.visual.num_features, config.embed_dim, bias=False)
        self.text_projection = nn.Linear(self.text.num_features, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.logit_bias = None if config.init_logit_bias is None else nn.Parameter(torch.empty(()))
        self._reset_heads()

    def _reset_heads(self) -> None:
        for projection in (self.image_projection, self.text_projection):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        start = self.config.init_logit_scale
        nn.init.constant_(self.logit_scale, math.log(start) if self.config.logit_scale_kind == "log" else start)
        if self.logit_bias is not None:
            nn.init.constant_(self.logit_bias, self.config.init_logit_bias)

    def reset_parameters(self) -> None:
        """Draw every parameter; all that a model made on the meta device needs after ``to_empty``."""
        self.visual.reset_parameters()
        self.text.reset_parameters()
        self._reset_heads()

    @property
    def context_length(self) -> int:
        """The most tokens that a text may have."""
        return self.config.text.context_length

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Map images (B, 3, H, W) of any size, normalised with the model's mean and std, to features (B, D).

        ``normalize`` brings features to length 1, computed in the weights' dtype: fp32 under autocast.
        """
        features = self.image_projection(self.visual(image))
        return self._normalized(features) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Map token ids (B, N), N at most the context length, to features (B, D); ``normalize`` as for images."""
        features = self.text_projection(self.text(text))
        return self._normalized(features) if normalize else features

    def _normalized(self, features: Tensor) -> Tensor:
        return F.normalize(features.to(self.image_projection.weight.dtype), dim=-1)

    def logit_factor(self) -> Tensor:
        """Return the factor of the cosines, whichever of its two forms the parameter holds."""
        return self.logit_scale.exp() if self.config.logit_scale_kind == "log" else self.logit_scale

    def forward(
        self, image: Tensor | None = None, text: Tensor | None = None
    ) -> tuple[Tensor | None, ...] | dict[str, Tensor]:
        """Return normalised image features, normalised text features, the factor of the cosines, and a bias if any.

        Args:
            image: (B, 3, H, W), or None.
            text: (B', N) token ids, or None; B' may differ from B.

        Returns:
            ``(image_features (B, D), text_features (B', D), factor)`` with None for what was not given, followed by
            ``logit_bias`` if the model has one; with ``output_dict`` a dict of what there is, under open_clip's names.

        Both inputs may be left out one at a time so that gradient cache and DDP always go through this call.
        """
        image_features = None if image is None else self.encode_image(image, normalize=True)
        text_features = None if text is None else self.encode_text(text, normalize=True)
        bias = {} if self.logit_bias is None else {"logit_bias": self.logit_bias}
        if not self.output_dict:
            return image_features, text_features, self.logit_factor(), *bias.values()
        named = {"image_features": image_features, "text_features": text_features, "logit_scale": self.logit_factor()}
        named |= bias
        return {name: value for name, value in named.items() if value is not None}

    @torch.no_grad()
    def clamp_logit_scale_(self) -> None:
        """Bring the factor back into [1, max_logit_scale], as open_clip does after each step; nothing when None."""
        largest = self.config.max_logit_scale
        if largest is None:
            return
        if self.config.logit_scale_kind == "log":
            self.logit_scale.clamp_(0, math.log(largest))
        else:
            self.logit_scale.clamp_(1, largest)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks of both towers in the backward pass instead of keeping what they computed."""
        self.visual.set_grad_checkpointing(enable)
        self.text.set_grad_checkpointing(enable)

    def set_input_size(self, img_size: int | None = None, window_size: int | None = None) -> None:
        """Change the image size that transforms aim at, or the window, resizing its bias tables bicubically."""
        self.visual.set_input_size(img_size, window_size)
        self.config = dataclasses.replace(self.config, image=self.visual.config)

    def lock_image_tower(self) -> None:
        """Freeze the image tower and its projection."""
        self.visual.requires_grad_(False)
        self.image_projection.requires_grad_(False)

    def lock_text_tower(self) -> None:
        """Freeze the text tower and its projection."""
        self.text.requires_grad_(False)
        self.text_projection.requires_grad_(False)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that decay would harm; those of fewer than two axes need no naming."""
        image = {f"visual.{name}" for name in self.visual.no_weight_decay()}
        return image | {f"text.{name}" for name in self.text.no_weight_decay()} | {"logit_scale"}
