"""Files and folders that only this user can read."""

from __future__ import annotations

from pathlib import Path

from rlhf_core.system.durable import write_whole
from rlhf_core.system.home import rlhf_home


def private_folder(name: str) -> Path:
    """A folder of `rlhf_home` that only this user can enter, made on first use.

    One that exists keeps its mode: several users may share it on purpose. `rlhf up` closes those
    of its home, see `close_folder`.
    """
    folder = rlhf_home() / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def close_folder(folder: Path) -> None:
    """Make a folder, and keep other users out of it."""
    folder.mkdir(parents=True, mode=0o700, exist_ok=True)
    folder.chmod(0o700)


def write_private(path: Path, text: str) -> None:
    """Write a file that only this user can read: whole, or not at all, also after a crash."""
    write_whole(path, text.encode(), mode=0o600)
