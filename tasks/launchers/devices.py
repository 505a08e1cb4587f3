"""No device is given to two jobs: one lock file per GPU of this machine.

The kernel frees a lock when its holder dies, however it dies, so that nothing has to be cleaned up.
On a machine without GPUs there is nothing to lock, unless RLHF_DEVICES names devices.
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
SAY_AGAIN_SECONDS = 60.0


def devices() -> list[str]:
    """Numbers of the devices that jobs on this machine share: RLHF_DEVICES ("0,1"), else
    CUDA_VISIBLE_DEVICES, else all GPUs; empty without any."""
    for name in ("RLHF_DEVICES", "CUDA_VISIBLE_DEVICES"):
        if name in os.environ:
            return [part.strip() for part in os.environ[name].split(",") if part.strip()]
    return [str(i) for i in range(this_machine().gpus)]


@contextlib.contextmanager
def reserved(count: int, owner: str, say: Callable[[str], None]) -> Iterator[list[str]]:
    """Holds `count` devices while the block runs; waits until so many are free.

    Args:
        owner: for the message of those who wait.
        say: told, now and then, who holds the devices that are waited for.
    Yields:
        The devices' numbers; empty where the machine has none.

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
            f"({', '.join(known)}): lower resources.ranks, or send it to a larger machine."
        )
    said = 0.0
    while True:
        held, holders = _take(known, count, owner)
        if held:
            break
        if time.monotonic() - said > SAY_AGAIN_SECONDS or said == 0.0:
            said = time.monotonic()
            say(f"waiting for {count} free devices of {len(known)}; held by {', '.join(holders)}")
        time.sleep(POLL_SECONDS)
    try:
        yield list(held)
    finally:
        for file in held.values():
            file.close()


def _take(known: list[str], count: int, owner: str) -> tuple[dict[str, IO[str]], list[str]]:
    """All or nothing: `count` locked devices, or none and who holds the others."""
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
