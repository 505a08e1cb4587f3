"""Hashes of n-grams of words, to find the same passage in two texts.

Words are runs of letters and digits without case and character width; each Han or kana character is
one. Punctuation and white space do not count. 13 words, as in GPT-3 (arXiv 2005.14165, appendix C)
and lm-evaluation-harness' decontamination.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
import zlib
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

N = 13
_FACTOR = 0x9E3779B97F4A7C15  # odd: a hash of N words is a polynomial in it, modulo 2**64
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_QUOTES = "\"'`“”‘’«»「」"
_STOPS = f".,;:!?…。、{_QUOTES}"
# ASCII: upper case to lower case, and what is neither letter nor digit to a space.
_ASCII = bytes(ord(chr(i).lower()) if chr(i).isalnum() else 32 for i in range(128)) + bytes(128)


def words(text: str) -> list[bytes]:
    """The words of a text, in UTF-8."""
    if text.isascii():
        return text.encode("ascii").translate(_ASCII).split()
    plain = unicodedata.normalize("NFKC", text).casefold()
    return [word.encode("utf-8", "surrogatepass") for word in _WORD.findall(plain)]


def grams(rows: Sequence[list[bytes]], n: int = N) -> list[Any]:
    """Hashes of each n words in a row, of several texts at once, which is faster.

    Args:
        rows: words of each text.

    Returns:
        numpy uint64 (words - n + 1,) for each text, (0,) for one with fewer words.
    """
    import numpy as np

    sizes = list(map(len, rows))
    single = np.fromiter(map(zlib.crc32, chain.from_iterable(rows)), np.uint64, sum(sizes))
    count = max(0, len(single) - n + 1)
    total = np.zeros(count, np.uint64)
    for start in range(n if count else 0):
        total = total * np.uint64(_FACTOR) + single[start : start + count]
    starts = accumulate(sizes, initial=0)
    return [
        total[start : start + max(0, size - n + 1)]
        for start, size in zip(starts, sizes, strict=False)
    ]


def whole(text: str) -> int:
    """A hash of a text, 64 bits, that case, width, white space and punctuation at the ends of words
    do not change; 0 if nothing else is in it. Signs such as + count: 2 + 3 is not 2 - 3."""
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    parts = (part.rstrip(_STOPS).lstrip(_QUOTES) for part in plain.casefold().split())
    found = "".join(parts).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(found, digest_size=8).digest()
    return int.from_bytes(digest, "big") if found else 0
