"""Mixes prepared data sets into one.

The rows keep the columns of their sources and get `source`, its name. Rows that an earlier source
has are dropped, by their tokens. Each row stays on its side of the split, which follows from the
prompt alone. The sources follow each other in proportion to their rows, so that the first rows are
a fair sample of all. Memory grows by at most 60 bytes a row.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_core.data.dataset.card import MAX_LISTED, DataCard, MixtureCard, SourceCard
from rlhf_core.data.dataset.carried import CARRIED
from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.dataset.schema import SPLITS, schema, sequence_lengths, trainable_tokens
from rlhf_core.data.dataset.split import prompt_hash
from rlhf_core.data.dataset.writer import BATCH_ROWS, DatasetWriter, prompt_text
from rlhf_core.data.overlap.datasets import contamination
from rlhf_core.data.overlap.result import Overlap
from rlhf_core.errors import DataError
from rlhf_core.jobs import MixedData, MixJob, Purpose

ELSEWHERE = "duplicate_of_another_source"

_IDENTITY: dict[Purpose, tuple[str, ...]] = {
    "sft": ("input_ids", "trainable"),
    "pretrain": ("input_ids", "trainable", "prompt"),  # last pieces of documents may be alike
    "preference": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "unpaired": ("prompt_ids", "completion_ids", "label"),
    "prompts": ("prompt_ids",),
}
"""Columns that two equal rows share."""


@dataclass
class _Source:
    """A prepared source: by the name of a side, its rows, a hash (uint64) of each, and whether the
    mixture keeps it."""

    settings: MixedData
    rows: dict[str, Rows]
    hashes: dict[str, Any]
    kept: dict[str, Any]

    @property
    def card(self) -> DataCard:
        return self.rows["train"].card


def mix(job: MixJob, folders: Sequence[Path], tokenizer: Any, folder: Path) -> DataCard:
    """Write the mixture into a folder, without publishing it.

    Args:
        folders: of the sources' artifacts, in the job's order.
        tokenizer: of the data sets.
        folder: is created; the Arrow files and the data card are written into it.

    Returns:
        The data card, which is in the folder too.

    Raises:
        DataError: a source is for another purpose or has other columns than the others, or none of
            its rows is left for training.
    """
    sources = [
        _read(part, job.purpose, source) for part, source in zip(job.mix, folders, strict=True)
    ]
    _drop_duplicates(sources)
    columns = _columns(sources, job.purpose)
    card = _combined(job, sources)
    writer = DatasetWriter(folder, job.purpose, columns)
    try:
        for side in SPLITS:
            for batch in _interleaved(sources, side, schema(job.purpose, columns)):
                _count(card, side, job.purpose, batch)
                prompts = map(prompt_text, batch.column("prompt").to_pylist())
                writer.write(side, batch, map(prompt_hash, prompts))
        assert card.mixture is not None
        if job.purpose != "pretrain":
            counts = card.mixture.plan.counts([s.train for s in card.mixture.sources])
            for source, count in zip(card.mixture.sources, counts, strict=True):
                source.epoch = count
        writer.finish(card)
    finally:
        writer.clean()
    card.overlap = _overlap(folder, tokenizer)
    card.save(folder)
    return card


def _read(part: MixedData, purpose: Purpose, folder: Path) -> _Source:
    rows = {side: Rows(folder, side, purpose) for side in SPLITS}
    hashes = {}
    for side, of_side in rows.items():
        values = (v for batch in of_side.batches for v in _hashes(batch, _IDENTITY[purpose]))
        hashes[side] = np.fromiter(values, dtype=np.uint64, count=len(of_side))
    kept = {side: np.ones(len(of_side), dtype=bool) for side, of_side in rows.items()}
    return _Source(part, rows, hashes, kept)


def _hashes(batch: Any, columns: Sequence[str]) -> Iterator[int]:
    """A 64-bit hash of each row's values in these columns."""
    parts = []
    for name in columns:
        column = batch.column(name)
        if hasattr(column, "offsets"):  # lists
            values = column.values.to_numpy(zero_copy_only=False)
            ends = column.offsets.to_numpy().tolist()
            parts.append([values[a:b].tobytes() for a, b in itertools.pairwise(ends)])
        else:
            parts.append([str(value).encode() for value in column.to_pylist()])
    for row in zip(*parts, strict=True):
        digest = hashlib.blake2b(digest_size=8)
        for value in row:
            digest.update(len(value).to_bytes(8, "big") + value)
        yield int.from_bytes(digest.digest(), "big")


def _drop_duplicates(sources: Sequence[_Source]) -> None:
    """Drop the rows that an earlier source has, unless the source keeps its duplicates."""
    seen = np.zeros(0, dtype=np.uint64)
    for source in sources:
        if source.settings.deduplicate:
            source.kept = {side: ~np.isin(h, seen) for side, h in source.hashes.items()}
        if not source.kept["train"].any():
            raise DataError(
                f"{source.settings.name} ({source.card.source}): no row is left to train on; all "
                f"of its {len(source.rows['train']):,} training rows are in earlier sources of the "
                "mixture too: leave it out, or set deduplicate: false for it."
            )
        seen = np.unique(np.concatenate([seen, *source.hashes.values()]))


def _columns(sources: Sequence[_Source], purpose: Purpose) -> tuple[str, ...]:
    """The columns of the mixture beside those of its purpose (carried.py).

    Raises:
        DataError: a source has a number that another one lacks.
    """
    found: list[str] = []
    for name in (*CARRIED.get(purpose, ()), "curriculum"):
        has = {s.settings.name: name in s.rows["train"].batches[0].schema.names for s in sources}
        if purpose == "prompts" and name != "curriculum":
            found += [name] if any(has.values()) else []  # "" where a source has none
        elif all(has.values()):
            found.append(name)
        elif any(has.values()):
            one, other = (next(n for n, yes in has.items() if yes is x) for x in (True, False))
            raise DataError(
                f"{one} has the column {name} and {other} has none; name it in the settings of "
                "each source of the mixture, or of none."
            )
    return (*found, "source")


def _combined(job: MixJob, sources: Sequence[_Source]) -> DataCard:
    """The card of the mixture, before its rows are written."""
    cards = []
    for source in sources:
        own, part = source.card, source.settings
        dropped = dict(own.dropped)
        twice = sum(int((~kept).sum()) for kept in source.kept.values())
        dropped |= {ELSEWHERE: twice} if twice else {}
        cards.append(
            SourceCard(
                name=part.name, source=own.source, data=part.data, weight=part.weight,
                share=part.rows, read=own.read, cut=own.cut, dropped=dropped, bad=dict(own.bad),
            )
        )  # fmt: skip
    own_cards = [source.card for source in sources]
    bad_rows = [row for card in own_cards for row in card.bad_rows]
    names = [part.name for part in job.mix]
    return DataCard(
        purpose=job.purpose,
        source=" + ".join(names),
        format="mixture",
        settings=job.model_dump(mode="json", include={"stopping_strategy", "max_repeats"}),
        tokenizer=own_cards[0].tokenizer,
        read=sum(card.read for card in own_cards),
        cut=sum(card.cut for card in own_cards),
        dropped=_sum(card.dropped for card in cards),
        bad=_sum(card.bad for card in own_cards),
        bad_rows=bad_rows[:MAX_LISTED],
        notes=_sum(card.notes for card in own_cards),
        left_out={name: why for card in own_cards for name, why in card.left_out.items()},
        mixture=MixtureCard(cards, job.stopping_strategy, job.max_repeats),
    )


def _sum(counts: Iterator[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total)


def _interleaved(sources: Sequence[_Source], side: str, kind: Any) -> Iterator[Any]:
    """Record batches of one side, of at most BATCH_ROWS rows."""
    import pyarrow as pa

    counts = [int(source.kept[side].sum()) for source in sources]
    places = [(np.arange(count) + 0.5) / max(1, count) for count in counts]
    order = np.argsort(np.concatenate(places), kind="stable")
    source_of = np.repeat(np.arange(len(sources)), counts)[order]
    streams = [_Stream(_kept(source, side, kind)) for source in sources]
    for start in range(0, len(source_of), BATCH_ROWS):
        part = source_of[start : start + BATCH_ROWS]
        taken = [b for i, stream in enumerate(streams) for b in stream.take(int((part == i).sum()))]
        # Rows come source by source; each goes to the place that its source has in the order.
        by_source = np.argsort(part, kind="stable")
        back = np.empty_like(by_source)
        back[by_source] = np.arange(len(part))
        yield pa.concat_batches(taken).take(pa.array(back))


def _kept(source: _Source, side: str, kind: Any) -> Iterator[Any]:
    """The rows of a source that are kept, in record batches with the columns of the mixture."""
    import pyarrow as pa

    constant, start = {"source": source.settings.name}, 0
    for batch in source.rows[side].batches:
        rows = batch.filter(pa.array(source.kept[side][start : start + batch.num_rows]))
        start += batch.num_rows
        columns = [
            rows.column(field.name)
            if field.name in rows.schema.names
            else pa.array([constant.get(field.name, "")] * rows.num_rows, field.type)
            for field in kind
        ]
        yield pa.RecordBatch.from_arrays(columns, schema=kind)


class _Stream:
    """Takes rows from record batches, one after another."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches
        self._rest: Any = None

    def take(self, count: int) -> list[Any]:
        """The next rows, as record batches."""
        found = []
        while count:
            if self._rest is None or not self._rest.num_rows:
                self._rest = next(self._batches)
                continue
            part = self._rest.slice(0, count)
            self._rest = self._rest.slice(part.num_rows)
            count -= part.num_rows
            found.append(part)
        return found


def _count(card: DataCard, side: str, purpose: Purpose, batch: Any) -> None:
    """Add rows to the cards of their sources."""
    import pyarrow.compute as pc

    assert card.mixture is not None
    for source in card.mixture.sources:
        rows = batch.filter(pc.equal(batch.column("source"), source.name))
        if not rows.num_rows:
            continue
        setattr(source, side, getattr(source, side) + rows.num_rows)
        source.tokens += int(sequence_lengths(purpose, rows).sum())
        source.trainable_tokens += trainable_tokens(purpose, rows)


def _overlap(folder: Path, tokenizer: Any) -> Overlap:
    """Of the mixture's training rows with the held-out prompts of all its sources."""
    heldout = Rows(folder, "heldout")
    texts = (
        prompt_text(prompt)
        for batch in heldout.batches
        for prompt in batch.column("prompt").to_pylist()
    )
    found = contamination({"heldout": texts}, {"train": folder}, tokenizer)
    return Overlap(**found["heldout"]["train"])
