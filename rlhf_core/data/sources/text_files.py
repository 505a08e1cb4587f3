"""Reads plain text files: each file is one document, or several if it is long.

A file longer than DOCUMENT_BYTES is cut at an empty line, else at the end of a line. So a book in
one file has documents in both splits, and a file of any size fits: one document is in memory at a
time.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import IO

from rlhf_core.data.rows.row import BadRow, RawRow

DOCUMENT_BYTES = 2**16
_BLANK_LINES = (b"\n\n", b"\n\r\n")
_CONVERT = "convert the file to UTF-8 (with `iconv -f LATIN1 -t UTF-8`, say)"


def read_text(stream: IO[bytes], name: str) -> Iterator[RawRow]:
    """The documents of a file, numbered in order.

    Line ends become line feeds; empty lines around a document are removed.
    """
    number, line = 0, 1
    for part in _parts(stream):
        found = _document(part, line)
        line += part.count(b"\n")
        if isinstance(found, BadRow) or found.strip():
            number += 1
            yield RawRow(name, number, found)
    if not number:
        problem = "the file is empty or holds only white space; add text or remove the file"
        yield RawRow(name, 1, BadRow("no_text", problem))


def _parts(stream: IO[bytes]) -> Iterator[bytes]:
    """All bytes without the byte order mark, in parts of at most DOCUMENT_BYTES."""
    buffer = stream.read(DOCUMENT_BYTES + 1).removeprefix(codecs.BOM_UTF8)
    while buffer:
        # One byte more than a part, to see whether it ends with the file or within a character.
        while len(buffer) <= DOCUMENT_BYTES and (
            fresh := stream.read(DOCUMENT_BYTES + 1 - len(buffer))
        ):
            buffer += fresh
        end = len(buffer) if len(buffer) <= DOCUMENT_BYTES else _find_cut(buffer)
        yield buffer[:end]
        buffer = buffer[end:]


def _find_cut(buffer: bytes) -> int:
    """The end of a part that does not end with the file."""
    for separators in (_BLANK_LINES, (b"\n",)):
        end = max(
            buffer.rfind(separator, DOCUMENT_BYTES // 2, DOCUMENT_BYTES) + len(separator)
            for separator in separators
        )
        if end > DOCUMENT_BYTES // 2:
            return end
    # Not within a character, which has at most 4 bytes.
    for end in range(DOCUMENT_BYTES, DOCUMENT_BYTES - 4, -1):
        if buffer[end] & 0xC0 != 0x80:
            return end
    return DOCUMENT_BYTES


def _document(part: bytes, line: int) -> str | BadRow:
    """The text of a part; ``line`` is its first line in the file, for the error."""
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
            f"line {at} of the file holds a zero byte, as UTF-16 and binary files do; convert the "
            "file to UTF-8 or leave it out",
        )
    return text.replace("\r\n", "\n").strip("\n")
