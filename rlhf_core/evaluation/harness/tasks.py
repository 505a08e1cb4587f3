"""Checks of the harness's tasks that do not import it: the package, names, contents.

Importing lm_eval and reading its 14,000 task files as YAML takes half a minute; looking for a name
in their texts takes a second.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from rlhf_core.errors import ConfigError
from rlhf_core.jobs import LmEvalSettings

INSTALL = "run: pip install 'rlhf-pipeline[lm-eval]' (or pip install lm-eval)"

_WORD = re.compile(rb"[^\s\"'\[\],#]+")
_NAMED = re.compile(rb"^(?:task|group):[ \t]*[\"']?([^\s\"'#\[]+)", re.MULTILINE)
_IGNORED = {"__pycache__", ".ipynb_checkpoints"}


def installed() -> bool:
    """Whether the package lm-eval is installed."""
    return find_spec("lm_eval") is not None


def check_tasks(settings: LmEvalSettings) -> list[str]:
    """Reasons why the tasks cannot be measured on this machine, one text each."""
    if not installed():
        return [f"the package lm-eval is not installed, and lm_eval needs it; {INSTALL}"]
    try:
        own = task_folder(settings.include_path)
    except ConfigError as error:
        return [str(error)]
    spec = find_spec("lm_eval")
    assert spec is not None
    folders = [Path(location) / "tasks" for location in spec.submodule_search_locations or []]
    missing = set(settings.tasks)
    known: set[str] = set()
    for folder in ([own] if own else []) + folders:
        for path in sorted(folder.rglob("*.yaml")):
            if not missing:
                return []
            text = path.read_bytes()
            missing -= {word.decode(errors="replace") for word in _WORD.findall(text)}
            known |= {name.decode(errors="replace") for name in _NAMED.findall(text)}
    return [
        unknown_task(name, known, settings.include_path)
        for name in settings.tasks
        if name in missing
    ]


def unknown_task(name: str, known: set[str], include_path: str | None) -> str:
    """The error message for a name that is neither lm-eval's nor in the user's folder."""
    close = difflib.get_close_matches(name, sorted(known), 3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    own = f"nor in the task files below {include_path}" if include_path else "and there is no "
    own += "" if include_path else "include_path with tasks of your own"
    return (
        f"lm_eval.tasks has {name!r}, which is not in the installed lm-eval, {own}; {hint}"
        "`lm_eval ls tasks` lists the names"
    )


def task_folder(include_path: str | None) -> Path | None:
    """The folder with a user's own tasks; None without one.

    Raises:
        ConfigError: it does not exist, or contains no task files.
    """
    if include_path is None:
        return None
    try:
        folder = Path(include_path).expanduser().absolute()
        there = folder.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"lm_eval.include_path: {include_path[:200]!r}: {error}") from error
    if not there:
        raise ConfigError(
            f"lm_eval.include_path is {include_path}, but there is no folder {folder}; correct the "
            "path (with workers, both need the folder)"
        )
    if next(folder.rglob("*.yaml"), None) is None:
        raise ConfigError(
            f"lm_eval.include_path is {include_path}, but that folder contains no .yaml file; it "
            "must contain task files of lm-eval"
        )
    return folder


def fingerprint(include_path: str | None) -> str:
    """Identity of a folder of tasks: names and sha256 of all its files; empty without a folder.

    Raises:
        ConfigError: as `task_folder`, or a file cannot be read.
    """
    folder = task_folder(include_path)
    if folder is None:
        return ""
    total = hashlib.sha256()
    try:
        for path in _files(folder):
            with path.open("rb") as file:
                identity = hashlib.file_digest(file, "sha256").hexdigest()
            name = path.relative_to(folder).as_posix()
            total.update(f"{name}\0{identity}\n".encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise ConfigError(
            f"lm_eval.include_path: {error.filename} cannot be read: {error.strerror}"
        ) from error
    return total.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(p in _IGNORED or p.startswith(".") for p in parts):
            yield path
