"""Prepares a data set: read, check, tokenise, deduplicate, shuffle, split and write.

    source -> rows -> [parse, normalise, render, tokenise, limits] -> deduplicate -> shuffle
           -> max_samples -> train / heldout -> Arrow files and data card

The part in brackets runs in worker processes. Memory does not grow with the number of rows.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf_core.data.dataset.arrays import array_of
from rlhf_core.data.dataset.card import MAX_LISTED, DataCard
from rlhf_core.data.dataset.hash_set import HashSet
from rlhf_core.data.dataset.shuffle import Shuffle
from rlhf_core.data.dataset.split import is_heldout_hash
from rlhf_core.data.dataset.writer import DatasetWriter, prompt_text
from rlhf_core.data.encoding import templates
from rlhf_core.data.encoding.encode import (
    SCRATCH_COLUMNS,
    EncodedBatch,
    Plan,
    encode_batch,
)
from rlhf_core.data.encoding.words import WordTable
from rlhf_core.data.overlap.within import SplitOverlap
from rlhf_core.data.parallel import one_ahead, ordered_map
from rlhf_core.data.rows.columns import FURTHER, MAX_NOTES
from rlhf_core.data.rows.detect import find_format
from rlhf_core.data.rows.row import SKIP_HINT, RawRow
from rlhf_core.data.sources.open import open_rows
from rlhf_core.errors import DataError
from rlhf_core.jobs import DataJob, DataSettings
from rlhf_core.store import Store

BATCH_ROWS = 512
BATCH_BYTES = 2**20
LOG_SECONDS = 10.0  # between two progress lines

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
        tokenizer: as `load_tokenizer` returns it; one without a chat template gets chatml.
        folder: is created; the Arrow files and the data card are written into it.
        log: called with a progress line at most every LOG_SECONDS.
        workers: number of processes; None: one per core. It does not change a byte of the result.
        store: holds the votes and thumbs; None: the store of the environment.

    Returns:
        The data card, which is in the folder too.

    Raises:
        DataError: the source, its format or a row cannot be used, or no row is left.
        ModelError: the tokenizer's chat template cannot be used.
    """
    if not tokenizer.chat_template:
        tokenizer.chat_template = templates.resolve_template(tokenizer)
    end = templates.end_of_turn(tokenizer)
    left_out: dict[str, str] = {}
    rows, format = find_format(
        open_rows(data_settings(job), store, job.fingerprint, left_out), job, job.purpose
    )
    card = DataCard(
        purpose=job.purpose,
        source=job.source,
        format=format,
        settings=_shown_settings(job),
        left_out=left_out,
        tokenizer={"tokens": len(tokenizer), "end_of_turn": end[0], "end_of_turn_id": end[1]},
    )
    if job.purpose == "pretrain" and job.max_length < 2:
        raise DataError(
            f"{job.source}: max_length is {job.max_length}, but a sequence needs a token and the "
            "next one that it predicts; set it to 2 or more."
        )
    plan = Plan(data_settings(job), format, job.purpose, job.seed)
    encode = functools.partial(encode_batch, plan, tokenizer, words=WordTable(tokenizer))
    writer = DatasetWriter(folder, job.purpose, plan.carried())
    try:
        shuffle = Shuffle(writer.scratch, "_priority")
        encoded = ordered_map(encode, _batches(rows), workers)
        for batch in _deduplicate(encoded, card, writer.scratch, job, log):
            shuffle.add(batch)
        overlap = SplitOverlap(writer.scratch)
        _write(shuffle, writer, overlap, card, job)
        _check_not_empty(writer, card, job)
        card.overlap = overlap.result(workers)
        return writer.finish(card)
    finally:
        writer.clean()


def _shown_settings(job: DataJob) -> dict[str, Any]:
    """The settings in the data card, with the seed; later ones are left out where they are empty,
    which keeps the bytes of older cards."""
    settings = data_settings(job).model_dump(mode="json") | {"seed": job.seed}
    return {k: v for k, v in settings.items() if v or k not in ("ignore_columns", "curriculum")}


def data_settings(job: DataJob) -> DataSettings:
    """The fields of a job that describe its data set."""
    names = DataSettings.model_fields
    return DataSettings(**{name: getattr(job, name) for name in names})


def _batches(rows: Iterable[RawRow]) -> Iterator[list[RawRow]]:
    """Lists of at most BATCH_ROWS rows, and of about BATCH_BYTES of undecoded text."""
    batch: list[RawRow] = []
    size = 0
    for raw in rows:
        batch.append(raw)
        size += len(raw.data) if isinstance(raw.data, bytes | str) else 0
        if len(batch) >= BATCH_ROWS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _deduplicate(
    batches: Iterable[EncodedBatch], card: DataCard, scratch: Path, job: DataJob, log: Log
) -> Iterator[Any]:
    """Record batches without duplicates; counts all rows in the card, and logs the progress.

    Raises:
        DataError: a bad row, with ``on_bad_row: error``; or `ignore_columns` names what no row has.
    """
    import pyarrow as pa

    dropped: Counter[str] = Counter()
    bad: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    unseen = set(job.ignore_columns)
    hashes = HashSet(scratch / "texts.sqlite")
    logged_at = time.monotonic()
    try:
        for batch in batches:
            card.read += batch.read
            card.cut += batch.cut
            dropped.update(batch.dropped)
            notes.update(batch.notes)
            unseen &= batch.unseen
            for file, row, reason, message in batch.bad:
                if job.on_bad_row == "error":
                    raise DataError(f"{file}, row {row}: {message}. {SKIP_HINT}")
                bad[reason] += 1
                if len(card.bad_rows) < MAX_LISTED:
                    card.bad_rows.append(
                        {"file": file, "row": row, "reason": reason, "message": message}
                    )
            if batch.rows is not None:
                rows = batch.rows
                if job.deduplicate:
                    new = [hashes.add(value) for value in rows.column("_text").to_pylist()]
                    dropped["duplicate"] += len(new) - sum(new)
                    rows = rows.filter(array_of(new, pa.bool_()))
                yield rows
            if time.monotonic() - logged_at > LOG_SECONDS:
                logged_at = time.monotonic()
                log(f"{card.read:,} rows read")
    finally:
        hashes.close()
    if unseen and card.read > bad.total():
        raise DataError(
            f"{job.source}: ignore_columns: [{', '.join(sorted(unseen))}] has no effect: no row "
            "has a column of that name, nor a key in its messages; correct the name or remove it."
        )
    card.dropped = {reason: count for reason, count in dropped.items() if count}
    card.bad = dict(bad)
    card.notes = few_notes(notes)


def few_notes(notes: Counter[str]) -> dict[str, int]:
    """The most common notes, the others together: each batch has few of them, but a file with
    endless names has others in each batch."""
    shown = Counter({note: count for note, count in notes.items() if note != FURTHER})
    few = dict(shown.most_common(2 * MAX_NOTES))
    further = sum(notes.values()) - sum(few.values())
    return few | ({FURTHER: further} if further else {})


def _write(
    shuffle: Shuffle, writer: DatasetWriter, overlap: SplitOverlap, card: DataCard, job: DataJob
) -> None:
    """Write the shuffled rows to their splits, up to max_samples rows."""
    for heldout, train in one_ahead(_splits(shuffle, card, job)):
        texts = list(map(prompt_text, heldout.column("prompt").to_pylist()))
        overlap.add(heldout, train, texts)
        for name, side in (("heldout", heldout), ("train", train)):
            prompts = side.column("_prompt").to_pylist()
            writer.write(name, side.drop_columns(list(SCRATCH_COLUMNS)), prompts)


def _splits(shuffle: Shuffle, card: DataCard, job: DataJob) -> Iterator[tuple[Any, Any]]:
    """The shuffled rows as record batches of held-out and of training rows, up to max_samples."""
    import numpy as np
    import pyarrow as pa

    left = job.max_samples
    cut_off = 0
    for rows in shuffle:
        if left is not None:
            cut_off += max(0, rows.num_rows - left)
            rows = rows.slice(0, left)
            left -= rows.num_rows
        hashes = np.from_dlpack(rows.column("_prompt"))
        held = (is_heldout_hash(int(value), job.heldout_fraction) for value in hashes)
        heldout = np.fromiter(held, dtype=bool, count=len(hashes))
        yield tuple(rows.filter(array_of(side, pa.bool_())) for side in (heldout, ~heldout))
    if cut_off:
        card.dropped["max_samples"] = cut_off


def _check_not_empty(writer: DatasetWriter, card: DataCard, job: DataJob) -> None:
    """Raise DataError if no row is left for training, with the reasons and what to change."""
    rows = {name: split.card.rows for name, split in writer.splits.items()}
    if rows["train"] or (rows["heldout"] and job.heldout_fraction == 1.0):
        return
    reasons = ", ".join(f"{n:,} {why}" for why, n in {**card.dropped, **card.bad}.items())
    first = card.bad_rows[0] if card.bad_rows else None
    example = f" First bad row: {first['file']}, row {first['row']}: {first['message']}." if (
        first
    ) else ""  # fmt: skip
    advice = {
        "too_long": f"raise max_length (now {job.max_length})",
        "prompt_too_long": f"raise max_prompt_length (now {job.max_prompt_length})",
    }
    todo = [text for reason, text in advice.items() if reason in card.dropped]
    if rows["heldout"]:
        todo.append(f"lower heldout_fraction (now {job.heldout_fraction:g}) or add rows")
    raise DataError(
        f"{job.source}: no row is left to train on; {card.read:,} were read, "
        f"{rows['heldout']:,} are held out, dropped or bad: {reasons or 'none'}.{example} "
        + (f"{'; '.join(todo).capitalize()}." if todo else "Check source, format and columns.")
    )
