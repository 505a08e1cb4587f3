"""Tool calls in the text of a reply.

Two forms are read, which cover most models: JSON objects within <tool_call></tool_call> (Hermes,
Qwen), and replies that are one JSON object (Llama 3.1), after <|python_tag|> or not.
"""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any, NamedTuple

_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)
_TAG = "<|python_tag|>"
EXAMPLE = '<tool_call>{"name": "...", "arguments": {...}}</tool_call>'


class Call(NamedTuple):
    """One call that a reply makes."""

    name: str
    arguments: dict[str, Any]
    problem: str = ""
    """Why it cannot be read; empty if it can."""


def find_calls(reply: str) -> list[Call]:
    """The calls of a reply in their order; none in a reply that is an answer.

    What stands within the tags and cannot be read is a call with a problem.
    """
    if "<tool_call>" in reply:
        return [_read(match[1]) for match in _TAGGED.finditer(reply)]
    text = reply.strip().removeprefix(_TAG).strip()
    if not text.startswith("{"):
        return []
    call = _read(text)
    # Without tags an object may be an answer: it is a call only if it says whose.
    return [call] if _TAG in reply or not call.problem else []


def _read(text: str) -> Call:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Call("", {}, f"the call is not JSON ({error}); expected {EXAMPLE}")
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str):
        return Call("", {}, f"the call names no tool; expected {EXAMPLE}")
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):  # JSON within JSON, as OpenAI's clients write it
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        return Call(name, {}, f"the arguments are not an object; expected {EXAMPLE}")
    return Call(name, arguments)
