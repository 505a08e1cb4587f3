"""Chat templates: from messages to tokens, and which of the tokens are trained on.

A conversation is rendered once and cut at the ends of its prompts and replies; each piece is
tokenised on its own. So the tokens of a prompt are the same whether a reply follows (SFT, reward
model) or not (rollout, chat), and the trainable spans come from positions in the text, never from
comparing token ids with a special token.

    system and user text, generation prompt | reply + end-of-turn token | ... | reply + end of turn
    not trainable                           | trainable                 |     | trainable

What a template writes after the last end-of-turn token (often a line feed) is left out: a rollout
ends there too.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_core.data.encoding.builtin_templates import SOURCES, TURN_TOKENS, fill
from rlhf_core.data.rows.row import Message
from rlhf_core.errors import DataError, ModelError

CHOICES = "set model.chat_template to one of " + ", ".join(SOURCES)


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered conversation; `trainable` pieces are a reply and its end of turn."""

    text: str
    trainable: bool


@dataclass(frozen=True, slots=True)
class _Facts:
    """What is worth finding out once per tokenizer and template."""

    key: tuple[str, int]
    end_text: str
    end_id: int
    specials: re.Pattern[str] | None
    lead: str  # written before a piece and taken off again, for tokenizers that prefix a space


_FACTS: weakref.WeakKeyDictionary[Any, _Facts] = weakref.WeakKeyDictionary()


def resolve_template(tokenizer: Any, name: str = "auto") -> str:
    """Jinja source of a chat template that fits the tokenizer; assign it to `chat_template`.

    Args:
        name: auto (the tokenizer's own, else chatml) or the name of a built-in template.
    Raises:
        ModelError: unknown name, or the tokenizer has no token that could end a turn.
    """
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, dict):
        own = own.get("default")
    if name == "auto" and own:
        return str(own)
    name = "chatml" if name == "auto" else name
    if name not in SOURCES:
        raise ModelError(f"There is no chat template {name!r}; {CHOICES}, or to auto.")
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


def end_of_turn(tokenizer: Any) -> tuple[str, int]:
    """Text and id of the token that ends an assistant's turn, found by rendering one.

    Raises:
        ModelError: the tokenizer has no chat template, or its turns end without such a token.
    """
    facts = _facts(tokenizer)
    return facts.end_text, facts.end_id


def special_text(tokenizer: Any, text: str) -> str | None:
    """The first special token whose text occurs in a message, if one does.

    Such a message would be read as if the template had written the token: a turn could end in the
    middle of a reply.
    """
    pattern = _facts(tokenizer).specials
    match = pattern.search(text) if pattern else None
    return match.group() if match else None


def render(
    tokenizer: Any, messages: Sequence[Message], generation_prompt: bool = False
) -> list[Segment]:
    """A conversation in pieces: up to the last end of turn, or with a final generation prompt.

    Raises:
        DataError: the template refuses the conversation (roles out of order, no system message).
        ModelError: the conversation's beginning changes when it goes on, so that a prompt would
            have other tokens in training than in a rollout.
    """
    end = _facts(tokenizer).end_text
    full = _apply(tokenizer, messages, generation_prompt)
    pieces: list[Segment] = []
    done = 0
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _apply(tokenizer, messages[:turn], True)
        if not full.startswith(prompt) or len(prompt) < done:
            if len(messages) == turn + 1 and prompt.startswith(full[:done]):
                # The last reply is written otherwise than it is generated (a reasoning model's
                # template opens its thinking for it): what is generated is what counts.
                pieces.append(Segment(prompt[done:], False))
                pieces.append(Segment(message["content"] + end, True))
                return pieces
            raise ModelError(_disagreement(turn, prompt, full))
        stop = full.find(end, len(prompt))
        if stop < 0:
            raise ModelError(
                f"The chat template does not end the assistant's turn (message {turn + 1}) with "
                f"{end!r}, though it does so after a short one; {CHOICES}."
            )
        stop += len(end)
        pieces.append(Segment(full[done : len(prompt)], False))
        pieces.append(Segment(full[len(prompt) : stop], True))
        done = stop
    if generation_prompt:
        pieces.append(Segment(full[done:], False))
    return pieces


def render_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[Segment]:
    """The messages before a reply, with the generation prompt. Errors as `render`."""
    return render(tokenizer, messages, generation_prompt=True)


def encode_segments(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each piece, tokenised on its own and without added special tokens."""
    if not texts:
        return []
    lead = _facts(tokenizer).lead
    if not lead:
        return _ids(tokenizer, texts)
    start = _ids(tokenizer, [lead])[0]
    rows = _ids(tokenizer, [lead + text for text in texts])
    return [
        row[len(start) :] if row[: len(start)] == start else _ids(tokenizer, [text])[0]
        for row, text in zip(rows, texts, strict=True)
    ]


def prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids from which a reply to the messages is generated. Errors as `render`."""
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


def _apply(tokenizer: Any, messages: Sequence[Message], generation_prompt: bool) -> str:
    import jinja2

    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation_prompt
            )
        )
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"The chat template is not valid Jinja ({error}); {CHOICES}.") from error
    except (jinja2.TemplateError, TypeError, KeyError, IndexError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"the chat template refuses turns of {roles}: {error}") from error


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)
    return [list(row) for row in encoded["input_ids"]]


def _find_lead(tokenizer: Any, end: str) -> str:
    """A text after which pieces are tokenised as they stand; empty where none is needed.

    Sentencepiece-like tokenizers put a space before every text, or after every special token; a
    reply would begin with a space that no template writes.
    """

    def spaced(lead: str) -> bool:
        skip = len(_ids(tokenizer, [lead])[0]) if lead else 0
        first = tokenizer.convert_ids_to_tokens(_ids(tokenizer, [lead + "a"])[0][skip:])[:1]
        return not first or str(first[0])[:1] in ("▁", "Ġ")

    return next((lead for lead in ("", end, "\n") if not spaced(lead)), "")


def _facts(tokenizer: Any) -> _Facts:
    key = (str(getattr(tokenizer, "chat_template", None)), len(tokenizer))
    facts = _FACTS.get(tokenizer)
    if facts is None or facts.key != key:
        facts = _FACTS[tokenizer] = _find_facts(tokenizer, key)
    return facts


def _find_facts(tokenizer: Any, key: tuple[str, int]) -> _Facts:
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(f"The tokenizer has no chat template; {CHOICES}.")
    added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
    for token in (tokenizer.eos_token, tokenizer.bos_token):
        if token:
            added.setdefault(token, tokenizer.convert_tokens_to_ids(token))
    special = {
        str(token) for token in tokenizer.added_tokens_decoder.values() if token.special
    } | set(tokenizer.all_special_tokens)
    probe = "Zebra answers 7"
    try:
        text = _apply(tokenizer, [_user("Question 1"), _assistant(probe)], False)
    except DataError as error:
        raise ModelError(f"The chat template fails on a plain question: {error}; {CHOICES}.") from (
            error
        )
    tail = text[text.rfind(probe) + len(probe) :]
    found = _any_of(added).match(tail.lstrip()) if added and probe in text else None
    if found is None:
        shown = repr(tail[:40]) if tail else "nothing"
        raise ModelError(
            "The chat template has no end-of-turn token: what follows a reply is "
            f"{shown}, needed is one of the tokenizer's special tokens; {CHOICES}."
        )
    end = found.group()
    return _Facts(
        key, end, added[end], _any_of(special) if special else None, _find_lead(tokenizer, end)
    )


def _any_of(texts: Any) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(t) for t in sorted(texts, key=len, reverse=True) if t))


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _disagreement(turn: int, prompt: str, full: str) -> str:
    same = next(
        (i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b),
        min(len(prompt), len(full)),
    )
    return (
        f"The chat template writes the prompt of message {turn + 1} in two ways: alone it goes on "
        f"with {prompt[same : same + 40]!r} at character {same + 1}, followed by its reply with "
        f"{full[same : same + 40]!r}. Training and generation would see different prompts; "
        f"{CHOICES}, or use single-turn conversations."
    )
