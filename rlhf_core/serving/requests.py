"""Requests of OpenAI's API: the parameters that are obeyed, and their values.

A parameter that is not named here is refused by name, unless its value is null, false or empty:
clients send those for parameters that they do not use. docs/serving.md is the table of them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from rlhf_core.serving.api_error import from_validation
from rlhf_core.serving.sampling import Options

MAX_CHOICES = 128  # of one request, as OpenAI
UNUSED: tuple[Any, ...] = (None, False, "", [], {})


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_unused(cls, data: Any) -> Any:
        """Null is a parameter left out; so are other empty values of those that are not named."""
        if not isinstance(data, dict):
            return data
        named = cls.model_fields
        return {
            key: value
            for key, value in data.items()
            if value is not None and (key in named or value not in UNUSED)
        }


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _as_prompts(value: Any) -> Any:
    """A list of texts and lists of token ids."""
    prompts = value if isinstance(value, list) else [value]
    if prompts and all(type(one) is int for one in prompts):
        prompts = [prompts]
    for one in prompts:
        ids = isinstance(one, list) and one and all(type(token) is int for token in one)
        if not (ids or isinstance(one, str)):
            raise ValueError("it must be a text, token ids, or a list of either")
    return prompts


class _Part(_Strict):
    type: Literal["text", "input_text", "output_text"]
    text: str


Parts = Annotated[list[_Part], BeforeValidator(_as_parts)]
Stops = Annotated[
    list[Annotated[str, Field(min_length=1)]], BeforeValidator(_as_list), Field(max_length=4)
]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Identifier = Annotated[str | None, Field(description="Accepted without effect.")]


class _TextFormat(_Strict):
    type: Literal["text"]


class _StreamOptions(_Strict):
    include_usage: bool = False


class _Request(_Strict):
    """What all three kinds of request have."""

    model: str | None = None
    stream: bool = False
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    # Who asks, and how OpenAI's own service treats it: without effect here.
    user: Identifier = None
    safety_identifier: Identifier = None
    prompt_cache_key: Identifier = None
    prompt_cache_retention: Identifier = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None


class _Completion(_Request):
    """What chats and plain completions have."""

    max_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stop: Stops = []
    seed: int | None = None
    presence_penalty: float = Field(0, ge=-2, le=2)
    frequency_penalty: float = Field(0, ge=-2, le=2)
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] = {}
    stream_options: _StreamOptions | None = None

    @field_validator("stream_options")
    @classmethod
    def _check_stream(cls, value: Any, info: ValidationInfo) -> Any:
        if value and not info.data.get("stream"):
            raise ValueError("it is only for stream: true")
        return value

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def options(self, longest: int | None, top_logprobs: int | None) -> Options:
        """How the replies are sampled. longest: tokens. top_logprobs: None for no logprobs."""
        return Options(
            max_new_tokens=longest,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias={int(token): bias for token, bias in self.logit_bias.items()},
            stop=tuple(self.stop),
            top_logprobs=top_logprobs,
        )


class ChatMessage(_Strict):
    """A message of a chat, or of the input of /v1/responses."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Parts
    # What clients send back with a reply of /v1/responses.
    id: str | None = None
    status: str | None = None

    def message(self) -> dict[str, str]:
        """As chat templates take it."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "".join(part.text for part in self.content)}


class ChatRequest(_Completion):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: _TextFormat | None = None
    modalities: list[Literal["text"]] = []
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    @field_validator("top_logprobs")
    @classmethod
    def _check_top(cls, value: Any, info: ValidationInfo) -> Any:
        if value and not info.data.get("logprobs"):
            raise ValueError("it needs logprobs: true")
        return value

    def sampling(self) -> Options:
        """How the replies are sampled."""
        given = [x for x in (self.max_tokens, self.max_completion_tokens) if x is not None]
        top = (self.top_logprobs or 0) if self.logprobs else None
        return self.options(min(given, default=None), top)


class CompletionRequest(_Completion):
    """POST /v1/completions."""

    prompt: Annotated[list[Any], BeforeValidator(_as_prompts), Field(min_length=1)]
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: Literal[1] | None = None

    def sampling(self) -> Options:
        """How the replies are sampled."""
        return self.options(self.max_tokens, self.logprobs)


class _TextSettings(_Strict):
    format: _TextFormat | None = None


class ResponsesRequest(_Request):
    """POST /v1/responses."""

    input: Annotated[
        list[ChatMessage],
        BeforeValidator(lambda v: [{"role": "user", "content": v}] if isinstance(v, str) else v),
        Field(min_length=1),
    ]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    text: _TextSettings | None = None
    truncation: Literal["disabled"] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    def messages(self) -> list[dict[str, str]]:
        """The conversation, with the instructions as its system message."""
        first = [{"role": "system", "content": self.instructions}] if self.instructions else []
        return [*first, *(item.message() for item in self.input)]

    def sampling(self) -> Options:
        """How the reply is sampled."""
        return Options(
            max_new_tokens=self.max_output_tokens, temperature=self.temperature, top_p=self.top_p
        )


Request = TypeVar("Request", bound=_Request)


def parse(kind: type[Request], body: bytes) -> Request:
    """A request's body.

    Raises:
        ApiError: it is not JSON, or a parameter is missing, wrong or not supported.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from error
