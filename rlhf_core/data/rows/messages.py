"""Reads messages: lists of them, single ones, and transcripts as texts.

    {"role": "system|user|assistant", "content": ...}     keys of OpenAI and of chat templates
    {"from": "system|human|gpt", "value": ...}            keys of ShareGPT
    "\\n\\nHuman: ...\\n\\nAssistant: ..."                    transcripts of Anthropic's HH
    blocks and items of two APIs                         see `blocks`

A message's text may be a list of text parts. Calls of tools and their results are read as in
`tools`. `reasoning_content`, `reasoning` or `thinking` of a
reply is for chat templates that read it. `weight`, `train` or `loss` of a reply, 0 or 1, says
whether it is trained on, and `masked` whether it is not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rlhf_core.data.rows.blocks import expanded
from rlhf_core.data.rows.columns import Rules, check_unread, is_empty, read_flag
from rlhf_core.data.rows.row import (
    CALLS,
    REASONING,
    TOOLS,
    BadRow,
    Message,
    names,
    parse_json,
    short,
    whole_text,
)
from rlhf_core.data.rows.tools import (
    CALL_KEYS,
    CALL_ROLES,
    RESULT_ROLES,
    read_calls,
    read_result,
    read_tools,
)

_ROLES = {
    "system": "system", "user": "user", "assistant": "assistant", "human": "user",
    "gpt": "assistant", "developer": "system", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "bot": "assistant", "chatbot": "assistant", "ai": "assistant",
    "model": "assistant", "prompter": "user",
} | dict.fromkeys(RESULT_ROLES, "tool") | dict.fromkeys(CALL_ROLES, "assistant")  # fmt: skip
_KEYS = (("role", "content"), ("from", "value"))
_TEXT_PARTS = (None, "text", "input_text", "output_text")
_TURN_PREFIXES = {"\n\nHuman:": "user", "\n\nAssistant:": "assistant"}
_WRITTEN = re.compile(r"\s*(?:\[\s*)?\{\s*['\"](?:role|content|from|value)['\"]\s*:")  # as a text
_REASONING = (REASONING, "reasoning", "thinking")
_OF_ROLE = {"tool": ("name", "tool_call_id"), "system": (), "user": (), "assistant": ()}
_MARKS = re.compile("</?think>")
_FLAGS = ("weight", "train", "training", "trainable", "loss", "masked")


class Untrained(dict[str, Any]):
    """A reply that is context only: the row says that it is not trained on."""


def untrained(messages: Sequence[Message]) -> list[Message]:
    """The messages, with replies that are context only."""
    return [Untrained(m) if m["role"] == "assistant" else m for m in messages]


def is_messages(value: Any) -> bool:
    """Whether a value is a list of messages or a single message, perhaps as JSON, not a text."""
    return isinstance(value, list | dict) or (
        isinstance(value, str) and _WRITTEN.match(value) is not None
    )


def check_text(value: str, name: str) -> str:
    """The text, if it is not empty and can be encoded.

    Raises:
        BadRow: it is empty, or holds half a character.
    """
    if not value.strip():
        raise BadRow("no_text", f"{name} is empty")
    return whole_text(value, name)


def wrong_type(name: str, value: Any, needed: str) -> BadRow:
    """The error for a column with a value of the wrong type."""
    found = "null" if value is None else f"a {type(value).__name__}"
    return BadRow("wrong_type", f"column {name!r} holds {found}; expected {needed}")


def read_messages(value: Any, name: str, rules: Rules) -> list[Message]:
    """The messages of a column: a list of them, or a single one.

    Args:
        name: of the column, for errors.

    Raises:
        BadRow: it holds something else, or messages that cannot be used.
    """
    if isinstance(value, str) and _WRITTEN.match(value):
        value = _parsed(value, name)
    if isinstance(value, dict) and all(isinstance(item, list) for item in value.values()):
        raise BadRow(
            "wrong_type",
            f"column {name!r} is an object of lists; expected a list of objects, one for each "
            "message: {role, content} or {from, value}",
        )
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list):
        raise wrong_type(name, value, "a list of {role, content} or {from, value}")
    if not items:
        raise BadRow("no_text", f"column {name!r} is an empty list")
    first = items[0]
    keys = _KEYS[isinstance(first, dict) and "from" in first and "role" not in first]
    messages: list[Message] = []
    for position, item in expanded(items, name):
        where = f"message {position} of column {name!r}"
        tools = item.get(TOOLS) if position == 1 and isinstance(item, dict) else None
        if tools and TOOLS not in rules.ignored:
            item = {key: held for key, held in item.items() if key != TOOLS}
        message = _message(item, keys, where, rules)
        if tools and not is_empty(tools) and TOOLS not in rules.ignored:
            message[TOOLS] = read_tools(tools, f"key {TOOLS!r} of {where}")
        if CALLS in message and messages and messages[-1]["role"] == "assistant" and (
            _role(item, keys) in CALL_ROLES
        ):  # fmt: skip
            message = _joined(messages.pop(), message, where)
        messages.append(message)
    return messages


def _parsed(text: str, name: str) -> Any:
    """The messages of a column that holds them as JSON, as tables do."""
    try:
        return parse_json(text)
    except BadRow as bad:
        raise BadRow(
            "wrong_type",
            f"column {name!r} holds messages as a text that is not JSON ({bad.message}); write it "
            "with json.dumps",
        ) from None


def _role(item: dict[str, Any], keys: tuple[str, str]) -> str:
    return str(item[keys[0]]).lower().replace("-", "_")


def _message(item: Any, keys: tuple[str, str], where: str, rules: Rules) -> Message:
    role_key, text_key = keys
    if not isinstance(item, dict) or role_key not in item:
        raise _no_message(item, keys, where)
    spoken = _role(item, keys)
    role = _ROLES.get(spoken)
    if role is None:
        raise _unknown_role(item[role_key], keys, where)
    flags: list[str] = []
    calls = reasoning = ""
    if len(item) > 2 or text_key not in item:  # first, because a call may have no text
        calls = _call_key(item, role, rules)
        flags = [key for key in _FLAGS if key in item and key not in rules.ignored]
        reasoning = _reasoning_key(item, role, rules, bool(calls))
        others = item.keys() - {role_key, text_key, *flags, reasoning, calls, *_OF_ROLE[role]}
        check_unread(item, sorted(others), rules, where)
    message: Message = {"role": role, "content": ""}
    if spoken in CALL_ROLES:
        message[CALLS] = read_calls(item.get(text_key), where, rules)
    elif calls:
        message[CALLS] = read_calls(item[calls], f"key {calls!r} of {where}", rules)
        text = _text(item.get(text_key), where, rules)
        message["content"] = whole_text(text, where) if text.strip() else ""
    elif text_key not in item:
        raise _no_message(item, keys, where)
    elif role == "tool":
        message["content"] = read_result(item[text_key], where)
        known = (key for key in _OF_ROLE[role] if not is_empty(item.get(key)))
        message |= {key: whole_text(str(item[key]), f"key {key!r} of {where}") for key in known}
    else:
        text = _text(item[text_key], where, rules)
        # An empty system message is one: templates that have a system message of their own then
        # write none.
        said = whole_text(text, where) if role == "system" else check_text(text, where)
        message["content"] = said
    if reasoning:
        thought = check_text(item[reasoning], f"key {reasoning!r} of {where}")
        if _MARKS.search(thought + message["content"]):
            raise BadRow(
                "unused_column",
                f"key {reasoning!r} of {where} holds reasoning beside a text with <think> marks of "
                f"its own; keep one of the two, or set ignore_columns: [{reasoning}]",
            )
        message[REASONING] = thought
        rules.reasoning = f"key {reasoning!r} of {where}"
    for key in flags:
        message = _flagged(message, key, item[key], where, rules)
    return message


def _call_key(item: dict[str, Any], role: str, rules: Rules) -> str:
    """The key with the calls of a reply; "" if there is none to read."""
    if role != "assistant":
        return ""
    held = (key for key in CALL_KEYS if not is_empty(item.get(key)))
    return next((key for key in held if key not in rules.ignored), "")


def _joined(reply: Message, call: Message, where: str) -> Message:
    """A reply and a call that is a turn of its own after it: the model writes them as one."""
    if type(reply) is not type(call) or (REASONING in reply and REASONING in call):
        raise BadRow(
            "unused_column",
            f"{where} is a call in the same turn as the reply before it, but has another weight or "
            "reasoning of its own; write them as one message with tool_calls",
        )
    joined = type(reply)(reply)
    joined |= {name: value for name, value in call.items() if name == REASONING}
    joined[CALLS] = [*reply.get(CALLS, ()), *call[CALLS]]
    return joined


def _reasoning_key(item: dict[str, Any], role: str, rules: Rules, calls: bool) -> str:
    """The key with the reasoning of a reply; "" if there is none to read. Of prompts, it is read
    before calls alone: a reply goes on from that."""
    if role != "assistant" or (rules.purpose == "prompts" and not calls):
        return ""
    held = (k for k in _REASONING if isinstance(item.get(k), str) and not is_empty(item[k]))
    return next((key for key in held if key not in rules.ignored), "")


def _flagged(message: Message, key: str, value: Any, where: str, rules: Rules) -> Message:
    """The message as its flag says. Only replies are ever trained on."""
    if is_empty(value) or rules.purpose == "prompts":
        return message
    flag, reply = read_flag(value), message["role"] == "assistant"
    flag = not flag if flag is not None and key == "masked" else flag
    if flag is None or (reply and not flag and rules.purpose == "pretrain"):
        raise BadRow(
            "unused_column",
            f"key {key!r} of {where} holds {short(value)}; expected 1 (train on this reply) or 0 "
            "(context only; not for pretraining; the other way round for masked). Other weights "
            "are not supported",
        )
    if flag and not reply and key != "weight":
        raise BadRow(
            "unused_column",
            f"key {key!r} of {where} asks to train on a turn of the role {message['role']}; only "
            f"replies are trained on. Remove it, or set ignore_columns: [{key}]",
        )
    return Untrained(message) if reply and not flag else message


def _no_message(item: Any, keys: tuple[str, str], where: str) -> BadRow:
    found = names(item) if isinstance(item, dict) else f"a {type(item).__name__}"
    other = _KEYS[keys == _KEYS[0]]
    todo = ""
    if isinstance(item, str):
        todo = ". If the texts are turns, give each its role: user and assistant in turn"
    elif isinstance(item, dict) and keys[0] not in item and len(item) > 1:
        todo = ". If it holds a question and its answer, write two messages"
    return BadRow(
        "wrong_type",
        f"{where} is {found}; expected {keys[0]}, {keys[1]} (or {other[0]}, {other[1]}){todo}",
    )


def _unknown_role(role: Any, keys: tuple[str, str], where: str) -> BadRow:
    return BadRow(
        "unknown_role",
        f"{where} has the {keys[0]} {short(role)}; expected one of {', '.join(_ROLES)}",
    )


def _text(value: Any, where: str, rules: Rules) -> str:
    """A message's content as one text; it may be a list of text parts."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    parts = value if isinstance(value, list) else [value]
    texts = []
    for number, part in enumerate(parts, 1):
        if isinstance(part, str) and value is parts:
            texts.append(part)
            continue
        which = f"part {number} of {where}"
        if not isinstance(part, dict):
            found = type(value).__name__
            raise BadRow("wrong_type", f"{where} is a {found}; expected text, or parts with text")
        if part.get("type") not in _TEXT_PARTS:
            raise BadRow(
                "unsupported", f"{which} is of type {short(part['type'])}; only text is supported"
            )
        key = next((k for k in ("text", "value", "content") if isinstance(part.get(k), str)), None)
        if key is None:
            raise BadRow(
                "wrong_type", f"{which} has no text: it is {names(part)}; expected type and text"
            )
        texts.append(part[key])
        if len(part) > 2:
            check_unread(part, sorted(part.keys() - {"type", key}), rules, which)
    return "".join(texts)


def is_transcript(text: Any) -> bool:
    """Whether a text is a transcript of Anthropic's HH: it starts with a turn of the human."""
    return isinstance(text, str) and ("\n\n" + text.lstrip("\n")).startswith("\n\nHuman:")


def read_transcript(text: str, name: str) -> list[Message]:
    """The messages of a transcript; their texts are stripped.

    Raises:
        BadRow: the text is no transcript, or a turn is empty.
    """
    messages: list[Message] = []
    rest = "\n\n" + text.lstrip("\n")
    while rest.strip():
        prefix = next((prefix for prefix in _TURN_PREFIXES if rest.startswith(prefix)), None)
        if prefix is None:
            raise BadRow(
                "not_a_transcript",
                f"column {name!r} starts with {text[:30]!r}; expected a transcript that starts "
                'with "\\n\\nHuman:"',
            )
        rest = rest[len(prefix) :]
        end = min((at for m in _TURN_PREFIXES if (at := rest.find(m)) >= 0), default=len(rest))
        content = rest[:end].strip()
        messages.append({"role": _TURN_PREFIXES[prefix], "content": content})
        rest = rest[end:]
    for position, message in enumerate(messages, 1):
        check_text(message["content"], f"turn {position} of column {name!r}")
    return messages
