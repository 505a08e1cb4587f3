"""A set of 64-bit hashes that lives on disk, so that memory does not grow with the data set."""

from __future__ import annotations

import sqlite3
from pathlib import Path

CACHE_KIB = 32 * 1024


class Seen:
    """Which hashes have occurred. Bounded memory; the file goes with its folder."""

    def __init__(self, path: Path) -> None:
        self._base = sqlite3.connect(path, isolation_level=None)
        for setting in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE"):
            self._base.execute(f"PRAGMA {setting}")
        self._base.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
        self._base.execute("CREATE TABLE seen (hash INTEGER PRIMARY KEY)")
        self._base.execute("BEGIN")
        self._cursor = self._base.cursor()
        self.count = 0

    def add(self, value: int) -> bool:
        """Remember an unsigned 64-bit hash; True when it is new."""
        self._cursor.execute("INSERT OR IGNORE INTO seen VALUES (?)", (value - 2**63,))
        new = self._cursor.rowcount > 0
        self.count += new
        return new

    def close(self) -> None:
        self._base.close()
