"""Two sheets of the unseen artist's pictures: what words find, and what pictures are read as."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from florence_fast.data.artists import artists_test
from florence_fast.data.labels import text_label
from florence_fast.data.pairs import PairText
from florence_fast.evaluate.features import EncodedImages, encode_texts

# Names stand for one picture each, keywords for many: Unicode's lists say which pictures are right.
QUERIES = ("red apple", "sailboat", "snowman", "guitar", "sunflower", "bicycle", "clock", "heart", "weather", "animal")
FOUND_A_QUERY = 8
READINGS = (4, 5)  # rows and columns of pictures that are read
RIGHT, WRONG, INK = "#15803d", "#dc2626", "#222222"


def draw_queries(path: Path, model: nn.Module, tokenizer: object, encoded: EncodedImages) -> None:
    """Draw, for each of `QUERIES`, the first pictures found among the unseen artist's, right ones framed green.

    A picture is right when the query is its name, its short name or one of its keywords in Unicode's list.
    """
    test = artists_test()
    scores = encode_texts(model, tokenizer, QUERIES) @ encoded.features.T
    figure = Figure(figsize=(FOUND_A_QUERY * 1.05 + 1.6, len(QUERIES) * 1.05), layout="constrained")
    grid = figure.subplots(len(QUERIES), FOUND_A_QUERY + 1, squeeze=False)
    for row, (query, best) in enumerate(zip(QUERIES, scores.topk(FOUND_A_QUERY).indices.tolist(), strict=True)):
        grid[row, 0].axis("off")
        grid[row, 0].text(1, 0.5, f"“{query}”", ha="right", va="center", fontsize=11, color=INK)
        for axes, found in zip(grid[row, 1:], best, strict=True):
            index = encoded.indices[found]
            show(axes, test.image(index), RIGHT if describes(query, test.texts(index)) else WRONG)
    figure.savefig(path, dpi=85)


def draw_readings(
    path: Path, model: nn.Module, tokenizer: object, encoded: EncodedImages, names: list[str], seed: int = 0
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
    """Show one picture in a coloured frame."""
    axes.imshow(np.asarray(image))
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=frame, linewidth=2.5)
