"""Syncs a local SeaweedFS's files every second, since the server itself never does.

It answers a writer from the kernel's memory. After a power cut in the middle of work, all objects
of the last half minute were listed and could not be read; with this, mostly those of the last
seconds (docs/operations.md).
"""

from __future__ import annotations

import subprocess
import threading
import time
from pathlib import Path

from rlhf_core.system.durable import sync_file, sync_folders

PAUSE_SECONDS = 1.0
# A volume's index before its data, and both before the list of objects that refers to them: what
# is behind counts as not written, and what is ahead cannot be read.
_ORDER = {".idx": 0, ".dat": 1}


def keep_synced(folder: Path, server: subprocess.Popen[bytes]) -> None:
    """Sync what changes below a folder, in a thread, until the server has ended."""
    thread = threading.Thread(target=_run, args=(folder, server), name="rlhf-sync", daemon=True)
    thread.start()


def _run(folder: Path, server: subprocess.Popen[bytes]) -> None:
    synced: dict[Path, tuple[int, int]] = {}
    running = True
    while running:
        time.sleep(PAUSE_SECONDS)
        running = server.poll() is None  # the last round is after its end
        sync_changed(folder, synced)


def sync_changed(folder: Path, synced: dict[Path, tuple[int, int]]) -> list[Path]:
    """Sync the files whose size or time differ from ``synced``, which is updated; returns them."""
    done = []
    there = sorted(folder.rglob("*"), key=lambda path: _ORDER.get(path.suffix, 2))
    for path in there:
        try:
            info = path.stat()
            if path.is_file() and synced.get(path) != (info.st_size, info.st_mtime_ns):
                sync_file(path)
                synced[path] = (info.st_size, info.st_mtime_ns)
                done.append(path)
        except OSError:  # the server has removed it; a failing disk is reported by the server
            continue
    if done:
        sync_folders([*(path for path in there if path.is_dir()), folder])
    return done
