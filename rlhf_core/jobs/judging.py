"""Judges behind a network endpoint."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from rlhf_core.jobs.base import Fraction, PositiveInt, Settings

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


class EndpointJudgeSettings(Settings):
    """A judge behind an OpenAI-compatible endpoint (chat completions). It compares each pair of
    replies twice, in both orders. A reply wins only if it wins both times; otherwise it is a
    tie."""

    type: Literal["endpoint"] = "endpoint"
    """Type of the judge."""
    url: str
    """Base URL of the API, such as https://api.openai.com/v1 or http://localhost:8000/v1."""
    model: Annotated[str, Field(min_length=1)]
    """Name of the model at the endpoint."""
    key_variable: Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$")] | None = None
    """Name of the environment variable with the API key, such as OPENAI_API_KEY; never the key
    itself. It is read where the stage runs. Empty: no key is sent."""
    template: str = TEMPLATE
    """The question, with the placeholders {prompt}, {first} and {second}. It must ask for an answer
    that ends in [[A]], [[B]] or [[C]] (equally good)."""
    max_new_tokens: PositiveInt = 512
    """Longest answer in tokens. Reasoning models need more."""
    limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """Name of the token limit in the request: newer OpenAI models take max_completion_tokens."""
    temperature: Annotated[float, Field(ge=0.0)] | None = 0.0
    """Sampling temperature of the answers. Empty: not sent, for models that reject it."""
    parallel: Annotated[int, Field(ge=1, le=256)] = 8
    """Number of requests in flight at once."""
    timeout: Annotated[float, Field(gt=0.0, le=3600.0)] = 60.0
    """Time limit of a request in seconds."""
    retries: Annotated[int, Field(ge=0, le=100)] = 5
    """Retries of a request that failed (no answer, 429, 5xx) or gave no verdict. Pauses grow, or
    follow the endpoint's Retry-After."""
    max_unclear: Fraction = 0.05
    """Largest fraction of questions without a verdict after all retries. They count as ties; more
    of them fail the stage."""

    @field_validator("url")
    @classmethod
    def _is_a_base(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("not a base URL; use one such as https://api.openai.com/v1")
        _ = parts.port  # raises ValueError when it is none
        if parts.username or parts.password or parts.query:
            raise ValueError(
                "the URL holds a user, a password or a query; a key belongs into an environment "
                "variable that key_variable names"
            )
        return value.rstrip("/").removesuffix("/chat/completions")

    @field_validator("template")
    @classmethod
    def _has_its_places(cls, value: str) -> str:
        missing = [place for place in PLACES if place not in value]
        if missing:
            raise ValueError(f"the template lacks {', '.join(missing)}")
        if "[[A]]" not in value or "[[B]]" not in value:
            raise ValueError("the template does not ask for [[A]] or [[B]] at the end")
        return value
