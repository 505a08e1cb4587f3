"""Chat templates: renders messages into segments, and says which ones the loss covers.

What is trained is what generation writes: after the prompt as generation sees it, the reply as the
template writes a new one, and its end-of-turn token. A conversation is rendered once and cut at the
ends of its prompts and replies; each segment is tokenised on its own. So a prompt has the same
tokens whether a reply follows (SFT, reward model) or not (rollout, chat), and the loss mask comes
from positions in the text, never from comparing token ids with a special token.

    system and user text, generation prompt | reply + end-of-turn token | ... | reply + end of turn
    loss mask false                         | true                      |     | true

Where a template writes past replies differently from new ones, a conversation is rendered once for
each reply. Text after the last end-of-turn token (often a line feed) is left out, because a rollout
ends there too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_core.data.encoding.builtin_templates import SOURCES, TURN_TOKENS, fill
from rlhf_core.data.encoding.template_facts import (
    ADVICE,
    CLOSE,
    TemplateFacts,
    apply_template,
    facts_of,
    generated_reply,
    token_ids,
)
from rlhf_core.data.encoding.tool_facts import check_written, uses_tools
from rlhf_core.data.rows.row import REASONING, Message
from rlhf_core.errors import ModelError

OWN = "tokenizer:"  # model.chat_template: one of several templates of the tokenizer


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered conversation.

    Attributes:
        in_loss: True for a reply with its end-of-turn token, the part that the loss covers.
    """

    text: str
    in_loss: bool


def resolve_template(tokenizer: Any, name: str = "auto") -> str:
    """The Jinja source of a chat template for the tokenizer; assign it to `chat_template`.

    Args:
        name: auto (the tokenizer's own template, else chatml), the name of a built-in template, or
            tokenizer:NAME for one of several that the tokenizer has.

    Raises:
        ModelError: unknown name, no choice among several templates, or the tokenizer has no token
            that can end a turn.
    """
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, dict):
        own = _named(own, name)
    elif name.startswith(OWN):
        raise ModelError(f"The tokenizer has no named chat templates; {ADVICE}, or to auto.")
    if own and (name == "auto" or name.startswith(OWN)):
        return str(own)
    name = "chatml" if name == "auto" else name
    if name not in SOURCES:
        raise ModelError(f"There is no chat template {name!r}; {ADVICE}, or to auto.")
    end = TURN_TOKENS.get(name, "")
    if not end or end not in tokenizer.get_vocab():
        end = tokenizer.eos_token
    if not end:
        raise ModelError(
            f"The tokenizer has no eos token, and chat template {name!r} needs one to end a turn; "
            "add eos_token to its tokenizer_config.json."
        )
    bos = tokenizer.bos_token
    starts = tokenizer("a")["input_ids"][:1]
    adds_bos = bool(bos) and starts == [tokenizer.bos_token_id]
    return fill(name, bos if adds_bos else "", end)


def _named(own: dict[str, str], name: str) -> str | None:
    """The template that a name chooses among a tokenizer's; None for a built-in one."""
    choices = " or ".join(f"{OWN}{key}" for key in own)
    wanted = "default" if name == "auto" else name.removeprefix(OWN)
    if name != "auto" and not name.startswith(OWN):
        return None
    if wanted not in own:
        raise ModelError(
            f"The tokenizer has the chat templates {', '.join(own)}, and none is named {wanted}; "
            f"set model.chat_template to {choices}, or to one of {', '.join(SOURCES)}."
        )
    return own[wanted]


def writes_date(tokenizer: Any) -> bool:
    """Whether the template writes today's date: prompts of another day then have other tokens."""
    return facts_of(tokenizer).dated


def reads_reasoning(tokenizer: Any) -> bool:
    """Whether the reasoning of a reply can be given to the template in a key of its own."""
    return facts_of(tokenizer).reads_reasoning


def has_reasoning(message: Message) -> bool:
    """Whether a message is a reply with reasoning."""
    return message["role"] == "assistant" and (CLOSE in message["content"] or REASONING in message)


def end_of_turn(tokenizer: Any) -> tuple[str, int]:
    """Text and id of the token that ends an assistant's turn, read from a rendered example.

    Raises:
        ModelError: the tokenizer has no chat template, or its turns end without such a token.
    """
    facts = facts_of(tokenizer)
    return facts.end_text, facts.end_id


def ends_of_turns(tokenizer: Any) -> list[str]:
    """The texts of the tokens that end a turn: a plain reply, and where it is another one, a reply
    with calls of tools."""
    facts = facts_of(tokenizer)
    return [end for end in (facts.end_text, facts.call_end) if end]


def find_special_token(tokenizer: Any, text: str) -> str | None:
    """The first special token whose text occurs in a message; None if there is none.

    The tokenizer would read it as if the template had written it: a turn could end in the middle of
    a reply.
    """
    pattern = facts_of(tokenizer).markers
    match = pattern.search(text) if pattern else None
    return match.group() if match else None


def render(tokenizer: Any, messages: Sequence[Message]) -> list[list[Segment]]:
    """Render a conversation up to its last reply.

    Returns:
        Segments, in one list, or in a list for each reply where the template writes a past reply
        differently from a new one: then only the list's last segment is a reply to train on.

    Raises:
        DataError: the template rejects the conversation (roles out of order, no system message),
            or writes it so that training and generation would see different texts.
    """
    facts = facts_of(tokenizer)
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    if len(turns) > 1 and _alike(facts, messages):
        segments = _cut(tokenizer, facts, messages[: turns[-1] + 1], generation_prompt=False)
        if segments is not None and _as_generated(tokenizer, facts, messages, segments):
            return [segments]
    return [render_reply(tokenizer, messages[: turn + 1]) for turn in turns]


def render_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[Segment]:
    """Segments of the messages before a reply, with the generation prompt; none is in the loss.

    Raises:
        DataError: the template rejects the messages.
    """
    facts = facts_of(tokenizer)
    cut = None
    if _alike(facts, messages) and any(m["role"] == "assistant" for m in messages):
        cut = _cut(tokenizer, facts, messages, generation_prompt=True)
    if cut is None:
        cut = [Segment(apply_template(tokenizer, messages, True), False)]
    if uses_tools(messages):
        check_written(messages, "".join(segment.text for segment in cut))
    return [Segment(segment.text, False) for segment in cut]


def render_reply(tokenizer: Any, messages: Sequence[Message]) -> list[Segment]:
    """Segments of a prompt, and as the last one the reply to it, the last message. Raises as
    `render`."""
    before = render_prompt(tokenizer, messages[:-1])
    prompt = "".join(segment.text for segment in before)
    return [
        *before,
        Segment(generated_reply(tokenizer, facts_of(tokenizer), messages, prompt), True),
    ]


def render_replies(
    tokenizer: Any, messages: Sequence[Message], replies: Sequence[Message]
) -> tuple[list[Segment], list[str]]:
    """Segments of a prompt, and the text of each reply to it with its end of turn. Raises as
    `render`."""
    before = render_prompt(tokenizer, messages)
    prompt, facts = "".join(segment.text for segment in before), facts_of(tokenizer)
    texts = [generated_reply(tokenizer, facts, [*messages, reply], prompt) for reply in replies]
    return before, texts


def encode_segments(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, tokenised on its own and without added special tokens."""
    if not texts:
        return []
    prefix = facts_of(tokenizer).prefix
    if not prefix:
        return token_ids(tokenizer, texts)
    start = token_ids(tokenizer, [prefix])[0]
    rows = token_ids(tokenizer, [prefix + text for text in texts])
    return [
        row[len(start) :] if row[: len(start)] == start else token_ids(tokenizer, [text])[0]
        for row, text in zip(rows, texts, strict=True)
    ]


def prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of the prompt for a reply to the messages. Raises as `render`."""
    texts = [segment.text for segment in render_prompt(tokenizer, messages)]
    return [token for piece in encode_segments(tokenizer, texts) for token in piece]


def reply_text(tokenizer: Any, response_ids: Sequence[int]) -> str:
    """The text of a generated reply: up to the first end of turn, without special tokens."""
    _, end = end_of_turn(tokenizer)
    ids = list(response_ids)
    if end in ids:
        ids = ids[: ids.index(end)]
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


# --------------------------------------------------------------------------- details


def _alike(facts: TemplateFacts, messages: Sequence[Message]) -> bool:
    """Whether the template writes the past replies of a conversation as it writes new ones. With
    tools it may not; then `_as_generated` compares each reply."""
    if uses_tools(messages):
        return facts.alike
    if not facts.alike or any(REASONING in message for message in messages):
        return False
    return facts.alike_reasoning or not any(map(has_reasoning, messages))


def _as_generated(
    tokenizer: Any, facts: TemplateFacts, messages: Sequence[Message], segments: list[Segment]
) -> bool:
    """Whether the replies of a rendered conversation are what generation writes. Templates that
    write plain replies alike are known to; of one with tools, each reply is compared.

    Raises:
        DataError: the template leaves out a part of a prompt or a reply.
    """
    if not uses_tools(messages):
        return True
    replies = iter([turn for turn, m in enumerate(messages) if m["role"] == "assistant"])
    prompt = ""
    for segment in segments:
        if segment.in_loss:
            turn = next(replies)
            check_written(messages[:turn], prompt)
            if segment.text != generated_reply(tokenizer, facts, messages[: turn + 1], prompt):
                return False
        prompt += segment.text
    return True


def _cut(
    tokenizer: Any, facts: TemplateFacts, messages: Sequence[Message], generation_prompt: bool
) -> list[Segment] | None:
    """The rendered conversation, cut at the ends of its prompts and replies; None if the template
    writes one of its prompts differently once the conversation goes on."""
    full = apply_template(tokenizer, messages, generation_prompt)
    pieces: list[Segment] = []
    done = 0
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = apply_template(tokenizer, messages[:turn], True)
        stop = full.find(facts.end_text, len(prompt))
        if not full.startswith(prompt) or len(prompt) < done or stop < 0:
            return None
        stop += len(facts.end_text)
        pieces.append(Segment(full[done : len(prompt)], False))
        pieces.append(Segment(full[len(prompt) : stop], True))
        done = stop
    return [*pieces, Segment(full[done:], False)] if generation_prompt else pieces
