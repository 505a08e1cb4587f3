"""A user's code, named by its path: imported, and called with a time limit."""

from __future__ import annotations

import importlib
import threading
import traceback
from collections.abc import Callable
from operator import attrgetter
from typing import Any, TypeVar

from rlhf_core.errors import ConfigError

T = TypeVar("T")


class Raised(Exception):
    """Wraps an exception of somebody's code, to tell it from our own."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


def load_object(path: str, what: str, its_name: str = "its name") -> Any:
    """What `package.module:name` names.

    Args:
        what: kind of the object, for messages. its_name: what a message asks to correct.

    Raises:
        ConfigError: the module cannot be imported, or has no such name.
    """
    module, _, name = path.partition(":")
    try:
        home = importlib.import_module(module)
    except Exception as error:  # a module may raise anything while it is imported
        raise ConfigError(
            f"{what} {path}: the module {module} cannot be imported ({type(error).__name__}: "
            f"{error}); install it where the stage runs, or put its folder on PYTHONPATH."
        ) from error
    try:
        return attrgetter(name)(home)
    except AttributeError as error:
        raise ConfigError(f"{what} {path}: {error}; correct {its_name}.") from error


def call_in_time(function: Callable[[], T], seconds: float, name: str) -> T:
    """The result of a function, in a thread of its own.

    Python cannot stop a thread: after the time limit it goes on until the process ends.

    Args:
        name: of the thread.

    Raises:
        TimeoutError: it took longer. Raised: it raised an exception.
    """
    box: dict[str, Any] = {}

    def work() -> None:
        try:
            box["result"] = function()
        except BaseException as error:  # even a SystemExit, which would end only the thread
            box["error"] = error

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    thread.join(min(seconds, threading.TIMEOUT_MAX))
    if thread.is_alive():
        raise TimeoutError
    if "error" in box:
        raise Raised(box["error"])
    return box["result"]  # type: ignore[no-any-return]


def raised_at(error: BaseException) -> str:
    """File and line of an exception."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"at {last.filename}, line {last.lineno}: {last.line}"
