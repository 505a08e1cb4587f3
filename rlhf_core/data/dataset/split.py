"""Which side of the train/held-out split a prompt falls on: a function of its text alone.

The same prompt is on the same side in every data set, whatever its format, order or seed, so what
is held out for the evaluation was held out in SFT, reward model and PPO too.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence

from rlhf_core.data.rows.row import Message

SALT = b"rlhf-split-v1\0"


def first_prompt(messages: Sequence[Message]) -> str:
    """The text that identifies a conversation's prompt: the user's turns before the first reply.

    System messages do not count, so that a data set with them shares its split with one without.
    """
    texts = []
    for message in messages:
        if message["role"] == "assistant":
            break
        if message["role"] == "user":
            texts.append(message["content"])
    return "\n".join(texts)


def normalise_prompt(text: str) -> str:
    """Text without differences in case, width and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def prompt_hash(text: str) -> int:
    """64 bits that stand for a prompt."""
    digest = hashlib.sha256(SALT + normalise_prompt(text).encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest()[:8], "big")


def is_heldout(prompt: str, fraction: float) -> bool:
    """True for the given share of all prompts.

    Args:
        prompt: text as `first_prompt` returns it.
        fraction: share of the prompts that is held out, 0 to 1.
    """
    return prompt_hash(prompt) < fraction * 2.0**64
