"""Tools that a policy calls in its replies, and the environment that runs them."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from pydantic import BaseModel, ValidationError, create_model

from rlhf_core.data.rows.row import Message
from rlhf_core.environments.calls import Call, find_calls, typed
from rlhf_core.environments.interface import Step
from rlhf_core.errors import ConfigError
from rlhf_core.rewards.user_code import Raised, call_in_time


class ToolError(Exception):
    """A call that failed: what the policy is told."""


class Tool(Protocol):
    """One tool."""

    name: str
    description: str
    parameters: dict[str, Any]
    """JSON schema of the arguments."""

    def call(self, arguments: dict[str, Any], call_id: str) -> str:
        """The result as text.

        Args:
            call_id: the same when a run that was killed makes the call again.

        Raises:
            ToolError: the call is wrong, or failed.
            TrainingFailure: no call can be answered any more.
        """


class FunctionTool:
    """A Python function as a tool. Its type annotations are the schema, and arguments are checked
    against them."""

    def __init__(self, function: Callable[..., Any], time_limit: float) -> None:
        """Args:
            time_limit: of a call, seconds.

        Raises:
            ConfigError: the function has parameters that no schema can be made for.
        """
        self._function, self._time_limit = function, time_limit
        self.name = getattr(function, "__name__", type(function).__name__)
        self.description = inspect.getdoc(function) or ""
        self._arguments = _model_of(function, self.name)
        schema = self._arguments.model_json_schema()
        self.parameters: dict[str, Any] = _plain(schema)

    def call(self, arguments: dict[str, Any], call_id: str) -> str:
        try:
            checked = self._arguments.model_validate(arguments)
        except ValidationError as wrong:
            first = wrong.errors()[0]
            where = ".".join(map(str, first["loc"])) or "arguments"
            raise ToolError(f"{where}: {first['msg']}") from None
        given = {name: getattr(checked, name) for name in type(checked).model_fields}
        try:
            result = call_in_time(lambda: self._function(**given), self._time_limit, "environment")
        except TimeoutError:
            raise ToolError(f"no result within {self._time_limit:g} s") from None
        except Raised as raised:
            error = raised.error
            raise ToolError(str(error) or type(error).__name__) from error
        if isinstance(result, str):
            return result
        try:
            return json.dumps(result, default=str)
        except (TypeError, ValueError, RecursionError) as error:
            raise ToolError(f"the result cannot be written as JSON ({error})") from None


class ToolSet:
    """Tools by name; shared by all episodes, and called from several threads."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        """Raises:
        ConfigError: two tools have one name.
        """
        self.tools = {tool.name: tool for tool in tools}
        twice = [name for name, n in Counter(tool.name for tool in tools).items() if n > 1]
        if twice:
            raise ConfigError(
                f"The environment has {twice[0]!r} as the name of two tools; rename one, so that a "
                "call says which it means."
            )

    def schemas(self) -> list[dict[str, Any]]:
        """As chat templates take tools."""
        return [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.parameters,
                },
            }
            for tool in self.tools.values()
        ]

    def run(self, call: Call, call_id: str) -> str:
        """The result of a call. Raises as `Tool.call`."""
        if call.problem:
            raise ToolError(call.problem)
        tool = self.tools.get(call.name)
        if tool is None:
            known = ", ".join(self.tools)
            raise ToolError(f"there is no tool {call.name[:60]!r}; the tools are {known}")
        given = typed(call.arguments, tool.parameters) if call.texts else call.arguments
        return tool.call(given, call_id)


class ToolEnvironment:
    """An episode with tools, which ends with the first reply without a call."""

    def __init__(self, tools: ToolSet, longest: int) -> None:
        """Args:
        longest: characters of a result.
        """
        self._tools, self._longest = tools, longest
        self._row: dict[str, Any] = {}
        self._turn = 0

    def reset(self, row: dict[str, Any]) -> Sequence[Message] | None:
        self._row, self._turn = row, 0
        return None

    def step(self, reply: str, ids: Sequence[int]) -> Step:
        calls = find_calls(reply)
        self._turn += 1
        counts = Counter(tool_calls=len(calls), tool_errors=0)
        if not calls:
            return Step(reward=self.worth(reply), done=True, counts=counts)
        results = [self._result(call, number, counts) for number, call in enumerate(calls)]
        return Step(results, counts=counts)

    def worth(self, reply: str) -> float:
        """Reward of the last reply."""
        return 0.0

    def _result(self, call: Call, number: int, counts: Counter[str]) -> Message:
        try:
            text = self._tools.run(call, f"{self._row.get('episode', '')}-{self._turn}-{number}")
        except ToolError as error:
            counts["tool_errors"] += 1
            text = f"Error: {error}"
        if len(text) > self._longest:
            counts["tool_results_cut"] += 1
            text = f"{text[: self._longest]} ... ({len(text) - self._longest} characters more)"
        name = call.name if call.name in self._tools.tools else "unknown"
        return {"role": "tool", "content": text, "name": name, "tool_call_id": f"call{number:05d}"}


def announcement(schemas: Sequence[Mapping[str, Any]]) -> str:
    """What a system message says of tools, for chat templates that do not write them."""
    lines = [json.dumps(schema["function"], ensure_ascii=False) for schema in schemas]
    return "\n".join(
        [
            "You can call these functions:",
            *lines,
            "For each call, write",
            '<tool_call>{"name": <function name>, "arguments": <object>}</tool_call>',
        ]
    )


# --------------------------------------------------------------------------- details


def _model_of(function: Callable[..., Any], name: str) -> type[BaseModel]:
    try:
        parameters = inspect.signature(function, eval_str=True).parameters.values()
        fields: dict[str, Any] = {}
        for parameter in parameters:
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise TypeError(f"its parameter {parameter.name} has no fixed name")
            if parameter.annotation is parameter.empty:
                raise TypeError(f"its parameter {parameter.name} has no type annotation")
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[parameter.name] = (parameter.annotation, default)
        model = create_model(name, __config__={"extra": "forbid"}, **fields)
        model.model_json_schema()
    except Exception as error:  # annotations may be anything
        raise ConfigError(
            f"The tool {name} has no schema: {error}. Annotate each parameter with a plain type "
            "(str, int, float, bool, or lists and dictionaries of them)."
        ) from error
    return model


def _plain(schema: dict[str, Any]) -> dict[str, Any]:
    """Without the titles that pydantic adds."""
    properties = {
        name: {key: value for key, value in part.items() if key != "title"}
        for name, part in schema.get("properties", {}).items()
    }
    kept: dict[str, Any] = {key: schema[key] for key in ("$defs", "required") if key in schema}
    return {"type": "object", "properties": properties, **kept}
