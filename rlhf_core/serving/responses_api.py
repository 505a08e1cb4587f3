"""The JSON and the events of OpenAI's responses API: one message with one text."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from rlhf_core.serving.api_error import ApiError
from rlhf_core.serving.generator import Replies, Update
from rlhf_core.serving.requests import ResponsesRequest


class Shape:
    """One response.

    Args:
        name: of the model. prompt_tokens: of the input.
    """

    def __init__(self, name: str, wanted: ResponsesRequest, prompt_tokens: int) -> None:
        self.id, self.item_id = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self.name, self.wanted, self.prompt_tokens = name, wanted, prompt_tokens
        self.created = time.time()
        self.number = 0

    def whole(self, update: Update) -> dict[str, Any]:
        """The response with the whole reply; incomplete where it was cut at its longest length."""
        cut = update.finish == "length"
        status = "incomplete" if cut else "completed"
        return {
            **self._response(status),
            "output": [self._item(status, [_part(update.text)])],
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": self.prompt_tokens,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": update.tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": self.prompt_tokens + update.tokens,
            },
        }

    async def events(self, replies: Replies) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream."""
        at = {"output_index": 0, "content_index": 0, "item_id": self.item_id}
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))
        item = self._item("in_progress", [])
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **at, part=_part(""))
        text = ""
        try:
            async for update in replies:
                text += update.text
                if update.text:
                    delta = {"delta": update.text, "logprobs": []}
                    yield self._event("response.output_text.delta", **at, **delta)
        except ApiError as error:
            failed = {"code": "server_error", "message": error.text}
            response = {**self._response("failed"), "error": failed}
            yield self._event("response.failed", response=response)
            return
        whole = self.whole(Update(0, text, finish=update.finish, tokens=update.tokens))
        yield self._event("response.output_text.done", **at, text=text, logprobs=[])
        yield self._event("response.content_part.done", **at, part=_part(text))
        yield self._event("response.output_item.done", output_index=0, item=whole["output"][0])
        yield self._event(f"response.{whole['status']}", response=whole)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self.number += 1
        return {"type": kind, "sequence_number": self.number - 1, **fields}

    def _response(self, status: str) -> dict[str, Any]:
        wanted = self.wanted
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status,
            "model": self.name, "output": [], "error": None, "incomplete_details": None,
            "instructions": wanted.instructions, "metadata": wanted.metadata or {},
            "temperature": wanted.temperature, "top_p": wanted.top_p,
            "max_output_tokens": wanted.max_output_tokens, "usage": None,
            "tools": [], "tool_choice": "auto", "parallel_tool_calls": False,
            "truncation": "disabled", "store": False, "text": {"format": {"type": "text"}},
        }  # fmt: skip

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.item_id, "type": "message", "role": "assistant", "status": status,
            "content": content,
        }  # fmt: skip


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": []}
