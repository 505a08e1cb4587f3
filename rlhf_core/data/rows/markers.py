"""Finds what no message may contain: the turns of a rendered conversation, and media placeholders.

A text with the turns of a whole conversation inside would be trained on as one reply, the person's
words included.
"""

from __future__ import annotations

import re

from rlhf_core.data.rows.row import BadRow, Message, short

# Turn tokens with a role, as chat templates write them.
_TOKENS = re.compile(
    r"<\|im_start\|>\s*(?:system|user|assistant)"
    r"|<\|(?:start_header_id|header_start)\|>\s*(?:system|user|assistant)"
    r"|<\|start\|>(?:system|developer|user|assistant)"
    r"|<\|(?:user|assistant|system|prompter|human|bot)\|>"
    r"|<\|START_OF_TURN_TOKEN\|>"
    r"|<start_of_turn>(?:user|model)"
    r"|<｜(?:User|Assistant)｜>|<extra_id_1>(?:User|Assistant)"
    r"|\[\|(?:Human|AI|User|Assistant)\|\]|<\|(?:Human|MOSS)\|>|<(?:human|bot)>:"
)
# A person's turn: at the start of the text, or of a line; then the assistant's.
_FIRST_PERSON = re.compile(r"\s*(?:#+ *|\*\*)?(?:User|USER|Human|HUMAN) *:")
_PERSON = re.compile(r"\n(?:#+ *|\*\*)?(?:User|USER|Human|HUMAN) *:")
_ASSISTANT = re.compile(r"\s(?:#+ *|\*\*)?(?:Assistant|ASSISTANT|AI|GPT|Bot) *:")
_FIRST_ASSISTANT = re.compile(r"\s*(?:#+ *|\*\*)?(?:Assistant|ASSISTANT) *:|\s*### Response:")
_IMAGE = re.compile(r"(?<![\w`'\"])<image>(?![`'\"]|\s*(?:tag|element)s?\b)")
_MEDIA = re.compile(r"(?:\A|\n)\s*<(?:video|audio)>|<(?:video|audio)>\s*(?:\n|\Z)")
# As the processors of single models write them: <|image_1|>, <|vision_start|>, <image_0>.
_FILES = re.compile(
    r"<\|(?:image|video|audio|vision|speech)(?:_\w+)?\|>|<(?:image|video|audio)_?\d+>"
    r"|<(?:IMAGE|VIDEO|AUDIO|ImageHere)>|<img>[^<\n]*</img>"
)
_TODO = (
    "a conversation inside one text would be read as a single turn; write it as messages "
    "({role, content}), or as Anthropic's HH writes it, for format hh"
)


def check_markers(messages: list[Message], replies: list[str]) -> None:
    """Check that no text is a whole conversation, and that none stands for an image.

    Args:
        replies: further ones outside the messages.

    Raises:
        BadRow: one is.
    """
    for position, message in enumerate(messages, 1):
        text = message["content"]
        if message["role"] == "assistant":
            _check_reply(text, f"message {position}")
        elif message["role"] != "tool":  # whose result may be any text, a page of the web too
            where = f"message {position}"
            check_turns(text, where, first=True)
            if found := _placeholder(text) if "<" in text else "":
                raise BadRow(
                    "unsupported",
                    f"{where} contains {found}, which stands for a file; images, video and audio "
                    "are not supported",
                )
    for text in replies:
        _check_reply(text, "the reply")


def _check_reply(text: str, where: str) -> None:
    check_turns(text, where)
    if found := _FIRST_ASSISTANT.match(text):
        raise BadRow(
            "transcript",
            f"{where} begins with {short(found.group())}, which the chat template writes in its "
            "own way; remove it from the reply",
        )


def check_turns(text: str, where: str, first: bool = False) -> None:
    """Check that a text, which is one turn or a document, does not hold the turns of several.

    Args:
        first: turns written as words (Human:) count only if the text begins with them: a question
            may quote a conversation.

    Raises:
        BadRow: it does.
    """
    if "<" in text or "[" in text or "### Instruction:" in text:
        _check_tokens(text, where)
    if "\n\nHuman:" in text and not first:
        raise _transcript(where, "\n\nHuman:")
    person = _FIRST_PERSON.match(text)
    if not person and not first and ":" in text:
        person = _PERSON.search(text)
    if person and _ASSISTANT.search(text, person.end()):
        raise _transcript(where, person.group())


def turns_in(text: str) -> str:
    """The first mark of a turn in a text that holds a conversation of several; "" if it is none."""
    try:
        check_turns(text, "it")
    except BadRow:
        found = _TOKENS.search(text) or _FIRST_PERSON.match(text) or _PERSON.search(text)
        return found.group().strip() if found else "several turns"
    return ""


def _check_tokens(text: str, where: str) -> None:
    if found := _TOKENS.search(text):
        raise _transcript(where, found.group())
    for first, second in (("[INST]", "[/INST]"), ("### Instruction:", "### Response:")):
        if first in text and second in text:
            raise _transcript(where, first)


def _placeholder(text: str) -> str:
    """The first text that stands for a file; code that opens and closes such an element is none."""
    if found := _FILES.search(text):
        return found.group()
    for name, pattern in (("image", _IMAGE), ("video", _MEDIA), ("audio", _MEDIA)):
        tag = f"<{name}>"
        if tag in text and f"</{name}>" not in text and pattern.search(text):
            return tag
    return ""


def _transcript(where: str, found: str) -> BadRow:
    return BadRow("transcript", f"{where} contains {short(found)}: {_TODO}")
