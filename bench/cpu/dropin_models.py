"""The models of other libraries that ``bench.cpu.dropin`` accelerates: random weights, published sizes.

Each entry builds a model and its inputs, and says which result to compare. Libraries are imported where they are used;
one that is absent, or that fails to import, is a row with its reason.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """One model: ``build(batch, size)`` gives it and its inputs, ``read`` takes the result that is compared."""

    build: Callable[[int, int], Built]
    read: Callable[[Any], Tensor] = lambda out: out
    batch: int = 8
    size: int = 224
    tiny: int = 224
    """The size of a rehearsal."""


def _pixels(batch: int, size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, size, size)}


def _hugging_face(name: str, config: Callable[[Any, int], Any]) -> Callable[[int, int], Built]:
    def build(batch: int, size: int) -> Built:
        import transformers

        return getattr(transformers, name)(config(transformers, size)), _pixels(batch, size)

    return build


def _swin_t(transformers: Any, size: int) -> Any:
    return transformers.SwinConfig(image_size=size)


def _backbone(transformers: Any, size: int) -> Any:
    return transformers.SwinConfig(image_size=size, out_features=["stage1", "stage2", "stage3", "stage4"])


def _mask_former(batch: int, size: int) -> Built:
    import transformers

    config = transformers.MaskFormerConfig(backbone_config=_backbone(transformers, size))
    return transformers.MaskFormerModel(config), _pixels(batch, size)


def _clap(batch: int, size: int) -> Built:
    import transformers

    model = transformers.ClapAudioModel(transformers.ClapAudioConfig())
    return model, {"input_features": torch.randn(batch, 1, 1001, 64), "is_longer": torch.zeros(batch, 1, dtype=bool)}


def _timm(name: str, **changes: Any) -> Callable[[int, int], Built]:
    def build(batch: int, size: int) -> Built:
        import timm

        return timm.create_model(name, img_size=size, **changes), {"x": torch.randn(batch, 3, size, size)}

    return build


def _torchvision(name: str, *frames: int) -> Callable[[int, int], Built]:
    def build(batch: int, size: int) -> Built:
        import torchvision

        models = torchvision.models.video if frames else torchvision.models
        return getattr(models, name)(weights=None), {"x": torch.randn(batch, 3, *frames, size, size)}

    return build


def _monai(**changes: Any) -> Callable[[int, int], Built]:
    def build(batch: int, size: int) -> Built:
        from monai.networks.nets import SwinUNETR

        model = SwinUNETR(1, 2, feature_size=24, spatial_dims=3, **changes)
        return model, {"x_in": torch.randn(batch, 1, size, size, size)}

    return build


def _last(out: Any) -> Tensor:
    return out.last_hidden_state


CASES = {
    "transformers Swin-T": Case(_hugging_face("SwinModel", _swin_t), _last),
    "transformers Swin-B": Case(
        _hugging_face(
            "SwinModel",
            lambda t, size: t.SwinConfig(
                image_size=size, embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32]
            ),
        ),
        _last,
        batch=4,
    ),
    "transformers Swin V2-T, window 8": Case(
        _hugging_face("Swinv2Model", lambda t, size: t.Swinv2Config(image_size=size, window_size=8)),
        _last,
        size=256,
        tiny=64,
    ),
    "transformers Swin-T backbone": Case(
        _hugging_face("SwinBackbone", _backbone), lambda out: out.feature_maps[-1], tiny=64
    ),
    "transformers MaskFormer on Swin-T": Case(
        _mask_former, lambda out: out.transformer_decoder_last_hidden_state, batch=2, tiny=96
    ),
    "transformers Donut's encoder": Case(
        _hugging_face("DonutSwinModel", lambda t, size: t.DonutSwinConfig(image_size=size)), _last
    ),
    "transformers Swin2SR": Case(
        _hugging_face("Swin2SRModel", lambda t, size: t.Swin2SRConfig(image_size=size, depths=[2, 2])), _last, 2, 64, 16
    ),
    "transformers CLAP's audio tower": Case(_clap, _last, batch=2),
    "timm swin_tiny_patch4_window7_224": Case(_timm("swin_tiny_patch4_window7_224")),
    "timm swinv2_tiny_window8_256": Case(_timm("swinv2_tiny_window8_256"), size=256),
    # of itself it begins with norms of zero, which leave nothing of the branches
    "timm swinv2_cr_tiny_224": Case(_timm("swinv2_cr_tiny_224", init_values=1.0)),
    "torchvision swin_t": Case(_torchvision("swin_t")),
    "torchvision swin_v2_t": Case(_torchvision("swin_v2_t"), size=256),
    "torchvision swin3d_t, 8 frames": Case(_torchvision("swin3d_t", 8), batch=1),
    "MONAI SwinUNETR, 64 cubed": Case(_monai(), batch=1, size=64, tiny=32),
    "MONAI SwinUNETR, its flash attention": Case(_monai(use_flash_attention=True), batch=1, size=64, tiny=32),
}
