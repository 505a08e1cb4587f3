"""Let a new environment see all packages of the one that runs this: `python beside.py FOLDER`."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path


def main(folder: str) -> None:
    """Write a .pth file into the environment at `folder`, which has this one's Python version."""
    ours = sysconfig.get_path("purelib")
    theirs = sysconfig.get_path("purelib", "venv", {"base": str(Path(folder).absolute())})
    line = f"import site; site.addsitedir({ours!r})\n"  # which reads the .pth files there, too
    Path(theirs, "beside.pth").write_text(line)


if __name__ == "__main__":
    main(sys.argv[1])
