"""A node's agent whose ranks have the faults of `tests.faults.ranks`."""

import sys

from tasks.launchers import local
from tasks.launchers.node_agent import main

local.MODULE = "tests.faults.ranks"

if __name__ == "__main__":
    sys.exit(main())
