"""Environments of online reinforcement learning: what answers a reply, so that an episode has
several turns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from rlhf_core.jobs.base import LARGEST, PositiveInt, Settings
from rlhf_core.jobs.judging import KeyVariable, Retries, checked_url
from rlhf_core.jobs.rewards import Reward

Seconds = Annotated[float, Field(gt=0.0, le=LARGEST)]
_NAME = r"[^\W\d]\w*(\.[^\W\d]\w*)*"


def check_path(value: str, what: str) -> str:
    """The path of something in a module, if it is one."""
    if not re.fullmatch(f"{_NAME}:{_NAME}", value):
        raise ValueError(
            f"{value[:100]!r} is not the path of a {what}; use package.module:name, such as "
            "my_tools:search"
        )
    return value


class EnvironmentSettings(Settings):
    """The base of all environments. `max_new_tokens` is the longest reply of one turn."""

    max_turns: PositiveInt = 4
    """Replies of the policy in an episode, at most. After the last one the episode is cut, unless
    the environment ends it."""
    max_episode_tokens: PositiveInt = 1024
    """Longest episode in tokens: replies, and what the environment writes, without the row's
    prompt. An episode without room for one more reply of max_new_tokens is cut."""
    time_limit: Seconds = 30.0
    """Time limit of one step of the environment, or of one call of a tool, in seconds."""


class ToolServer(Settings):
    """Tools behind HTTP: `GET url/tools` lists them, `POST url/call` calls one. The protocol is in
    docs/environments.md."""

    url: str
    """Address, such as http://tools.internal:8080."""
    key_variable: KeyVariable | None = None
    """Name of the environment variable with a bearer token for the server; never the token itself.
    It is read where the stage runs. Empty: none is sent."""
    retries: Retries = 5
    """Retries of a request that failed (no answer, 429, 5xx). Pauses grow, or follow the server's
    Retry-After, up to 60 s each. Then the stage fails."""
    version: str = ""
    """Change this when the server's tools do something else. A finished stage is reused while its
    settings stay the same."""

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        return checked_url(value, "http://tools.internal:8080")


class ToolsEnvironment(EnvironmentSettings):
    """Tools that the policy may call. An episode ends with the first reply without a call. There is
    no reward of its own: use rules, which read the last reply."""

    type: Literal["tools"] = "tools"
    """Type of the environment."""
    functions: tuple[str, ...] = ()
    """Python functions as tools, package.module:function each. Name, docstring and type annotations
    are what the policy is told. The modules must be importable where the stage runs."""
    servers: tuple[ToolServer, ...] = ()
    """Servers with further tools."""
    version: str = ""
    """Change this when a function computes something else. A finished stage is reused while its
    settings stay the same, and the functions' code is not part of them."""
    announce: bool = True
    """Tell the policy of the tools: by the chat template, or in a system message if the template
    does not write tools. Rows with tools of their own (column tools) stay as they are. false: the
    prompts, or the training before, say it already."""
    max_result: PositiveInt = 2000
    """Longest result of a call in characters. A longer one is cut, says so, and is counted."""

    @field_validator("functions")
    @classmethod
    def _paths(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_path(path, "function") for path in value)

    @model_validator(mode="after")
    def _some_tools(self) -> ToolsEnvironment:
        if not self.functions and not self.servers:
            raise ValueError(
                "the environment tools has neither functions nor servers, so there is nothing to "
                "call; give one of them, or take the environment calculator"
            )
        return self


class CalculatorEnvironment(EnvironmentSettings):
    """The tool `calculator`, for arithmetic. An episode ends with the first reply without a call.
    Its reward (type environment) is 1 if the last number of that reply is the row's `answer`, else
    0."""

    type: Literal["calculator"] = "calculator"
    """Type of the environment."""
    announce: bool = True
    """Tell the policy of the tool: by the chat template, or in a system message if the template
    does not write tools. false: the prompts, or the training before, say it already."""
    tolerance: Annotated[float, Field(ge=0.0, lt=1.0)] = 1e-6
    """Largest relative difference of two equal numbers."""


class PythonEnvironment(EnvironmentSettings):
    """Your own environment: a class with `reset` and `step` (docs/environments.md)."""

    type: Literal["python"] = "python"
    """Type of the environment."""
    environment: str
    """package.module:Class. The module must be importable where the stage runs; there is one object
    for each episode."""
    version: str = ""
    """Change this when the class does something else. A finished stage is reused while its settings
    stay the same, and the class's code is not part of them."""

    @field_validator("environment")
    @classmethod
    def _path(cls, value: str) -> str:
        return check_path(value, "class")


Environment = CalculatorEnvironment | ToolsEnvironment | PythonEnvironment
"""An environment; a plain union, because `Field(discriminator=...)` breaks Prefect's form."""


def check_environment(
    environment: Environment | None,
    rewards: Sequence[Reward],
    max_new_tokens: int,
    tensor_parallel: int,
) -> None:
    """An environment fits the other settings of a stage.

    Args:
        max_new_tokens: of one reply. tensor_parallel: ranks that sample one reply together.

    Raises:
        ValueError: it does not.
    """
    rewarded = any(reward.type == "environment" for reward in rewards)
    if rewarded and (environment is None or isinstance(environment, ToolsEnvironment)):
        found = "there is no environment" if environment is None else "tools give no reward"
        raise ValueError(
            f"rewards has an entry of type environment, but {found}; set environment to one "
            "with a reward (calculator, python), or take other rewards"
        )
    if environment is None:
        return
    if environment.max_episode_tokens < max_new_tokens:
        raise ValueError(
            f"environment.max_episode_tokens is {environment.max_episode_tokens}, less than "
            f"one reply of max_new_tokens {max_new_tokens}; give it room for "
            f"{environment.max_turns} replies and what the environment writes between them"
        )
    if tensor_parallel > 1:
        raise ValueError(
            f"environment is set and rollout.tensor_parallel is {tensor_parallel}: each of those "
            "ranks would ask the environment about the same replies; set tensor_parallel to 1, or "
            "clear environment"
        )
