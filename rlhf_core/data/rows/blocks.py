"""Messages whose calls, results and reasoning are blocks, as logs of two APIs hold them.

    Anthropic's     an assistant's content of thinking, text and tool_use blocks, and a user's of
                    tool_result and text blocks
    OpenAI's        Responses: items of the types message, reasoning, function_call and
                    function_call_output, of which a turn has several

They are written in the form of chat messages: `tool_calls`, `reasoning_content`, the role tool.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rlhf_core.data.rows.row import CALLS, REASONING, BadRow

_BLOCKS = frozenset({"tool_use", "tool_result", "thinking"})
_TEXTS = ("text", "output_text", "input_text", "reasoning_text", "summary_text")

Numbered = Iterator[tuple[int, Any]]
"""(position from 1 of the message in the row, a message)."""


def expanded(items: Sequence[Any], name: str) -> Numbered:
    """The messages of a column, those with blocks as chat messages; others as they are.

    Args:
        name: of the column, for errors.

    Raises:
        BadRow: blocks that no chat message can hold.
    """
    thought = ""  # of items before the reply or the call that it belongs to
    for position, item in enumerate(items, 1):
        where = f"message {position} of column {name!r}"
        kind = item.get("type") if isinstance(item, dict) and "role" not in item else None
        if kind == "reasoning":
            thought += _reasoning(item, where)
            continue
        found = list(_messages(item, kind, where))
        if thought:
            first = found[0]
            if not isinstance(first, dict) or first.get("role") not in ("assistant", "tool_call"):
                raise _no_reply(where)
            found[0], thought = first | {REASONING: thought}, ""
        for message in found:
            yield position, message
    if thought:
        raise _no_reply(f"the end of column {name!r}")


# --------------------------------------------------------------------------- details


def _messages(item: Any, kind: str | None, where: str) -> Iterator[Any]:
    if kind == "function_call":
        yield _call(item)
    elif kind == "function_call_output":
        yield _output(item)
    elif isinstance(item, dict) and _has_blocks(item.get("content")):
        yield from _of_blocks(item, where)
    elif isinstance(item, dict) and item.get("type") == "message":
        yield {k: v for k, v in item.items() if k not in ("type", "id", "status", "phase")}
    else:
        yield item


def _no_reply(where: str) -> BadRow:
    return BadRow("unsupported", f"{where} follows reasoning that belongs to no reply; take it out")


def _call(item: dict[str, Any]) -> dict[str, Any]:
    call = {"id": item.get("call_id"), "name": item.get("name"), "arguments": item.get("arguments")}
    return {"role": "tool_call", "content": call}


def _output(item: dict[str, Any]) -> dict[str, Any]:
    output = item.get("output")
    if isinstance(output, list):
        output = "".join(str(part.get("text", "")) for part in output if isinstance(part, dict))
    return {"role": "tool", "tool_call_id": item.get("call_id"), "content": output}


def _reasoning(item: dict[str, Any], where: str) -> str:
    parts = item.get("content") or item.get("summary") or []
    if not parts and item.get("encrypted_content"):
        raise BadRow("unsupported", f"{where} holds reasoning that is encrypted; take it out")
    return _joined_texts(parts, where)


def _has_blocks(content: Any) -> bool:
    return isinstance(content, list) and any(
        isinstance(part, dict) and part.get("type") in _BLOCKS for part in content
    )


def _of_blocks(item: dict[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """An assistant's message as one, a user's as results of tools and what is said after them."""
    thoughts: list[str] = []
    texts: list[Any] = []
    calls: list[dict[str, Any]] = []
    for part in item["content"]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "tool_result" and not texts:
            yield {
                "role": "tool", "tool_call_id": part.get("tool_use_id"),
                "content": _result(part.get("content"), where),
            }  # fmt: skip
        elif kind == "thinking" and not texts and not calls:
            thoughts.append(str(part.get("thinking", "")))
        elif kind == "tool_use":
            function = {"name": part.get("name"), "arguments": part.get("input")}
            calls.append({"id": part.get("id"), "type": "function", "function": function})
        elif kind in _BLOCKS or calls:
            raise BadRow(
                "unsupported",
                f"{where} holds a block of type {kind!r} after others that a chat template writes "
                "behind it; write it as messages: reasoning_content, content and tool_calls of a "
                "reply, and results as messages of the role tool before the user's text",
            )
        else:
            texts.append(part)
    rest = {key: value for key, value in item.items() if key != "content"}
    if thoughts:
        rest[REASONING] = "\n".join(thoughts)
    if calls:
        rest[CALLS] = calls
    if texts or calls or thoughts or item.get("role") == "assistant":
        yield rest | {"content": texts}


def _result(content: Any, where: str) -> Any:
    if not isinstance(content, list):
        return content
    return _joined_texts(content, f"a tool's result in {where}")


def _joined_texts(parts: Any, where: str) -> str:
    found = []
    for part in parts if isinstance(parts, list) else [parts]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXTS or not isinstance(part.get("text"), str):
            raise BadRow("unsupported", f"{where} holds a part of type {kind!r}; only text is read")
        found.append(part["text"])
    return "".join(found)
