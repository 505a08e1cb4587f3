"""A published model as a plain folder for other programs, switched in one step.

    published/chat                 a link to the newest version
    published/.chat/<digest>       complete versions: the newest, and the one before for its readers

Whoever opens the folder sees one version, whole. A program that opens several files one by one,
while a model may be published, resolves the link once (`realpath`) and opens them there.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import uuid
from pathlib import Path

from rlhf_core.errors import ConfigError
from rlhf_core.store.artifact import Artifact
from rlhf_core.store.cache import locked
from rlhf_core.store.local import file_errors
from rlhf_core.store.store import Store
from rlhf_core.system.durable import sync_folders
from rlhf_core.system.home import rlhf_home

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's renameat2


def published_folder(name: str) -> Path:
    """The folder of a published model on this machine."""
    return rlhf_home() / "published" / name


def materialise(store: Store, artifact: Artifact, folder: Path) -> Path:
    """Fetch the artifact into a plain folder; an existing one is replaced in one step.

    Raises:
        StoreError: as `Store.fetch`.
    """
    versions = folder.parent / f".{folder.name}"
    version = versions / artifact.digest
    with file_errors(folder), locked(folder):
        if folder.is_symlink() and folder.resolve() == version.resolve() and version.is_dir():
            return folder
        versions.mkdir(parents=True, exist_ok=True)
        try:
            store.fetch(artifact.digest, version)
        except ConfigError:  # an earlier version, to which somebody has added files
            shutil.rmtree(version)
            store.fetch(artifact.digest, version)
        before = _switch(folder, version)
        for old in versions.iterdir():
            if old.is_symlink():  # of a process that was killed
                old.unlink()
            elif old.resolve() not in (before, version.resolve()):
                shutil.rmtree(old, ignore_errors=True)
    return folder


def _switch(folder: Path, version: Path) -> Path:
    """Let ``folder`` be a link to ``version``, or the version itself where links are not possible.

    Returns:
        Where the version before is now.
    """
    fresh = version.with_name(f"{uuid.uuid4().hex}.next")
    try:
        fresh.symlink_to(Path(version.parent.name, version.name), target_is_directory=True)
    except OSError:
        version.rename(fresh)
    before = folder.resolve()
    if folder.is_dir() and not folder.is_symlink():  # as it was before there were links
        before = version.with_name(f"{uuid.uuid4().hex}.before")
        if _exchange(fresh, folder):
            fresh.rename(before)
        else:
            folder.rename(before)
            fresh.rename(folder)
    else:
        fresh.replace(folder)
    sync_folders([version.parent, folder.parent])
    return before


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system cannot."""
    try:
        call = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):  # not Linux, or an old C library
        return False
    names = (os.fsencode(one), os.fsencode(other))
    return bool(call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)
