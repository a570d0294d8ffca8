"""What a data set holds and its reader does not use: counted, and said in one line."""

from florence_fast.printable import printable

MOST_REASONS = 8


class LeftOut:
    """Count what is left out, by reason; the first of each is named.

    >>> left_out = LeftOut()
    >>> left_out.add("of kind .heic", "a.heic")
    >>> str(left_out)
    '1 of kind .heic (a.heic)'
    """

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}

    def add(self, reason: str, *names: object) -> None:
        """Count ``names`` under ``reason``."""
        for name in names:
            count, first = self._found.get(reason, (0, str(name)))
            self._found[reason] = (count + 1, first)

    def __bool__(self) -> bool:
        return bool(self._found)

    def __str__(self) -> str:
        rows = sorted(self._found.items(), key=lambda item: -item[1][0])
        parts = [f"{n} {reason} ({printable(first, 80)}{', ...' if n > 1 else ''})" for reason, (n, first) in rows]
        shown = parts[:MOST_REASONS]
        if rows[MOST_REASONS:]:
            shown.append(f"{sum(n for _, (n, _) in rows[MOST_REASONS:])} for other reasons")
        return ", ".join(shown)
