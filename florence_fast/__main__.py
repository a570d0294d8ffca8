"""``python -m florence_fast``: the command line, also where nothing is installed."""

import sys

from florence_fast.cli import main

sys.exit(main())
