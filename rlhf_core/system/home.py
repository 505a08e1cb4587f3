"""The folder for everything local: stores, runs, caches, the system of `rlhf up`."""

from __future__ import annotations

import os
from pathlib import Path


def rlhf_home() -> Path:
    """``$RLHF_HOME``, else the nearest ``.rlhf`` folder upward from the working directory, else
    ``./.rlhf`` (which need not exist yet)."""
    if home := os.environ.get("RLHF_HOME"):
        return Path(home).expanduser().absolute()
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / ".rlhf").is_dir():
            return folder / ".rlhf"
    return here / ".rlhf"
