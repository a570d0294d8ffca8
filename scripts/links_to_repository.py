"""A hook of mkdocs: links from a page to a file outside docs/ lead to that file in the repository."""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Return the page with every such link made absolute."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def absolute(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[1]))
        inside = path.startswith("docs/") or not (ROOT / path).exists()
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return link[0] if inside else f"]({config.repo_url}/{kind}/main/{path})"

    return re.sub(r"\]\((\.\./[^)#]*)\)", absolute, markdown)
