"""The reason why the native extension is absent, as the installation recorded it; read without torch."""

from pathlib import Path

_FILE = Path(__file__).with_name("_native_failure.txt")  # written by setup.py


def build_failure() -> str | None:
    """Return in one line why the build of the extension failed; None if it did not, or was not tried."""
    try:
        return " ".join(_FILE.read_text(encoding="utf-8", errors="replace").split())[:300] or None
    except OSError:
        return None
