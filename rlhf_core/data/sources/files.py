"""Finding the data files of a local path, a pattern or an s3:// URL."""

from __future__ import annotations

import glob
import io
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsspec.utils import glob_translate

from rlhf_core.data.sources.kind import local_path, path_exists, source_kind
from rlhf_core.data.sources.readers import READABLE, reader_of
from rlhf_core.data.sources.text_files import read_text
from rlhf_core.errors import DataError, StoreUnavailable
from rlhf_core.jobs import DataSettings

_NO_DATA = "no data file"


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


@dataclass
class Found:
    """The data files of a source, sorted by name, and what lies beside them.

    Attributes:
        left_out: name -> why it is not read.
    """

    files: list[SourceFile] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def find_files(settings: DataSettings) -> Found:
    """The data files of a local or s3 source. The rules are the same for both:

    * A source that exists as it is written is that file or folder, brackets and stars included.
    * A folder is read with all folders in it. Left out are names that begin with a dot, and files
      that hold no data. Links are followed, each folder once; one to nothing is an error.
    * In a pattern, * and [ab] stay within a name, and ** spans folders.

    Raises:
        DataError: there is no data file, one of an unknown type, or a link to nothing.
        StoreUnavailable: S3 cannot be reached.
    """
    source = settings.source
    texts = settings.format == "text" or reader_of(source) is read_text
    found = (_s3_files if source_kind(source) == "s3" else _local_files)(source, texts)
    if not found.files:
        there = ", ".join(f"{name} ({why})" for name, why in list(found.left_out.items())[:5])
        raise DataError(
            f"{source}: no data file found; supported are {READABLE}. Files of the last two types "
            "in a folder are read only with format: text (or a pattern: texts/*.txt). "
            + (f"Left out: {there}. " if there else "")
            + f"Check the path (relative paths start at {os.getcwd()})."
        )
    for file in found.files:
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


def _choose(names: Iterable[str], pattern: str, texts: bool, left_out: dict[str, str]) -> list[str]:
    """Which of the files below a folder are read, by their paths from there.

    Args:
        pattern: of these paths; empty: the whole folder.
        left_out: what is not read is added.
    """
    matches = re.compile(glob_translate(pattern)).match if pattern else lambda name: True
    dots = any(part.startswith(".") for part in pattern.split("/"))
    chosen = []
    for name in sorted(names):
        if not matches(name):
            continue
        if not dots and any(part.startswith(".") for part in name.split("/")):
            left_out[name] = "its name, or a folder's, begins with a dot"
        elif not pattern and not _is_data(name, texts):
            left_out[name] = _NO_DATA
        else:
            chosen.append(name)
    return chosen


def _local_files(source: str, texts: bool) -> Found:
    path = local_path(source)
    base, pattern = _split(path)
    if not path_exists(base) or (pattern and not glob.has_magic(pattern)):
        raise DataError(
            f"{source[:300]}: there is no such file or folder (relative paths start at "
            f"{os.getcwd()}); correct the path, or give a Hugging Face dataset id such as "
            "Anthropic/hh-rlhf."
        )
    if base.is_file() and not pattern:
        return Found([SourceFile(source, str(path))])
    if not base.is_dir():
        raise DataError(f"{source} is neither a regular file nor a folder; give one of the two.")
    found = Found()
    names = _walk(base, None if "**" in pattern or not pattern else pattern.count("/"), found)
    chosen = _choose(names, pattern, texts, found.left_out)
    for name in [*chosen, *(n for n, why in found.left_out.items() if why == _NO_DATA)]:
        if not os.path.exists(base / name):  # perhaps a folder of a disk that is not there
            raise DataError(
                f"{base / name}: this link leads to nothing; mend it, or remove it from the folder."
            )
    for name in chosen:
        whole = str(base / name)
        if os.path.isfile(whole):
            found.files.append(SourceFile(whole if pattern else name, whole))
        else:
            found.left_out[name] = "no regular file"
    return found


def _split(path: Path) -> tuple[Path, str]:
    """The part of a path that exists as it is written, and the pattern below it."""
    if path_exists(path):
        return path, ""
    base, *rest = [*reversed(path.parents), path]
    for longer in rest:
        if not path_exists(longer):
            break
        base = longer
    return base, path.relative_to(base).as_posix()


def _walk(base: Path, depth: int | None, found: Found) -> Iterator[str]:
    """Paths of all files below a folder; links to folders are followed, each folder once.

    Args:
        depth: of the folders below it to look into, for a pattern, which names links itself; None:
            all.

    Raises:
        DataError: a folder cannot be read.
    """
    # Folders of their own come first: a link to one of them is left out, not the folder.
    seen = {os.path.realpath(base)}
    if depth is None:
        seen |= {os.path.realpath(folder) for folder, _, _ in os.walk(base, onerror=_unreadable)}
    for folder, folders, files in os.walk(base, followlinks=True, onerror=_unreadable):
        here = Path(folder).relative_to(base)
        yield from ((here / name).as_posix() for name in files)
        if depth is not None:
            folders[:] = folders if len(here.parts) < depth else []
            continue
        for name in sorted(folders):
            path = os.path.join(folder, name)
            real = os.path.realpath(path)
            if os.path.islink(path) and real in seen:
                found.left_out[(here / name).as_posix()] = "a link to a folder that is read already"
                folders.remove(name)
            seen.add(real)
        folders.sort()


def _unreadable(error: OSError) -> None:
    raise DataError(
        f"{error.filename}: the folder cannot be read ({error.strerror}); allow it, or move it out "
        "of the source."
    ) from error


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


def _s3_files(source: str, texts: bool) -> Found:
    fs = s3_filesystem()
    path = source.removeprefix("s3://").rstrip("/")
    try:
        found, keys = Found(), []
        if fs.isfile(path):
            keys = [path]
        elif fs.isdir(path):
            keys = _below(fs, path, "", texts, found)
        elif glob.has_magic(path):
            base, pattern = _split_keys(fs, path)
            keys = _below(fs, base, pattern, texts, found)
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
    found.files = [SourceFile(f"s3://{key}", key, fs) for key in keys]
    return found


def _below(fs: Any, base: str, pattern: str, texts: bool, found: Found) -> list[str]:
    """The data files below a prefix, as whole keys."""
    names = (key.removeprefix(f"{base}/") for key in fs.find(base) if not key.endswith("/"))
    return [f"{base}/{name}" for name in _choose(names, pattern, texts, found.left_out)]


def _split_keys(fs: Any, path: str) -> tuple[str, str]:
    """As `_split`, for a key."""
    parts = path.split("/")
    literal = next(i for i, part in enumerate(parts) if glob.has_magic(part)) or 1
    base = "/".join(parts[:literal])
    while literal < len(parts) - 1 and fs.isdir(f"{base}/{parts[literal]}"):
        base, literal = f"{base}/{parts[literal]}", literal + 1
    return base, "/".join(parts[literal:])


def s3_error(source: str, error: Exception) -> Exception:
    """A DataError or StoreUnavailable for an error of s3fs."""
    if isinstance(error, FileNotFoundError):
        return DataError(f"{source}: there is no such bucket or object.")
    return StoreUnavailable(
        f"{source}: cannot be read ({error or type(error).__name__}); check RLHF_STORE_ENDPOINT, "
        "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's permissions."
    )
