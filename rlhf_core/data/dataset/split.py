"""Assigns a prompt to the train or heldout split by a hash of its text alone.

The same prompt is in the same split of every data set, whatever its format, order or seed. So the
prompts of the evaluation were held out in SFT, reward model and PPO too.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence

from rlhf_core.data.rows.row import Message

SALT = b"rlhf-split-v1\0"


def first_prompt(messages: Sequence[Message]) -> str:
    """The text that identifies a conversation's prompt: the user's turns before the first reply.

    System messages are ignored, so data sets with and without them share the same split.
    """
    texts = []
    for message in messages:
        if message["role"] == "assistant":
            break
        if message["role"] == "user":
            texts.append(message["content"])
    return "\n".join(texts)


def normalise_prompt(text: str) -> str:
    """The text with case, character width and white space normalised."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def prompt_hash(text: str) -> int:
    """A 64-bit hash of the normalised prompt."""
    digest = hashlib.sha256(SALT + normalise_prompt(text).encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest()[:8], "big")


def is_heldout(prompt: str, fraction: float) -> bool:
    """Whether a prompt is held out; True for the given share of all prompts.

    Args:
        prompt: text as `first_prompt` returns it.
        fraction: share of the prompts that is held out, 0 to 1.
    """
    return is_heldout_hash(prompt_hash(prompt), fraction)


def is_heldout_hash(value: int, fraction: float) -> bool:
    """`is_heldout` of a prompt with this `prompt_hash`."""
    return value < fraction * 2.0**64
