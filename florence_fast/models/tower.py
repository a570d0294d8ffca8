"""Base class of CoSwin and Swin: four stages of window attention, pooling, and timm's interface.

B batch · H W map height and width · C channels · K classes
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from florence_fast.models.config import ImageConfig
from florence_fast.models.layers import drop_path_rates, init_weights, layer_norm, module_list, quieten_branches
from florence_fast.models.saving import SavePretrained
from florence_fast.models.swin_block import Stage, SwinBlock, WindowAttention
from florence_fast.ranges import annotate


class ImageTower(SavePretrained, nn.Module):
    """A hierarchical image encoder; `CoSwin` and `Swin` differ in their stem, their merges and their padding.

    Maps are channels-last, (B, H, W, C), from the stem to the end; only images come in and feature lists go out as
    (B, C, H, W).
    """

    pad_mode: str

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.config = config
        self.num_features = config.num_features
        self.patch_embed = self.make_stem(config.in_chans, config.embed_dim)
        rates = drop_path_rates(config.depths, config.drop_path_rate)
        self.layers = module_list(self._make_stage(stage, rates[stage]) for stage in range(len(config.depths)))
        self.norm = nn.LayerNorm(config.num_features)
        self.head: nn.Module = nn.Identity()
        if config.num_classes:
            self.head = nn.Linear(config.num_features, config.num_classes)
        self.reset_parameters()

    @staticmethod
    def make_stem(in_chans: int, width: int) -> nn.Module:
        """Return the module that maps an image (B, C, H, W) to tokens (B, H/4, W/4, width)."""
        raise NotImplementedError

    @staticmethod
    def make_merge(width: int) -> nn.Module:
        """Return the module that maps (B, H, W, width) to (B, H/2, W/2, 2 width)."""
        raise NotImplementedError

    def _make_stage(self, stage: int, drop_paths: list[float]) -> Stage:
        config, width = self.config, self.config.stage_width(stage)
        blocks = []
        for index, drop_path in enumerate(drop_paths):
            attention = WindowAttention(
                width,
                config.num_heads[stage],
                config.window_size,
                shifted=index % 2 == 1,
                qkv_bias=config.qkv_bias,
                pad_mode=self.pad_mode,
            )
            blocks.append(SwinBlock(width, config.mlp_ratio, drop_path, attention))
        last = stage == len(config.depths) - 1
        return Stage(blocks, None if last else self.make_merge(width))

    def reset_parameters(self) -> None:
        """Draw every parameter; all that a tower made on the meta device needs after ``to_empty``."""
        for module in self.modules():
            init_weights(module)
            if isinstance(module, WindowAttention):
                nn.init.normal_(module.relative_position_bias_table, std=0.02)
        blocks = [block for stage in self.layers for block in stage.blocks]
        quieten_branches([output for block in blocks for output in (block.attn.proj, block.mlp.fc2)])

    def forward_features(self, image: Tensor) -> Tensor:
        """Map an image (B, C, H, W) to the last stage's normalised map (B, H/32, W/32, num_features)."""
        x = self._stem(image)
        for index, stage in enumerate(self.layers):
            with annotate("image.stage", index):
                x = stage(x)
            if stage.downsample is not None:
                with annotate("image.merge", index):
                    x = stage.downsample(x)
        return layer_norm(self.norm, x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Average a map (B, H, W, C) to (B, C), and classify it to (B, K) if there is a classifier."""
        x = x.mean((1, 2))
        return x if pre_logits else self.head(x)

    def forward(self, image: Tensor) -> Tensor:
        """Map an image (B, C, H, W) to pooled features (B, num_features), or to logits (B, K).

        Raises:
            ValueError: ``image`` is not (B, in_chans, H, W), or has a side of less than 4 pixels.
            TypeError: ``image`` does not hold floating-point numbers.
        """
        return self.forward_head(self.forward_features(image))

    @property
    def _stem_weight(self) -> Tensor:
        return cast(nn.Conv2d, self.patch_embed.proj).weight

    def _stem(self, image: Tensor) -> Tensor:
        if image.ndim != 4 or image.shape[1] != self.config.in_chans:
            raise ValueError(f"image must have shape (B, {self.config.in_chans}, H, W), got {tuple(image.shape)}")
        if min(image.shape[2:]) < 4:
            raise ValueError(f"image must be at least 4 pixels wide and high, got {tuple(image.shape)}")
        if not image.is_floating_point():
            raise TypeError(f"image must hold normalised floating-point numbers, got {image.dtype}")
        with annotate("image.stem"):
            return self.patch_embed(image.to(self._stem_weight.dtype))

    def forward_intermediates(
        self,
        image: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the maps of chosen stages, and the final map unless told not to (timm's signature).

        Args:
            image: (B, C, H, W).
            indices: stages to return (negative counts from the end), the last n for an int, all for None.
            norm: apply the final normalisation to the last stage's map.
            stop_early: do not run the stages after the last one asked for.
            output_fmt: ``"NCHW"`` or ``"NHWC"``, of the intermediate maps.
            intermediates_only: return the list alone.

        Returns:
            A list of (B, C_i, H_i, W_i), or that list behind the final map (B, H, W, C).
        """
        wanted = self.stage_indices(indices)
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        last = len(self.layers) - 1
        x, maps, index = self._stem(image), [], 0
        for index, stage in enumerate(self.layers):
            with annotate("image.stage", index):
                x = stage(x)
            if index in wanted:
                out = layer_norm(self.norm, x) if norm and index == last else x
                maps.append(out.permute(0, 3, 1, 2) if output_fmt == "NCHW" else out)
            if stop_early and index == wanted[-1]:
                break
            if stage.downsample is not None:
                with annotate("image.merge", index):
                    x = stage.downsample(x)
        return maps if intermediates_only else (layer_norm(self.norm, x) if index == last else x, maps)

    def stage_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        """Resolve ``indices`` as `forward_intermediates` takes them to a sorted list of stages.

        Raises:
            ValueError: an index names no stage, or none is asked for.
        """
        count = len(self.layers)
        if indices is None:
            return list(range(count))
        asked = range(-indices, 0) if isinstance(indices, int) else indices
        if not asked or any(not -count <= index < count for index in asked):
            raise ValueError(f"indices must name stages from {-count} to {count - 1}, got {indices!r}")
        return sorted({index % count for index in asked})

    def set_input_size(self, img_size: int | None = None, window_size: int | None = None) -> None:
        """Change the size that transforms aim at, or the window, resizing its bias tables bicubically.

        The sizes of images are free without this; it serves fine-tuning at another resolution (224 px with window 7
        to 384 px with window 12). An optimiser made before holds the old tables: make it afterwards.
        """
        changes = {"img_size": img_size, "window_size": window_size}
        self.config = dataclasses.replace(self.config, **{k: v for k, v in changes.items() if v is not None})
        for module in self.modules():
            if isinstance(module, WindowAttention):
                module.set_window_size(self.config.window_size)

    def disable_drop_path(self) -> None:
        """Leave out no branch from now on, as a frozen tower wants it; the configuration stays."""
        for stage in self.layers:
            for block in stage.blocks:
                block.drop_path = 0.0

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep one map a block for the backward pass and compute the rest again, drop path included."""
        for stage in self.layers:
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the classifier: a Linear, or an Identity when there is none."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a new one of ``num_classes``; 0 removes it."""
        self.config = dataclasses.replace(self.config, num_classes=num_classes)
        reference = self._stem_weight
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.num_features, num_classes, device=reference.device, dtype=reference.dtype)
            init_weights(self.head)

    def no_weight_decay(self) -> set[str]:
        """Return the names of matrices that decay would harm: the bias tables."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Return timm's patterns that sort parameters into layers, for learning rates that fall with depth."""
        fine = [
            (r"^layers\.(\d+)\.downsample", (0,)),
            (r"^layers\.(\d+)\.\w+\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)" if coarse else fine}

    def layer_numbers(self) -> dict[str, int]:
        """Return the layer of every parameter, counted from the input, for learning rates that fall with depth.

        The stem is layer 0, each block one more; a merge belongs to the block behind it, norm and head to the last.
        """
        first = [1 + sum(self.config.depths[:stage]) for stage in range(len(self.config.depths) + 1)]
        numbers = {}
        for name, _ in self.named_parameters():
            part, *rest = name.split(".")
            if part == "layers":
                stage = int(rest[0])
                numbers[name] = first[stage] + int(rest[2]) if rest[1] == "blocks" else first[stage + 1]
            else:
                numbers[name] = 0 if part == "patch_embed" else first[-1]
        return numbers

    @property
    def feature_info(self) -> FeatureInfo:
        """Channels and reduction of each stage's map."""
        stages = range(len(self.layers))
        return FeatureInfo([(self.config.stage_width(stage), 4 * 2**stage, f"layers.{stage}") for stage in stages])


class FeatureInfo:
    """What a list of feature maps holds, as timm's class of this name answers it."""

    def __init__(self, rows: list[tuple[int, int, str]]) -> None:
        self._rows = rows

    def channels(self) -> list[int]:
        """Return the channels of each map."""
        return [channels for channels, _, _ in self._rows]

    def reduction(self) -> list[int]:
        """Return how many pixels one step of each map covers."""
        return [reduction for _, reduction, _ in self._rows]

    def module_name(self) -> list[str]:
        """Return the stage that each map comes from."""
        return [name for _, _, name in self._rows]

    def select(self, indices: Sequence[int]) -> FeatureInfo:
        """Return the same for the maps ``indices`` alone."""
        return FeatureInfo([self._rows[index] for index in indices])


class FeatureExtractor(nn.Module):
    """A tower as a backbone: an image goes in, a list of maps comes out, and stages that nobody reads are dropped.

    >>> maps = create_model("coswin_tiny", features_only=True, out_indices=(1, 3))(torch.randn(1, 3, 64, 96))
    >>> [tuple(m.shape) for m in maps]
    [(1, 192, 8, 12), (1, 768, 2, 3)]
    """

    def __init__(
        self, tower: ImageTower, out_indices: int | Sequence[int] | None = None, output_fmt: str = "NCHW"
    ) -> None:
        super().__init__()
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        self.out_indices = tower.stage_indices(out_indices)
        self.output_fmt = output_fmt
        self.feature_info = tower.feature_info.select(self.out_indices)
        tower.layers = tower.layers[: self.out_indices[-1] + 1]
        tower.layers[-1].downsample = None
        tower.register_module("norm", nn.Identity())
        tower.head = nn.Identity()
        self.tower = tower

    def forward(self, image: Tensor) -> list[Tensor]:
        """Map an image (B, C, H, W) to one map a chosen stage, (B, C_i, H_i, W_i), or channels-last."""
        maps = self.tower.forward_intermediates(
            image, self.out_indices, stop_early=True, output_fmt=self.output_fmt, intermediates_only=True
        )
        return cast("list[Tensor]", maps)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As `ImageTower.set_grad_checkpointing`."""
        self.tower.set_grad_checkpointing(enable)

    def set_input_size(self, img_size: int | None = None, window_size: int | None = None) -> None:
        """As `ImageTower.set_input_size`."""
        self.tower.set_input_size(img_size, window_size)

    def no_weight_decay(self) -> set[str]:
        """As `ImageTower.no_weight_decay`."""
        return {f"tower.{name}" for name in self.tower.no_weight_decay()}
