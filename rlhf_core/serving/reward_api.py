"""A reward model behind the HTTP reward protocol: POST /score, see docs/rewards.md.

Each reply is scored alone, so that its score does not depend on what else is in the request.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rlhf_core.data.encoding.templates import (
    encode_segments,
    end_of_turn,
    find_special_token,
    prompt_ids,
)
from rlhf_core.data.encoding.tokenizer import load_tokenizer
from rlhf_core.errors import RLHFError
from rlhf_core.model_files.remote_code import is_trusted
from rlhf_core.models.loading import load_scalar_model
from rlhf_core.nn.padding import rows_on
from rlhf_core.serving.api_error import ApiError
from rlhf_core.serving.requests import parse

PATHS = frozenset({"/score"})
MOST_ITEMS = 1024


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Message(_Strict):
    role: str
    content: str


class _Item(_Strict):
    prompt: Annotated[list[_Message], Field(min_length=1)]
    reply: str
    finished: bool = True
    row: dict[str, Any] = {}


class _ScoreRequest(_Strict):
    items: Annotated[list[_Item], Field(max_length=MOST_ITEMS)]


class RewardScorer:
    """A reward model that scores texts.

    Args:
        folder: a reward model's, with tokenizer and chat template.

    Raises:
        ModelError: it is none.
    """

    def __init__(self, folder: Path) -> None:
        self.tokenizer = load_tokenizer(folder, is_trusted(folder))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model = load_scalar_model(folder, dtype).requires_grad_(False).to(self.device)
        config = self.model.backbone.config.get_text_config()  # type: ignore[union-attr]
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self._end = end_of_turn(self.tokenizer)[1]
        self._lock = threading.Lock()

    def encode(self, prompt: list[dict[str, str]], reply: str, finished: bool) -> list[int]:
        """Token ids of prompt and reply; a finished reply ends with its end-of-turn token.

        Special tokens that a reply spells out are read as text.
        """
        ids = prompt_ids(self.tokenizer, prompt)  # type: ignore[arg-type]
        if find_special_token(self.tokenizer, reply):
            spelled = self.tokenizer(reply, add_special_tokens=False, split_special_tokens=True)
            ids += spelled["input_ids"]
        elif reply:
            ids += encode_segments(self.tokenizer, [reply])[0]
        return [*ids, self._end] if finished else ids

    @torch.no_grad()
    def score(self, sequences: list[list[int]]) -> list[float]:
        """The model's normalised scores."""
        with self._lock:
            return [float(self.model(*rows_on(self.device, [ids]))[0]) for ids in sequences]


class RewardApi:
    """The handlers.

    Args:
        name: of the model, for people.
    """

    def __init__(self, name: str, scorer: RewardScorer) -> None:
        self.name, self.scorer = name, scorer

    def application(self) -> Starlette:
        """As an ASGI application."""
        return Starlette(
            routes=[
                Route("/health", self.health),
                Route("/score", self.score, methods=["POST"]),
            ],
            exception_handlers={ApiError: _told, HTTPException: _told, Exception: _told},
        )

    async def health(self, request: Request) -> Response:
        """Answers once the model is loaded."""
        return JSONResponse({"status": "ok", "model": self.name})

    async def score(self, request: Request) -> Response:
        """POST /score."""
        wanted = parse(_ScoreRequest, await request.body())
        scores = await run_in_threadpool(self._scores, wanted.items)
        return JSONResponse({"scores": scores})

    def _scores(self, items: list[_Item]) -> list[float]:
        sequences = []
        for i, item in enumerate(items):
            messages = [message.model_dump() for message in item.prompt]
            try:
                ids = self.scorer.encode(messages, item.reply, item.finished)
            except RLHFError as error:
                raise ApiError(f"items[{i}]: {error}", param=f"items[{i}].prompt") from error
            if self.scorer.context is not None and len(ids) > self.scorer.context:
                raise ApiError(
                    f"items[{i}] has {len(ids)} tokens, and the model reads {self.scorer.context}.",
                    param=f"items[{i}]",
                    code="context_length_exceeded",
                )
            sequences.append(ids)
        return self.scorer.score(sequences)


async def _told(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        error = ApiError(str(error.detail), status=error.status_code)
    if not isinstance(error, ApiError):
        error = ApiError("The server failed; its log has the reason.", status=500)
    return Response(error.body, error.status, media_type="application/json")
