"""What the summary of a run tells beside passed and failed: a test or fixture that proves something adds to it."""

from collections import Counter

import pytest

COUNTS = pytest.StashKey[Counter]()
"""Numbers by the words that follow them."""
