"""Everything of transformers that is built on a Swin: what is swapped in it, and that it computes the same."""

import pytest
import torch

from florence_fast.compat.accelerate import accelerate
from tests.compat.hugging_face_models import error

transformers = pytest.importorskip("transformers")

SMALL = {
    "embed_dim": 8,
    "depths": (1, 2),
    "num_heads": (1, 2),
    "window_size": 4,
    "image_size": 64,
    "drop_path_rate": 0.0,
}
PYRAMID = SMALL | {"depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 2)}
DECODER = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_queries": 4,
    "num_labels": 2,
}
PIXEL_DECODER = {
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 2,
    "dim_feedforward": 16,
    "num_queries": 4,
    "num_labels": 2,
}


def backbone(config="SwinConfig"):
    stages = ["stage1", "stage2", "stage3", "stage4"]
    return getattr(transformers, config)(**PYRAMID, out_features=stages)


def dpt():
    sizes = {"neck_hidden_sizes": [8, 16, 32, 64], "fusion_hidden_size": 16, "reassemble_factors": [1, 1, 1, 1]}
    return {"backbone_config": backbone("Swinv2Config"), "hidden_size": 16, **sizes}


def swin2sr():
    return {"embed_dim": 8, "depths": (2,), "num_heads": (2,), "window_size": 4, "image_size": 16, "upscale": 2}


def clap():
    sizes = {"spec_size": 64, "num_mel_bins": 16, "patch_embeds_hidden_size": 8, "hidden_size": 16}
    return {"window_size": 4, "depths": [1, 2], "num_attention_heads": [1, 2], "drop_path_rate": 0.0, **sizes}


def maskformer():
    decoder = transformers.DetrConfig(**DECODER)
    sizes = {"fpn_feature_size": 32, "mask_feature_size": 32, "num_labels": 2}
    return {"backbone_config": backbone(), "decoder_config": decoder, **sizes}


def upernet():
    return {"backbone_config": backbone(), "hidden_size": 16, "auxiliary_in_channels": 32, "num_labels": 2}


FAMILY = [
    # model, configuration, its arguments, layers, merges
    ("SwinForImageClassification", "SwinConfig", lambda: SMALL, 3, 1),
    ("SwinForMaskedImageModeling", "SwinConfig", lambda: SMALL | {"encoder_stride": 8}, 3, 1),
    ("SwinBackbone", "SwinConfig", lambda: PYRAMID | {"out_features": ["stage2", "stage4"]}, 5, 3),
    ("DonutSwinModel", "DonutSwinConfig", lambda: SMALL, 3, 1),
    ("ClapAudioModel", "ClapAudioConfig", clap, 3, 1),
    (
        "MaskFormerModel",
        "MaskFormerConfig",
        maskformer,
        5,
        3,
    ),
    (
        "Mask2FormerModel",
        "Mask2FormerConfig",
        lambda: PIXEL_DECODER | {"backbone_config": backbone(), "feature_size": 32},
        5,
        3,
    ),
    (
        "OneFormerModel",
        "OneFormerConfig",
        lambda: PIXEL_DECODER | {"backbone_config": backbone(), "conv_dim": 32, "mask_dim": 32, "task_seq_len": 5},
        5,
        3,
    ),
    ("UperNetForSemanticSegmentation", "UperNetConfig", upernet, 5, 3),
    ("DPTForDepthEstimation", "DPTConfig", dpt, 5, 3),
    ("Swinv2ForImageClassification", "Swinv2Config", lambda: SMALL, 3, 1),
    ("Swinv2ForMaskedImageModeling", "Swinv2Config", lambda: SMALL | {"encoder_stride": 8}, 3, 1),
    ("Swin2SRForImageSuperResolution", "Swin2SRConfig", swin2sr, 2, 0),
]


INPUTS = {
    "ClapAudioModel": lambda: {"input_features": torch.randn(1, 1, 64, 16)},
    "OneFormerModel": lambda: {"pixel_values": torch.randn(1, 3, 64, 64), "task_inputs": torch.zeros(1, 5)},
}


def tensors(output):
    """Every tensor of a model's output, depth first."""
    if torch.is_tensor(output):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else []
    return [tensor for part in parts for tensor in tensors(part)]


@pytest.mark.parametrize(("model", "config", "arguments", "layers", "merges"), FAMILY, ids=[row[0] for row in FAMILY])
def test_all_that_is_built_on_a_swin(model, config, arguments, layers, merges):
    torch.manual_seed(0)
    built = getattr(transformers, model)(getattr(transformers, config)(**arguments())).eval()
    keys = list(built.state_dict())
    inputs = INPUTS.get(model, lambda: {"pixel_values": torch.randn(1, 3, 64, 64)})()
    with torch.no_grad():
        expected = built(**inputs)
        report = accelerate(built, verbose=False)
        found = built(**inputs)
    counts = {kind: len(names) for kind, names in report.swapped.items()}
    assert sum(count for kind, count in counts.items() if kind.endswith("Layer")) == layers
    assert sum(count for kind, count in counts.items() if kind.endswith("PatchMerging")) == merges
    assert not report.skipped
    assert list(built.state_dict()) == keys
    pairs = list(zip(tensors(found), tensors(expected), strict=True))
    assert pairs and max(error(f, e) for f, e in pairs) <= 2e-5
