"""The identity of a source's contents, part of the stage key. Imports no torch."""

from __future__ import annotations

import hashlib
import os

from rlhf_core.data.sources import builtin, reasoning
from rlhf_core.data.sources.files import find_files
from rlhf_core.data.sources.hub import hub_commit
from rlhf_core.data.sources.kind import FEEDBACK, source_kind
from rlhf_core.jobs import DataSettings
from rlhf_core.store import Store, open_store


def fingerprint(settings: DataSettings, store: Store | None = None) -> str:
    """Identity of a source's contents: the same text as long as nothing in it changes.

    Local files: names and sha256 of their contents. S3: names, sizes and etags. Hub: the commit
    that the revision names, or the revision when the hub cannot be asked. Built-in, and
    reasoning-gym: the version of the package. Votes and thumbs: those that there are in the store
    (None: the environment's).

    Raises:
        DataError, StoreUnavailable: as `find_files`; or there are no votes or thumbs.
    """
    kind = source_kind(settings.source)
    if kind == "builtin":
        return f"{settings.source}@{builtin.version(settings.source.removeprefix('builtin:'))}"
    if kind == "reasoning":
        return f"{settings.source}@{reasoning.version()}"
    if kind == "feedback":
        return FEEDBACK[settings.source].fingerprint(store or open_store())
    if kind == "hub":
        return f"hub:{settings.source}@{hub_commit(settings)}"
    total = hashlib.sha256()
    for file in find_files(settings):
        name = file.name if len(file.name) < len(file.path) else os.path.basename(file.path)
        if file.remote is None:
            with file.open() as stream:
                identity = hashlib.file_digest(stream, "sha256").hexdigest()
        else:
            info = file.remote.info(file.path)
            identity = f"{info.get('size')} {info.get('ETag')}"
        total.update(f"{name}\0{identity}\n".encode("utf-8", "surrogateescape"))
    return f"{kind}:{total.hexdigest()}"
