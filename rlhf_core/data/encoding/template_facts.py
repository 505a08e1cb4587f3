"""What a chat template does, found out by rendering short conversations with it.

A template is code: what it writes around a reply, and whether it writes a past reply as it writes
a new one, shows only in what it renders. Reasoning models (Qwen3, the R1 distills, gpt-oss) write
past replies without their reasoning.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf_core.data.encoding.apply import ADVICE, apply_chat
from rlhf_core.data.encoding.tool_facts import (
    PROBE_TOOL,
    check_written,
    probe_call,
    tool_facts_of,
    uses_tools,
    with_arguments,
    with_short_ids,
)
from rlhf_core.data.rows.row import CALLS, REASONING, TOOLS, Message
from rlhf_core.errors import DataError, ModelError

OPEN, CLOSE = "<think>", "</think>"  # around a reply's reasoning
PROBE = "Zebra answers 7"
_MARKS = re.compile(f"{OPEN}|{CLOSE}")


@dataclass(frozen=True, slots=True)
class TemplateFacts:
    """Facts about a tokenizer with its template.

    Attributes:
        key: template and vocabulary size that the facts are valid for.
        end_text, end_id: the end-of-turn token.
        tail: what follows a reply's text, up to the end-of-turn token and with it.
        markers: matches the text of any token that no message may hold: special tokens, and
            others that the template writes around turns.
        prefix: put before a text and removed after tokenisation, for tokenizers that add a space.
        alike: a past reply is written as a new one; alike_reasoning: one with reasoning, too.
        dated: the template writes today's date.
        reads_reasoning: it writes reasoning that a reply has in a key of its own, or its prompt
            opens the reasoning, which the reply then begins with.
        call_end: the token that ends a reply with calls of tools, if it is another one (gpt-oss).
    """

    key: tuple[str, int]
    end_text: str
    end_id: int
    tail: str
    markers: re.Pattern[str] | None
    prefix: str
    alike: bool = False
    alike_reasoning: bool = False
    dated: bool = False
    reads_reasoning: bool = False
    call_end: str = ""


_FACTS: weakref.WeakKeyDictionary[Any, TemplateFacts] = weakref.WeakKeyDictionary()


def facts_of(tokenizer: Any) -> TemplateFacts:
    """The facts about a tokenizer's template; kept until the template changes.

    Raises:
        ModelError: the tokenizer has no chat template, or one that cannot be used.
    """
    key = (str(getattr(tokenizer, "chat_template", None)), len(tokenizer))
    facts = _FACTS.get(tokenizer)
    if facts is None or facts.key != key:
        facts = _FACTS[tokenizer] = _read(tokenizer, key)
    return facts


def apply_template(tokenizer: Any, messages: Sequence[Message], generation_prompt: bool) -> str:
    """The rendered text, with the tools that the first message holds.

    Raises:
        DataError: the template rejects the conversation. ModelError: it is no valid template.
    """
    if uses_tools(messages) and tool_facts_of(tokenizer).short_ids:
        messages = with_short_ids(messages)
    chat = [m if len(m) == 2 else _as_read(tokenizer, m) for m in messages]
    tools = messages[0].get(TOOLS) if messages else None
    return apply_chat(tokenizer, chat, tools or None, generation_prompt)


def generated_reply(
    tokenizer: Any, facts: TemplateFacts, messages: Sequence[Message], prompt: str
) -> str:
    """What generation would write after the prompt: the last message, a reply, to its end of turn.

    Args:
        prompt: the messages before it, with the generation prompt.

    Raises:
        DataError: the template writes the prompt in another way once the reply follows, or leaves
            out a part of the reply.
    """
    full = apply_template(tokenizer, messages, False)
    content, reasoning = messages[-1]["content"], messages[-1].get(REASONING, "")
    head, opened, blank = prompt.rpartition(OPEN)
    if opened and not blank.strip():
        if not full.startswith(head.rstrip()):
            raise DataError(_two_ways(prompt, full))
        return _after_opened_reasoning(facts, full, prompt, messages[-1])
    if not full.startswith(prompt):
        if not facts.call_end or CALLS in messages[-1]:
            raise DataError(_two_ways(prompt, full))
        # gpt-oss takes the reasoning before a call out once the answer follows, which was not there
        # when it was generated. What it writes of the answer itself does not depend on that.
        asked = [_user("Question 1")]
        prompt = apply_template(tokenizer, asked, True)
        full = apply_template(tokenizer, [*asked, messages[-1]], False)
    text = full[len(prompt) :]
    end = facts.call_end if facts.call_end and CALLS in messages[-1] else facts.end_text
    if (stop := text.find(end)) < 0:
        raise DataError(
            f"the chat template does not end this reply with {end!r}, though it does so "
            "after a short one"
        )
    if not all(p.strip() in text or _letters(p) in _letters(text) for p in (content, reasoning)):
        raise DataError(
            "the chat template leaves out a part of the reply, such as its reasoning; take that "
            f"part out of the data, or {ADVICE}"
        )
    check_written(messages[-1:], text)
    return text[: stop + len(end)]


# --------------------------------------------------------------------------- details


def _as_read(tokenizer: Any, message: Message) -> Message:
    """A message as templates read it: reasoning under all the names that they have for it,
    arguments of calls as an object or a text, and no tools, which they get by themselves."""
    read = {name: value for name, value in message.items() if name != TOOLS}
    if REASONING in read:
        read |= dict.fromkeys(("reasoning", "thinking"), read[REASONING])
    return with_arguments(read, tool_facts_of(tokenizer).as_text) if CALLS in read else read


def _after_opened_reasoning(facts: TemplateFacts, full: str, prompt: str, reply: Message) -> str:
    """A reply after a prompt that has opened its reasoning, which need not be there: as the
    template writes it if it keeps the reasoning where the prompt has it, else from its text."""
    content, reasoning = reply["content"], reply.get(REASONING, "")
    opened = prompt.rstrip()
    if full.startswith(opened):
        blank = prompt[len(opened) :]
        text = full[len(opened) :]
        text = text.removeprefix(blank) if text.startswith(blank) else text.lstrip()
        stop = text.find(facts.end_text)
        letters = _letters(text)
        kept = _letters(content).removeprefix(OPEN) in letters and _letters(reasoning) in letters
        if stop >= 0 and kept and CLOSE in text and not text.lstrip().startswith(OPEN):
            check_written([reply], text)
            return text[: stop + len(facts.end_text)]
    if CALLS in reply:
        raise DataError(
            "the chat template does not keep the reasoning that its prompt opens before a call of "
            f"a tool; {ADVICE}"
        )
    if CLOSE in content:
        content = content.lstrip().removeprefix(OPEN).lstrip("\n")
    else:
        content = f"{reasoning.strip()}\n{CLOSE}\n\n{content}"
    return content + facts.tail


def has_letters(part: str, text: str) -> bool:
    """Whether a text holds another one, white space and the marks of reasoning aside."""
    return _letters(_MARKS.sub("", part)) in _letters(_MARKS.sub("", text))


def _letters(text: str) -> str:
    return "".join(text.split())


def _two_ways(prompt: str, full: str) -> str:
    same = next(
        (i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b),
        min(len(prompt), len(full)),
    )
    return (
        f"the chat template writes the prompt in two ways: from character {same + 1} on it is "
        f"{prompt[same : same + 40]!r} before generation, and {full[same : same + 40]!r} when the "
        f"reply follows, so training and generation would see different prompts; {ADVICE}"
    )


def _read(tokenizer: Any, key: tuple[str, int]) -> TemplateFacts:
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(f"The tokenizer has no chat template; {ADVICE}.")
    added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
    for token in (tokenizer.eos_token, tokenizer.bos_token):
        if token:
            added.setdefault(token, tokenizer.convert_tokens_to_ids(token))
    question = [_user("Question 1")]
    try:
        prompt = apply_template(tokenizer, question, True)
        text = apply_template(tokenizer, [*question, _assistant(PROBE)], False)
    except DataError as error:
        raise ModelError(f"The chat template fails on a plain question: {error}; {ADVICE}.") from (
            error
        )
    after = text[text.rfind(PROBE) + len(PROBE) :]
    system: Message = {"role": "system", "content": "Rule 1"}
    try:
        around = prompt + after + apply_template(tokenizer, [system, *question], True)
    except DataError:  # it takes no system message
        around = prompt + after
    found = _any_of(added).match(after.lstrip()) if added and PROBE in text else None
    if found is None:
        shown = repr(after[:40]) if after else "nothing"
        raise ModelError(
            f"The chat template has no end-of-turn token: a reply is followed by {shown}, expected "
            f"one of the tokenizer's special tokens; {ADVICE}."
        )
    end = found.group()
    facts = TemplateFacts(
        key, end, added[end], after[: after.index(end) + len(end)],
        _markers(tokenizer, added, around),
        _find_prefix(tokenizer, end), dated="strftime_now" in key[0],
    )  # fmt: skip
    return replace(
        facts,
        reads_reasoning=prompt.rstrip().endswith(OPEN) or _writes_reasoning(tokenizer),
        call_end=_call_end(tokenizer, end),
        alike=_alike(tokenizer, facts, PROBE),
        alike_reasoning=_alike(tokenizer, facts, f"{OPEN}\nStripes.\n{CLOSE}\n\n{PROBE}"),
    )


def _writes_reasoning(tokenizer: Any) -> bool:
    """Whether the template writes the reasoning that a reply has in a key of its own."""
    reply = _assistant(PROBE) | {REASONING: "Stripes."}
    try:
        return "Stripes." in apply_template(tokenizer, [_user("Question 1"), reply], False)
    except DataError:
        return False


def _call_end(tokenizer: Any, end: str) -> str:
    """The special token at the end of a reply with a call, where this is not its end of turn."""
    tools = tool_facts_of(tokenizer)
    if not tools.calls:
        return ""
    asked = _user("How many?") | ({TOOLS: [PROBE_TOOL]} if tools.tools else {})
    try:
        prompt = apply_template(tokenizer, [asked], True)
        full = apply_template(tokenizer, [asked, probe_call()], False)
    except DataError:
        return ""
    text = full[len(prompt) :].rstrip()
    found = [token for token in _special(tokenizer) if token and text.endswith(token)]
    return found[0] if full.startswith(prompt) and end not in text and found else ""


def _alike(tokenizer: Any, facts: TemplateFacts, reply: str) -> bool:
    """Whether the template writes a past reply as it writes a new one."""
    talk = [_user("Question 1"), _assistant(reply), _user("Question 2"), _assistant(reply)]
    try:
        full = apply_template(tokenizer, talk, False)
        for turns in (1, 3):
            prompt = apply_template(tokenizer, talk[:turns], True)
            written = prompt + generated_reply(tokenizer, facts, talk[: turns + 1], prompt)
            if not full.startswith(written):
                return False
    except DataError:
        return False
    return True


def _markers(tokenizer: Any, added: Iterable[str], around: str) -> re.Pattern[str] | None:
    """Special tokens, and other tokens of their own that the template writes around messages. The
    marks of reasoning are none: a reply may hold them."""
    special = _special(tokenizer)
    written = {token for token in added if token.strip() and token in around}
    found = special | (written - {OPEN, CLOSE})
    return _any_of(found) if found else None


def _special(tokenizer: Any) -> set[str]:
    """The texts of the special tokens."""
    added = tokenizer.added_tokens_decoder.values()
    return {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)


def _find_prefix(tokenizer: Any, end: str) -> str:
    """A text after which the tokenizer adds no space; empty if it never adds one.

    Sentencepiece-like tokenizers add a space before every text, or after every special token, so
    that a reply would start with a space that the template does not write.
    """

    def spaced(prefix: str) -> bool:
        skip = len(token_ids(tokenizer, [prefix])[0]) if prefix else 0
        ids = token_ids(tokenizer, [prefix + "a"])[0][skip:]
        first = tokenizer.convert_ids_to_tokens(ids)[:1]
        return not first or str(first[0])[:1] in ("▁", "Ġ")

    return next((prefix for prefix in ("", end, "\n") if not spaced(prefix)), "")


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without added special tokens."""
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)
    return [list(row) for row in encoded["input_ids"]]


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(t) for t in sorted(texts, key=len, reverse=True) if t))


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}
