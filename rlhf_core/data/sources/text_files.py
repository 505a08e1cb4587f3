"""Plain text files: each is one document, and a long one goes on in further ones.

A file longer than PART is cut at an empty line, else at the end of a line. So a book in one file
has parts on both sides of the split, and no file is too large: one part is in memory at a time.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import IO

from rlhf_core.data.rows.row import BadRow, RawRow

PART = 2**16  # bytes of a document
_EMPTY_LINES = (b"\n\n", b"\n\r\n")
_CONVERT = "convert the file to UTF-8 (with `iconv -f LATIN1 -t UTF-8`, say)"


def read_text(stream: IO[bytes], name: str) -> Iterator[RawRow]:
    """The documents of a file; row numbers are their positions in it.

    Line ends become line feeds; empty lines around a document do not belong to it.
    """
    number, line = 0, 1
    for part in _parts(stream):
        found = _document(part, line)
        line += part.count(b"\n")
        if isinstance(found, BadRow) or found.strip():
            number += 1
            yield RawRow(name, number, found)
    if not number:
        problem = "the file is empty, or holds nothing but white space; give it text or remove it"
        yield RawRow(name, 1, BadRow("no_text", problem))


def _parts(stream: IO[bytes]) -> Iterator[bytes]:
    """All bytes but the byte order mark, in parts of PART bytes at most."""
    held = stream.read(PART + 1).removeprefix(codecs.BOM_UTF8)
    while held:
        # One byte more than a part has, to see whether it ends with the file or in a character.
        while len(held) <= PART and (fresh := stream.read(PART + 1 - len(held))):
            held += fresh
        end = len(held) if len(held) <= PART else _cut(held)
        yield held[:end]
        held = held[end:]


def _cut(held: bytes) -> int:
    """Where a part ends, if that is not the end of the file."""
    for marks in (_EMPTY_LINES, (b"\n",)):
        end = max(held.rfind(mark, PART // 2, PART) + len(mark) for mark in marks)
        if end > PART // 2:
            return end
    for end in range(PART, PART - 4, -1):  # not within a character, which has 4 bytes at most
        if held[end] & 0xC0 != 0x80:
            return end
    return PART


def _document(part: bytes, line: int) -> str | BadRow:
    """The text of a part that begins on a line of the file."""
    try:
        text = part.decode("utf-8")
    except UnicodeDecodeError as error:
        at = line + part.count(b"\n", 0, error.start)
        found = f"line {at} of the file holds a byte (0x{part[error.start]:02x}) that is not UTF-8"
        return BadRow("invalid_utf8", f"{found}; {_CONVERT}")
    if "\0" in text:
        at = line + text.count("\n", 0, text.index("\0"))
        return BadRow(
            "not_text",
            f"line {at} of the file holds a zero byte, as UTF-16 and files that are no text do; "
            "convert the file to UTF-8 or leave it out",
        )
    return text.replace("\r\n", "\n").strip("\n")
