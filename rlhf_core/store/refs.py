"""Finds artifacts by a reference, such as `model/1a2b3c`, and by what they were made from."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable

from rlhf_core.errors import ArtifactCorrupt, ArtifactNotFound, ConfigError
from rlhf_core.store.artifact import KIND, Artifact
from rlhf_core.store.backend import Backend
from rlhf_core.store.parallel import REQUESTS_AT_ONCE, in_parallel

MIN_DIGITS = 6
_HEX = re.compile(rf"[0-9a-f]{{{MIN_DIGITS},64}}")
MANIFEST = re.compile(r"artifacts/([^/]+)/([0-9a-f]{64})/manifest\.json")


def manifest_key(kind: str, digest: str) -> str:
    """The key of an artifact's manifest."""
    return f"artifacts/{kind}/{digest}/manifest.json"


def find_refs(backend: Backend, kind: str | None, start: str = "") -> list[tuple[str, str]]:
    """(kind, digest) of each artifact whose digest starts with ``start``; ``kind`` None: any."""
    if kind is None and not start:
        prefixes = ["artifacts/"]
    else:
        kinds = backend.folders("artifacts") if kind is None else [kind]
        prefixes = [f"artifacts/{each}/{start}" for each in kinds]
    keys = [key for prefix in prefixes for key in backend.keys(prefix)]
    return [(m[1], m[2]) for m in map(MANIFEST.fullmatch, keys) if m]


def resolve(backend: Backend, ref: str) -> tuple[str, str]:
    """(kind, digest) of the one artifact that ``ref`` names; see `Store.get`.

    Raises:
        ConfigError: malformed, or several artifacts match.
        ArtifactNotFound: no artifact matches.
    """
    kind, slash, start = ref.strip().rpartition("/")
    start = start.lower()
    if not _HEX.fullmatch(start) or (slash and not KIND.fullmatch(kind)):
        raise ConfigError(
            f"{ref!r} is not an artifact reference; expected {MIN_DIGITS} to 64 hex digits, such "
            f"as 'model/1a2b3c4d' or '1a2b3c4d'"
        )
    if kind and len(start) == 64:
        return kind, start
    found = find_refs(backend, kind or None, start)
    if len(found) == 1:
        return found[0]
    if found:
        shown = ", ".join(f"{k}/{d[:16]}" for k, d in found[:8])
        raise ConfigError(
            f"{ref!r} matches {len(found)} artifacts ({shown}); add digits or the kind"
        )
    raise ArtifactNotFound(_not_found(backend, ref, kind, start))


def _not_found(backend: Backend, ref: str, kind: str, start: str) -> str:
    refs = find_refs(backend, None)
    if not refs:
        return f"there is no artifact {ref!r}: {backend.url} holds none; check RLHF_STORE"
    message = f"there is no artifact {ref!r} among the {len(refs)} in {backend.url}"
    if others := [k for k, d in refs if d.startswith(start)]:
        return f"{message}; that digest is of kind {', '.join(others)}"
    names = {d[: len(start)]: f"{k}/{d[:12]}" for k, d in refs if not kind or k == kind}
    near = difflib.get_close_matches(start, names, n=3, cutoff=0.5)
    shown = [names[d] for d in near] or list(names.values())[:3] or sorted({k for k, _ in refs})
    return f"{message}; closest: {', '.join(shown)}"


def lineage(
    backend: Backend, digest: str, read: Callable[[str, str], Artifact]
) -> dict[str, Artifact | None]:
    """See `Store.lineage`. ``read`` returns the artifact of a kind and digest."""

    def find(digest: str) -> Artifact | None:
        try:
            return read(kinds[digest], digest) if digest in kinds else None
        except (ArtifactNotFound, ArtifactCorrupt):
            return None

    kinds = {each: kind for kind, each in find_refs(backend, None)}
    known: dict[str, Artifact | None] = {}
    todo = {digest}
    while todo:
        names = sorted(todo)
        known |= zip(names, in_parallel(find, names, REQUESTS_AT_ONCE), strict=True)
        todo = {parent for each in names if (a := known[each]) for parent in a.parents}
        todo -= known.keys()
    return known
