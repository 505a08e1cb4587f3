"""Which column of a row holds which part, by the names of its columns.

The names that projects use for the same part count as one: TRL's prompt and completion, OpenRLHF's
input and output, LLaMA-Factory's instruction, input, output, system, history and kto_tag.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from rlhf_core.data.rows.meanings import is_part
from rlhf_core.errors import DataError
from rlhf_core.jobs import Format

CONVERSATION = ("messages", "conversations", "conversation")
PROMPT = ("prompt", "input")
REPLY = ("completion", "response", "output")
CALL_COLUMN = "tool_calls"  # a reply that consists of calls
LABEL = ("label", "kto_tag")
SYSTEM = ("system", "system_prompt")
TOOL_COLUMNS = ("tools", "functions")

# The columns of each format, for messages.
FORMAT_COLUMNS: dict[str, str] = {
    "alpaca": "(instruction, input, output)",
    "messages": "(messages)",
    "sharegpt": "(conversations)",
    "prompt_completion": "(prompt, completion)",
    "hh": "(chosen, rejected; transcripts)",
    "preference": "(prompt, chosen, rejected)",
    "implicit_prompt": "(chosen, rejected; texts that begin with the prompt)",
    "unpaired": "(prompt, completion, label)",
    "prompt": "(prompt)",
    "text": "(text)",
}
_QUESTION = (*PROMPT, "instruction", *CONVERSATION, "history", *SYSTEM, *TOOL_COLUMNS)
# Every column that a format may read.
_READ: dict[str, tuple[str, ...]] = {
    "alpaca": ("instruction", "input", *REPLY, CALL_COLUMN, "history", *SYSTEM, *TOOL_COLUMNS),
    "messages": (*CONVERSATION, "input", *SYSTEM, *TOOL_COLUMNS),
    "sharegpt": (*CONVERSATION, "input", *SYSTEM, *TOOL_COLUMNS),
    "prompt_completion": (*PROMPT, *REPLY, CALL_COLUMN, "history", *SYSTEM, *TOOL_COLUMNS),
    "hh": ("chosen", "rejected", *SYSTEM, *TOOL_COLUMNS),
    "preference": (*_QUESTION, "chosen", "rejected"),
    "implicit_prompt": ("chosen", "rejected", *SYSTEM, *TOOL_COLUMNS),
    "unpaired": (*_QUESTION, *REPLY, CALL_COLUMN, *LABEL),
    "prompt": (*PROMPT, "history", *SYSTEM, *TOOL_COLUMNS),
    "text": ("text",),
}
# A label says nothing about a row without replies; it may be a class or an answer.
HARMLESS: dict[str, tuple[str, ...]] = {"text": LABEL, "prompt": LABEL}


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns of a row by part; "" for a part that it does not have.

    Attributes:
        conversation: messages; they may end with the reply.
        instruction, input: a prompt in two texts.
        prompt: a prompt in one column.
        reply: a single reply.
        tools: the tools that the model may call.
        unread: the other columns.
        doubtful: those of them that may say once more what was read.
    """

    conversation: str = ""
    instruction: str = ""
    input: str = ""
    prompt: str = ""
    reply: str = ""
    label: str = ""
    system: str = ""
    history: str = ""
    tools: str = ""
    unread: tuple[str, ...] = ()
    doubtful: tuple[str, ...] = ()


def first_of(known: tuple[str, ...], has: frozenset[str]) -> str:
    """The first of some names that a row has; "" if it has none."""
    return next((name for name in known if name in has), "")


@functools.lru_cache(maxsize=256)
def find_layout(format: Format, names: tuple[str, ...]) -> Layout:
    """The layout of a row with these columns.

    A part that the format needs and the row lacks has the name that the format expects, so that
    reading it says what is missing.
    """
    has = frozenset(names)
    parts: dict[str, str] = {}
    if format in ("messages", "sharegpt"):
        own = "messages" if format == "messages" else "conversations"
        # OpenRLHF keeps whole conversations in the column input.
        parts["conversation"] = (
            own if own in has else first_of((*CONVERSATION, "input"), has) or own
        )
    elif format == "alpaca":
        reply = first_of((*REPLY[::-1], CALL_COLUMN), has) or "output"
        parts |= {"instruction": "instruction", "reply": reply}
    elif format in ("prompt_completion", "prompt"):
        parts["prompt"] = first_of(PROMPT, has) or "prompt"
    elif format in ("preference", "unpaired"):
        parts |= _question(has, format)
    if format == "prompt_completion" or (format == "unpaired" and "conversation" not in parts):
        parts["reply"] = first_of((*REPLY, CALL_COLUMN), has) or "completion"
    if format == "unpaired":
        parts["label"] = first_of(LABEL, has) or "label"
    if "instruction" in parts and "input" in has:
        parts["input"] = "input"
    if "instruction" in parts or "prompt" in parts or format == "preference":
        parts["history"] = "history" if "history" in has else ""
    if format != "text":
        parts["system"] = first_of(SYSTEM, has)
        parts["tools"] = first_of(TOOL_COLUMNS, has)
    used = {*parts.values()} | {name for name in ("chosen", "rejected") if name in _READ[format]}
    used |= {"text"} if format == "text" else set()
    unread = tuple(name for name in names if name not in used)
    return Layout(**parts, unread=unread, doubtful=tuple(filter(is_part, unread)))


def _question(has: frozenset[str], format: Format) -> dict[str, str]:
    """The columns of the prompt before a pair or a labelled reply."""
    conversation = first_of(CONVERSATION, has)
    alone = format == "preference" or not first_of((*REPLY, CALL_COLUMN), has)
    if conversation and alone and not (format == "preference" and "prompt" in has):
        return {"conversation": conversation}
    if "prompt" in has or "instruction" not in has:
        return {"prompt": first_of(PROMPT, has) or "prompt"}
    return {"instruction": "instruction"}


def check_columns(format: Format, columns: dict[str, str], carried: tuple[str, ...]) -> None:
    """Check that each name in the setting `columns` has an effect.

    Args:
        carried: names that a later step reads.

    Raises:
        DataError: the format reads no column of some name.
    """
    for name, present in columns.items():
        if name not in _READ[format] and name not in carried:
            raise DataError(
                f"columns: {{{name}: {present}}} has no effect: format {format} reads no column "
                f"{name!r}, only {', '.join((*_READ[format], *carried))}. Correct the name, remove "
                "it, or set another format."
            )
