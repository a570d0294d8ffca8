"""``python -m bench.budget``."""

import sys

from bench.budget.command import main

if __name__ == "__main__":
    sys.exit(main())
