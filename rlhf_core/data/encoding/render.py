"""Renders an example with the chat template, as far as its purpose needs it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_core.data.dataset.schema import dump_messages
from rlhf_core.data.dataset.split import first_prompt
from rlhf_core.data.encoding import templates, tool_facts
from rlhf_core.data.rows.formats import Example
from rlhf_core.data.rows.messages import Untrained, untrained
from rlhf_core.data.rows.row import CALLS, REASONING, TOOLS, BadRow, Message
from rlhf_core.errors import DataError
from rlhf_core.jobs import Purpose

UNLISTED = "calls of tools that the row does not list: no column tools"  # a note of the card


@dataclass(slots=True)
class Rendered:
    """A row before tokenisation. Each segment and each reply is tokenised on its own.

    Attributes:
        columns: the row's columns besides the token ids.
        prompt: text of the prompt, for the split.
        replies: the rendered replies after the prompt, for pairs and labelled replies.
        bos_eos: ids for plain text, -1 for a missing one; None: the template writes its own.
        flags: whether each reply is trained on; empty: all are.
    """

    segments: list[templates.Segment]
    columns: dict[str, Any]
    prompt: str
    replies: tuple[str, ...] = ()
    bos_eos: tuple[int, int] | None = None
    flags: tuple[bool, ...] = ()


def render_example(
    tokenizer: Any, example: Example, purpose: Purpose, system: str | None, notes: Counter[str]
) -> list[Rendered]:
    """Render an example for its purpose: one row, or several of a conversation, see
    `templates.render`.

    Args:
        system: system message for conversations without one; None: none.
        notes: remark -> number of rows; counts conversations whose last turns are left out, and
            those with calls of tools that they do not list.

    Raises:
        BadRow: the chat template rejects it, or it holds nothing for this purpose.
    """
    if example.text is not None and purpose in ("sft", "pretrain"):
        text = example.text
        segments = [templates.Segment(text, True)]
        return [Rendered(segments, {"prompt": text[:200]}, text, bos_eos=(-1, -1))]
    if example.text is not None:
        example = Example([{"role": "user", "content": example.text}])
    messages, replies = _with_system(example.messages, system), example.replies
    if example.reasoning and not templates.reads_reasoning(tokenizer):
        raise BadRow(
            "unused_column",
            f"{example.reasoning} holds reasoning, which the chat template does not read: put it "
            "into the reply's text in the form that the model writes, such as <think>...</think>, "
            "or name the key in ignore_columns",
        )
    _check_special_tokens(tokenizer, [text for m in [*messages, *replies] for text in _texts(m)])
    prompt = first_prompt(messages)
    try:
        if tool_facts.uses_tools([*messages, *replies]):
            tool_facts.check_tools(tokenizer, [*messages, *replies])
            if tool_facts.calls_unlisted([*messages, *replies]):
                notes[UNLISTED] += 1
            messages = tool_facts.unmarked(tokenizer, messages)
        if purpose == "preference":
            return [_render_replies(tokenizer, messages, replies, prompt, ("chosen", "rejected"))]
        if purpose == "unpaired":
            row = _render_replies(tokenizer, messages, replies, prompt, ("completion",))
            row.columns["label"] = example.label
            return [row]
        if purpose == "prompts":
            text = _render_prompt(tokenizer, messages, replies, prompt)
            if example.label is False:
                text.columns["reference"] = None
            return [text]
        if replies:
            messages = [*untrained(messages), replies[0]]
        return _render_conversation(tokenizer, messages, prompt, purpose, notes)
    except DataError as error:
        raise BadRow("template", str(error)) from None


def _with_system(messages: list[Message], system: str | None) -> list[Message]:
    """The conversation with the data set's system message, if it has none; the first message holds
    the tools."""
    if not system or any(m["role"] == "system" for m in messages):
        return messages
    first = {name: value for name, value in messages[0].items() if name != TOOLS}
    tools = {TOOLS: messages[0][TOOLS]} if TOOLS in messages[0] else {}
    return [{"role": "system", "content": system} | tools, first, *messages[1:]]


def _texts(message: Message) -> list[str]:
    """All texts of a message."""
    found = [message["content"]]
    if len(message) == 2:
        return found
    if REASONING in message:
        found.append(message[REASONING])
    found += [json.dumps(message[key], ensure_ascii=False) for key in (CALLS, TOOLS)
              if key in message]  # fmt: skip
    return found


def _check_special_tokens(tokenizer: Any, texts: Sequence[str]) -> None:
    """Raise BadRow if a text contains one of the tokenizer's special tokens."""
    for text in texts:
        if found := templates.find_special_token(tokenizer, text):
            raise BadRow(
                "special_token",
                f"a message contains {found!r}, which the tokenizer reads as a special token; "
                "remove it from the text",
            )


def _render_conversation(
    tokenizer: Any, messages: list[Message], prompt: str, purpose: Purpose, notes: Counter[str]
) -> list[Rendered]:
    """All turns up to the last reply. The loss covers the replies; for pretraining, everything."""
    replies = sum(m["role"] == "assistant" for m in messages)
    if not replies:
        raise BadRow("nothing_to_train", "the conversation has no assistant message")
    if messages[-1]["role"] != "assistant":
        notes["turns after the last reply left out"] += 1
        while messages[-1]["role"] != "assistant":
            messages = messages[:-1]
    trained = [not isinstance(m, Untrained) for m in messages if m["role"] == "assistant"]
    parts = _render_trained(tokenizer, messages, [True] if purpose == "pretrain" else trained)
    if purpose == "pretrain":  # the whole conversation, which ends with its last reply
        if len(parts) > 1 and any(map(templates.has_reasoning, messages[:-1])):
            notes["without the reasoning of earlier replies, as the chat template writes them"] += 1
        parts = [[templates.Segment(segment.text, True) for segment in parts[-1]]]
    if len(parts) > 1:
        notes[
            "split into a row for each reply, as the chat template writes past ones otherwise"
        ] += 1
    flags = () if purpose == "pretrain" or all(trained) else tuple(trained)
    return [Rendered(segments, {"prompt": prompt}, prompt, flags=flags) for segments in parts]


def _render_trained(
    tokenizer: Any, messages: list[Message], trained: Sequence[bool]
) -> list[list[templates.Segment]]:
    """As `templates.render`, with the loss on some replies only: ``trained`` has a flag for each.

    Raises:
        BadRow: none is trained on. Also as `templates.render`.
    """
    if all(trained):
        return templates.render(tokenizer, messages)
    if not any(trained):
        raise BadRow("nothing_to_train", "each reply has the weight 0: nothing is trained on")
    if not any(trained[:-1]):
        return [templates.render_reply(tokenizer, messages)]
    parts = templates.render(tokenizer, messages)
    if len(parts) > 1:
        return [segments for segments, flag in zip(parts, trained, strict=True) if flag]
    left = iter(trained)
    return [[templates.Segment(s.text, s.in_loss and next(left)) for s in parts[0]]]


def _render_prompt(
    tokenizer: Any, messages: list[Message], replies: Sequence[Message], prompt: str
) -> Rendered:
    """All messages up to the last turn of the user, or to results of tools at the end; the reply to
    it becomes `reference`."""
    reference = replies[0]["content"] or None if replies else None
    if not replies and messages[-1]["role"] != "tool":
        last = max(i for i, m in enumerate(messages) if m["role"] == "user")
        end = next((i for i in range(last, len(messages)) if messages[i]["role"] == "assistant"),
                   len(messages))  # fmt: skip
        answers = [m["content"] for m in messages[end:] if m["role"] == "assistant"]
        calls = any(CALLS in m for m in messages[end:])  # the answer comes after them
        reference = (answers[-1 if calls else 0] or None) if answers else None
        messages = messages[:end]
    columns = {"prompt": dump_messages(messages), "reference": reference}
    return Rendered(templates.render_prompt(tokenizer, messages), columns, prompt)


def _render_replies(
    tokenizer: Any,
    messages: list[Message],
    replies: Sequence[Message],
    prompt: str,
    names: Sequence[str],
) -> Rendered:
    """A prompt with one or two replies. ``names`` are the columns with their texts: of a reply with
    calls or reasoning in keys of their own, what the template writes."""
    before, texts = templates.render_replies(tokenizer, messages, replies)
    ends = templates.ends_of_turns(tokenizer)
    columns: dict[str, Any] = {"prompt": dump_messages(messages)}
    for name, reply, text in zip(names, replies, texts, strict=True):
        plain = CALLS not in reply and REASONING not in reply
        end = next((end for end in ends if text.endswith(end)), "")
        columns[name] = reply["content"] if plain else text.removesuffix(end).strip()
    return Rendered(before, columns, prompt, replies=tuple(texts))
