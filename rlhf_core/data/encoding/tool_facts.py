"""What a chat template does with tools: probed once with a made-up tool, and checked in each row.

A template that knows nothing of tools leaves them out without an error. So a conversation with
tools is used only if the template writes each part of it: the tools, the calls with their
arguments, and the results.
"""

from __future__ import annotations

import hashlib
import json
import re
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_core.data.encoding.apply import apply_chat
from rlhf_core.data.rows.row import CALLS, TOOLS, Message, short
from rlhf_core.errors import DataError, ModelError

_NAME, _FIELD, _VALUE, _RESULT = "count_zebras", "meadow", "Meadow 7", "Stripes 41"
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "Counts zebras.",
        "parameters": {
            "type": "object",
            "properties": {_FIELD: {"type": "string", "description": "Which meadow."}},
            "required": [_FIELD],
        },
    },
}
_ADVICE = (
    "take a model whose template does, or set model.chat_template to hermes, or to tokenizer:NAME "
    "where the tokenizer has a template for tools"
)


@dataclass(frozen=True, slots=True)
class ToolFacts:
    """Which parts of a conversation with tools a template writes.

    Attributes:
        key: as in `TemplateFacts`.
        tools: the tools that the model may call. calls: those that it made. results: theirs.
        as_text: the template takes the arguments of a call as JSON text, not as an object.
        marks: what it writes around a result, if this is a pair of tags: ("<tool_response>",
            "</tool_response>"); else two empty texts.
        short_ids: it takes calls and results only with ids of nine characters (Mistral).
    """

    key: tuple[str, int]
    tools: bool
    calls: bool
    results: bool
    as_text: bool = False
    marks: tuple[str, str] = ("", "")
    short_ids: bool = False


_FACTS: weakref.WeakKeyDictionary[Any, ToolFacts] = weakref.WeakKeyDictionary()


def tool_facts_of(tokenizer: Any) -> ToolFacts:
    """The facts about a tokenizer's template and tools; kept until the template changes."""
    key = (str(getattr(tokenizer, "chat_template", None)), len(tokenizer))
    facts = _FACTS.get(tokenizer)
    if facts is None or facts.key != key:
        facts = _FACTS[tokenizer] = _probe(tokenizer, key)
    return facts


def uses_tools(messages: Sequence[Message]) -> bool:
    """Whether a conversation has tools, calls or results."""
    return any(m["role"] == "tool" or (len(m) > 2 and (TOOLS in m or CALLS in m)) for m in messages)


def calls_unlisted(messages: Sequence[Message]) -> bool:
    """Whether a call's tool is neither listed with the conversation nor named by a system text."""
    if any(TOOLS in m for m in messages):
        return False
    told = " ".join(m["content"] for m in messages if m["role"] == "system")
    calls = [call for m in messages for call in m.get(CALLS, ())]
    return any(call["function"]["name"] not in told for call in calls)


def check_tools(tokenizer: Any, messages: Sequence[Message]) -> None:
    """Check that the template writes tools, calls and results, as far as a conversation has them.

    Raises:
        DataError: it does not.
    """
    facts = tool_facts_of(tokenizer)
    parts = (
        (facts.tools, "tools that the model may call (column 'tools')",
         any(TOOLS in m for m in messages)),
        (facts.calls, "calls of tools (tool_calls)", any(CALLS in m for m in messages)),
        (facts.results, "results of tools (role tool)", any(m["role"] == "tool" for m in messages)),
    )  # fmt: skip
    missing = [name for able, name, present in parts if present and not able]
    if missing:
        raise DataError(f"the chat template does not write {' and '.join(missing)}: {_ADVICE}")


def check_written(messages: Sequence[Message], text: str) -> None:
    """Check that a rendered conversation holds all that its tools, calls and results say.

    Raises:
        DataError: something is missing.
    """
    squeezed = _squeeze(text)
    for part, where in _parts(messages):
        if not any(_holds(text, squeezed, form) for form in _forms(part)):
            raise DataError(
                f"the chat template leaves out {short(part)} of {where}; take that out of the "
                f"data, or {_ADVICE}"
            )


def unmarked(tokenizer: Any, messages: Sequence[Message]) -> list[Message]:
    """The conversation without marks around results that the template writes itself: data in the
    form of Hermes hold them, also around several results of one message."""
    first, last = tool_facts_of(tokenizer).marks
    found: list[Message] = []
    for message in messages:
        text = message["content"].strip()
        if not first or message["role"] != "tool" or not text.startswith(first):
            found.append(message)
            continue
        inside = re.findall(rf"{first}(.*?){last}", text, re.S)
        if _squeeze(text) != _squeeze("".join(first + said + last for said in inside)):
            found.append(message)  # marks within a text: a part of it
            continue
        found += [message | {"content": said.strip("\n")} for said in inside]
    return found


def with_arguments(message: Message, as_text: bool) -> Message:
    """The message with the arguments of its calls as the template takes them."""
    if not as_text:
        return message
    calls = [
        call | {"function": call["function"] | {"arguments": _dump(call["function"]["arguments"])}}
        for call in message[CALLS]
    ]
    return message | {CALLS: calls}


def with_short_ids(messages: Sequence[Message]) -> list[Message]:
    """The conversation with ids of nine letters and digits for calls and their results. Other ids
    are replaced by hashes of the calls: what ids say is only which result belongs to which call."""
    found: list[Message] = []
    ids: list[str] = []  # of the calls before, as far as they have no result yet
    renamed: dict[str, str] = {}
    for turn, message in enumerate(messages):
        if CALLS in message:
            given = [str(call.get("id", "")) for call in message[CALLS]]
            ids = [_short_id(call, turn, n) for n, call in enumerate(message[CALLS])]
            renamed = {old: new for old, new in zip(given, ids, strict=True) if old}
            calls = [call | {"id": own} for call, own in zip(message[CALLS], ids, strict=True)]
            message = message | {CALLS: calls}
        elif message["role"] == "tool" and ids:
            own = renamed.get(message.get("tool_call_id", ""), ids[0])
            ids = [other for other in ids if other != own]
            message = message | {"tool_call_id": own}
        found.append(message)
    return found


# --------------------------------------------------------------------------- details


def _short_id(call: dict[str, Any], turn: int, number: int) -> str:
    own = str(call.get("id", ""))
    if re.fullmatch(r"[A-Za-z0-9]{9}", own):
        return own
    return hashlib.sha256(f"{turn} {number} {_dump(call)}".encode()).hexdigest()[:9]


def _probe(tokenizer: Any, key: tuple[str, int]) -> ToolFacts:
    def rendered(chat: list[Message], tools: list[Any] | None) -> str:
        try:
            return apply_chat(tokenizer, chat, tools, False)
        except (DataError, ModelError):
            return ""

    asked: Message = {"role": "user", "content": "How many?"}
    tools = [PROBE_TOOL] if _NAME in rendered([asked], [PROBE_TOOL]) else None
    found = {
        as_text: rendered([asked, with_arguments(probe_call(), as_text)], tools)
        for as_text in (False, True)
    }
    # Written by Python ({'meadow': ...), or as a text inside JSON ({\"meadow\": ...).
    spoilt = (f"{{'{_FIELD}", f'{{\\"{_FIELD}')
    able = [
        as_text
        for as_text, text in found.items()
        if _NAME in text and _VALUE in text and not any(mark in text for mark in spoilt)
    ]
    said = (
        with_arguments(probe_call(), able[0]) if able else {"role": "assistant", "content": "Now."}
    )
    answer = {"role": "tool", "content": _RESULT, "name": _NAME, "tool_call_id": "call00007"}
    text = rendered([asked, said, answer], tools)
    # Some templates write whatever is no user's turn as a reply.
    reply = rendered([asked, said, {"role": "assistant", "content": _RESULT}], tools)
    around = re.search(rf"(<(\w+)>)\s*{_RESULT}\s*(</\2>)", text)
    marks = (around[1], around[3]) if around else ("", "")
    results = _RESULT in text and text != reply
    calls = said.get(CALLS, ())
    others = [[call | {"id": "call_000007"} for call in calls],
              [{k: v for k, v in call.items() if k != "id"} for call in calls]]  # fmt: skip
    short_ids = bool(calls) and not all(rendered([asked, said | {CALLS: o}], tools) for o in others)
    return ToolFacts(
        key, tools is not None, bool(able), results, True in able[:1], marks, short_ids
    )


def probe_call() -> Message:
    """A reply that calls `PROBE_TOOL`."""
    function = {"name": _NAME, "arguments": {_FIELD: _VALUE}}
    call = {"id": "call00007", "type": "function", "function": function}
    return {"role": "assistant", "content": "", CALLS: [call]}


def _parts(messages: Sequence[Message]) -> Iterator[tuple[Any, str]]:
    """(a text, a number or another plain value that must be written; the part that holds it)."""
    for message in messages:
        for tool in message.get(TOOLS, ()):
            function = tool["function"]
            where = f"the tool {function['name']!r}"
            yield function["name"], where
            yield function.get("description") or "", where
            for name in _properties(function):
                yield name, where
        for call in message.get(CALLS, ()):
            function = call["function"]
            where = f"a call of {function['name']!r}"
            yield function["name"], where
            for leaf in _leaves(function["arguments"]):
                yield leaf, where
        if message["role"] == "tool":
            yield message["content"], "the result of a tool"


def _properties(function: dict[str, Any]) -> Sequence[str]:
    parameters = function.get("parameters")
    found = parameters.get("properties") if isinstance(parameters, dict) else None
    return list(found) if isinstance(found, dict) else []


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _forms(part: Any) -> Iterator[str]:
    """How a template may write a value: as it is, or in JSON."""
    yield str(part)
    if isinstance(part, str):
        yield _dump(part)[1:-1]
        yield json.dumps(part)[1:-1]
    else:
        yield json.dumps(part)


def _holds(text: str, squeezed: str, form: str) -> bool:
    letters = _squeeze(form)
    return letters in squeezed if letters else form.strip() in text


def _squeeze(text: str) -> str:
    """Letters and digits: templates indent, and write comments over several lines."""
    return re.sub(r"\W+", "", text)


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
