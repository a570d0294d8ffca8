"""The clocks that the static budget predicts, for comparison with measured ones."""

import json
from pathlib import Path

BUDGET = Path(__file__).parents[1] / "results" / "budget.json"


def predicted_clocks(case: str, arch: int | None) -> float | None:
    """Return the clocks of one multiprocessor for one window and head, all kernels that loop over windows together.

    None where the budget has no such case, or no budget was written.

    Args:
        case: the budget's name of the case, direction included.
        arch: compute capability times ten.
    """
    if not BUDGET.is_file():
        return None
    try:
        rows = json.loads(BUDGET.read_text(encoding="utf-8"))["rows"]
        found = [float(row["clocks"]) for row in rows if row["case"] == case and row["arch"] == arch]
    except (KeyError, TypeError, ValueError):
        return None  # a budget of another form predicts nothing here
    return sum(found) or None
