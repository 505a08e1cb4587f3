"""Tokenises many texts, each different word once.

A byte-level tokenizer cuts a text into words by a regular expression before it merges bytes, so a
text's ids are those of its words one after another. A table of words that came before saves most of
the work: three of four seconds that tokenizers' own batch encoding takes.

The words here are coarser than the tokenizer's: a text is cut only before white space, and only
where no match of the known expressions goes on. All of them read a space after another character as
the start of a new match, and a line feed after a letter or digit too; none looks behind. So what
stands on one side of a cut does not change how the other is tokenised, and the ids are the same as
those of the whole text. For other tokenizers the whole texts are tokenised.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from rlhf_core.data.encoding import templates
from rlhf_core.data.encoding.tokenizer import overrides

MOST_WORDS = 2**18  # in the table: about 60 MB
# A word: white space, then characters up to white space that starts with a space, or that follows
# a letter or a digit.
_WORDS = re.compile(r"\s*+\S++(?:(?<![A-Za-z0-9])[^\S ]\s*+(?:\S++|\Z))*+|\s++")

_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# The expressions for which the above holds. GPT-2's own is that of `ByteLevel`.
_KNOWN = frozenset(
    {
        # Llama 3, Qwen 2 to 3
        rf"{_SUFFIX}|{_BEFORE}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
        rf"{_SUFFIX}|{_BEFORE}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
        # Qwen 3.5
        rf"{_SUFFIX}|{_BEFORE}[\p{{L}}\p{{M}}]+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
        # gpt-oss, Mistral's Tekken
        rf"{_BEFORE}{_UPPER}*{_LOWER}+{_SUFFIX}?|{_BEFORE}{_UPPER}+{_LOWER}*{_SUFFIX}?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
        rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*"
        rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
    }
)


class WordTable:
    """The token ids of words that came before, for one tokenizer.

    Args:
        most: words that are kept.
    """

    def __init__(self, tokenizer: Any, most: int = MOST_WORDS) -> None:
        self._tokenizer, self._most = tokenizer, most
        self._by_words = is_cut_at_spaces(tokenizer)
        self._ids: dict[str, bytes] = {}  # int32 of each word

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """Token ids of each text, as `templates.encode_segments` has them: numpy int32, (T,)."""
        import numpy as np

        if not self._by_words:
            rows = templates.encode_segments(self._tokenizer, texts)
            return [np.array(row, np.int32) for row in rows]
        cut = list(map(_WORDS.findall, texts))
        words = set().union(*cut)
        new = list(words.difference(self._ids))
        found = self._tokenizer.backend_tokenizer.encode_batch_fast(new, add_special_tokens=False)
        self._ids.update(
            (word, np.array(encoding.ids, np.int32).tobytes())
            for word, encoding in zip(new, found, strict=True)
        )
        ids_of = self._ids.__getitem__
        ids = [np.frombuffer(b"".join(map(ids_of, row)), np.int32) for row in cut]
        if len(self._ids) > self._most:  # what is frequent is among the newest
            self._ids = {word: self._ids[word] for word in words}
        return ids


def is_cut_at_spaces(tokenizer: Any) -> bool:
    """Whether a text's ids are those of its words, cut as `WordTable` cuts them."""
    if not getattr(tokenizer, "is_fast", False) or overrides(tokenizer, "__call__", "_encode_plus"):
        return False
    if tokenizer.split_special_tokens or templates.facts_of(tokenizer).prefix:
        return False
    backend = tokenizer.backend_tokenizer
    rules = json.loads(backend.to_str())
    if rules["truncation"] or rules["padding"] or rules["model"].get("dropout"):
        return False
    return (
        rules["model"]["type"] == "BPE"
        and (rules["normalizer"] or {"type": "NFC"})["type"] == "NFC"
        and _pre_tokenizer_cuts(rules["pre_tokenizer"])
        and not any(
            token["lstrip"] or token["rstrip"] or token["single_word"]
            or re.search(r"\S\s", token["content"])
            for token in rules["added_tokens"]
        )
    )  # fmt: skip


def _pre_tokenizer_cuts(rule: dict[str, Any] | None) -> bool:
    """Whether a pre-tokenizer, as tokenizer.json has it, cuts a text where `WordTable` does."""
    rules = rule["pretokenizers"] if rule and rule["type"] == "Sequence" else [rule or {}]
    cuts = False
    for one in rules:
        if one.get("type") == "ByteLevel" and not one["add_prefix_space"]:
            cuts |= one["use_regex"]
        elif one.get("type") == "Split" and one["behavior"] == "Isolated" and not one["invert"]:
            pattern = one["pattern"].get("Regex")
            if pattern not in _KNOWN:
                return False
            cuts = True
        elif one.get("type") != "Digits":
            return False
    return cuts
