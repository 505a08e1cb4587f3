"""Rewards that a service computes: it is asked over HTTP, as soon as a reply is finished.

docs/rewards.md has the protocol.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from rlhf_core.jobs.base import PositiveInt
from rlhf_core.jobs.judging import (
    ASKING,
    KeyVariable,
    Parallel,
    Retries,
    RubricSettings,
    Timeout,
    checked_url,
)
from rlhf_core.jobs.weighted import WeightedReward


class ServiceReward(WeightedReward):
    """The base of the rewards of services of your own."""

    excluded_from_key: ClassVar[frozenset[str]] = ASKING

    url: str
    """Address to which replies are posted."""
    version: str = ""
    """Change this when the service computes something else. A finished stage is reused while its
    settings stay the same, and what is behind the URL is not part of them."""
    key_variable: KeyVariable | None = None
    """Name of the environment variable with the service's key (sent as Authorization: Bearer);
    never the key itself. It is read where the stage runs. Empty: no key is sent."""
    parallel: Parallel = 8
    """Requests in flight at once over all ranks, at least one on each."""
    timeout: Timeout = 60.0
    """Time limit of a request in seconds."""
    retries: Retries = 5
    """Retries of a request that failed (no answer, 429, 5xx, an answer that cannot be read). Pauses
    grow, or follow the service's Retry-After, up to 60 s each. Then the stage fails."""

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        return checked_url(value, "http://localhost:8100/score")


class HttpReward(ServiceReward):
    """Score of a service that speaks this project's reward protocol, such as `rlhf rewards serve`
    or one of your own."""

    type: Literal["http"] = "http"
    """Type of the reward."""
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 8
    """Most replies in a request. What waits goes together, so the number in a request varies; the
    service must score each reply as if it were alone."""
    columns: tuple[Literal["answer", "extra", "row", "source"], ...] = ("answer", "extra")
    """Columns of the prompt's row that are sent too, where the row has them."""


class JudgeReward(RubricSettings, WeightedReward):
    """Rating of a reply by a model behind an OpenAI-compatible endpoint, 0 (lowest) to 1."""

    excluded_from_key: ClassVar[frozenset[str]] = ASKING

    type: Literal["judge"] = "judge"
    """Type of the reward."""
    version: str = ""
    """Change this when another model is behind the same name."""


class CodeReward(ServiceReward):
    """Share of the row's tests that the reply's code passes, run by a SandboxFusion service; never
    in this process."""

    type: Literal["code"] = "code"
    """Type of the reward."""
    language: Annotated[str, Field(pattern=r"^[A-Za-z0-9_+-]{1,40}$")] = "python"
    """Language, by SandboxFusion's name."""
    column: Literal["answer", "extra"] = "answer"
    """Column with the row's tests: a program that is put behind the reply's code and must end
    without an error, or a JSON list of such programs."""
    run_timeout: Timeout = 10.0
    """Time limit of one test in seconds, in the sandbox."""
    memory_mb: PositiveInt = 512
    """Memory limit of one test in MiB, in the sandbox."""

    @field_validator("url")
    @classmethod
    def _is_a_base(cls, value: str) -> str:
        return value.removesuffix("/run_code")

    @model_validator(mode="after")
    def _waits_for_the_longest_run(self) -> Self:
        if self.timeout <= self.run_timeout:
            raise ValueError(
                f"run_timeout is {self.run_timeout:g} s and timeout {self.timeout:g} s: a program "
                "that does not end would look like a sandbox that does not answer, which ends the "
                "stage; set timeout well above run_timeout"
            )
        return self


SERVICES = (HttpReward, JudgeReward, CodeReward)


def without_asking(rewards: tuple[WeightedReward, ...], dumped: list[dict[str, Any]]) -> None:
    """Take out of a job's rewards, as its key covers them, how services are asked.

    Args:
        dumped: the rewards as JSON; changed in place.
    """
    for reward, settings in zip(rewards, dumped, strict=True):
        if isinstance(reward, SERVICES):
            for name in reward.excluded_from_key:
                settings.pop(name, None)
