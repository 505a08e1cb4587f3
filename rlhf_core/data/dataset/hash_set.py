"""A set of 64-bit hashes on disk, so that memory does not grow with the data set."""

from __future__ import annotations

import sqlite3
from pathlib import Path

CACHE_KIB = 32 * 1024


class HashSet:
    """Hashes in an SQLite file, with a cache of CACHE_KIB KiB. The caller removes the file.

    Attributes:
        count: number of different hashes.
    """

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, isolation_level=None)
        for setting in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE"):
            self._database.execute(f"PRAGMA {setting}")
        self._database.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
        self._database.execute("CREATE TABLE seen (hash INTEGER PRIMARY KEY)")
        self._database.execute("BEGIN")
        self._cursor = self._database.cursor()
        self.count = 0

    def add(self, value: int) -> bool:
        """Add an unsigned 64-bit hash; True if it is new."""
        self._cursor.execute("INSERT OR IGNORE INTO seen VALUES (?)", (value - 2**63,))
        new = self._cursor.rowcount > 0
        self.count += new
        return new

    def close(self) -> None:
        """Close the file."""
        self._database.close()
