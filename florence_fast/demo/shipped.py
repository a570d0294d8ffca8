"""Evaluate the shipped weights, before the demo trains its own."""

from typing import Any

from rich.console import Console
from rich.table import Table

from florence_fast.data.artists import artists_names, artists_test
from florence_fast.data.labels import text_label
from florence_fast.demo.grounds import forty_images, on_grounds
from florence_fast.evaluate import zero_shot
from florence_fast.evaluate.features import encode_images, encode_texts
from florence_fast.models import create_model, get_tokenizer
from florence_fast.models.florence import Florence

SHOWN = 8  # images whose answers are printed


def show_shipped(model_name: str, device: str, precision: str, console: Console) -> dict[str, Any]:
    """Let the shipped weights read the unseen artist, and print what they answer.

    Returns:
        Their figures: "zero_shot" of all images on white, and "grounds", see `on_grounds`.
    """
    model = create_model(model_name, pretrained="artists", device=device).eval()
    tokenizer, names = get_tokenizer(model_name), artists_names()
    console.print("The shipped weights, trained on six artists, read images by a seventh:")
    console.print(answers_table(model, tokenizer, names))
    found = zero_shot(model, tokenizer, artists_test(), names, precision=precision)
    grounds = on_grounds(model, tokenizer, precision=precision)
    console.print(
        f"The right one of {found['classes']:,} names comes first for {found['top1']:.1%} of {found['images']:,} "
        f"images on white. Of 40 names: {grounds['white']:.0%} on white, {grounds['mean']:.0%} on other grounds."
    )
    return {"zero_shot": found, "grounds": grounds}


def answers_table(model: Florence, tokenizer: Any, names: list[str]) -> Table:
    """Set the names of a few images beside what the model reads them as."""
    test = forty_images()
    encoded = encode_images(model, test)
    rows = range(0, len(encoded.indices), len(encoded.indices) // SHOWN)
    answers = (encoded.features[list(rows)] @ encode_texts(model, tokenizer, names).T).argmax(1).tolist()
    table = Table("image of", "is read as", "")
    for row, answer in zip(rows, answers, strict=True):
        truth = test.texts(encoded.indices[row]).text
        table.add_row(truth, names[answer], "✓" if text_label(truth) == text_label(names[answer]) else "✗")
    return table
