"""A row as its source holds it, and the errors of rows that cannot be used."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

# {"role": "system" | "user" | "assistant" | "tool", "content": text}. A reply may have REASONING
# and CALLS, the result of a call (role tool) its "name" and "tool_call_id". The first message of a
# conversation may have the TOOLS that the model can call.
Message = dict[str, Any]
REASONING = "reasoning_content"
CALLS = "tool_calls"
TOOLS = "tools"

MAX_MESSAGE = 1000  # characters; messages quote the row and are listed in the data card
SKIP_HINT = "Correct the row, or set on_bad_row: skip to leave such rows out and count them."


class BadRow(Exception):
    """A row that cannot be used.

    Args:
        reason: name under which the data card counts the row.
        message: what was found, what was expected and what to do; cut to MAX_MESSAGE characters.
    """

    def __init__(self, reason: str, message: str) -> None:
        if len(message) > MAX_MESSAGE:
            message = f"{message[: MAX_MESSAGE - 200]} ... {message[-190:]}"
        super().__init__(reason, message)
        self.reason = reason
        self.message = message


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row before it is parsed.

    Attributes:
        file: name of the file, for messages.
        number: from 1; the line of a .jsonl file, else the position of the row in its file.
        data: columns by name, an undecoded JSON line, a plain text, or the BadRow that says why
            it cannot be read.
        dropped: reason for which the reader drops the row; empty: it keeps it.
    """

    file: str
    number: int
    data: Any
    dropped: str = ""

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, which is five times slower for a dataclass with slots."""
        return RawRow, (self.file, self.number, self.data, self.dropped)

    def where(self) -> str:
        """File and number, for messages."""
        return f"{self.file}, row {self.number}"

    def columns(self, renames: dict[str, str]) -> dict[str, Any]:
        """The row's columns under the names that its format expects.

        Args:
            renames: expected name -> name in the file.

        Raises:
            BadRow: invalid UTF-8, malformed JSON, not an object, or a renamed column is missing.
        """
        if isinstance(self.data, BadRow):
            raise self.data
        value = parse_line(self.data) if isinstance(self.data, bytes) else self.data
        if isinstance(value, str):
            value = {"text": value}
        if not isinstance(value, dict):
            raise BadRow(
                "not_an_object",
                f"the row is a JSON {type(value).__name__}; expected an object with columns"
                + "; if it is the whole table, rename the file to .json" * isinstance(value, list),
            )
        if not renames:
            return value
        row = {name: item for name, item in value.items() if name not in renames.values()}
        for wanted, present in renames.items():
            if present not in value:
                raise BadRow(
                    "missing_column",
                    f"there is no column {present!r} to use as {wanted!r}; the row has "
                    f"{names(value)}; correct the setting "
                    f"{'curriculum' if wanted == 'curriculum' else 'columns'}",
                )
            hidden = value.get(wanted)
            if wanted not in renames.values() and hidden not in (None, "", [], value[present]):
                raise BadRow(
                    "unused_column",
                    f"columns: {{{wanted}: {present}}} hides the file's own column {wanted!r}, "
                    f"which holds {short(hidden)}. If the rows are right without it, remove it "
                    "from the file; else give it a name in columns too, such as "
                    f"{{system: {wanted}}}",
                )
            row[wanted] = value[present]
        return row


def short(value: Any, longest: int = 60) -> str:
    """A value as a message shows it: its repr in at most ``longest`` characters."""
    try:
        text = repr(value[: 2 * longest] if isinstance(value, str) else value)
    except RecursionError:
        text = f"a {type(value).__name__} of many levels"
    return text if len(text) <= longest else f"{text[: longest - 4]} ..."


def names(row: dict[str, Any]) -> str:
    """The names of a row's first twelve columns, for a message."""
    shown = [short(name, 40) for name in list(row)[:12]]
    more = [f"{len(row) - 12:,} more"] if len(row) > 12 else []
    return ", ".join(shown + more) or "no columns"


def parse_line(line: bytes) -> Any:
    """The JSON value on a line.

    Raises:
        BadRow: invalid UTF-8 or malformed JSON.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(
            "invalid_utf8",
            f"byte {error.start + 1} of the line (0x{line[error.start]:02x}) is not UTF-8; "
            "convert the file to UTF-8",
        ) from None
    return parse_json(text)


def parse_json(text: str) -> Any:
    """A JSON value.

    Raises:
        BadRow: the text is not one JSON value, or an object in it repeats a key.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        if text.strip() in ("[", "{", "[{"):
            raise BadRow(
                "malformed_json",
                f"malformed JSON: the line is only {text.strip()!r}. One JSON value over several "
                "lines is a file of type .json: rename it",
            ) from None
        near = text[max(0, error.pos - 20) : error.pos + 20].strip()
        message = f"malformed JSON at column {error.pos + 1} ({error.msg}) near {near!r}"
        raise BadRow("malformed_json", message) from None
    except (ValueError, RecursionError) as error:
        raise BadRow("malformed_json", f"malformed JSON ({json_problem(error)})") from None


def json_problem(error: ValueError | RecursionError) -> str:
    """An error of Python's JSON parser, in words about the file."""
    if isinstance(error, RecursionError):
        return "lists or objects are nested too deeply to be read"
    if "integer string conversion" in str(error):
        return "a number has thousands of digits"
    return str(error)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object without repeated keys, of which Python would silently take the last one."""
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise BadRow("double_key", f"the key {short(twice)} appears twice in one object")
    return value


def whole_text(value: str, name: str) -> str:
    """The text, if it can be encoded as UTF-8.

    Args:
        name: of the column or message, for the error.

    Raises:
        BadRow: the text holds a lone surrogate.
    """
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow(
                "invalid_utf8",
                f"{name} holds half a character (a lone surrogate) at position {error.start + 1}",
            ) from None
    return value


def message_text(message: Message) -> str:
    """What a message says, its calls of tools as JSON."""
    calls = message.get(CALLS)
    parts = [message["content"], json.dumps(calls, ensure_ascii=False) if calls else ""]
    return "\n".join(filter(None, parts))
