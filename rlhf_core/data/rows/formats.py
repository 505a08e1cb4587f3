"""Converts rows of every supported format into one shape, `Example`.

alpaca             instruction, input (may be missing), output
messages           messages: [{"role": "system|user|assistant", "content": ...}, ...]
sharegpt           conversations: [{"from": "human|gpt|system", "value": ...}, ...]
prompt_completion  prompt, completion (texts or messages)
hh                 chosen, rejected: transcripts with "\\n\\nHuman:" and "\\n\\nAssistant:"
preference         prompt, chosen, rejected (texts or messages)
unpaired           prompt, completion (texts or messages), label: was the reply good? (see `labels`)
prompt             prompt (text or messages)
text               text
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_core.data.rows.labels import read_label
from rlhf_core.data.rows.row import BadRow, Message, names, short, whole_text
from rlhf_core.errors import DataError
from rlhf_core.jobs import Format, Purpose

PURPOSES_OF: dict[str, tuple[Purpose, ...]] = {
    "alpaca": ("sft", "prompts", "pretrain"),
    "messages": ("sft", "prompts", "pretrain"),
    "sharegpt": ("sft", "prompts", "pretrain"),
    "prompt_completion": ("sft", "prompts", "pretrain"),
    "hh": ("preference", "sft", "prompts", "pretrain"),
    "preference": ("preference", "sft", "prompts", "pretrain"),
    "unpaired": ("unpaired", "sft", "prompts", "pretrain"),
    "prompt": ("prompts",),
    "text": ("pretrain", "sft", "prompts"),
}
_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT = {
    "system": "system", "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant",
}  # fmt: skip
_TURN_PREFIXES = {"\n\nHuman:": "user", "\n\nAssistant:": "assistant"}


@dataclass(slots=True)
class Example:
    """A row in one shape.

    Attributes:
        messages: a conversation, or the messages before a pair of replies or a labelled reply;
            empty if there is `text`.
        chosen, rejected: texts of a pair of replies.
        text: plain text.
        completion, label: text of a labelled reply, and whether it was good.
    """

    messages: list[Message]
    chosen: str | None = None
    rejected: str | None = None
    text: str | None = None
    completion: str | None = None
    label: bool | None = None


def check_purpose(format: Format, purpose: Purpose) -> None:
    """Check that rows of a format can be used for a purpose.

    Raises:
        DataError: they cannot; the text lists the possible purposes and formats.
    """
    if purpose not in PURPOSES_OF[format]:
        able = ", ".join(name for name, purposes in PURPOSES_OF.items() if purpose in purposes)
        raise DataError(
            f"Format {format} can be used for {', '.join(PURPOSES_OF[format])}, not for {purpose}; "
            f"{purpose} needs one of the formats {able}."
        )


def normalise(row: dict[str, Any], format: Format, purpose: Purpose) -> Example:
    """Convert a row as far as the purpose needs it.

    Raises:
        BadRow: a column is missing, has the wrong type, or is empty.
    """
    if format == "text":
        return Example([], text=_text(row, "text"))
    if format == "hh":
        return _pair(_transcript(_text(row, "chosen"), "chosen"),
                     _transcript(_text(row, "rejected"), "rejected"))  # fmt: skip
    if format == "preference":
        return _preference(row)
    if format == "unpaired":
        return _unpaired(row)
    if format == "prompt":
        return _conversation(_prompt(row))
    if format == "prompt_completion":
        prompt = _prompt(row)
        if purpose == "prompts" and not row.get("completion"):
            return _conversation(prompt)
        return _conversation(prompt + _reply(row, "completion"))
    if format == "alpaca":
        extra = row.get("input")
        if extra is not None and not isinstance(extra, str):
            raise _wrong_type("input", extra, "text or nothing")
        question = _text(row, "instruction")
        if extra and extra.strip():
            question += "\n\n" + _check_text(extra, "column 'input'")
        messages = [_message("user", question)]
        if purpose != "prompts" or row.get("output"):
            messages.append(_message("assistant", _text(row, "output")))
        return _conversation(messages)
    if format == "messages":
        return _conversation(_messages(row, "messages", "role", "content", _ROLES))
    assert format == "sharegpt", format
    messages = _messages(row, "conversations", "from", "value", _SHAREGPT)
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, _message("system", _check_text(system, "column 'system'")))
    return _conversation(messages)


# --------------------------------------------------------------------------- details


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _column(row: dict[str, Any], name: str) -> Any:
    if name not in row:
        raise BadRow(
            "missing_column",
            f"there is no column {name!r}; the row has {names(row)}. If it has another name, set "
            f'columns: {{"{name}": "<its name>"}}; if the format is another one, set format',
        )
    return row[name]


def _wrong_type(name: str, value: Any, needed: str) -> BadRow:
    found = "null" if value is None else f"a {type(value).__name__}"
    return BadRow("wrong_type", f"column {name!r} holds {found}; expected {needed}")


def _check_text(value: str, name: str) -> str:
    if not value.strip():
        raise BadRow("no_text", f"{name} is empty")
    return whole_text(value, name)


def _text(row: dict[str, Any], name: str) -> str:
    value = _column(row, name)
    if value is None:
        raise BadRow("no_text", f"column {name!r} is null")
    if not isinstance(value, str):
        raise _wrong_type(name, value, "text")
    return _check_text(value, f"column {name!r}")


def _messages(
    row: dict[str, Any], name: str, role_key: str, text_key: str, roles: dict[str, str]
) -> list[Message]:
    value = _column(row, name)
    if not isinstance(value, list):
        raise _wrong_type(name, value, f"a list of {{{role_key}, {text_key}}}")
    if not value:
        raise BadRow("no_text", f"column {name!r} is an empty list")
    messages = []
    for position, item in enumerate(value, 1):
        where = f"message {position} of column {name!r}"
        if not isinstance(item, dict) or not {role_key, text_key} <= item.keys():
            found = names(item) if isinstance(item, dict) else f"a {type(item).__name__}"
            raise BadRow("wrong_type", f"{where} is {found}; expected {role_key}, {text_key}")
        role = roles.get(str(item[role_key]).lower())
        if role is None:
            raise BadRow(
                "unknown_role",
                f"{where} has the {role_key} {short(item[role_key])}; expected one of "
                f"{', '.join(roles)}",
            )
        if item.get("tool_calls"):
            raise BadRow("unsupported", f"{where} has tool calls, which are not supported")
        messages.append(_message(role, _check_text(_parts(item[text_key], where), where)))
    return messages


def _parts(value: Any, where: str) -> str:
    """A message's content as one text; it may be a list of text parts."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in texts):
        raise BadRow("wrong_type", f"{where} is a {type(value).__name__}; expected text")
    return "".join(part["text"] for part in texts)


def _transcript(text: str, name: str) -> list[Message]:
    """The messages of an Anthropic HH transcript; their texts are stripped."""
    messages = []
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
        messages.append(_message(_TURN_PREFIXES[prefix], rest[:end].strip()))
        rest = rest[end:]
    for position, message in enumerate(messages, 1):
        _check_text(message["content"], f"turn {position} of column {name!r}")
    return messages


def _prompt(row: dict[str, Any]) -> list[Message]:
    value = _column(row, "prompt")
    if isinstance(value, list):
        return _messages(row, "prompt", "role", "content", _ROLES)
    text = _text(row, "prompt")
    if text.startswith("\n\nHuman:"):
        return _transcript(text.rstrip().removesuffix("\n\nAssistant:"), "prompt")
    return [_message("user", text)]


def _reply(row: dict[str, Any], name: str) -> list[Message]:
    """A column with a reply: a text, or messages that end with the reply."""
    if isinstance(_column(row, name), list):
        return _messages(row, name, "role", "content", _ROLES)
    return [_message("assistant", _text(row, name))]


def _preference(row: dict[str, Any]) -> Example:
    chosen, rejected = _reply(row, "chosen"), _reply(row, "rejected")
    # If the two columns hold whole conversations, `prompt` only repeats their first message.
    if len(chosen) == 1 and len(rejected) == 1:
        prompt = _prompt(row)
        chosen, rejected = prompt + chosen, prompt + rejected
    elif "prompt" in row and isinstance(row["prompt"], list):
        prompt = _prompt(row)
        chosen = chosen if chosen[: len(prompt)] == prompt else prompt + chosen
        rejected = rejected if rejected[: len(prompt)] == prompt else prompt + rejected
    return _pair(chosen, rejected)


def _unpaired(row: dict[str, Any]) -> Example:
    label = read_label(_column(row, "label"))
    messages = _prompt(row) + _reply(row, "completion")
    if messages[-1]["role"] != "assistant":
        raise BadRow("nothing_to_train", "column 'completion' does not end with a reply")
    example = _conversation(messages[:-1])
    example.completion, example.label = messages[-1]["content"], label
    return example


def _pair(chosen: list[Message], rejected: list[Message]) -> Example:
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1]["role"] != "assistant":
            raise BadRow("nothing_to_train", f"column {name!r} does not end with a reply")
    if chosen[:-1] != rejected[:-1]:
        at = next(
            (i for i, (a, b) in enumerate(zip(chosen[:-1], rejected[:-1], strict=False)) if a != b),
            min(len(chosen), len(rejected)) - 1,
        )
        raise BadRow(
            "prompts_differ",
            f"the prompts of chosen and rejected differ at turn {at + 1}; expected two replies to "
            "the same prompt",
        )
    example = _conversation(chosen[:-1])
    example.chosen, example.rejected = chosen[-1]["content"], rejected[-1]["content"]
    return example


def _conversation(messages: list[Message]) -> Example:
    first = next((m["role"] for m in messages if m["role"] != "system"), None)
    if first is None:
        raise BadRow("no_text", "the conversation has no user message")
    if first == "assistant":
        raise BadRow("role_order", "the conversation starts with the assistant, not with the user")
    return Example(messages)
