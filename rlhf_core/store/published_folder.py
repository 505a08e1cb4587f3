"""A published model as a plain folder for other programs, replaced in one step."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rlhf_core.store.artifact import Artifact
from rlhf_core.store.store import Store
from rlhf_core.system.home import rlhf_home


def published_folder(name: str) -> Path:
    """The folder of a published model on this machine."""
    return rlhf_home() / "published" / name


def materialise(store: Store, artifact: Artifact, folder: Path) -> Path:
    """Fetch the artifact into a plain folder; an existing one is replaced in one step.

    Raises:
        StoreError: as `Store.fetch`.
    """
    mark = folder.parent / f".{folder.name}.digest"
    if folder.is_dir() and mark.is_file() and mark.read_text() == artifact.digest:
        return folder
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    shutil.rmtree(fresh, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    store.fetch(artifact.digest, fresh)
    mark.unlink(missing_ok=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    mark.write_text(artifact.digest)
    shutil.rmtree(old, ignore_errors=True)
    return folder
