"""The forbidden-words reward: words that a reply must not contain."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

import regex

from rlhf_core.rewards.text import UNSPACED

# A letter or digit that extends a neighbouring word. Scripts without spaces are excluded, so that a
# Latin word is found between Chinese characters.
_GLUE = rf"[[\p{{L}}\p{{M}}\p{{N}}_]--[{UNSPACED}]]"
_GLUED = regex.compile(rf"(?V1){_GLUE}")


def forbidden_score(forbidden: Sequence[str]) -> Callable[[str], float]:
    """A function that returns 0 for a text with one of the words, else 1.

    It ignores case and character width. A space in a phrase matches any white space.
    """
    pattern = regex.compile(
        "(?V1)" + "|".join(_word_pattern(word) for word in forbidden),
        regex.IGNORECASE | regex.FULLCASE,
    )

    def score(text: str) -> float:
        return 0.0 if pattern.search(unicodedata.normalize("NFKC", text)) else 1.0

    return score


def _word_pattern(word: str) -> str:
    parts = unicodedata.normalize("NFKC", word).split()
    before = rf"(?<!{_GLUE})" if _GLUED.match(parts[0][0]) else ""
    after = rf"(?!{_GLUE})" if _GLUED.match(parts[-1][-1]) else ""
    return before + r"\s+".join(regex.escape(part) for part in parts) + after
