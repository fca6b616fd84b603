"""`python -m kvblocks`: the command line."""

import sys

from kvblocks.cli.main import main

sys.exit(main())
