"""The identity of a source's contents, part of the stage key. Imports no torch."""

from __future__ import annotations

import hashlib
import os

from rlhf_core.data.sources import builtin, reasoning
from rlhf_core.data.sources.files import find_files
from rlhf_core.data.sources.hub import hub_commit
from rlhf_core.data.sources.kind import FEEDBACK, source_kind
from rlhf_core.errors import DataError
from rlhf_core.jobs import DataSettings, Source
from rlhf_core.store import Store, open_store

_AND = " + "  # between the sources of a mixture


def check_unchanged(settings: Source, expected: str) -> None:
    """Check that files are what they were when the run was started.

    Args:
        expected: the fingerprint then; empty: nothing is checked.

    Raises:
        DataError: a local or S3 source changed.
    """
    if not expected:
        return
    for part, before in zip(settings.parts, expected.split(_AND), strict=True):
        if source_kind(part.source) not in ("local", "s3"):
            continue
        found = fingerprint(part)
        if found != before:
            raise DataError(
                f"{part.source} changed after this run was started (it was {before[:20]}, it is "
                f"{found[:20]}); start the run again to use it as it is now."
            )


def fingerprint(settings: Source, store: Store | None = None) -> str:
    """The identity of a source's contents; it changes when the contents change. That of a mixture
    changes with any of its sources.

    - Local files: their names and the sha256 of their contents.
    - S3: names, sizes and etags.
    - Hub: the commit of the revision, or the revision if the hub does not answer.
    - Built-in sets and reasoning-gym: the version of the package.
    - Votes and thumbs: the records in the store.

    Args:
        store: holds the votes and thumbs; None: the store of the environment.

    Raises:
        DataError, StoreUnavailable: as `find_files`; or the store holds no votes or thumbs.
    """
    if not isinstance(settings, DataSettings):
        return _AND.join(fingerprint(part, store) for part in settings.parts)
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
    for file in find_files(settings).files:
        name = file.name if len(file.name) < len(file.path) else os.path.basename(file.path)
        if file.remote is None:
            with file.open() as stream:
                identity = hashlib.file_digest(stream, "sha256").hexdigest()
        else:
            info = file.remote.info(file.path)
            identity = f"{info.get('size')} {info.get('ETag')}"
        total.update(f"{name}\0{identity}\n".encode("utf-8", "surrogateescape"))
    return f"{kind}:{total.hexdigest()}"
