"""A contact sheet: one HTML file, with its pictures inside, that shows what a search found."""

import base64
import html
import io
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from florence_fast.data.pictures import open_picture
from florence_fast.evaluate.search import Hit
from florence_fast.printable import printable

THUMBNAIL = 192

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
  body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff; }}
  main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(12rem, 1fr)); gap: 1rem; }}
  figure {{ margin: 0; }}
  img {{ width: 100%; aspect-ratio: 1; object-fit: contain; background: #f4f4f4; border-radius: 6px; }}
  figcaption {{ overflow-wrap: anywhere; }}
  small {{ color: #666; }}
</style>
<h1>{title}</h1>
<p>{count} pictures, best first; the number is the cosine between the picture and the words.</p>
<main>
{figures}
</main>
</html>
"""

FIGURE = (
    '<figure><img src="{data}" alt="{name}"><figcaption>{rank}. {name} <small>{score:.3f}</small></figcaption></figure>'
)


def contact_sheet(query: str, hits: Sequence[Hit], folder: Path) -> str:
    """Return the HTML page of the ranked ``hits``; names are shown relative to ``folder``."""
    figures = [
        FIGURE.format(
            data=thumbnail_uri(open_picture(hit.path)),
            name=html.escape(printable(os.path.relpath(hit.path, folder)), quote=True),
            rank=rank,
            score=hit.score,
        )
        for rank, hit in enumerate(hits, start=1)
    ]
    return PAGE.format(title=html.escape(printable(query), quote=True), count=len(hits), figures="\n".join(figures))


def thumbnail_uri(image: Image.Image, size: int = THUMBNAIL) -> str:
    """Return a picture of at most ``size`` pixels a side as a ``data:`` address that an ``<img>`` can hold."""
    small = image.copy()
    small.thumbnail((size, size))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
