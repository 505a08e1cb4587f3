"""From settings to environments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhf_core.environments.calculator import calculator
from rlhf_core.environments.interface import Environment
from rlhf_core.environments.server import Server
from rlhf_core.environments.tools import FunctionTool, Tool, ToolEnvironment, ToolSet
from rlhf_core.errors import ConfigError
from rlhf_core.jobs.environments import (
    CalculatorEnvironment,
    PythonEnvironment,
    ToolsEnvironment,
)
from rlhf_core.jobs.environments import Environment as Settings
from rlhf_core.rewards.answer import Verdict, numeric_match
from rlhf_core.rewards.user_code import load_object


@dataclass(frozen=True)
class Environments:
    """What makes an environment for each episode of a stage."""

    settings: Settings
    new: Callable[[], Environment]
    schemas: tuple[dict[str, Any], ...] = ()
    """Tools that the policy is told of; none where it is not to be told."""


def make_environments(settings: Settings) -> Environments:
    """Import what the settings name, and ask servers for their tools.

    Raises:
        ConfigError: a module, function or class is missing, or is something else.
        TrainingFailure: a server does not answer.
    """
    match settings:
        case PythonEnvironment():
            made = load(settings.environment, "Environment")
            return Environments(settings, made)
        case ToolsEnvironment():
            limit = settings.time_limit
            tools: list[Tool] = [
                FunctionTool(load(path, "Tool"), limit) for path in settings.functions
            ]
            for server in settings.servers:
                tools += Server(server, limit).tools()
            known = ToolSet(tools)
            schemas = tuple(known.schemas()) if settings.announce else ()
            longest = settings.max_result
            return Environments(settings, lambda: ToolEnvironment(known, longest), schemas)
        case CalculatorEnvironment():
            known = ToolSet([FunctionTool(calculator, settings.time_limit)])
            schemas = tuple(known.schemas()) if settings.announce else ()
            return Environments(settings, lambda: Sums(known, settings.tolerance), schemas)
    raise AssertionError(settings)


class Sums(ToolEnvironment):
    """Questions with a number as their answer, and a calculator."""

    def __init__(self, tools: ToolSet, tolerance: float) -> None:
        super().__init__(tools, longest=200)
        self._tolerance = tolerance

    def worth(self, reply: str) -> float:
        answer = str(self._row.get("answer") or "")
        return float(numeric_match(reply, answer, self._tolerance) is Verdict.EQUAL)


def load(path: str, what: str) -> Callable[..., Any]:
    """What `package.module:name` names.

    Raises:
        ConfigError: the module cannot be imported, or has no such name, or it cannot be called.
    """
    found = load_object(path, what)
    methods = ("reset", "step") if what == "Environment" else ()
    missing = [method for method in methods if not callable(getattr(found, method, None))]
    if not callable(found) or missing:
        needs = " with the methods reset and step" if methods else ""
        kind = "class" if methods else "function"
        raise ConfigError(f"{what} {path} is no {kind}{needs}; expected one.")
    return found  # type: ignore[no-any-return]
