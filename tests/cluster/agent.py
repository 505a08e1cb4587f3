"""A node's agent whose ranks have the faults of `tests.faults.ranks`, and which soon notices that
another node has vanished."""

import sys

from tasks.launchers import local, peers
from tasks.launchers.node_agent import main

local.MODULE = "tests.faults.ranks"
peers.IDLE, peers.INTERVAL, peers.PROBES, peers.GRACE_SECONDS = 2, 1, 3, 3.0

if __name__ == "__main__":
    sys.exit(main())
