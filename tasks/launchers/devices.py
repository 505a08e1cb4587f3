"""Reserves GPUs: one lock file per GPU of this machine, so that no GPU is given to two jobs.

The kernel releases a lock when its holder exits, so that nothing has to be cleaned up. A machine
without GPUs has nothing to lock, unless RLHF_DEVICES names devices.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from rlhf_core.errors import ConfigError
from rlhf_core.system.machine import this_machine

POLL_SECONDS = 1.0
REPORT_SECONDS = 60.0


def devices() -> list[str]:
    """Ids of the devices that jobs on this machine share: RLHF_DEVICES ("0,1"), else
    CUDA_VISIBLE_DEVICES, else all GPUs."""
    for name in ("RLHF_DEVICES", "CUDA_VISIBLE_DEVICES"):
        if name in os.environ:
            return [part.strip() for part in os.environ[name].split(",") if part.strip()]
    return [str(i) for i in range(this_machine().gpus)]


@contextlib.contextmanager
def reserved(count: int, owner: str, report: Callable[[str], None]) -> Iterator[list[str]]:
    """Reserve `count` devices while the block runs; waits until that many are free.

    Args:
        owner: name of the job, for the messages of jobs that wait.
        report: gets a message from time to time that names the holders of busy devices.

    Yields:
        The devices' ids; empty on a machine without devices.

    Raises:
        ConfigError: the machine has fewer devices.
    """
    known = devices()
    if not known:
        yield []
        return
    if count > len(known):
        raise ConfigError(
            f"{owner} needs {count} devices, and this machine has {len(known)} "
            f"({', '.join(known)}): lower resources.ranks, or use a larger machine."
        )
    reported = 0.0
    while True:
        held, holders = _try_lock(known, count, owner)
        if held:
            break
        if time.monotonic() - reported > REPORT_SECONDS or reported == 0.0:
            reported = time.monotonic()
            report(
                f"waiting for {count} free devices of {len(known)}; held by {', '.join(holders)}"
            )
        time.sleep(POLL_SECONDS)
    try:
        yield list(held)
    finally:
        for file in held.values():
            file.close()


def _try_lock(known: list[str], count: int, owner: str) -> tuple[dict[str, IO[str]], list[str]]:
    """Lock `count` devices; if there are not enough, none, and the holders of the others."""
    held: dict[str, IO[str]] = {}
    holders: list[str] = []
    for device in known:
        file: IO[str] = (_folder() / f"device-{device}.lock").open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holders.append(_holder(device, file.read()))
            file.close()
            continue
        file.truncate(0)
        file.write(json.dumps({"owner": owner, "pid": os.getpid()}))
        file.flush()
        held[device] = file
        if len(held) == count:
            return held, []
    for file in held.values():
        file.close()
    return {}, holders


def _holder(device: str, text: str) -> str:
    try:
        found = json.loads(text)
        return f"{found['owner']} (device {device}, process {found['pid']})"
    except (ValueError, KeyError, TypeError):
        return f"device {device}"


def _folder() -> Path:
    name = os.environ.get("RLHF_LOCKS")
    folder = Path(name) if name else Path(tempfile.gettempdir()) / f"rlhf-devices-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
