"""Finding the data files of a local path, a pattern or an s3:// URL."""

from __future__ import annotations

import glob
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core.data.sources.kind import local_path, path_exists, source_kind
from rlhf_core.data.sources.readers import READABLE, reader_of
from rlhf_core.data.sources.text_files import read_text
from rlhf_core.errors import DataError, StoreUnavailable
from rlhf_core.jobs import DataSettings


@dataclass(frozen=True)
class SourceFile:
    """A data file.

    Attributes:
        name: for messages.
        path: on the local or remote file system.
        remote: fsspec file system; None: local.
    """

    name: str
    path: str
    remote: Any = None

    def open(self) -> Any:
        """A buffered binary stream.

        Raises:
            DataError: the file cannot be read.
        """
        try:
            if self.remote is None:
                return Path(self.path).open("rb")
            return io.BufferedReader(self.remote.open(self.path, "rb"), 2**20)
        except OSError as error:
            raise DataError(f"{self.name}: cannot be read ({error.strerror or error}).") from error


def find_files(settings: DataSettings) -> list[SourceFile]:
    """The data files of a local or s3 source, sorted by name.

    Raises:
        DataError: there is no data file, or one of an unknown type.
        StoreUnavailable: S3 cannot be reached.
    """
    source = settings.source
    texts = settings.format == "text" or reader_of(source) is read_text
    found = (_s3_files if source_kind(source) == "s3" else _local_files)(source, texts)
    if not found:
        raise DataError(
            f"{source}: no data file found; supported are {READABLE}. Files of the last two types "
            "in a folder are read only with format: text (or a pattern: texts/*.txt). Check the "
            f"path (relative paths start at {os.getcwd()})."
        )
    for file in found:
        if reader_of(file.name) is None:
            raise DataError(f"{file.name}: unknown file type; supported are {READABLE}.")
        if not _is_data(file.name, texts):
            raise DataError(
                f"{file.name}: {source} matches this plain text file; set format: text to read it, "
                "or narrow the pattern."
            )
    return found


def _is_data(name: str, texts: bool) -> bool:
    """Whether a file of a folder is read.

    A plain text is read only if texts are wanted; otherwise it is about the data, like a README.
    """
    reader = reader_of(name)
    return reader is not None and (texts or reader is not read_text)


def _local_files(source: str, texts: bool) -> list[SourceFile]:
    path = local_path(source)
    if not path_exists(path) and not glob.has_magic(str(path)):
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
    raise DataError(f"{source} is neither a regular file nor a folder; give one of the two.")


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
        use_listings_cache=False,  # it misses what other clients write or delete
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
        raise s3_error(source, error) from error
    except Exception as error:  # of botocore, such as missing credentials
        if isinstance(error, DataError):
            raise
        raise s3_error(source, error) from error
    return [SourceFile(f"s3://{match}", match, fs) for match in matches]


def s3_error(source: str, error: Exception) -> Exception:
    """A DataError or StoreUnavailable for an error of s3fs."""
    if isinstance(error, FileNotFoundError):
        return DataError(f"{source}: there is no such bucket or object.")
    return StoreUnavailable(
        f"{source}: cannot be read ({error or type(error).__name__}); check RLHF_STORE_ENDPOINT, "
        "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's permissions."
    )
