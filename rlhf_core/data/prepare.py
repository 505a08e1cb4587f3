"""The data stage: read, check, tokenise, drop, shuffle, split and write one data set.

    source -> rows -> [parse, normalise, render, tokenise, limits] -> duplicates -> shuffle
           -> max_samples -> train / held-out -> Arrow files and data card

The part in brackets runs in worker processes; a bounded number of rows is in memory at any time.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf_core.data.dataset.card import LISTED, DataCard
from rlhf_core.data.dataset.seen import Seen
from rlhf_core.data.dataset.shuffle import Shuffle
from rlhf_core.data.dataset.writer import DatasetWriter
from rlhf_core.data.encoding import templates
from rlhf_core.data.encoding.encode import EXTRA, Piece, Plan, check_purpose, encode_piece
from rlhf_core.data.parallel import ordered_map
from rlhf_core.data.rows.detect import find_format
from rlhf_core.data.rows.row import SKIP_HINT, RawRow
from rlhf_core.data.sources.open import open_rows
from rlhf_core.errors import DataError
from rlhf_core.jobs import DataJob, DataSettings
from rlhf_core.store import Store

PIECE_ROWS = 512
PIECE_BYTES = 2**20
SILENCE = 10.0  # seconds between two lines of progress

Log = Callable[[str], None]


def prepare(
    job: DataJob,
    tokenizer: Any,
    folder: Path,
    log: Log = lambda message: None,
    workers: int | None = None,
    store: Store | None = None,
) -> DataCard:
    """Write the data set into a folder, without publishing it.

    Args:
        tokenizer: as `load_tokenizer` returns it; without a chat template it gets chatml.
        workers: processes; None: one per core. Their number does not change a byte of the result.
        store: where votes and thumbs are; None: the environment's.
    Raises:
        DataError: the source, its format or a row cannot be used, or nothing is left.
        ModelError: the tokenizer's chat template cannot be used.
    """
    if not tokenizer.chat_template:
        tokenizer.chat_template = templates.resolve_template(tokenizer)
    end = templates.end_of_turn(tokenizer)
    rows, format = find_format(
        open_rows(data_settings(job), store, job.fingerprint), job, job.purpose
    )
    check_purpose(format, job.purpose)
    card = DataCard(
        purpose=job.purpose,
        source=job.source,
        format=format,
        settings=data_settings(job).model_dump(mode="json") | {"seed": job.seed},
        tokenizer={"tokens": len(tokenizer), "end_of_turn": end[0], "end_of_turn_id": end[1]},
    )
    if job.purpose == "pretrain" and job.max_length < 2:
        raise DataError(
            f"{job.source}: max_length is {job.max_length}, but a piece of text holds a token and "
            "the one that it predicts; set it to 2 or more."
        )
    plan = Plan(data_settings(job), format, job.purpose, job.seed)
    work = functools.partial(encode_piece, plan, tokenizer)
    writer = DatasetWriter(folder, job.purpose, plan.carried())
    try:
        shuffle = Shuffle(writer.work, "_priority")
        for batch in _kept(ordered_map(work, _pieces(rows), workers), card, writer.work, job, log):
            shuffle.add(batch)
        _write(shuffle, writer, card, job)
        _refuse_empty(writer, card, job)
        return writer.finish(card)
    finally:
        writer.clean()


def data_settings(job: DataJob) -> DataSettings:
    """The part of a job that describes its data set, without the fields of the job itself."""
    names = DataSettings.model_fields
    return DataSettings(**{name: getattr(job, name) for name in names})


def _pieces(rows: Iterable[RawRow]) -> Iterator[list[RawRow]]:
    """Rows in lists that are bounded in rows and, as far as that is cheap to know, in bytes."""
    piece: list[RawRow] = []
    size = 0
    for raw in rows:
        piece.append(raw)
        size += len(raw.data) if isinstance(raw.data, bytes | str) else 0
        if len(piece) >= PIECE_ROWS or size >= PIECE_BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _kept(
    pieces: Iterable[Piece], card: DataCard, work: Path, job: DataJob, log: Log
) -> Iterator[Any]:
    """The rows that are no duplicates, with every other row entered into the card."""
    import pyarrow as pa

    dropped: Counter[str] = Counter()
    bad: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    seen = Seen(work / "texts.sqlite")
    spoke = time.monotonic()
    try:
        for piece in pieces:
            card.read += piece.read
            card.cut += piece.cut
            dropped.update(piece.dropped)
            notes.update(piece.notes)
            for file, row, reason, message in piece.bad:
                if job.on_bad_row == "error":
                    raise DataError(f"{file}, row {row}: {message}. {SKIP_HINT}")
                bad[reason] += 1
                if len(card.bad_rows) < LISTED:
                    card.bad_rows.append(
                        {"file": file, "row": row, "reason": reason, "message": message}
                    )
            if piece.rows is not None:
                batch = piece.rows
                if job.deduplicate:
                    new = [seen.add(value) for value in batch.column("_text").to_pylist()]
                    dropped["duplicate"] += len(new) - sum(new)
                    batch = batch.filter(pa.array(new))
                yield batch
            if time.monotonic() - spoke > SILENCE:
                spoke = time.monotonic()
                log(f"{card.read:,} rows read")
    finally:
        seen.close()
    card.dropped = {reason: count for reason, count in dropped.items() if count}
    card.bad, card.notes = dict(bad), dict(notes)


def _write(shuffle: Shuffle, writer: DatasetWriter, card: DataCard, job: DataJob) -> None:
    """Rows in shuffled order to their sides, until there are max_samples."""
    import numpy as np
    import pyarrow as pa

    left = job.max_samples
    over = 0
    for rows in shuffle:
        if left is not None:
            over += max(0, rows.num_rows - left)
            rows = rows.slice(0, left)
            left -= rows.num_rows
        hashes = rows.column("_prompt").to_numpy()
        # The comparison of split.is_heldout, on numbers that stand for the prompts.
        heldout = np.fromiter(
            (int(h) < job.heldout_fraction * 2.0**64 for h in hashes), dtype=bool, count=len(hashes)
        )
        columns = rows.drop_columns(list(EXTRA))
        writer.write("heldout", columns.filter(pa.array(heldout)), hashes[heldout].tolist())
        writer.write("train", columns.filter(pa.array(~heldout)), hashes[~heldout].tolist())
    if over:
        card.dropped["max_samples"] = over


def _refuse_empty(writer: DatasetWriter, card: DataCard, job: DataJob) -> None:
    sides = {name: side.card.rows for name, side in writer.splits.items()}
    if sides["train"] or (sides["heldout"] and job.heldout_fraction == 1.0):
        return
    account = ", ".join(f"{n:,} {why}" for why, n in {**card.dropped, **card.bad}.items()) or "none"
    first = card.bad_rows[0] if card.bad_rows else None
    example = f" First bad row: {first['file']}, row {first['row']}: {first['message']}." if (
        first
    ) else ""  # fmt: skip
    advice = {
        "too_long": f"raise max_length (now {job.max_length})",
        "prompt_too_long": f"raise max_prompt_length (now {job.max_prompt_length})",
    }
    todo = [text for reason, text in advice.items() if reason in card.dropped]
    if sides["heldout"]:
        todo.append(f"lower heldout_fraction (now {job.heldout_fraction:g}) or add rows")
    raise DataError(
        f"{job.source}: no row is left to train on; {card.read:,} were read, "
        f"{sides['heldout']:,} are held out, left out were: {account}.{example} "
        + (f"{'; '.join(todo).capitalize()}." if todo else "Check source, format and columns.")
    )
