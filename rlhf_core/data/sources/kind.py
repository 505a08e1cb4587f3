"""Which kind of source `data.*.source` names. Imports no torch, for the orchestrator."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from rlhf_core.data.sources import reasoning
from rlhf_core.data.sources.readers import reader_of
from rlhf_core.data.sources.thumbs import THUMBS
from rlhf_core.data.sources.votes import VOTES
from rlhf_core.errors import DataError
from rlhf_core.store.clouds.cloud import CLOUDS

FEEDBACK = {kind.source: kind for kind in (VOTES, THUMBS)}
_NEAR_URL = re.compile(r"([A-Za-z][\w+.-]+):(?![/][/])/*\S|\W*s3[:;/]/")  # s3:/b, file:/x, s3:b
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def source_kind(source: str) -> str:
    """builtin, reasoning, feedback, s3, local or hub.

    A source that exists as a file, or looks like a path, is local.

    Raises:
        DataError: the source is none of these.
    """
    if source.startswith("builtin:"):
        return "builtin"
    if reasoning.is_reasoning(source):
        return "reasoning"
    if source in FEEDBACK:
        return "feedback"
    if source.startswith("s3://"):
        if source[5:6] in ("", "/"):
            raise DataError(f"{source}: there is no bucket; expected s3://bucket/key.")
        if "@" in source.removeprefix("s3://").partition("/")[0]:
            raise DataError(
                "The s3:// URL holds a user or a key before an @; write s3://bucket/key, and give "
                "the keys by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
            )
        return "s3"
    if scheme := re.match(r"([A-Za-z][\w+.-]*)://", source):
        if scheme[1] == "file":
            return "local"
        if scheme[1] in CLOUDS:
            raise DataError(
                f"{source}: {scheme[1]}:// URLs are for the store (RLHF_STORE), not for data; copy "
                f"the files to a folder first ({CLOUDS[scheme[1]].copy_command}), or to S3."
            )
        raise DataError(
            f"{source}: {scheme[1]}:// URLs are not supported; expected a Hugging Face dataset id, "
            "a path, an s3:// URL or builtin:chatterbot."
        )
    path = local_path(source)
    if _NEAR_URL.match(source) and not path_exists(path):
        raise DataError(
            f"{source[:300]}: neither a URL nor an existing path; expected s3://bucket/key with "
            "two slashes, a path such as ./data.jsonl, a Hugging Face dataset id or "
            "builtin:chatterbot."
        )
    looks = source.startswith(("/", ".", "~")) or reader_of(source) or glob.has_magic(source)
    if looks or path_exists(path):
        return "local"
    if _HUB_ID.fullmatch(source):
        return "hub"
    return "local"


def local_path(source: str) -> Path:
    """The path that a local source names.

    Raises:
        DataError: it is empty, or names the home of an unknown user.
    """
    text = source.removeprefix("file://")
    if not text.strip():
        raise DataError(
            f"The source {source!r} is empty; expected a Hugging Face dataset id, a path, an s3:// "
            "URL or builtin:chatterbot."
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise DataError(f"{source}: {error} Give the whole path.") from error


def path_exists(path: Path) -> bool:
    """Whether a path exists; False for one that the operating system rejects."""
    try:
        return path.exists()
    except OSError:  # the name is too long for a file; it may be a hub id
        return False
