"""OpenAI's API for one model: chats, plain completions and responses, streamed or not."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from rlhf_core.data.encoding.templates import prompt_ids
from rlhf_core.errors import DataError
from rlhf_core.serving import responses_api
from rlhf_core.serving.api_error import ApiError
from rlhf_core.serving.auth import model_entry
from rlhf_core.serving.generator import Generator, Replies, Update
from rlhf_core.serving.requests import (
    ChatRequest,
    CompletionRequest,
    ResponsesRequest,
    parse,
)
from rlhf_core.serving.sampling import TokenLogprob

LEFT = 499  # as nginx: the client has left; nobody reads it

T = TypeVar("T")


class Api:
    """The handlers.

    Args:
        name: of the model in the API.
    """

    def __init__(self, name: str, generator: Generator) -> None:
        self.name = name
        self.generator = generator
        self.tokenizer = generator.chat_model.tokenizer

    def application(self) -> Starlette:
        """As an ASGI application."""
        return Starlette(
            routes=[
                Route("/health", self.health),
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.complete, methods=["POST"]),
                Route("/v1/responses", self.respond, methods=["POST"]),
            ],
            exception_handlers={ApiError: _told, HTTPException: _told, Exception: _told},
        )

    async def health(self, request: Request) -> Response:
        """Answers once the model is loaded."""
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [model_entry(self.name)]})

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        wanted = parse(ChatRequest, await request.body())
        prompt = await self.prompt([message.message() for message in wanted.messages])
        replies = self.generator.reply([prompt], wanted.sampling(), wanted.n, wanted.stream)
        shape = _Shape(self, "chatcmpl", "chat.completion", chat=True)
        return await self._answer(request, wanted, replies, shape, [prompt])

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        wanted = parse(CompletionRequest, await request.body())
        prompts = [
            list(p) if not isinstance(p, str) else await run_in_threadpool(self._encode, p)
            for p in wanted.prompt
        ]
        replies = self.generator.reply(prompts, wanted.sampling(), wanted.n, wanted.stream)
        shape = _Shape(self, "cmpl", "text_completion", chat=False)
        return await self._answer(request, wanted, replies, shape, prompts)

    async def respond(self, request: Request) -> Response:
        """POST /v1/responses."""
        wanted = parse(ResponsesRequest, await request.body())
        prompt = await self.prompt(wanted.messages())
        replies = self.generator.reply([prompt], wanted.sampling(), 1, wanted.stream)
        shape = responses_api.Shape(self.name, wanted, len(prompt))
        if wanted.stream:
            return _stream(shape.events(replies), replies)
        return await while_there(request, replies.whole(), lambda found: shape.whole(found[0]))

    async def prompt(self, messages: Sequence[Any]) -> list[int]:
        """Token ids of the prompt for a reply.

        Raises:
            ApiError: the chat template rejects the messages.
        """
        try:
            return await run_in_threadpool(prompt_ids, self.tokenizer, messages)
        except DataError as error:
            raise ApiError(str(error), param="messages", code="invalid_value") from error

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    async def _answer(
        self,
        request: Request,
        wanted: ChatRequest | CompletionRequest,
        replies: Replies,
        shape: _Shape,
        prompts: Sequence[Sequence[int]],
    ) -> Response:
        tokens = sum(map(len, prompts))
        if wanted.stream:
            return _stream(_chunks(shape, replies, tokens, wanted.with_usage), replies)
        return await while_there(
            request,
            replies.whole(),
            lambda found: {
                **shape.head(""),
                "choices": [shape.choice(update) for update in found],
                "usage": _usage(tokens, found),
            },
        )


class _Shape:
    """The JSON of one chat's or plain completion's choices."""

    def __init__(self, api: Api, prefix: str, kind: str, *, chat: bool) -> None:
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.api, self.kind, self.chat = api, kind, chat

    def head(self, suffix: str) -> dict[str, Any]:
        """What all objects of an answer begin with."""
        kind = self.kind + (suffix if self.chat else "")
        return {"id": self.id, "object": kind, "created": self.created, "model": self.api.name}

    def choice(self, update: Update, *, delta: bool = False) -> dict[str, Any]:
        """A choice, or what is new of it."""
        found: dict[str, Any] = {"index": update.choice, "finish_reason": update.finish}
        found["logprobs"] = self._logprobs(update.logprobs)
        if not self.chat:
            return {**found, "text": update.text}
        if delta:
            return {**found, "delta": {"content": update.text} if update.text else {}}
        message = {"role": "assistant", "content": update.text, "refusal": None}
        return {**found, "message": message}

    def _logprobs(self, given: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not given:
            return None
        if self.chat:
            return {"content": [self._chat_logprob(one) for one in given], "refusal": None}
        return {
            "tokens": [self._text(one.token) for one in given],
            "token_logprobs": [one.logprob for one in given],
            "top_logprobs": [{self._text(t): value for t, value in one.top} for one in given],
        }

    def _chat_logprob(self, one: TokenLogprob) -> dict[str, Any]:
        top = [self._entry(token, value) for token, value in one.top]
        return {**self._entry(one.token, one.logprob), "top_logprobs": top}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        whole = "\ufffd" not in text  # else the token ends within a character
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}

    def _text(self, token: int) -> str:
        return str(self.api.tokenizer.decode([token]))


async def _chunks(
    shape: _Shape, replies: Replies, prompt_tokens: int, with_usage: bool
) -> AsyncIterator[dict[str, Any]]:
    """The objects of a stream."""
    head = shape.head(".chunk")
    usage = {"usage": None} if with_usage else {}
    if shape.chat:
        for row in replies.rows:
            start = {"role": "assistant", "content": ""}
            choice = {"index": row.choice, "delta": start, "logprobs": None, "finish_reason": None}
            yield {**head, "choices": [choice], **usage}
    done = []
    async for update in replies:
        yield {**head, "choices": [shape.choice(update, delta=True)], **usage}
        done += [update] if update.finish else []
    if with_usage:
        yield {**head, "choices": [], "usage": _usage(prompt_tokens, done)}


def _usage(prompt_tokens: int, done: Sequence[Update]) -> dict[str, int]:
    tokens = sum(update.tokens for update in done)
    return {
        "prompt_tokens": prompt_tokens, "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
    }  # fmt: skip


def _stream(objects: AsyncIterator[dict[str, Any]], replies: Replies) -> StreamingResponse:
    """Server-sent events; those with a type have it as their event's name, and no [DONE] after."""

    async def lines() -> AsyncIterator[str]:
        named = False
        try:
            async for value in objects:
                named = "type" in value
                yield (f"event: {value['type']}\n" if named else "") + _data(value)
        except ApiError as error:
            yield _data({"error": error.value})
        finally:
            replies.leave()
        if not named:
            yield "data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream")


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def while_there(
    request: Request, work: Awaitable[T], shaped: Callable[[T], dict[str, Any]]
) -> Response:
    """The JSON of what the work gives; it is cancelled if the client leaves before."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(_left(request))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return JSONResponse(shaped(tasks[0].result()))
        return Response(status_code=LEFT)
    finally:
        for task in tasks:
            task.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _told(request: Request, error: Exception) -> Response:
    """An error in OpenAI's form."""
    if isinstance(error, HTTPException):
        error = ApiError(str(error.detail), status=error.status_code)
    elif not isinstance(error, ApiError):
        error = ApiError(f"The server failed: {type(error).__name__}: {error}", status=500)
    return Response(error.body, error.status, media_type="application/json")
