"""Turn a finished run of the demo into the weights that the package ships, with their model card.

    florence-fast demo --long --out runs/demo-long                                    # from nothing
    florence-fast demo --pretrained runs/demo-long/model --out runs/demo-further      # then further, or from 'artists'
    python scripts/ship_artists.py runs/demo-further

Writes florence_fast/models/weights/florence_nano-artists.safetensors (bf16) and .md, bench/results/demo_long.json or
demo_further.json, and docs/demo.png, the README's image. The card's figures are measured here, on the bf16 weights as
they are shipped.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from florence_fast.data.artists import artists_names, artists_test
from florence_fast.demo.grounds import on_grounds
from florence_fast.demo.sheets import draw_queries
from florence_fast.evaluate import retrieval, zero_shot
from florence_fast.evaluate.features import encode_images
from florence_fast.files import replacing, write_json, write_text
from florence_fast.models import create_model, get_tokenizer
from florence_fast.models.saving import WEIGHTS_NAME

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "florence_fast" / "models" / "weights"
LARGEST = 15_000_000  # bytes: what a package may ask of those who do not need the weights

CARD = """# florence_nano-artists

`create_model("florence_nano", pretrained="artists")`: a dual encoder of {parameters:,} parameters for images of
64 x 64 pixels and texts of up to 16 tokens, stored in bf16 ({megabytes:.1f} MB).

**Trained on** 8,666 emoji by six artists (Emoji One, Fluent Emoji, Fluent Emoji flat, Firefox OS Emoji, Noto, Noto v1)
with their names and Unicode's keywords:

{runs}

Two thirds of the images of {which} were put on random grounds: colours, gradients, smooth noise, heaps of shapes.

**Measured on** a seventh artist that it has never seen (Twemoji), with the weights as they are stored:

| | first | among 5 | among 10 |
|---|---|---|---|
| name of the image, {images:,} images against {classes:,} names | {top1:.1%} | {top5:.1%} | {top10:.1%} |
| image to text, {pool_images:,} images, {pool_texts:,} texts | {i[r1]:.1%} | {i[r5]:.1%} | {i[r10]:.1%} |
| text to image | {t[r1]:.1%} | {t[r5]:.1%} | {t[r10]:.1%} |

On **grounds that training does not draw**, the right one of 40 names comes first for so many of 40 images:

| {ground_names} | mean without white |
|{ground_line}---:|
| {ground_shares} | {ground_mean:.1%} |

**Good for** trying the library, searching in icons and simple drawings, tests. **Not for** photographs: it has never
learnt one. It knows the vocabulary of emoji in English and nothing else, with the view of the world that emoji have.

**Licence** Apache-2.0 for the weights; the images they were learnt from keep their own licences and authors, listed
in NOTICE.
"""


def describe_run(run: dict) -> str:
    """One line of the card for a run: its command, its length, its machine."""
    return (
        f"- `{run['command']}` at commit `{run['commit']}`: {run['steps']:,} steps, {run['images_seen']:,} images, "
        f"{run['seconds'] / 60:.0f} minutes on {run['device']} with {run['threads']} threads; loss {run['loss']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished `florence-fast demo --long`")
    run = parser.parse_args().run
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    if results["recipe"] not in ("long", "further"):
        raise SystemExit(f"{run} holds a run of the recipe {results['recipe']!r}, wanted 'long' or 'further'")
    record = ROOT / "bench" / "results" / f"demo_{results['recipe']}.json"
    before = [] if results["recipe"] == "long" else [json.loads(record.with_name("demo_long.json").read_text("utf-8"))]
    runs = [*before, results]

    path = WEIGHTS / f"{results['model']}-artists.safetensors"
    WEIGHTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        create_model(results["model"], pretrained=run / "model", precision="bf16").save_pretrained(folder)
        with replacing(path) as beside:
            shutil.copyfile(Path(folder) / WEIGHTS_NAME, beside)
    if path.stat().st_size > LARGEST:
        raise SystemExit(f"{path} takes {path.stat().st_size:,} bytes, more than {LARGEST:,}")

    model, tokenizer = create_model(results["model"], pretrained="artists").eval(), get_tokenizer(results["model"])
    found = zero_shot(model, tokenizer, artists_test(), artists_names(), progress=True)
    recalls = retrieval(model, tokenizer, artists_test(), progress=True)
    draw_queries(ROOT / "docs" / "demo.png", model, tokenizer, encode_images(model, artists_test()))
    grounds = on_grounds(model, tokenizer)
    mean = grounds.pop("mean")
    card = CARD.format(
        **{**results, **found},
        megabytes=path.stat().st_size / 1e6,
        runs="\n".join(map(describe_run, runs)),
        which="the last of them" if before else "this run",
        ground_names=" | ".join(grounds),
        ground_line="---:|" * len(grounds),
        ground_shares=" | ".join(f"{share:.1%}" for share in grounds.values()),
        ground_mean=mean,
        i=recalls["image_to_text"],
        t=recalls["text_to_image"],
        pool_images=recalls["images"],
        pool_texts=recalls["texts"],
    )
    write_text(path.with_suffix(".md"), card)
    write_json(record, results)
    print(card)


if __name__ == "__main__":
    main()
