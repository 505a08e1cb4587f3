"""An artifact: files, kind, metadata and parents, named by the digest of its manifest."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from rlhf_core.errors import ArtifactCorrupt, ConfigError

SCHEMA = 1
KIND = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, order=True)
class FileEntry:
    """One file: its path inside the artifact (posix, relative), bytes, and sha256 in hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Artifact:
    """A complete, immutable set of files.

    ``digest`` covers kind, files, metadata and parents but not ``created`` (ISO 8601, UTC), so
    that two publishers of the same thing get the same artifact.
    """

    digest: str
    kind: str
    files: tuple[FileEntry, ...]
    metadata: dict[str, Any] = field(hash=False)
    parents: tuple[str, ...] = ()
    created: str = field(default="", compare=False)

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size for entry in self.files)

    @property
    def ref(self) -> str:
        """A short name for people, ``kind/digest[:12]``; `Store.get` accepts it."""
        return f"{self.kind}/{self.digest[:12]}"

    def with_files(self, paths: Container[str] | None) -> Artifact:
        """Itself with only the files of these paths; None: with all."""
        if paths is None:
            return self
        return replace(self, files=tuple(file for file in self.files if file.path in paths))

    def file(self, path: str) -> FileEntry:
        """The entry of one file. Raises ConfigError, listing the files, for an unknown path."""
        for entry in self.files:
            if entry.path == path:
                return entry
        there = ", ".join(entry.path for entry in self.files[:20]) or "no files"
        raise ConfigError(f"artifact {self.ref} has no file {path!r}; it holds: {there}")


def check_path(path: str) -> str:
    """Return ``path`` if it is a safe relative posix path; raise ConfigError otherwise."""
    problem = None
    if not path or path.startswith("/"):
        problem = "is empty or absolute"
    elif any(part in ("", ".", "..") for part in path.split("/")):
        problem = "has an empty, '.' or '..' part"
    elif "\\" in path or any(ord(char) < 32 or ord(char) == 127 for char in path):
        problem = "has a backslash or a control character"
    else:
        try:
            path.encode()
        except UnicodeEncodeError:
            problem = "is not valid UTF-8"
    if problem:
        raise ConfigError(
            f"path {path!r} {problem}; expected a relative path such as 'weights/a.safetensors'"
        )
    return path


def check_kind(kind: str) -> str:
    """Return ``kind`` if it is a slug; raise ConfigError otherwise."""
    if not KIND.fullmatch(kind):
        raise ConfigError(
            f"artifact kind {kind!r} is not a slug; use lower-case letters, digits, '.', '_', '-' "
            "(1 to 64 characters, starting with a letter or digit)"
        )
    return kind


def check_files(files: Iterable[FileEntry]) -> tuple[FileEntry, ...]:
    """Files in path order. Raises ConfigError for unsafe, duplicate or clashing paths.

    Paths clash if they differ only in case or in their Unicode form: on a file system that ignores
    the difference, one file would silently replace the other.
    """
    ordered = tuple(sorted(files))
    seen: dict[str, str] = {}
    for entry in ordered:
        check_path(entry.path)
        folded = _folded(entry.path)
        if (other := seen.get(folded)) is not None:
            double = f"the same as {other!r} on a file system that ignores case"
            raise ConfigError(
                f"path {entry.path!r} is {'a duplicate' if other == entry.path else double}; each "
                "file needs its own path"
            )
        if not SHA256.fullmatch(entry.sha256) or entry.size < 0:
            raise ConfigError(f"file {entry.path!r} has no valid sha256 and size")
        seen[folded] = entry.path
    for folded, path in seen.items():
        parts = folded.split("/")
        for depth in range(1, len(parts)):
            if file := seen.get("/".join(parts[:depth])):
                raise ConfigError(f"{file!r} is a file and also a folder of {path!r}")
    return ordered


def _folded(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", path).casefold())


def plain_json(value: Mapping[str, Any], what: str) -> dict[str, Any]:
    """``value`` after a JSON round trip (tuples become lists).

    Args:
        what: names the value in the error.

    Raises:
        ConfigError: the value is not a JSON object.
    """
    try:
        copy = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{what} is not plain JSON ({error}); convert it first") from error
    if not isinstance(copy, dict):
        raise ConfigError(f"{what} is a JSON {type(copy).__name__}; expected an object")
    return copy


def canonical(value: Mapping[str, Any]) -> bytes:
    """The canonical JSON text of a value: sorted keys, no spaces, UTF-8."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode("utf-8", "surrogatepass")


def _digested(artifact: Artifact) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "kind": artifact.kind,
        "files": [asdict(entry) for entry in artifact.files],
        "metadata": artifact.metadata,
        "parents": list(artifact.parents),
    }


def make_artifact(
    kind: str,
    files: Iterable[FileEntry],
    metadata: Mapping[str, Any] | None,
    parents: Sequence[str],
    created: str | None = None,
) -> Artifact:
    """An artifact with its digest, after checking its parts.

    Args:
        created: ISO 8601, UTC; None: now.

    Raises:
        ConfigError: a kind, path, digest or metadata is invalid.
    """
    for parent in parents:
        if not SHA256.fullmatch(parent):
            raise ConfigError(
                f"parent {parent!r} is not a full artifact digest (64 hex digits); pass "
                "Artifact.digest"
            )
    unnamed = Artifact(
        digest="",
        kind=check_kind(kind),
        files=check_files(files),
        metadata=plain_json(metadata or {}, "metadata"),
        parents=tuple(parents),
        created=created or datetime.now(UTC).isoformat(timespec="microseconds"),
    )
    digest = hashlib.sha256(canonical(_digested(unnamed))).hexdigest()
    return Artifact(**{**vars(unnamed), "digest": digest})


def dump_manifest(artifact: Artifact) -> bytes:
    """The manifest as indented JSON."""
    value = {**_digested(artifact), "created": artifact.created}
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode()


def parse_manifest(data: bytes, key: str, digest: str) -> Artifact:
    """Parse a manifest and check it against its digest.

    Args:
        key: where it is in the store, for the error.

    Raises:
        ArtifactCorrupt: it is malformed, or its content has another digest.
    """
    try:
        value = json.loads(data)
        if value["schema"] != SCHEMA:
            raise ValueError(f"schema {value['schema']!r}; this version reads {SCHEMA}")
        artifact = make_artifact(
            _typed(value["kind"], str, "kind"),
            [_entry(file) for file in _typed(value["files"], list, "files")],
            _typed(value["metadata"], dict, "metadata"),
            [
                _typed(parent, str, "a parent")
                for parent in _typed(value["parents"], list, "parents")
            ],
            _typed(value["created"], str, "created"),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactCorrupt(
            f"manifest {key} cannot be read ({type(error).__name__}: {str(error)[:500]}); run "
            "`rlhf artifacts repair`, or publish it again"
        ) from error
    if artifact.digest != digest:
        raise ArtifactCorrupt(
            f"manifest {key} was changed: its content has digest {artifact.digest[:12]}, its name "
            f"says {digest[:12]}; run `rlhf artifacts repair`, or publish it again"
        )
    return artifact


def _entry(file: Any) -> FileEntry:
    file = _typed(file, dict, "a file")
    return FileEntry(
        _typed(file["path"], str, "a path"),
        _typed(file["size"], int, "a size"),
        _typed(file["sha256"], str, "a sha256"),
    )


def _typed(value: Any, kind: type, what: str) -> Any:
    if type(value) is not kind:  # isinstance would take True for a size
        raise TypeError(f"{what} is a {type(value).__name__} instead of a {kind.__name__}")
    return value
