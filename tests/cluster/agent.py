"""A node's agent whose ranks have the faults of `tests.faults.ranks`, and which soon notices that
another node has vanished.

RLHF_TEST_MACHINE has the network namespace that it and its ranks live in, and its host name.
"""

import ctypes
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

from rlhf_core.system.processes import die_with_parent
from tasks.launchers import local, peers
from tasks.launchers.node_agent import main

local.MODULE = "tests.faults.ranks"
peers.IDLE, peers.INTERVAL, peers.PROBES, peers.GRACE_SECONDS = 2, 1, 3, 3.0

MODULE = "rlhf_core.runtime.torchrun"


class ForkedTorchrun:
    """torchrun as `subprocess.Popen` starts it, but forked: what it imports is here already."""

    def __init__(self, command: list[str], env: dict[str, str], **_: object) -> None:
        read, write = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                die_with_parent(signal.SIGTERM)
                for standard in (1, 2):
                    os.dup2(write, standard)
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, signal.SIG_DFL)
                os.environ.clear()
                os.environ.update(env)
                sys.argv = command[command.index(MODULE) :]
                sys.modules.pop(MODULE, None)
                runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
                code = 0
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else int(left.code is not None)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        os.close(write)
        self.stdout = os.fdopen(read, "rb")

    def poll(self) -> int | None:
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        if self.returncode is None and os.waitid(os.P_PID, self.pid, options):
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (timeout or 0.0)
        while self.poll() is None:
            if timeout is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(MODULE, timeout)
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


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
    if "torch" in sys.modules:  # this process was forked from one that has imported it
        local.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": ForkedTorchrun})
    if machine := os.environ.pop("RLHF_TEST_MACHINE", ""):
        enter(machine)
    sys.exit(main())
