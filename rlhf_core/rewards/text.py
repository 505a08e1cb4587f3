"""Splits texts of any script into words."""

from __future__ import annotations

import regex

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}"  # scripts without spaces between words
_WORD = regex.compile(rf"(?V1)[{UNSPACED}]|[[\p{{L}}\p{{M}}\p{{N}}'’_]--[{UNSPACED}]]+")
_LETTER = regex.compile(r"\p{L}")
_LATIN = regex.compile(r"\p{Latin}")
_HAN = regex.compile(r"\p{Han}")


def words(text: str) -> list[str]:
    """The words: runs of letters, digits and apostrophes; each Han or kana character is one.

    Other scripts without spaces, such as Thai, give long words.
    """
    return [word for word in _WORD.findall(text) if word.strip("'’_")]


def script_share(text: str, language: str) -> float:
    """Share, 0 to 1, of the words whose first letter is Latin (english) or Han (chinese).

    Words without letters do not count; a text without letters gives 0.
    """
    wanted = _LATIN if language == "english" else _HAN
    letters = [found[0] for word in words(text) if (found := _LETTER.search(word))]
    if not letters:
        return 0.0
    return sum(wanted.match(letter) is not None for letter in letters) / len(letters)
