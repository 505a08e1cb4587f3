"""Log files of the system's processes, each bounded in size.

The processes write to a file themselves, so that none waits for a reader or ends with it. Such a
file cannot be renamed away: its writer would follow it. It is copied and then truncated, as by
`copytruncate` of logrotate; what is written between the two, within a moment, is lost.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import IO

LIMIT = 10 * 2**20  # bytes of a log, after which it is moved to <name>.1
KEPT = 3  # older parts: <name>.1 is the newest


def open_log(path: Path) -> IO[bytes]:
    """A private log file, for a child process to write to. O_APPEND: it may be truncated."""
    number = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    return open(number, "ab")


def rotate(folder: Path, limit: int = LIMIT, kept: int = KEPT) -> None:
    """Move the contents of logs beyond the limit to older parts, of which the oldest is deleted.

    Raises:
        OSError: the disk is full, for example; nothing is lost.
    """
    for log in folder.glob("*.log"):
        if log.stat().st_size <= limit:
            continue
        copy = log.with_name(f"{log.name}.copy")
        copy.unlink(missing_ok=True)
        with log.open("r+b") as source, open_log(copy) as part:
            shutil.copyfileobj(source, part)
            part.flush()  # a full disk shows here, while the log is whole
            for number in range(kept - 1, 0, -1):
                older = log.with_name(f"{log.name}.{number}")
                if older.exists():
                    older.replace(log.with_name(f"{log.name}.{number + 1}"))
            copy.replace(log.with_name(f"{log.name}.1"))
            while os.fstat(source.fileno()).st_size > source.tell():  # written meanwhile
                shutil.copyfileobj(source, part)
                part.flush()
            source.truncate(0)
