"""Judges behind a network endpoint."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationInfo, field_validator

from rlhf_core.jobs.base import LARGEST, Fraction, PositiveInt, Settings

TEMPLATE = """\
Two assistants have answered the same message. Compare their replies and say which one is better: \
more helpful, correct, relevant and clear. Neither their order nor their length is an argument.

[Message]
{prompt}

[Reply A]
{first}

[Reply B]
{second}

Explain in a sentence or two, then end with exactly one of [[A]] if A is better, [[B]] if B is \
better, and [[C]] if they are equally good."""

PLACES = ("{prompt}", "{first}", "{second}")

RUBRIC = """\
Rate the assistant's reply to the message: is it helpful, correct, relevant and clear? Its length \
is no argument. 1 is the worst and 10 the best.

[Message]
{prompt}

[Reply]
{reply}

Explain in a sentence or two, then end with the rating in double brackets, such as [[5]]."""

ASKING = frozenset({"key_variable", "parallel", "timeout", "retries", "batch_size", "max_unclear"})
"""How a service is asked, which does not change what it answers."""

KeyVariable = Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$")]
Retries = Annotated[int, Field(ge=0, le=100)]
Parallel = Annotated[int, Field(ge=1, le=256)]
Timeout = Annotated[float, Field(gt=0.0, le=3600.0)]


def without_asking(judge: dict[str, Any]) -> dict[str, Any]:
    """A judge's settings without how it is asked, as stage keys cover them."""
    return {name: value for name, value in judge.items() if name not in ASKING}


def checked_url(value: str, example: str) -> str:
    """The URL of a service.

    Raises:
        ValueError: it is none, or it holds what may be a secret.
    """
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"not a base URL; use one such as {example}")
    _ = parts.port  # raises ValueError when it is none
    if parts.username or parts.password or parts.query:
        raise ValueError(
            "the URL holds a user, a password or a query; a key belongs into an environment "
            "variable that key_variable names"
        )
    return value.rstrip("/")


class EndpointSettings(Settings):
    """A model behind an OpenAI-compatible endpoint (chat completions) that is asked as a judge."""

    url: str
    """Base URL of the API, such as https://api.openai.com/v1 or http://localhost:8000/v1."""
    model: Annotated[str, Field(min_length=1)]
    """Name of the model at the endpoint."""
    key_variable: KeyVariable | None = None
    """Name of the environment variable with the API key, such as OPENAI_API_KEY; never the key
    itself. It is read where the stage runs. Empty: no key is sent."""
    template: str
    """The question."""
    max_new_tokens: PositiveInt = 512
    """Longest answer in tokens. Reasoning models need more."""
    limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """Name of the token limit in the request: newer OpenAI models take max_completion_tokens."""
    temperature: Annotated[float, Field(ge=0.0)] | None = 0.0
    """Sampling temperature of the answers. Empty: not sent, for models that reject it."""
    parallel: Parallel = 8
    """Number of requests in flight at once."""
    timeout: Timeout = 60.0
    """Time limit of a request in seconds."""
    retries: Retries = 5
    """Retries of a request that failed (no answer, 429, 5xx) or gave no verdict. Pauses grow, or
    follow the endpoint's Retry-After, up to 60 s each."""
    max_unclear: Fraction = 0.05
    """Largest fraction of questions, in online_dpo of a rollout's, without a verdict after all
    retries; there one is always allowed. They count as ties; more of them fail the stage."""

    @field_validator("url")
    @classmethod
    def _is_a_base(cls, value: str) -> str:
        return checked_url(value, "https://api.openai.com/v1").removesuffix("/chat/completions")


class EndpointJudgeSettings(EndpointSettings):
    """A judge behind an OpenAI-compatible endpoint (chat completions). It compares each pair of
    replies twice, in both orders. A reply wins only if it wins both times; otherwise it is a
    tie."""

    type: Literal["endpoint"] = "endpoint"
    """Type of the judge."""
    template: str = TEMPLATE
    """The question, with the placeholders {prompt}, {first} and {second}. It must ask for an answer
    that ends in [[A]], [[B]] or [[C]] (equally good)."""

    @field_validator("template")
    @classmethod
    def _has_its_places(cls, value: str) -> str:
        missing = [place for place in PLACES if place not in value]
        if missing:
            raise ValueError(f"the template lacks {', '.join(missing)}")
        if "[[A]]" not in value or "[[B]]" not in value:
            raise ValueError("the template does not ask for [[A]] or [[B]] at the end")
        return value


class RubricSettings(EndpointSettings):
    """A judge behind an OpenAI-compatible endpoint that rates one reply at a time."""

    template: str = RUBRIC
    """The question, with the placeholders {prompt} and {reply}, and {answer} for the row's answer
    if the rubric needs it. It must ask for an answer that ends in a rating such as [[5]]."""
    lowest: Annotated[float, Field(ge=-LARGEST, le=LARGEST)] = 1.0
    """Lowest rating."""
    highest: Annotated[float, Field(ge=-LARGEST, le=LARGEST)] = 10.0
    """Highest rating. A score is (rating - lowest) / (highest - lowest), so 0 to 1."""
    max_unclear: Fraction = 0.05
    """Largest fraction of the replies of a rollout, or of the replies to be labelled, without a
    rating in lowest to highest after all retries; one is always allowed. They score 0; more of them
    fail the stage."""

    @field_validator("template")
    @classmethod
    def _has_its_places(cls, value: str) -> str:
        missing = [place for place in ("{prompt}", "{reply}") if place not in value]
        if missing:
            raise ValueError(f"the template lacks {', '.join(missing)}")
        if not re.search(r"\[\[.*?\]\]", value):
            raise ValueError("the template does not ask for a rating such as [[5]] at the end")
        return value

    @field_validator("highest")
    @classmethod
    def _is_above(cls, value: float, info: ValidationInfo) -> float:
        lowest = info.data.get("lowest", -float(LARGEST))
        if value <= lowest:
            raise ValueError(f"highest is {value:g} and lowest {lowest:g}; expected a greater one")
        return value


class RubricJudgeSettings(RubricSettings):
    """A judge that rates one reply at a time."""

    type: Literal["rubric"] = "rubric"
    """Type of the judge."""
