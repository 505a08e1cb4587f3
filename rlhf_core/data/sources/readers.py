"""Reads rows from one open file: JSON Lines, JSON, CSV, Parquet or plain text.

A bounded part of the file is in memory at a time. Rows are numbered from 1. A row that cannot be
read is yielded with a BadRow as its data, so that the caller can stop or skip it.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from rlhf_core.data.rows.row import BadRow, RawRow, json_problem, parse_json
from rlhf_core.data.sources.text_files import read_text
from rlhf_core.errors import DataError
from rlhf_core.system.git_lfs import LFS_MAGIC

READ_BYTES = 2**20
MAX_ROW_BYTES = 64 * 2**20

Reader = Callable[[IO[bytes], str], Iterator[RawRow]]


def read_jsonl(stream: IO[bytes], name: str) -> Iterator[RawRow]:
    """JSON Lines: one value per line. Row numbers are line numbers; blank lines are skipped.

    Raises:
        DataError: a line is longer than MAX_ROW_BYTES.
    """
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise DataError(
                f"{name}, line {number} is longer than {MAX_ROW_BYTES:,} bytes; expected one JSON "
                "object per line. Is it a .json file with the wrong file name?"
            )
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield RawRow(name, number, line.rstrip(b"\r\n"))


def read_json(stream: IO[bytes], name: str) -> Iterator[RawRow]:
    """A JSON array of rows, or JSON objects one after another.

    Raises:
        DataError: malformed JSON, even with ``on_bad_row: skip``: without line ends it is unknown
            where the next row starts.
    """
    text = _JsonStream(stream, name)
    array = text.peek() == "["
    if array:
        text.take(1)
    number = 0
    while (mark := text.peek()) and not (array and mark == "]"):
        if number and array:
            if mark != ",":
                raise text.malformed(number, "',' or ']' is missing after the row")
            text.take(1)
            text.peek()
        number += 1
        # Yielded as text: a worker parses it again, with the checks of a JSON line.
        found = text.value(number)
        try:
            yield RawRow(name, number, found.encode("utf-8"))
        except UnicodeEncodeError:
            yield RawRow(name, number, BadRow("invalid_utf8", _NOT_UTF8))
    if array and not mark:
        raise text.malformed(number + 1, "the file ends before the array's ']'; it is truncated")


class _JsonStream:
    """A stream of JSON values; only the part around the current one is in memory."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self.stream, self.name = stream, name
        # Bytes that are not UTF-8 become lone surrogates, so that only their own row is bad.
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.position, self.ended = "", 0, False
        self.json = json.JSONDecoder()

    def more(self, size: int = READ_BYTES) -> bool:
        """Read up to ``size`` more bytes; False at the end of the stream."""
        if self.ended:
            return False
        data = self.stream.read(size)
        self.ended = not data
        fresh = self.decoder.decode(data, self.ended)
        first = not self.text and not self.position
        self.text = self.text[self.position :] + (fresh.removeprefix("\ufeff") if first else fresh)
        self.position = 0
        return True

    def peek(self) -> str:
        """The next character that is not white space, without consuming it; empty at the end."""
        while True:
            while self.position < len(self.text) and self.text[self.position].isspace():
                self.position += 1
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.more():
                return ""

    def take(self, count: int) -> None:
        """Consume ``count`` characters."""
        self.position += count

    def value(self, number: int) -> str:
        """The text of the next JSON value; ``number`` is its row, for the error."""
        size = READ_BYTES
        while True:
            try:
                value, end = self.json.raw_decode(self.text, self.position)
                # A number at the very end may continue in the next read.
                if end < len(self.text) or self.ended or not isinstance(value, int | float):
                    found = self.text[self.position : end]
                    self.position = end
                    return found
                problem = ""
            except json.JSONDecodeError as error:
                problem = f"{error.msg} near {self.text[error.pos : error.pos + 40].strip()!r}"
            except (ValueError, RecursionError) as error:
                problem = json_problem(error)
            if len(self.text) - self.position > MAX_ROW_BYTES:
                raise self.malformed(
                    number, f"{problem}; or the row exceeds {MAX_ROW_BYTES:,} bytes"
                )
            if not self.more(size):
                raise self.malformed(number, problem)
            size *= 2

    def malformed(self, number: int, problem: str) -> DataError:
        """The error for row ``number``."""
        return DataError(
            f"{self.name}, row {number}: malformed JSON ({problem}). Such a row cannot be skipped "
            "inside a JSON array; correct the file, or convert it to .jsonl with one object per "
            "line."
        )


_NOT_UTF8 = "the row is not UTF-8; convert the file to UTF-8"


def _surrogates(fields: list[str]) -> BadRow | None:
    """The BadRow for fields with bytes that are not UTF-8, else None."""
    try:
        "".join(fields).encode("utf-8")
    except UnicodeEncodeError:
        return BadRow("invalid_utf8", _NOT_UTF8)
    return None


def read_csv(stream: IO[bytes], name: str) -> Iterator[RawRow]:
    """Comma-separated values with a header line; row 1 is the first one after the header.

    Raises:
        DataError: the file is not CSV, or its header repeats a column.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, strict=True)
    header: list[str] | None = None
    number = 0
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{name}, row {number + 1}: not CSV ({error}); quote fields that hold commas, "
                'quotes or line feeds, and write a quote as "".'
            ) from None
        if not fields:
            continue
        if header is None:
            header = [field.strip() for field in fields]
            if len(set(header)) != len(header):
                raise DataError(f"{name}: the header repeats a column: {', '.join(header)}.")
            continue
        number += 1
        if len(fields) != len(header):
            bad = BadRow(
                "field_count", f"the row has {len(fields)} fields, the header has {len(header)}"
            )
            yield RawRow(name, number, bad)
        else:
            row = dict(zip(header, fields, strict=True))
            yield RawRow(name, number, _surrogates(fields) or row)


def read_parquet(stream: IO[bytes], name: str) -> Iterator[RawRow]:
    """Parquet, in batches of 256 rows. Values of the type JSON, as `datasets` writes objects with
    different keys, are read as what they say, also inside other values.

    Raises:
        DataError: the file is not readable as Parquet, or repeats a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        file = pq.ParquetFile(stream, pre_buffer=False)
        columns = file.schema_arrow.names
        if len(set(columns)) < len(columns):
            shown = ", ".join(columns[:20])
            raise DataError(f"{name}: the file repeats a column: {shown}.")
        parsers = {f.name: parse for f in file.schema_arrow if (parse := _json_parser(f.type))}
        for batch in file.iter_batches(batch_size=256, use_threads=False):
            for row in _rows(batch):
                number += 1
                yield RawRow(name, number, _parsed(row, parsers) if parsers else row)
    except (pa.ArrowInvalid, pa.ArrowException, OSError) as error:
        raise DataError(
            f"{name}, row {number + 1}: not readable as Parquet ({error}); download it again, or "
            "check that it is not a git-lfs pointer."
        ) from None


def _rows(batch: Any) -> list[Any]:
    """The rows of a batch; a BadRow for one with a value that Python cannot represent.

    Examples are texts that are not UTF-8, times after the year 9999 and unknown time zones.
    """
    try:
        return list(batch.to_pylist())
    except Exception:  # pyarrow raises what Python, pytz or its own code raise
        return [_row(batch.slice(position, 1)) for position in range(batch.num_rows)]


def _row(batch: Any) -> Any:
    """The row of a batch of one, or its BadRow."""
    row = {}
    for field, column in zip(batch.schema, batch.columns, strict=True):
        try:
            row[field.name] = column.to_pylist()[0]
        except UnicodeDecodeError:
            return BadRow("invalid_utf8", "a text of the row is not UTF-8")
        except Exception as error:
            return BadRow(
                "unreadable_value",
                f"column {field.name!r} of type {field.type} holds a value that cannot be read "
                f"({type(error).__name__}: {error}); correct it, or write the file without it",
            )
    return row


def _parsed(row: Any, parsers: dict[str, Callable[[Any], Any]]) -> Any:
    """The row with the JSON texts of its columns read; a BadRow if one is malformed."""
    if isinstance(row, BadRow):
        return row
    try:
        return row | {name: parse(row[name]) for name, parse in parsers.items()}
    except BadRow as bad:
        return bad


def _json_parser(kind: Any) -> Callable[[Any], Any] | None:
    """What reads the JSON texts in values of an Arrow type; None if it has none."""
    import pyarrow as pa

    if isinstance(kind, pa.JsonType):
        return lambda text: None if text is None else parse_json(text)
    if pa.types.is_struct(kind):
        inner = {field.name: parse for field in kind if (parse := _json_parser(field.type))}
        return (
            None if not inner
            else lambda held: held and held | {key: read(held[key]) for key, read in inner.items()}
        )  # fmt: skip
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        item = _json_parser(kind.value_type)
        return None if item is None else lambda held: held and [item(value) for value in held]
    return None


ENDINGS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_text,
    ".md": read_text,
}
READABLE = ".json, .jsonl, .jsonl.gz, .parquet, .csv, .txt and .md"


def reader_of(name: str) -> Reader | None:
    """The reader for a file name; None for an unknown type."""
    plain = name.lower().removesuffix(".gz")
    return next((read for ending, read in ENDINGS.items() if plain.endswith(ending)), None)


def read_file(stream: io.BufferedReader, name: str) -> Iterator[RawRow]:
    """The rows of an open file; .gz files are decompressed while reading.

    Raises:
        DataError: unknown type, a git-lfs pointer, or the file is damaged beyond single rows.
    """
    reader = reader_of(name)
    if reader is None:
        raise DataError(f"{name}: unknown file type; supported are {READABLE}.")
    if stream.peek(len(LFS_MAGIC)).startswith(LFS_MAGIC):
        raise DataError(
            f"{name} is a git-lfs pointer; expected the file that it points to: run `git lfs "
            "install && git lfs pull` in its clone."
        )
    number = 0
    try:
        plain: IO[bytes] = stream
        if name.lower().endswith(".gz"):
            plain = io.BufferedReader(gzip.GzipFile(fileobj=stream))
        for row in reader(plain, name):
            number = row.number
            yield row
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{name}: the gzip data is damaged or truncated after row {number} ({error}); download "
            "or compress it again."
        ) from None
