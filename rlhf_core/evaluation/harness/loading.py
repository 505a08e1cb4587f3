"""Loads the harness's tasks; explains why where that fails."""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from lm_eval.tasks import TaskManager

from rlhf_core.errors import ConfigError, DataError
from rlhf_core.evaluation.harness.tasks import task_folder, unknown_task
from rlhf_core.jobs import LmEvalJob

UNREACHABLE = (
    ConnectionError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled,
    datasets.exceptions.DatasetNotFoundError,
)  # fmt: skip
LONGEST = 400  # characters of a library's message


class Loaded:
    """The tasks of a job.

    Attributes:
        items: as the harness's evaluate takes them: {"tasks", "groups", "group_map"}.
        members: name in lm_eval.tasks -> names of its tasks.
    """

    def __init__(self, items: dict[str, Any], members: dict[str, list[str]]) -> None:
        self.items = items
        self.members = members


def load_tasks(job: LmEvalJob) -> Loaded:
    """Load the job's tasks with their data sets.

    Raises:
        ConfigError: a name is not known, or a task cannot be measured by this stage.
        DataError: a task's data set or files cannot be read.
    """
    folder = task_folder(job.include_path)
    manager = _manager(job, folder)
    items: list[Any] = []
    members: dict[str, list[str]] = {}
    # Relative paths of data files start at the user's folder, wherever the stage runs.
    with contextlib.chdir(folder) if folder else contextlib.nullcontext():
        for name in job.tasks:
            loaded = _load(manager, name)
            group = (loaded.get("groups") or {}).get(name)
            items += [group] if group is not None else list(loaded["tasks"].values())
            members[name] = list(loaded["tasks"])
            for task, found in loaded["tasks"].items():
                _refuse(task, found)
    try:
        return Loaded(manager.load(items), members)
    except ValueError as error:  # a task in two of the groups
        raise ConfigError(f"lm_eval.tasks: {error}; name one of the two") from error


def _manager(job: LmEvalJob, folder: Path | None) -> TaskManager:
    """An index of task names: the user's folder alone where that has them all, which saves reading
    the 14,000 files of the harness."""
    if folder is not None:
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if set(job.tasks) <= set(own.all_subtasks):
            return own
    manager = TaskManager(include_path=str(folder) if folder else None)
    known = set(manager.all_tasks)
    if unknown := [name for name in job.tasks if name not in known]:
        raise ConfigError(
            "; ".join(unknown_task(name, known, job.include_path) for name in unknown)
        )
    return manager


def _load(manager: TaskManager, name: str) -> Any:
    try:
        return manager.load([name])
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"lm_eval.tasks: {name} needs the package {error.name}, which is not installed; "
            f"run: pip install {error.name}, or leave the task out"
        ) from error
    except Exception as error:  # data sets, the network and task files may raise anything
        raise DataError(_unloadable(manager, name, error)) from error


def _unloadable(manager: TaskManager, name: str, error: Exception) -> str:
    what = f"{type(error).__name__}: {' '.join(str(error).split())}"[:LONGEST]
    causes = [error, error.__cause__, error.__context__]
    if any(isinstance(cause, UNREACHABLE) for cause in causes):
        config = manager.task_index[name].cfg or {}
        source = f" ({config['dataset_path']})" if config.get("dataset_path") else ""
        return (
            f"lm_eval.tasks: the data set of {name}{source} is not in this machine's Hugging Face "
            f"cache and could not be downloaded ({what}). Check the network and HF_ENDPOINT; or "
            "load it once on a machine with a network and copy its HF_HOME; or give tasks with "
            "local data in lm_eval.include_path."
        )
    return (
        f"lm_eval.tasks: {name} cannot be loaded ({what}). Correct its task file or data, or leave "
        "it out."
    )


def _refuse(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(
            f"lm_eval.tasks: {name} runs code that the model wrote, which this stage does not do; "
            "leave it out, and run lm_eval yourself on the published folder in a sandbox"
        )
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(
            f"lm_eval.tasks: {name} uses images or sound, which these models cannot read; "
            "leave it out"
        )


class _OncePerLine(logging.Filter):
    """Passes one record for each line of code: the harness warns for each of its requests."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[tuple[str, int]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        line = (record.pathname, record.lineno)
        new = line not in self._seen
        self._seen.add(line)
        return new


def silence_libraries(main: bool) -> None:
    """The harness's warnings, each once, on rank 0; its notices nowhere."""
    logger = logging.getLogger("lm_eval")
    handler = logging.StreamHandler(sys.stdout)
    handler.addFilter(_OncePerLine())
    handler.setFormatter(logging.Formatter("lm-eval: %(message)s"))
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.WARNING if main else logging.CRITICAL)
