"""Child processes: PYTHONPATH for this code, exit with the parent, and a name."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

import rlhf_core

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_libc = ctypes.CDLL(None, use_errno=True)  # loaded before any fork


def python_path() -> str:
    """PYTHONPATH with which a child imports the rlhf_core that runs here."""
    source = str(Path(rlhf_core.__file__).resolve().parents[1])
    paths = [source, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return os.pathsep.join(paths)


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel to signal this process when the thread that started it ends, for whatever
    reason. Safe between fork and exec."""
    if sys.platform == "linux":
        _libc.prctl(_PR_SET_PDEATHSIG, number)


def name_process(name: str) -> None:
    """Set the name that `top` and `ps -o comm` show; at most 15 characters. A forked process keeps
    its parent's command line and, in /proc, its parent's environment."""
    if sys.platform == "linux":
        _libc.prctl(_PR_SET_NAME, name.encode())
