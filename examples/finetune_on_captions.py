"""Fine-tune the shipped weights on captions of your own, and measure retrieval before and after.

    python examples/finetune_on_captions.py --pairs pairs.csv      # columns filepath and title
    python examples/finetune_on_captions.py                        # without a file: emoji by one artist

The same from the command line: florence-fast train --train-data pairs.csv --pretrained artists
"""

import argparse
import tempfile
from pathlib import Path

import florence_fast as ff
from florence_fast.data import Subset, artists_test, open_pairs
from florence_fast.evaluate import retrieval
from florence_fast.tasks.contrastive import ContrastiveConfig, ContrastiveTask
from florence_fast.train import RunConfig, Stage, Trainer


def main() -> None:
    """Hold out every fifth pair, train on the others, and print the recall on those that were held out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", help="CSV, TSV, JSONL, Parquet, class folders or WebDataset tars")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path, help="folder of the run; by default one that is deleted afterwards")
    args = parser.parse_args()

    pairs = open_pairs(args.pairs) if args.pairs else Subset(artists_test(), range(600))
    held_out = Subset(pairs, range(0, len(pairs), 5))
    trained_on = Subset(pairs, [i for i in range(len(pairs)) if i % 5])
    print(f"{len(trained_on)} pairs to train on, {len(held_out)} held out")

    model = ff.create_model("florence_nano", pretrained="artists")
    tokenizer = ff.get_tokenizer("florence_nano")
    before = retrieval(model, tokenizer, held_out)["text_to_image"]

    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary)
        size = model.config.image.img_size
        run = RunConfig(
            stages=(Stage(steps=args.steps, image_size=size),), batch_size=args.batch_size, lr=1e-4, progress=False
        )
        Trainer(ContrastiveTask(model, tokenizer, trained_on, ContrastiveConfig()), run, out).run()
        model.eval()
        model.save_pretrained(out / "model")

        after = retrieval(model, tokenizer, held_out)["text_to_image"]
    for name in before:
        print(f"text to image {name}: {before[name]:.1%} before, {after[name]:.1%} after")


if __name__ == "__main__":
    main()
