"""Two sheets of the unseen artist's pictures: what words find, and what pictures are read as."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from florence_fast.data.artists import artists_test
from florence_fast.data.labels import text_label
from florence_fast.data.pairs import PairText
from florence_fast.evaluate.features import EncodedImages, encode_texts
from florence_fast.models.florence import Florence

# Keywords of many pictures each: Unicode's lists say which pictures are right.
QUERIES = ("heart", "clock", "boat", "moon", "flower", "arrow", "insect", "hand", "animal", "shoe")
FOUND_A_QUERY = 8
READINGS = (4, 5)  # rows and columns of pictures that are read
RIGHT, WRONG, INK = "#0f766e", "#c2410c", "#222222"  # teal and orange differ for every eye; marks say it too
MARKS = {RIGHT: "✓", WRONG: "✗"}


def draw_queries(path: Path, model: Florence, tokenizer: Any, encoded: EncodedImages) -> None:
    """Draw, for each of `QUERIES`, the first pictures found among the unseen artist's, down to the last right one.

    A picture is right when the query is its name, its short name or one of its keywords in Unicode's list.
    """
    test = artists_test()
    scores = encode_texts(model, tokenizer, QUERIES) @ encoded.features.T
    figure = Figure(figsize=(FOUND_A_QUERY * 1.05 + 1.9, len(QUERIES) * 1.05), layout="constrained")
    grid = figure.subplots(len(QUERIES), FOUND_A_QUERY + 1, squeeze=False)
    for row, (query, best) in enumerate(zip(QUERIES, scores.topk(FOUND_A_QUERY).indices.tolist(), strict=True)):
        found = [encoded.indices[number] for number in best]
        right = [describes(query, test.texts(index)) for index in found]
        for axes in grid[row]:
            axes.axis("off")
        grid[row, 0].text(1, 0.58, f"“{query}”", ha="right", va="center", fontsize=12, color=INK)
        count = f"{sum(right)} of {FOUND_A_QUERY} right"
        grid[row, 0].text(1, 0.3, count, ha="right", va="center", fontsize=8, color="#666666")
        shown = len(right) - right[::-1].index(True) if any(right) else 0
        for axes, index, is_right in zip(grid[row, 1 : shown + 1], found, right, strict=False):
            axes.axis("on")
            show(axes, test.image(index), RIGHT if is_right else WRONG)
    figure.savefig(path, dpi=85)


def draw_readings(
    path: Path, model: Florence, tokenizer: Any, encoded: EncodedImages, names: list[str], seed: int = 0
) -> None:
    """Draw pictures of the unseen artist, chosen at random, with the five names that the model finds nearest."""
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
    """Say whether ``query`` is the name, the short name or a keyword of a picture."""
    return text_label(query) in {text_label(t) for t in (texts.text, texts.short_name or texts.text, *texts.keywords)}


def show(axes: Axes, image: object, frame: str) -> None:
    """Show one picture in a coloured frame, with a tick or a cross in its corner."""
    axes.imshow(np.asarray(image))
    badge = {"boxstyle": "circle,pad=0.12", "facecolor": frame, "edgecolor": "white", "linewidth": 0.8}
    axes.annotate(
        MARKS[frame],
        (0.97, 0.97),
        xycoords="axes fraction",
        ha="center",
        va="center",
        fontsize=7.5,
        color="white",
        bbox=badge,
        annotation_clip=False,
    )
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=frame, linewidth=2.5)
