"""Writes a data set: Arrow files whose bytes depend on the rows alone, and the data card."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf_core.data.dataset.card import DataCard, SplitCard, describe_lengths
from rlhf_core.data.dataset.hash_set import HashSet
from rlhf_core.data.dataset.schema import SPLITS, schema, sequence_lengths, trainable_tokens
from rlhf_core.data.dataset.split import prompt_hash
from rlhf_core.errors import DataError
from rlhf_core.jobs import Purpose

BATCH_ROWS = 1000
FILE_BYTES = 256 * 2**20  # size after which a new file is started


class SplitWriter:
    """Writes one split. It takes batches of any size and writes batches of BATCH_ROWS.

    Args:
        scratch: folder for temporary files.
        carried: additional columns (carried.py).
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        purpose: Purpose,
        scratch: Path,
        carried: tuple[str, ...] = (),
    ) -> None:
        self.folder, self.name, self.purpose = folder, name, purpose
        self.schema = schema(purpose, carried)
        self.card = SplitCard()
        self.files: list[dict[str, Any]] = []
        self._lengths: Counter[int] = Counter()
        self._prompts = HashSet(scratch / f"prompts-{name}.sqlite")
        self._buffer: list[Any] = []
        self._buffered_rows = 0
        self._file: Any = None
        self._bytes = 0

    def write(self, batch: Any, prompt_hashes: Iterable[int]) -> None:
        """Add rows.

        Args:
            batch: record batch with the split's schema.
            prompt_hashes: `split.prompt_hash` of each row, to count different prompts.
        """
        if not batch.num_rows:
            return
        for value in prompt_hashes:
            self._prompts.add(value)
        lengths = sequence_lengths(self.purpose, batch).tolist()
        self._lengths.update(lengths)
        self.card.rows += batch.num_rows
        self.card.tokens += sum(lengths)
        self.card.trainable_tokens += trainable_tokens(self.purpose, batch)
        self._buffer.append(batch)
        self._buffered_rows += batch.num_rows
        if self._buffered_rows >= BATCH_ROWS:
            self._flush(last=False)

    def _flush(self, last: bool) -> None:
        import pyarrow as pa

        if not self._buffer:
            return
        rows = pa.concat_batches(self._buffer)
        whole = rows.num_rows if last else rows.num_rows // BATCH_ROWS * BATCH_ROWS
        for start in range(0, whole, BATCH_ROWS):
            part = rows.slice(start, min(BATCH_ROWS, whole - start))
            if self._file is not None and self._bytes >= FILE_BYTES:
                self._end_file()
            self._write(part)
        rest = rows.slice(whole)
        self._buffer = [rest] if rest.num_rows else []
        self._buffered_rows = rest.num_rows

    def _write(self, part: Any) -> None:
        import pyarrow as pa

        kind = self.schema
        if self._file is None:
            name = f"{self.name}-{len(self.files):05d}.arrow"
            self.files.append({"name": name, "rows": 0})
            self._file = pa.ipc.new_file(str(self.folder / name), kind)
            self._bytes = 0
        # Copied, without offsets into a larger batch, so that equal rows give equal bytes.
        columns = [pa.concat_arrays([part.column(field.name)]) for field in kind]
        clean = pa.RecordBatch.from_arrays(
            [pa.array(column.to_pylist(), field.type) if column.offset else column
             for column, field in zip(columns, kind, strict=True)], schema=kind,
        )  # fmt: skip
        self._file.write_batch(clean)
        self._bytes += clean.nbytes
        self.files[-1]["rows"] += clean.num_rows

    def _end_file(self) -> None:
        self._file.close()
        self._file = None

    def close(self) -> None:
        """Finish the files (there is always one, even without rows) and the split's card."""
        import pyarrow as pa

        self._flush(last=True)
        if not self.files:
            name = f"{self.name}-00000.arrow"
            self.files.append({"name": name, "rows": 0})
            self._file = pa.ipc.new_file(str(self.folder / name), self.schema)
        if self._file is not None:
            self._end_file()
        for entry in self.files:
            with (self.folder / entry["name"]).open("rb") as stream:
                entry["sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
                entry["bytes"] = stream.tell()
        self.card.prompts = self._prompts.count
        self.card.lengths, self.card.histogram = describe_lengths(self._lengths)
        self._prompts.close()


class DatasetWriter:
    """Writes a data set folder: `write` batches of either split, then `finish` with the card."""

    def __init__(self, folder: Path, purpose: Purpose, carried: tuple[str, ...] = ()) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.scratch = self.folder / ".work"
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        self.splits = {
            name: SplitWriter(self.folder, name, purpose, self.scratch, carried) for name in SPLITS
        }

    def write(self, split: str, batch: Any, prompt_hashes: Iterable[int]) -> None:
        """Add rows to a split; see `SplitWriter.write`."""
        self.splits[split].write(batch, prompt_hashes)

    def finish(self, card: DataCard) -> DataCard:
        """Close the files, complete the card and write it."""
        total = hashlib.sha256()
        card.files = []
        for name, split in self.splits.items():
            split.close()
            card.splits[name] = split.card
            card.files += split.files
        for entry in card.files:
            total.update(f"{entry['name']}\0{entry['sha256']}\n".encode())
        card.digest = total.hexdigest()
        card.kept = sum(split.card.rows for split in self.splits.values())
        card.check()
        card.save(self.folder)
        self.clean()
        return card

    def clean(self) -> None:
        """Remove the scratch folder."""
        shutil.rmtree(self.scratch, ignore_errors=True)


def write_dataset(
    folder: Path,
    purpose: Purpose,
    splits: Mapping[str, Iterable[Mapping[str, Any]]],
    card: DataCard | Mapping[str, Any],
    carried: tuple[str, ...] = (),
) -> DataCard:
    """Write rows that are tokenised already, such as sampled preference pairs, as a data set.

    Args:
        splits: "train" and "heldout" -> rows with the columns of the purpose (schema.py); read
            once, BATCH_ROWS rows in memory at a time. A missing split is written empty.
        card: a DataCard, or a mapping with its `source` and perhaps `dropped`; numbers under
            `counts` become the card's notes. If `read` is 0, it becomes kept + dropped + bad.
        carried: additional columns (carried.py).

    Returns:
        The completed card, which is in the folder too.

    Raises:
        DataError: an unknown split, or a row without the purpose's columns and types.
    """
    if unknown := set(splits) - set(SPLITS):
        raise DataError(f"There is no split {sorted(unknown)}; there are {', '.join(SPLITS)}.")
    if not isinstance(card, DataCard):
        given = {name: value for name, value in card.items() if name not in ("counts", "purpose")}
        card = DataCard(purpose=purpose, notes=dict(card.get("counts", {})), **given)
    writer = DatasetWriter(folder, purpose, carried)
    try:
        for split, rows in splits.items():
            for start, part in _parts(rows):
                batch = _record_batch(part, schema(purpose, carried), purpose, split, start)
                writer.write(
                    split, batch, [prompt_hash(prompt_text(row["prompt"])) for row in part]
                )
        if not card.read:
            rows_kept = sum(split.card.rows for split in writer.splits.values())
            card.read = rows_kept + sum(card.dropped.values()) + sum(card.bad.values())
        return writer.finish(card)
    finally:
        writer.clean()


def _record_batch(
    rows: list[Mapping[str, Any]], kind: Any, purpose: Purpose, split: str, start: int
) -> Any:
    """Rows as a record batch. ``start`` is the number of the first one, for messages.

    Raises:
        DataError: a row has other columns or types than the schema ``kind``.
    """
    import pyarrow as pa

    for number, row in enumerate(rows, start):
        if set(row) != set(kind.names):
            raise DataError(
                f"{split} row {number} has the columns {sorted(row)}; purpose {purpose} needs "
                f"{sorted(kind.names)}."
            )
    try:
        return pa.RecordBatch.from_pylist([dict(row) for row in rows], schema=kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise DataError(
            f"{split} rows {start} to {start + len(rows) - 1}: {error}; expected "
            + ", ".join(f"{field.name} {field.type}" for field in kind)
        ) from error


def prompt_text(prompt: str) -> str:
    """The text that identifies the value of a prompt column: JSON messages or plain text."""
    import json

    from rlhf_core.data.dataset.split import first_prompt

    if prompt.startswith("[{"):
        try:
            return first_prompt(json.loads(prompt))
        except (ValueError, KeyError, TypeError):
            return prompt
    return prompt


def _parts(rows: Iterable[Mapping[str, Any]]) -> Iterable[tuple[int, list[Mapping[str, Any]]]]:
    """(number of its first row, from 1; rows) in lists of at most BATCH_ROWS."""
    part: list[Mapping[str, Any]] = []
    start = 1
    for row in rows:
        part.append(row)
        if len(part) == BATCH_ROWS:
            yield start, part
            start += len(part)
            part = []
    if part:
        yield start, part
