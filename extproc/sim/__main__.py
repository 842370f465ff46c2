"""`python -m extproc.sim …`: the same as `extproc engine …`."""

import sys

from extproc.sim.cli import main

sys.exit(main())
