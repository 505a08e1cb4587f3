"""Chat templates: renders messages into segments, and says which ones the loss covers.

A conversation is rendered once and cut at the ends of its prompts and replies; each segment is
tokenised on its own. So a prompt has the same tokens whether a reply follows (SFT, reward model) or
not (rollout, chat), and the loss mask comes from positions in the text, never from comparing token
ids with a special token.

    system and user text, generation prompt | reply + end-of-turn token | ... | reply + end of turn
    loss mask false                         | true                      |     | true

Text after the last end-of-turn token (often a line feed) is left out, because a rollout ends there
too.
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

ADVICE = "set model.chat_template to one of " + ", ".join(SOURCES)


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered conversation.

    Attributes:
        in_loss: True for a reply with its end-of-turn token, the part that the loss covers.
    """

    text: str
    in_loss: bool


@dataclass(frozen=True, slots=True)
class _TemplateInfo:
    """Cached facts about a tokenizer with its template.

    Attributes:
        key: template and vocabulary size that the facts are valid for.
        end_text, end_id: the end-of-turn token.
        special_tokens: matches any special token's text.
        prefix: put before a text and removed after tokenisation, for tokenizers that add a space.
    """

    key: tuple[str, int]
    end_text: str
    end_id: int
    special_tokens: re.Pattern[str] | None
    prefix: str


_INFO: weakref.WeakKeyDictionary[Any, _TemplateInfo] = weakref.WeakKeyDictionary()


def resolve_template(tokenizer: Any, name: str = "auto") -> str:
    """The Jinja source of a chat template for the tokenizer; assign it to `chat_template`.

    Args:
        name: auto (the tokenizer's own template, else chatml) or the name of a built-in template.

    Raises:
        ModelError: unknown name, or the tokenizer has no token that can end a turn.
    """
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, dict):
        own = own.get("default")
    if name == "auto" and own:
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


def end_of_turn(tokenizer: Any) -> tuple[str, int]:
    """Text and id of the token that ends an assistant's turn, read from a rendered example.

    Raises:
        ModelError: the tokenizer has no chat template, or its turns end without such a token.
    """
    info = _template_info(tokenizer)
    return info.end_text, info.end_id


def find_special_token(tokenizer: Any, text: str) -> str | None:
    """The first special token whose text occurs in a message; None if there is none.

    The tokenizer would read it as if the template had written it: a turn could end in the middle of
    a reply.
    """
    pattern = _template_info(tokenizer).special_tokens
    match = pattern.search(text) if pattern else None
    return match.group() if match else None


def render(
    tokenizer: Any, messages: Sequence[Message], generation_prompt: bool = False
) -> list[Segment]:
    """Render a conversation into segments.

    Args:
        generation_prompt: end with the prompt for the next reply; else with the last end of turn.

    Raises:
        DataError: the template rejects the conversation (roles out of order, no system message).
        ModelError: the template renders the start of a conversation differently once it continues,
            so that a prompt would have other tokens in training than in a rollout.
    """
    end = _template_info(tokenizer).end_text
    full = _apply_template(tokenizer, messages, generation_prompt)
    pieces: list[Segment] = []
    done = 0
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _apply_template(tokenizer, messages[:turn], True)
        if not full.startswith(prompt) or len(prompt) < done:
            if len(messages) == turn + 1 and prompt.startswith(full[:done]):
                # The template renders the last reply differently from a generated one (a reasoning
                # model's template opens the thinking block itself): take the generated form.
                pieces.append(Segment(prompt[done:], False))
                pieces.append(Segment(message["content"] + end, True))
                return pieces
            raise ModelError(_prefix_mismatch(turn, prompt, full))
        stop = full.find(end, len(prompt))
        if stop < 0:
            raise ModelError(
                f"The chat template does not end the assistant's turn (message {turn + 1}) with "
                f"{end!r}, though it does so after a short one; {ADVICE}."
            )
        stop += len(end)
        pieces.append(Segment(full[done : len(prompt)], False))
        pieces.append(Segment(full[len(prompt) : stop], True))
        done = stop
    if generation_prompt:
        pieces.append(Segment(full[done:], False))
    return pieces


def render_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[Segment]:
    """Segments of the messages before a reply, with the generation prompt. Raises as `render`."""
    return render(tokenizer, messages, generation_prompt=True)


def encode_segments(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, tokenised on its own and without added special tokens."""
    if not texts:
        return []
    prefix = _template_info(tokenizer).prefix
    if not prefix:
        return _ids(tokenizer, texts)
    start = _ids(tokenizer, [prefix])[0]
    rows = _ids(tokenizer, [prefix + text for text in texts])
    return [
        row[len(start) :] if row[: len(start)] == start else _ids(tokenizer, [text])[0]
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


def _apply_template(tokenizer: Any, messages: Sequence[Message], generation_prompt: bool) -> str:
    """The rendered text; template errors as ModelError or DataError, see `render`."""
    import jinja2

    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation_prompt
            )
        )
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"The chat template is not valid Jinja ({error}); {ADVICE}.") from error
    except (jinja2.TemplateError, TypeError, KeyError, IndexError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"the chat template rejects turns of {roles}: {error}") from error


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)
    return [list(row) for row in encoded["input_ids"]]


def _find_prefix(tokenizer: Any, end: str) -> str:
    """A text after which the tokenizer adds no space; empty if it never adds one.

    Sentencepiece-like tokenizers add a space before every text, or after every special token, so
    that a reply would start with a space that the template does not write.
    """

    def spaced(prefix: str) -> bool:
        skip = len(_ids(tokenizer, [prefix])[0]) if prefix else 0
        first = tokenizer.convert_ids_to_tokens(_ids(tokenizer, [prefix + "a"])[0][skip:])[:1]
        return not first or str(first[0])[:1] in ("▁", "Ġ")

    return next((prefix for prefix in ("", end, "\n") if not spaced(prefix)), "")


def _template_info(tokenizer: Any) -> _TemplateInfo:
    key = (str(getattr(tokenizer, "chat_template", None)), len(tokenizer))
    info = _INFO.get(tokenizer)
    if info is None or info.key != key:
        info = _INFO[tokenizer] = _read_template(tokenizer, key)
    return info


def _read_template(tokenizer: Any, key: tuple[str, int]) -> _TemplateInfo:
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(f"The tokenizer has no chat template; {ADVICE}.")
    added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
    for token in (tokenizer.eos_token, tokenizer.bos_token):
        if token:
            added.setdefault(token, tokenizer.convert_tokens_to_ids(token))
    special = {
        str(token) for token in tokenizer.added_tokens_decoder.values() if token.special
    } | set(tokenizer.all_special_tokens)
    probe = "Zebra answers 7"
    try:
        text = _apply_template(tokenizer, [_user("Question 1"), _assistant(probe)], False)
    except DataError as error:
        raise ModelError(f"The chat template fails on a plain question: {error}; {ADVICE}.") from (
            error
        )
    tail = text[text.rfind(probe) + len(probe) :]
    found = _any_of(added).match(tail.lstrip()) if added and probe in text else None
    if found is None:
        shown = repr(tail[:40]) if tail else "nothing"
        raise ModelError(
            f"The chat template has no end-of-turn token: a reply is followed by {shown}, expected "
            f"one of the tokenizer's special tokens; {ADVICE}."
        )
    end = found.group()
    return _TemplateInfo(
        key, end, added[end], _any_of(special) if special else None, _find_prefix(tokenizer, end)
    )


def _any_of(texts: Any) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(t) for t in sorted(texts, key=len, reverse=True) if t))


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _prefix_mismatch(turn: int, prompt: str, full: str) -> str:
    same = next(
        (i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b),
        min(len(prompt), len(full)),
    )
    return (
        f"The chat template renders the prompt of message {turn + 1} in two ways: from character "
        f"{same + 1} on it is {prompt[same : same + 40]!r} before generation, and "
        f"{full[same : same + 40]!r} when the reply follows. Training and generation would see "
        f"different prompts; {ADVICE}, or use single-turn conversations."
    )
