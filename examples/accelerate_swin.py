"""Put faster kernels into a Swin of transformers, timm or torchvision, and check that nothing else changed.

    python examples/accelerate_swin.py                     # a Swin-T with random weights
    python examples/accelerate_swin.py --model microsoft/swin-tiny-patch4-window7-224

Needs transformers (pip install transformers).
"""

import argparse
import statistics
import time

import torch
from transformers import SwinConfig, SwinForImageClassification

import florence_fast as ff


def seconds(model: torch.nn.Module, images: torch.Tensor, turns: int) -> float:
    """Median seconds of one forward pass."""
    times = []
    with torch.inference_mode():
        model(images)
        for _ in range(turns):
            start = time.perf_counter()
            model(images)
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Time the model before and after `ff.accelerate`, and compare what it computes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a Swin of transformers; without it random weights")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()

    torch.manual_seed(0)
    if args.model:
        model = SwinForImageClassification.from_pretrained(args.model)
    else:
        model = SwinForImageClassification(SwinConfig())
    model.eval()
    images = torch.randn(args.batch_size, 3, model.config.image_size, model.config.image_size)

    with torch.inference_mode():
        expected = model(images).logits
    before = seconds(model, images, args.turns)
    ff.accelerate(model, verbose=True)
    after = seconds(model, images, args.turns)
    with torch.inference_mode():
        error = (model(images).logits - expected).abs().max().item()

    print(f"before {1e3 * before:.0f} ms, after {1e3 * after:.0f} ms, {before / after:.2f} times as fast")
    print(f"largest difference of a logit: {error:.1e}")
    ff.restore(model)


if __name__ == "__main__":
    main()
