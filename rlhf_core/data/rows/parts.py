"""Reads the parts of a row: the prompt with its history and system message, a reply, a text."""

from __future__ import annotations

import re
from typing import Any

from rlhf_core.data.rows.columns import Rules, is_empty
from rlhf_core.data.rows.layout import CALL_COLUMN, CONVERSATION, PROMPT, REPLY, Layout
from rlhf_core.data.rows.markers import check_turns
from rlhf_core.data.rows.messages import (
    check_text,
    is_messages,
    is_transcript,
    read_messages,
    read_transcript,
    wrong_type,
)
from rlhf_core.data.rows.row import CALLS, BadRow, Message, names, short
from rlhf_core.data.rows.tools import read_calls

_TEXTS = re.compile(r"""\s*\[\s*"(?:[^"\\]|\\.)*"\s*(?:,\s*"(?:[^"\\]|\\.)*"\s*)*\]\s*\Z""")


def message(role: str, content: str) -> Message:
    """A message."""
    return {"role": role, "content": content}


def column(row: dict[str, Any], name: str) -> Any:
    """The value of a column. Raises BadRow if the row does not have it."""
    if name not in row:
        raise BadRow(
            "missing_column",
            f"there is no column {name!r}; the row has {names(row)}. If it has another name, set "
            f'columns: {{"{name}": "<its name>"}}; if the format is another one, set format',
        )
    return row[name]


def text_of(row: dict[str, Any], name: str) -> str:
    """The text of a column. Raises BadRow if it holds something else, or nothing."""
    value = column(row, name)
    if value is None:
        raise BadRow("no_text", f"column {name!r} is null")
    if not isinstance(value, str):
        raise wrong_type(name, value, "text")
    return check_text(value, f"column {name!r}")


def prompt_of(row: dict[str, Any], layout: Layout, rules: Rules) -> list[Message]:
    """The messages before a reply, with history and system message."""
    name = layout.conversation or layout.prompt
    if layout.instruction:
        messages = [message("user", _instruction(row, layout))]
    elif layout.conversation or is_messages(column(row, name)):
        messages = read_messages(column(row, name), name, rules)
    else:
        text = text_of(row, name)
        if _TEXTS.match(text):
            raise BadRow(
                "transcript",
                f"column {name!r} is a list of texts, written as one text; if they are turns, "
                "write them as messages ({role, content})",
            )
        if is_transcript(text):
            messages = _transcript_prompt(text, name)
        else:
            check_turns(text, f"column {name!r}")
            messages = [message("user", text)]
    if layout.history and not is_empty(row[layout.history]):
        start = 1 if messages[0]["role"] == "system" else 0
        messages[start:start] = _history(row[layout.history], layout.history, rules)
    return with_system(row, layout, messages)


def _transcript_prompt(text: str, name: str) -> list[Message]:
    return read_transcript(text.rstrip().removesuffix("\n\nAssistant:"), name)


def _instruction(row: dict[str, Any], layout: Layout) -> str:
    """The instruction, and after an empty line its input."""
    extra = row.get(layout.input) if layout.input else None
    if extra is not None and not isinstance(extra, str):
        raise wrong_type(layout.input, extra, "text or nothing")
    question = text_of(row, layout.instruction)
    if extra and extra.strip():
        question += "\n\n" + check_text(extra, f"column {layout.input!r}")
    return question


def _history(value: Any, name: str, rules: Rules) -> list[Message]:
    """Earlier turns: messages, or pairs of a question and its answer."""
    if isinstance(value, dict) or (isinstance(value, list) and isinstance(value[0], dict)):
        return read_messages(value, name, rules)
    if not isinstance(value, list):
        raise wrong_type(name, value, "pairs of question and answer, or messages")
    turns = []
    for position, pair in enumerate(value, 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(
            isinstance(text, str) for text in pair
        ):  # fmt: skip
            raise BadRow(
                "wrong_type",
                f"entry {position} of column {name!r} is {short(pair)}; expected a question and "
                "its answer",
            )
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append(message(role, check_text(text, f"entry {position} of column {name!r}")))
    return turns


def with_system(row: dict[str, Any], layout: Layout, messages: list[Message]) -> list[Message]:
    """The messages, after the system message of a column of its own."""
    if not layout.system or is_empty(value := row[layout.system]):
        return messages
    name = layout.system
    if not isinstance(value, str):
        raise wrong_type(name, value, "text or nothing")
    text = check_text(value, f"column {name!r}")
    given = [m["content"] for m in messages if m["role"] == "system"]
    if given and given[0].strip() != text.strip():
        raise BadRow(
            "unused_column",
            f"column {name!r} and the conversation hold two different system messages; keep one, "
            f"or set ignore_columns: [{name}]",
        )
    return messages if given else [message("system", text), *messages]


def reply_of(row: dict[str, Any], name: str, rules: Rules) -> list[Message]:
    """A column with a reply: a text, messages that end with the reply, or calls of tools."""
    value = column(row, name)
    if name == CALL_COLUMN:
        return [message("assistant", "") | {CALLS: read_calls(value, f"column {name!r}", rules)}]
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        raise BadRow(
            "wrong_type",
            f"column {name!r} holds a list of {len(value)} texts; expected one reply: write a row "
            "for each reply that is good, or a pair with the better one as chosen and another one "
            "as rejected",
        )
    if is_messages(value):
        return read_messages(value, name, rules)
    return [message("assistant", text_of(row, name))]


_MAY_REPEAT = frozenset(
    {*CONVERSATION, *PROMPT, *REPLY, "instruction", "question", "query", "text", "chosen"}
)
LONG = 20  # characters from which a text that occurs in another one is no chance


def repeated(
    row: dict[str, Any], layout: Layout, messages: list[Message], replies: list[str]
) -> set[str]:
    """Unread columns that only say once more what was read: `prompt` beside `messages`, or a
    context that the prompt quotes.

    Args:
        replies: that were read besides the messages.
    """
    again: set[str] = set()
    if not layout.doubtful:
        return again
    texts = [m["content"] for m in messages] + replies
    bare = [text.strip() for text in texts]
    asked = [m["content"] for m in messages if m["role"] != "assistant"]
    for name in layout.doubtful:
        value = row[name]
        if is_transcript(value):
            value = [dict(m) for m in _transcript_prompt(value, name)]
        if isinstance(value, str) and name in _MAY_REPEAT:
            same = repeats_text(value.strip(), bare)
            if not same and name in ("text", "prompt"):  # the whole row, rendered
                read = [v for n, v in row.items() if n not in layout.unread and isinstance(v, str)]
                same = all(text.strip() in value for text in (read or texts))
        elif isinstance(value, str):  # a context, which the prompt quotes
            same = repeats_text(value.strip(), [text.strip() for text in asked])
        else:
            same = (
                name in _MAY_REPEAT
                and isinstance(value, list)
                and all(
                    isinstance(item, dict) and item.get("content", item.get("value")) in texts
                    for item in value
                )
            )
        if same:
            again.add(name)
    return again


def repeats_text(value: str, texts: list[str]) -> bool:
    """Whether a text is one of some texts, or a long part of one."""
    return value in texts or (len(value) >= LONG and any(value in text for text in texts))
