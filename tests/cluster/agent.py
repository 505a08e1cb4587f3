"""A node's agent whose ranks have the faults of `tests.faults.ranks`, and which soon notices that
another node has vanished.

RLHF_TEST_MACHINE has the network namespace that it and its ranks live in, and its host name.
"""

import ctypes
import os
import socket
import sys
from pathlib import Path

from tasks.launchers import local, peers
from tasks.launchers.node_agent import main

local.MODULE = "tests.faults.ranks"
peers.IDLE, peers.INTERVAL, peers.PROBES, peers.GRACE_SECONDS = 2, 1, 3, 3.0

CLONE_NEWUTS, CLONE_NEWNET = 0x04000000, 0x40000000  # linux/sched.h; Python 3.12 has them in os


def enter(machine: str) -> None:
    """Live on a machine of `tests.cluster.conftest` from now on. There must be one thread only."""
    namespace, host = machine.split()
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", namespace).open() as file:
        done = libc.setns(file.fileno(), CLONE_NEWNET) or libc.unshare(CLONE_NEWUTS)
    if done != 0:
        raise OSError(ctypes.get_errno(), f"{machine} cannot be entered")
    socket.sethostname(host)


if __name__ == "__main__":
    if machine := os.environ.pop("RLHF_TEST_MACHINE", ""):
        enter(machine)
    sys.exit(main())
