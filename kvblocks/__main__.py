"""`python -m kvblocks`: the command line."""

import sys

from kvblocks.cli import main

sys.exit(main())
