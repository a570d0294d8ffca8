"""A contact sheet: one HTML file, with its images inside, that shows what a search found."""

import base64
import html
import io
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from florence_fast.data.images import open_image
from florence_fast.evaluate.search import Hit
from florence_fast.printable import printable

THUMBNAIL = 192

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
  :root {{ color-scheme: light dark; }}
  body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem; }}
  body {{ color: light-dark(#222, #ddd); background: light-dark(#fff, #181a1b); }}
  figure {{ margin: 0; }}
  img {{ width: 100%; aspect-ratio: 1; object-fit: contain; background: #f4f4f4; border-radius: 6px; }}
  figcaption {{ overflow-wrap: anywhere; }}
  small {{ color: light-dark(#666, #aaa); }}
</style>
{searches}
</html>
"""

SEARCH = """<h1>{title}</h1>
<p>{count} images, best first; the number is the cosine between the image and the words.</p>
<main style="display: grid; grid-template-columns: repeat(auto-fill, minmax(12rem, 1fr)); gap: 1rem">
{figures}
</main>"""

FIGURE = (
    '<figure><img src="{data}" alt="{name}"><figcaption>{rank}. {name} <small>{score:.3f}</small></figcaption></figure>'
)


def contact_sheet(query: str, hits: Sequence[Hit], folder: Path) -> str:
    """Return the HTML page of the ranked ``hits``; names are shown relative to ``folder``."""
    return contact_sheets([(query, hits)], folder)


def contact_sheets(searches: Sequence[tuple[str, Sequence[Hit]]], folder: Path) -> str:
    """Return one HTML page of several searches, each a query and its ranked hits."""
    title = "; ".join(_escaped(query) for query, _ in searches)
    return PAGE.format(title=title, searches="\n".join(figures(query, hits, folder) for query, hits in searches))


def figures(query: str, hits: Sequence[Hit], folder: Path | None = None) -> str:
    """Return the part of a page that shows the hits of one query, which a notebook can show by itself."""
    shown = [
        FIGURE.format(
            data=_thumbnail(hit.path),
            name=_escaped(hit.path if folder is None else os.path.relpath(hit.path, folder)),
            rank=rank,
            score=hit.score,
        )
        for rank, hit in enumerate(hits, start=1)
    ]
    return SEARCH.format(title=_escaped(query), count=len(hits), figures="\n".join(shown))


def _escaped(text: object) -> str:
    return html.escape(printable(text), quote=True)


def _thumbnail(path: Path) -> str:
    """The image as an address, or an empty one for an image that has gone since it was encoded."""
    try:
        return thumbnail_uri(open_image(path))
    except (OSError, ValueError):
        return "data:,"


def thumbnail_uri(image: Image.Image, size: int = THUMBNAIL) -> str:
    """Return an image of at most ``size`` pixels a side as a ``data:`` address that an ``<img>`` can hold."""
    small = image.copy()
    small.thumbnail((size, size))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
