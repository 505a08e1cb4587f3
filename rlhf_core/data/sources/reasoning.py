"""Prompts made by reasoning-gym: endless tasks with answers and verifiers (arXiv 2505.24760).

A source is `reasoning-gym:TASK?size=500&seed=0`; what else stands after the question mark are the
task's own options, as JSON values. Rows have the format `prompt_completion` with the columns
`answer` and `extra`; the reward `reasoning_gym` reads `extra`.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl

from rlhf_core.data.rows.row import RawRow
from rlhf_core.errors import DataError

PREFIX = "reasoning-gym:"
SIZE = 500
MOST = 10_000_000


def is_reasoning(source: str) -> bool:
    return source.startswith(PREFIX)


def version() -> str:
    """Version of the package.

    Raises:
        DataError: it is not installed.
    """
    try:
        return importlib.metadata.version("reasoning-gym")
    except importlib.metadata.PackageNotFoundError:
        raise DataError(
            "A source reasoning-gym:TASK needs the package reasoning-gym; run: pip install "
            '"rlhf-pipeline[reasoning]" (or pip install reasoning-gym)'
        ) from None


def parse(source: str) -> tuple[str, dict[str, Any]]:
    """Task and options (size and seed among them) of a source.

    Raises:
        DataError: it does not have the form, or size or seed is no number in its bounds.
    """
    task, _, query = source.removeprefix(PREFIX).partition("?")
    options: dict[str, Any] = {"size": SIZE, "seed": 0}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise DataError(f"{source[:200]}: {error}; write {PREFIX}TASK?size=500&seed=0.") from None
    for name, text in pairs:
        try:
            options[name] = json.loads(text)
        except (ValueError, RecursionError):
            options[name] = text
    for name, least in (("size", 1), ("seed", 0)):
        value = options[name]
        if type(value) is not int or not least <= value <= MOST:
            raise DataError(
                f"{source[:200]}: {name} is {str(value)[:40]!r}; needed is a whole number from "
                f"{least} to {MOST}."
            )
    return task, options


def rows(source: str) -> Iterator[RawRow]:
    """The task's questions with their answers.

    Raises:
        DataError: the package is missing, there is no such task or option, or the task's entries
            do not outlast being written as JSON, so that its verifier would judge them wrongly.
    """
    version()
    task, options = parse(source)
    dataset = _made(source, task, options)
    own = {name: value for name, value in options.items() if name not in ("size", "seed")}
    for number in range(1, options["size"] + 1):
        try:
            entry = dataset[number - 1]
            written = json.loads(json.dumps(entry))
            scores = [dataset.score_answer(entry["answer"], form) for form in (entry, written)]
        except Exception as error:  # a task's code raises what it likes
            raise DataError(
                f"{source}, row {number}: the task failed ({type(error).__name__}: {error}); "
                "change its options, or take another task."
            ) from error
        if scores[0] != scores[1]:
            raise DataError(
                f"{source}, row {number}: the task's verifier gives its own answer {scores[0]:g}, "
                f"and {scores[1]:g} once the entry was stored as JSON; take another task."
            )
        answer = "" if entry["answer"] is None else str(entry["answer"])
        extra = {"reasoning_gym": {"task": task, "options": own, "entry": written}}
        row = {"prompt": entry["question"], "completion": answer, "answer": answer, "extra": extra}
        yield RawRow(source, number, row)


def _made(source: str, task: str, options: dict[str, Any]) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise DataError(
            f"{source[:200]}: reasoning-gym has no task {task[:60]!r}; there are "
            f"{', '.join(sorted(DATASETS))}."
        )
    try:
        return reasoning_gym.create_dataset(task, **options)
    except Exception as error:  # assertions and type errors about its options
        raise DataError(f"{source[:200]}: {error}; correct the options after '?'.") from error
