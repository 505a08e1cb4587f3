"""Where rows come from: files, s3:// URLs, the Hugging Face hub, built-in sets, people's verdicts.

Nothing here imports torch or transformers, so that the orchestrator can ask for fingerprints.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core.data.rows.row import RawRow
from rlhf_core.data.sources import builtin, reasoning
from rlhf_core.data.sources.hub import hub_commit, hub_rows
from rlhf_core.data.sources.readers import READABLE, read_file, reader_of
from rlhf_core.data.sources.text_files import read_text
from rlhf_core.data.sources.thumbs import THUMBS
from rlhf_core.data.sources.votes import VOTES
from rlhf_core.errors import DataError, StoreUnavailable
from rlhf_core.jobs import DataSettings
from rlhf_core.store import Store, open_store

_VERDICTS = {kind.source: kind for kind in (VOTES, THUMBS)}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class SourceFile:
    """A data file: the name to show, and where it is."""

    name: str
    path: str
    remote: Any = None  # fsspec file system; None: local

    def open(self) -> Any:
        try:
            if self.remote is None:
                return Path(self.path).open("rb")
            return io.BufferedReader(self.remote.open(self.path, "rb"), 2**20)
        except OSError as error:
            raise DataError(f"{self.name}: cannot be read ({error.strerror or error}).") from error


def kind_of(source: str) -> str:
    """builtin, reasoning, verdicts, s3, local or hub; what exists or looks like a file is local.

    Raises:
        DataError: none of these.
    """
    if source.startswith("builtin:"):
        return "builtin"
    if reasoning.is_reasoning(source):
        return "reasoning"
    if source in _VERDICTS:
        return "verdicts"
    if source.startswith("s3://"):
        return "s3"
    if scheme := re.match(r"([A-Za-z][\w+.-]*)://", source):
        if scheme[1] == "file":
            return "local"
        raise DataError(
            f"{source}: {scheme[1]}:// is not readable; needed is a Hugging Face dataset id, a "
            "path, an s3:// URL or builtin:chatterbot."
        )
    path = _path(source)
    looks = source.startswith(("/", ".", "~")) or reader_of(source) or glob.has_magic(source)
    if looks or _exists(path):
        return "local"
    if _HUB_ID.fullmatch(source):
        return "hub"
    return "local"


def _path(source: str) -> Path:
    """The path that a local source names.

    Raises:
        DataError: it is empty, or names the home of a user who is not known.
    """
    text = source.removeprefix("file://")
    if not text.strip():
        raise DataError(
            f"The source is {source!r}, which names nothing; needed is a Hugging Face dataset id, "
            "a path, an s3:// URL or builtin:chatterbot."
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise DataError(f"{source}: {error} Give the whole path.") from error


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long for a file: a hub id it may be
        return False


def find_files(settings: DataSettings) -> list[SourceFile]:
    """The data files of a local or s3 source, sorted by name.

    Raises:
        DataError: there is none, or a single one has an unknown ending.
    """
    source = settings.source
    texts = settings.format == "text" or reader_of(source) is read_text
    found = (_s3_files if kind_of(source) == "s3" else _local_files)(source, texts)
    if not found:
        raise DataError(
            f"{source}: no data file there; readable are {READABLE}, of which the last two in a "
            "folder only with format: text (or name them: texts/*.txt). Check the path (relative "
            f"paths start at {os.getcwd()})."
        )
    for file in found:
        if reader_of(file.name) is None:
            raise DataError(f"{file.name}: the ending is not known; readable are {READABLE}.")
        if not _is_data(file.name, texts):
            raise DataError(
                f"{file.name}: a plain text among what {source} matches; set format: text to read "
                "it as one, or narrow the pattern."
            )
    return found


def _is_data(name: str, texts: bool) -> bool:
    """Whether a file is read that nobody named. A text is where texts are asked for: else it is
    about the data, as a README.md."""
    reader = reader_of(name)
    return reader is not None and (texts or reader is not read_text)


def _local_files(source: str, texts: bool) -> list[SourceFile]:
    path = _path(source)
    if not _exists(path) and not glob.has_magic(str(path)):
        raise DataError(
            f"{source[:300]}: there is no such file or folder (relative paths start at "
            f"{os.getcwd()}); correct the path, or give a Hugging Face dataset id such as "
            "Anthropic/hh-rlhf."
        )
    if path.is_file():
        return [SourceFile(source, str(path))]
    if path.is_dir():
        inside = (p for p in sorted(path.rglob("*")) if p.is_file() and _is_data(p.name, texts))
        return [
            SourceFile(p.relative_to(path).as_posix(), str(p))
            for p in inside
            if not any(part.startswith(".") for part in p.relative_to(path).parts)
        ]
    if glob.has_magic(str(path)):
        matches = sorted(glob.glob(str(path), recursive=True))
        return [SourceFile(match, match) for match in matches if os.path.isfile(match)]
    raise DataError(f"{source}: is neither a plain file nor a folder; give one of the two.")


def s3_filesystem() -> Any:
    """An s3fs file system with the store's settings (RLHF_STORE_*, AWS_*)."""
    import s3fs

    from rlhf_core.store.s3.client import botocore_options
    from rlhf_core.store.settings import StoreSettings

    settings = StoreSettings()
    fs = s3fs.S3FileSystem(
        endpoint_url=settings.endpoint,
        profile=settings.profile,
        client_kwargs={
            "verify": None if settings.tls_verify else False,
            "region_name": settings.region,
        },
        config_kwargs=botocore_options(settings),
        use_listings_cache=False,  # it is wrong about what another client wrote or deleted
        skip_instance_cache=True,
    )
    fs.retries = settings.retries + 1
    return fs


def _s3_files(source: str, texts: bool) -> list[SourceFile]:
    fs = s3_filesystem()
    path = source.removeprefix("s3://").rstrip("/")
    try:
        if glob.has_magic(path):
            matches = sorted(fs.glob(path))
        elif fs.isfile(path):
            matches = [path]
        elif fs.isdir(path):
            matches = sorted(match for match in fs.find(path) if _is_data(match, texts))
        else:
            raise DataError(
                f"{source}: there is no such object or prefix; check bucket, key and "
                "RLHF_STORE_ENDPOINT."
            )
    except (OSError, PermissionError) as error:
        raise _s3_error(source, error) from error
    except Exception as error:  # botocore's own, such as missing credentials
        if isinstance(error, DataError):
            raise
        raise _s3_error(source, error) from error
    return [SourceFile(f"s3://{match}", match, fs) for match in matches]


def _s3_error(source: str, error: Exception) -> Exception:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{source}: there is no such bucket or object.")
    return StoreUnavailable(
        f"{source}: cannot be read ({error or type(error).__name__}); check RLHF_STORE_ENDPOINT, "
        "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's permissions."
    )


def open_rows(
    settings: DataSettings, store: Store | None = None, known: str = ""
) -> Iterator[RawRow]:
    """All rows of the source, in order, a bounded part in memory at a time.

    Args:
        store: where votes and thumbs are; None: the environment's.
        known: fingerprint of those to read, without what came later; empty: all.

    Raises:
        DataError: the source does not exist or is damaged beyond single rows.
        StoreUnavailable: S3 or the hub cannot be reached.
    """
    kind = kind_of(settings.source)
    if kind == "builtin":
        yield from builtin.rows(settings.source.removeprefix("builtin:"), settings.subset)
    elif kind == "reasoning":
        yield from reasoning.rows(settings.source)
    elif kind == "verdicts":
        yield from _VERDICTS[settings.source].rows(store or open_store(), known)
    elif kind == "hub":
        yield from hub_rows(settings)
    else:
        for file in find_files(settings):
            with file.open() as stream:
                try:
                    yield from read_file(stream, file.name)
                except OSError as error:
                    raise (
                        _s3_error(file.name, error)
                        if kind == "s3"
                        else DataError(f"{file.name}: reading failed ({error.strerror or error}).")
                    ) from error


def fingerprint(settings: DataSettings, store: Store | None = None) -> str:
    """Identity of a source's contents: the same text as long as nothing in it changes.

    Local files: names and sha256 of their contents. S3: names, sizes and etags. Hub: the commit
    that the revision names, or the revision when the hub cannot be asked. Built-in, and
    reasoning-gym: the version of the package. Votes and thumbs: those that there are in the store
    (None: the environment's).

    Raises:
        DataError, StoreUnavailable: as `find_files`; or there are no votes or thumbs.
    """
    kind = kind_of(settings.source)
    if kind == "builtin":
        return f"{settings.source}@{builtin.version(settings.source.removeprefix('builtin:'))}"
    if kind == "reasoning":
        return f"{settings.source}@{reasoning.version()}"
    if kind == "verdicts":
        return _VERDICTS[settings.source].fingerprint(store or open_store())
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
