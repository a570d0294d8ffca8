"""Two sheets of the unseen artist's images: the results of text queries, and the names predicted for images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from florence_fast.data.artists import TRAIN_ARTISTS, artists_names, artists_test, artists_train
from florence_fast.data.labels import text_label
from florence_fast.data.pairs import PairText
from florence_fast.evaluate.features import EncodedImages, encode_texts
from florence_fast.models.florence import Florence

Tokenizer = Callable[[list[str]], Tensor]

# Keywords of many images each: Unicode's lists say which images are right.
QUERIES = ("heart", "clock", "boat", "moon", "flower", "arrow", "insect", "hand", "animal", "shoe")
FOUND_A_QUERY = 8
DRAWN_BY_ALL = ("penguin", "rocket")  # shown as each artist draws them
READINGS = (4, 5)  # rows and columns of images that are read
RIGHT, WRONG, INK, GREY = (
    "#0f766e",
    "#c2410c",
    "#222222",
    "#9ca3af",
)  # teal and orange differ for every eye; marks say it too
MARKS = {RIGHT: "✓", WRONG: "✗"}


def draw_queries(path: Path, model: Florence, tokenizer: Tokenizer, encoded: EncodedImages) -> None:
    """Draw what training saw beside what it did not, then the images of the unseen artist that words find.

    First `DRAWN_BY_ALL`, by the six artists of training and by the seventh, with what the model reads in the last.
    Then, for each of `QUERIES`, the first images found, down to the last right one. An image is right when the query
    is its name, its short name or one of its keywords in Unicode's list.
    """
    rows, columns = len(DRAWN_BY_ALL) + len(QUERIES), FOUND_A_QUERY + 1
    figure = Figure(figsize=(FOUND_A_QUERY * 1.05 + 1.9, rows * 1.05 + 0.8), layout="constrained")
    heights = (len(DRAWN_BY_ALL) + 0.4, len(QUERIES) + 0.4)
    upper, lower = cast("np.ndarray", figure.subfigures(2, 1, height_ratios=heights))
    upper.suptitle("Seen in training: six artists", x=0.46, fontsize=11, color=INK)
    upper.text(0.93, 0.985, "never seen", ha="center", va="top", fontsize=11, color=RIGHT)
    _draw_artists(upper.subplots(len(DRAWN_BY_ALL), columns, squeeze=False), model, tokenizer, encoded)
    lower.suptitle("What words find among the images of the artist never seen, best first", fontsize=11, color=INK)
    _draw_found(lower.subplots(len(QUERIES), columns, squeeze=False), model, tokenizer, encoded)
    figure.savefig(path, dpi=85)


def _draw_artists(grid: np.ndarray, model: Florence, tokenizer: Tokenizer, encoded: EncodedImages) -> None:
    train, test, names = artists_train(), artists_test(), artists_names()
    named = encode_texts(model, tokenizer, names)
    for row, name in zip(grid, DRAWN_BY_ALL, strict=True):
        for axes in row:
            axes.axis("off")
        label(row[0], name, "")
        drawn = [index for index in range(len(train)) if train.texts(index).text == name]
        for axes, index in zip(row[1:], drawn[: len(TRAIN_ARTISTS)], strict=False):
            axes.axis("on")
            show(axes, train.image(index), GREY)
        of_the_seventh = [(n, i) for n, i in enumerate(encoded.indices) if test.texts(i).text == name]
        if not of_the_seventh:  # a rehearsal on a few images
            continue
        ((position, index), *_) = of_the_seventh
        read = names[int((named @ encoded.features[position]).argmax())]
        row[-2].text(1.05, 0.5, f"read as\n“{read}”", ha="right", va="center", fontsize=9, color=INK)
        row[-1].axis("on")
        show(row[-1], test.image(index), RIGHT if text_label(read) == text_label(name) else WRONG)


def _draw_found(grid: np.ndarray, model: Florence, tokenizer: Tokenizer, encoded: EncodedImages) -> None:
    test = artists_test()
    scores = encode_texts(model, tokenizer, QUERIES) @ encoded.features.T
    for row, query, best in zip(grid, QUERIES, scores.topk(FOUND_A_QUERY).indices.tolist(), strict=True):
        found = [encoded.indices[number] for number in best]
        right = [describes(query, test.texts(index)) for index in found]
        for axes in row:
            axes.axis("off")
        label(row[0], query, f"{sum(right)} of {FOUND_A_QUERY} right")
        shown = len(right) - right[::-1].index(True) if any(right) else 0
        for axes, index, is_right in zip(row[1 : shown + 1], found, right, strict=False):
            axes.axis("on")
            show(axes, test.image(index), RIGHT if is_right else WRONG)


def label(axes: Axes, words: str, below: str) -> None:
    """Write the words of a row, and a smaller line below them."""
    axes.text(1, 0.58 if below else 0.5, f"“{words}”", ha="right", va="center", fontsize=12, color=INK)
    axes.text(1, 0.3, below, ha="right", va="center", fontsize=8, color="#666666")


def draw_readings(
    path: Path, model: Florence, tokenizer: Any, encoded: EncodedImages, names: list[str], seed: int = 0
) -> None:
    """Draw images of the unseen artist, chosen at random, with the five names that the model finds nearest."""
    test = artists_test()
    rows, columns = READINGS
    chosen = np.random.default_rng(seed).choice(len(encoded.indices), rows * columns, replace=False)
    best = (encoded.features[chosen] @ encode_texts(model, tokenizer, names).T).topk(5).indices.tolist()
    figure = Figure(figsize=(columns * 2.7, rows * 1.5), layout="constrained")
    cells = figure.subplots(rows, columns * 2).reshape(-1, 2)
    for (axes, beside), row, ranked in zip(cells, chosen, best, strict=True):
        index = encoded.indices[row]
        truth = text_label(test.texts(index).text)
        right = [text_label(names[i]) == truth for i in ranked]
        show(axes, test.image(index), RIGHT if right[0] else WRONG)
        beside.axis("off")
        for line, (i, is_right) in enumerate(zip(ranked, right, strict=True)):
            shown = names[i] if len(names[i]) <= 22 else names[i][:21] + "…"
            weight = "bold" if is_right else "normal"
            beside.text(
                0, 0.9 - 0.2 * line, shown, fontsize=8, color=RIGHT if is_right else INK, weight=weight, va="center"
            )
    figure.savefig(path, dpi=85)


def describes(query: str, texts: PairText) -> bool:
    """Say whether ``query`` is the name, the short name or a keyword of an image."""
    return text_label(query) in {text_label(t) for t in (texts.text, texts.short_name or texts.text, *texts.keywords)}


def show(axes: Axes, image: object, frame: str) -> None:
    """Show one image in a coloured frame; a right one has a tick in its corner, a wrong one a cross."""
    axes.imshow(np.asarray(image))
    if frame in MARKS:
        badge = {"boxstyle": "circle,pad=0.15", "facecolor": frame, "edgecolor": "white", "linewidth": 0.8}
        style = {"ha": "center", "va": "center", "fontsize": 9, "color": "white", "weight": "bold"}
        place = {"xycoords": "axes fraction", "annotation_clip": False}
        axes.annotate(MARKS[frame], (0.95, 0.95), bbox=badge, **style, **place)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=frame, linewidth=2.5)
