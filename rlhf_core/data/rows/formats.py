"""Converts rows of every supported format into one shape, `Example`.

alpaca             instruction, input (may be missing), output
messages           messages: [{"role": "system|user|assistant", "content": ...}, ...]
sharegpt           conversations: [{"from": "human|gpt|system", "value": ...}, ...]
prompt_completion  prompt, completion (texts or messages)
hh                 chosen, rejected: transcripts with "\\n\\nHuman:" and "\\n\\nAssistant:"
preference         prompt, chosen, rejected (texts or messages)
implicit_prompt    chosen, rejected: texts that begin with the same prompt
unpaired           prompt, completion (texts or messages), label: was the reply good? (see `labels`)
prompt             prompt (text or messages)
text               text

A prompt may also be an instruction with input, or a conversation; `layout` has the other names.
`system` and `history` come before it. `tools` (or `functions`) are those that the model may call.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rlhf_core.data.rows.columns import Rules, check_unread, is_empty
from rlhf_core.data.rows.labels import read_label
from rlhf_core.data.rows.layout import HARMLESS, Layout, find_layout
from rlhf_core.data.rows.markers import check_markers, check_turns
from rlhf_core.data.rows.messages import Untrained, is_messages, read_transcript, untrained
from rlhf_core.data.rows.parts import (
    LONG,
    column,
    message,
    prompt_of,
    repeated,
    repeats_text,
    reply_of,
    text_of,
    with_system,
)
from rlhf_core.data.rows.row import CALLS, TOOLS, BadRow, Message
from rlhf_core.data.rows.tools import (
    check_calls_in_text,
    match_results,
    read_tools,
    with_tools,
    without_padding,
)
from rlhf_core.jobs import Format, Purpose


@dataclass(slots=True)
class Example:
    """A row in one shape.

    Attributes:
        messages: a conversation, or the messages before a pair of replies or a labelled reply;
            empty if there is `text`.
        replies: the two of a pair, the better one first; or a labelled one. With reasoning and
            calls of tools as in messages.
        text: plain text.
        reasoning: a key of a message that only some chat templates read; "" for none.
        label: whether the labelled reply was good.
    """

    messages: list[Message]
    replies: list[Message] = field(default_factory=list)
    text: str | None = None
    reasoning: str = ""
    label: bool | None = None

    @property
    def chosen(self) -> str | None:
        """The text of the better reply of a pair."""
        return self._said(0, 2)

    @property
    def rejected(self) -> str | None:
        """The text of the worse reply of a pair."""
        return self._said(1, 2)

    @property
    def completion(self) -> str | None:
        """The text of a labelled reply."""
        return self._said(0, 1)

    def _said(self, number: int, of: int) -> str | None:
        return self.replies[number]["content"] if len(self.replies) == of else None


def normalise(
    row: dict[str, Any], format: Format, purpose: Purpose, rules: Rules | None = None
) -> Example:
    """Convert a row as far as the purpose needs it.

    Args:
        rules: what may be left unread; its notes count what is.

    Raises:
        BadRow: a column is missing, has the wrong type, is empty, or is not read though it may
            change what the row means.
    """
    rules = rules or Rules(purpose)
    rules.remarks.clear()
    rules.reasoning = ""
    ignored = [name for name in row if name in rules.ignored] if rules.ignored else []
    read = {name: row[name] for name in row if name not in ignored} if ignored else row
    layout = find_layout(format, tuple(read))
    example = _READERS[format](read, layout, rules)
    example.reasoning = rules.reasoning
    if example.messages:
        _finish_tools(example, read.get(layout.tools), layout.tools, rules)
    replies = [reply["content"] for reply in example.replies]
    if layout.unread or ignored:
        again = repeated(read, layout, example.messages, replies)
        unread = [name for name in layout.unread if name not in again]
        check_unread(
            row,
            unread + ignored,
            rules,
            harmless=HARMLESS.get(format, ()),
            document=format == "text",
        )
    if example.text is None:
        check_markers(example.messages, replies)
    elif purpose != "pretrain":
        check_turns(example.text, "column 'text'")
    if rules.remarks:
        rules.count()
    return example


def _finish_tools(example: Example, value: Any, name: str, rules: Rules) -> None:
    """Add the tools of a column to an example, and put results and arguments in order."""
    if not is_empty(value):
        tools = read_tools(value, f"column {name!r}")
        example.messages = with_tools(example.messages, tools, rules)
    if tools := example.messages[0].get(TOOLS):
        check_calls_in_text([*example.messages, *example.replies], tools)
    if any(m["role"] == "tool" for m in example.messages):
        example.messages = match_results(example.messages, rules)
    if tools := example.messages[0].get(TOOLS):
        for said in (example.messages, example.replies):
            said[:] = [without_padding(m, tools) if CALLS in m else m for m in said]


# --------------------------------------------------------------------------- formats


def _plain(row: dict[str, Any], layout: Layout, rules: Rules) -> Example:
    return Example([], text=text_of(row, "text"))


def _talk(row: dict[str, Any], layout: Layout, rules: Rules) -> Example:
    return _conversation(prompt_of(row, layout, rules))


def _answered(row: dict[str, Any], layout: Layout, rules: Rules) -> Example:
    prompt = prompt_of(row, layout, rules)
    if rules.purpose == "prompts" and not row.get(layout.reply):
        return _conversation(prompt)
    if layout.prompt:  # its replies are context; those of a history are trained on, as others
        prompt = untrained(prompt)
    return _conversation(prompt + reply_of(row, layout.reply, rules))


def _hh(row: dict[str, Any], layout: Layout, rules: Rules) -> Example:
    chosen, rejected = (
        read_transcript(text_of(row, name), name) for name in ("chosen", "rejected")
    )
    return _pair(with_system(row, layout, chosen), with_system(row, layout, rejected))


def _common_start(first: str, second: str) -> str:
    pairs = enumerate(zip(first, second, strict=False))
    return first[: next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))]


def _implicit(row: dict[str, Any], layout: Layout, rules: Rules) -> Example:
    texts = [text_of(row, name) for name in ("chosen", "rejected")]
    shared = _common_start(*texts)
    words = re.match(r"(?s).*(?=\s)", shared)  # up to the last space: a reply starts with a word
    prompt = (words.group() if words else "" if shared.isascii() else shared).rstrip()
    if not prompt or prompt in (text.rstrip() for text in texts):
        raise BadRow(
            "no_prompt",
            "chosen and rejected do not begin with the same words and go on differently; format "
            "implicit_prompt reads the beginning that they share as the prompt",
        )
    before = with_system(row, layout, [message("user", prompt)])
    chosen, rejected = ([*before, message("assistant", t[len(prompt) :])] for t in texts)
    return _pair(chosen, rejected)


def _preference(row: dict[str, Any], layout: Layout, rules: Rules) -> Example:
    chosen, rejected = reply_of(row, "chosen", rules), reply_of(row, "rejected", rules)
    for name, reply in (("chosen", chosen), ("rejected", rejected)):
        _check_trained(reply[-1], name, rules)
    _check_not_repeated(row, layout)
    whole = len(chosen) > 1 or len(rejected) > 1
    # Whole conversations need no column with the prompt; if there is one, it repeats their start.
    present = layout.instruction or layout.conversation or layout.prompt in row
    prompt = prompt_of(row, layout, rules) if present or not whole else with_system(row, layout, [])
    if layout.conversation and len(prompt) > 1 and prompt[-1] == chosen[-1]:
        prompt = prompt[:-1]  # the conversation repeats the chosen reply
    return _pair(
        _continue(row, layout, prompt, chosen, "chosen"),
        _continue(row, layout, prompt, rejected, "rejected"),
    )


def _check_not_repeated(row: dict[str, Any], layout: Layout) -> None:
    """Check that the replies of a pair are not prompt and reply in one text."""
    prompt = row.get(layout.prompt)
    if isinstance(prompt, str) and len(prompt) >= LONG and all(
        isinstance(row[name], str) and row[name].startswith(prompt)
        for name in ("chosen", "rejected")
    ):  # fmt: skip
        raise BadRow(
            "transcript",
            "columns 'chosen' and 'rejected' begin with the prompt, which would be trained on as a "
            "part of the replies; remove it there, or set format: implicit_prompt",
        )


def _continue(
    row: dict[str, Any], layout: Layout, prompt: list[Message], reply: list[Message], name: str
) -> list[Message]:
    """The conversation of a prompt and of a column that goes on after it, or repeats it first."""
    if reply[0]["role"] == "assistant":
        return prompt + reply
    spoken = [m for m in reply if m["role"] != "system"]
    asked = [m for m in prompt if m["role"] != "system"]
    texts = [m["content"] for m in spoken[:-1]]
    # A prompt as one text may be a part of the conversation, such as its last question.
    whole = bool(layout.conversation) or is_messages(row.get(layout.prompt))
    if spoken[: len(asked)] != asked and (
        whole or not all(repeats_text(m["content"].strip(), texts) for m in asked)
    ):
        raise BadRow(
            "prompts_differ",
            f"column {name!r} is a whole conversation that does not contain the prompt of column "
            f"{layout.conversation or layout.instruction or layout.prompt!r}; leave one of the two "
            "out, or set ignore_columns",
        )
    first = [m for m in prompt if m["role"] == "system"]
    own = [m for m in reply if m["role"] == "system"]
    if first and own and first != own:
        raise BadRow(
            "prompts_differ",
            f"column {name!r} and the prompt hold different system messages; keep one of the two",
        )
    return reply if own else [*first, *reply]


def _unpaired(row: dict[str, Any], layout: Layout, rules: Rules) -> Example:
    label = read_label(column(row, layout.label), layout.label)
    messages = prompt_of(row, layout, rules)
    if layout.reply:
        messages = messages + reply_of(row, layout.reply, rules)
    name = layout.reply or layout.conversation
    if messages[-1]["role"] != "assistant":
        raise BadRow("nothing_to_train", f"column {name!r} does not end with a reply")
    _check_trained(messages[-1], name, rules)
    example = _conversation(messages[:-1])
    example.replies, example.label = [messages[-1]], label
    return example


_READERS: dict[str, Callable[[dict[str, Any], Layout, Rules], Example]] = {
    "alpaca": _answered,
    "messages": _talk,
    "sharegpt": _talk,
    "prompt_completion": _answered,
    "hh": _hh,
    "preference": _preference,
    "implicit_prompt": _implicit,
    "unpaired": _unpaired,
    "prompt": _talk,
    "text": _plain,
}


# --------------------------------------------------------------------------- details


def _check_trained(reply: Message, name: str, rules: Rules) -> None:
    """Check that the reply of a pair or of a label is not marked as context."""
    if isinstance(reply, Untrained) and rules.purpose != "prompts":
        raise BadRow("nothing_to_train", f"the reply in column {name!r} has the weight 0")


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
            "the same prompt"
            + "; write a pair for each turn that differs"
            * any(CALLS in m for m in chosen),
        )
    example = _conversation(chosen[:-1])
    example.replies = [chosen[-1], rejected[-1]]
    return example


def _conversation(messages: list[Message]) -> Example:
    first = next((m["role"] for m in messages if m["role"] != "system"), None)
    if first is None:
        raise BadRow("no_text", "the conversation has no user message")
    if first in ("assistant", "tool"):
        raise BadRow("role_order", f"the conversation starts with the {first}, not with the user")
    return Example(messages)
