"""Encodes rows to tokens: the work of one worker process on a batch of rows."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_core.data.dataset.arrays import array_of
from rlhf_core.data.dataset.carried import carried, carried_values
from rlhf_core.data.dataset.schema import schema
from rlhf_core.data.dataset.split import is_heldout_hash, prompt_hash
from rlhf_core.data.encoding import templates
from rlhf_core.data.encoding.render import Rendered, render_example
from rlhf_core.data.encoding.words import WordTable
from rlhf_core.data.overlap import ngrams
from rlhf_core.data.rows.columns import Rules, names_in
from rlhf_core.data.rows.formats import normalise
from rlhf_core.data.rows.row import BadRow, RawRow
from rlhf_core.jobs import DataSettings, Format, Purpose

# Columns beside those of the schema, used only while preparing: priority in the shuffle, hash of
# the whole text, hash of the prompt; hash of the prompt without punctuation, and hashes of n-grams
# (bytes), of the prompt if it is held out, else of the whole text.
SCRATCH_COLUMNS = ("_priority", "_text", "_prompt", "_whole", "_grams")


@dataclass(frozen=True)
class Plan:
    """What a worker needs besides the tokenizer."""

    settings: DataSettings
    format: Format
    purpose: Purpose
    seed: int

    def carried(self) -> tuple[str, ...]:
        """The additional columns that the data set has, see `carried`."""
        return carried(self.settings, self.purpose)


@dataclass
class EncodedBatch:
    """The encoded rows of a batch, and the counts of the other rows.

    Attributes:
        rows: record batch with the schema's columns and SCRATCH_COLUMNS; None without rows.
        read: number of rows read.
        cut: number of additional rows that documents or conversations were split into.
        dropped: reason -> number of rows. notes: remark -> number of rows.
        unseen: names of `ignore_columns` that no row has.
        bad: (file, row, reason, message) of the bad rows, in order; only the first one with
            ``on_bad_row: error``.
    """

    rows: Any = None
    read: int = 0
    cut: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    unseen: set[str] = field(default_factory=set)
    bad: list[tuple[str, int, str, str]] = field(default_factory=list)


def encode_batch(
    plan: Plan, tokenizer: Any, rows_in: Sequence[RawRow], words: WordTable | None = None
) -> EncodedBatch:
    """Parse, check, render and tokenise some rows.

    Bad and dropped rows are counted in the result.

    Args:
        words: of the tokenizer, with those of earlier rows; None: a new table.

    Raises:
        ModelError: the chat template cannot be used.
    """
    batch = EncodedBatch(unseen=set(plan.settings.ignore_columns))
    rules = Rules.of(plan.settings, plan.purpose, batch.notes)
    texts: list[tuple[RawRow, Rendered]] = []
    for raw in rows_in:
        batch.read += 1
        if raw.dropped:
            batch.dropped[raw.dropped] += 1
            continue
        try:
            row = raw.columns(plan.settings.renames)
            if batch.unseen:
                batch.unseen -= set(names_in(row, batch.unseen))
            example = normalise(row, plan.format, plan.purpose, rules)
            if plan.purpose == "preference" and example.replies[0] == example.replies[1]:
                batch.dropped["identical_replies"] += 1
                continue
            if plan.purpose in ("sft", "pretrain") and example.label is False:
                batch.dropped["undesirable"] += 1  # SFT must not imitate a bad reply
                continue
            parts = render_example(
                tokenizer, example, plan.purpose, plan.settings.system, batch.notes
            )
            carried_over = carried_values(row, plan.carried())
            batch.cut += len(parts) - 1
            for text in parts:
                text.columns |= carried_over
                texts.append((raw, text))
        except BadRow as bad:
            batch.bad.append((raw.file, raw.number, bad.reason, bad.message))
            if plan.settings.on_bad_row == "error":
                break
    if any(text.bos_eos is None for _, text in texts) and templates.writes_date(tokenizer):
        batch.notes["with today's date, which the chat template writes"] += len(texts)
    _tokenise(plan, tokenizer, texts, batch, words or WordTable(tokenizer))
    return batch


def _tokenise(
    plan: Plan,
    tokenizer: Any,
    texts: Sequence[tuple[RawRow, Rendered]],
    batch: EncodedBatch,
    words: WordTable,
) -> None:
    """Tokenise rendered rows into ``batch.rows``; bad and dropped ones are counted."""
    import numpy as np

    positions: dict[str, int] = {}
    for _, text in texts:
        for part in (*(s.text for s in text.segments), *text.replies):
            positions.setdefault(part, len(positions))
    ids = words.encode(list(positions))
    bos_eos = _bos_and_eos(tokenizer) if any(text.bos_eos for _, text in texts) else (-1, -1)

    rows: list[dict[str, Any]] = []
    passages = _passages([text for _, text in texts], plan.settings.heldout_fraction)
    for (raw, text), columns in zip(texts, passages, strict=True):
        parts = [(ids[positions[s.text]], s.in_loss) for s in text.segments]
        if text.bos_eos is not None:
            bos, eos = (np.array([t] if t >= 0 else [], np.int32) for t in bos_eos)
            parts = [(bos, False), *parts, (eos, True)]
        replies = [ids[positions[reply]] for reply in text.replies]
        try:
            row = _row(plan, parts, replies, batch)
        except BadRow as bad:
            batch.bad.append((raw.file, raw.number, bad.reason, bad.message))
            continue
        if row is None:
            continue
        row |= text.columns
        row["row"] = raw.number
        row |= columns
        whole = _text_hash(plan.purpose, text)
        file = raw.file.rpartition("/")[2]  # the folder's path must not change the order
        length = plan.settings.max_length
        pieces = _split_document(row, length) if plan.purpose == "pretrain" else [row]
        for number, part in enumerate(pieces):
            # A later piece is a duplicate only if its whole document is one.
            part["_text"] = _hash(f"{whole}\0{number}") if number else whole
            if number:
                part["_whole"], part["_grams"] = 0, b""  # the first piece has the document's
            part["_priority"] = _hash(f"{plan.seed}\0{file}\0{raw.number}\0{part['_text']}")
        batch.cut += len(pieces) - 1
        rows += pieces
    batch.bad.sort(key=lambda bad: (bad[0], bad[1]))
    if rows:
        batch.rows = _record_batch(rows, plan)


def _record_batch(rows: Sequence[dict[str, Any]], plan: Plan) -> Any:
    """Rows as a record batch with the schema's columns and SCRATCH_COLUMNS."""
    import pyarrow as pa

    kind = schema(plan.purpose, plan.carried())
    for name in SCRATCH_COLUMNS:
        kind = kind.append(pa.field(name, pa.binary() if name == "_grams" else pa.uint64()))
    columns = [array_of([row[f.name] for row in rows], f.type) for f in kind]
    return pa.RecordBatch.from_arrays(columns, schema=kind)


def _passages(texts: Sequence[Rendered], fraction: float) -> list[dict[str, Any]]:
    """The values of the columns `_prompt`, `_whole` and `_grams` of each row.

    Args:
        fraction: share of the prompts that is held out.
    """
    hashes = [prompt_hash(text.prompt) for text in texts]
    compared = [
        text.prompt
        if is_heldout_hash(value, fraction)
        else " ".join([*(part.text for part in text.segments), *text.replies])
        for text, value in zip(texts, hashes, strict=True)
    ]
    found = ngrams.grams(list(map(ngrams.words, compared)))
    return [
        {"_prompt": value, "_whole": ngrams.whole(text.prompt), "_grams": grams.tobytes()}
        for value, text, grams in zip(hashes, texts, found, strict=True)
    ]


def _row(
    plan: Plan, parts: list[tuple[Any, bool]], replies: list[Any], batch: EncodedBatch
) -> dict[str, Any] | None:
    """The token columns of a row; None if a length limit drops it.

    Args:
        parts: (token ids, whether the loss covers them) of each segment; numpy int32, (T,).
        replies: token ids of each reply.

    Raises:
        BadRow: the loss covers no token.
    """
    import numpy as np

    settings = plan.settings
    all_ids = np.concatenate([ids for ids, _ in parts])
    prompt = 0
    for ids, in_loss in parts:
        if in_loss:
            break
        prompt += len(ids)
    longest = len(all_ids) + max((len(reply) for reply in replies), default=0)
    if plan.purpose in ("preference", "unpaired", "prompts"):
        prompt = len(all_ids)
    if settings.max_prompt_length and prompt > settings.max_prompt_length:
        batch.dropped["prompt_too_long"] += 1
        return None
    if longest > settings.max_length and plan.purpose != "pretrain":  # pretraining splits it
        batch.dropped["too_long"] += 1
        return None
    if plan.purpose == "prompts":
        return {"prompt_ids": all_ids}
    if plan.purpose == "preference":
        if np.array_equal(*replies):  # the template strips what told them apart
            batch.dropped["identical_replies"] += 1
            return None
        return {"prompt_ids": all_ids, "chosen_ids": replies[0], "rejected_ids": replies[1]}
    if plan.purpose == "unpaired":
        return {"prompt_ids": all_ids, "completion_ids": replies[0]}
    loss_mask = np.repeat([in_loss for _, in_loss in parts], [len(ids) for ids, _ in parts])
    if not loss_mask[1:].any():  # no token precedes the first one, so it cannot be predicted
        raise BadRow("nothing_to_train", "the loss mask of the row is empty: no token to train on")
    return {"input_ids": all_ids, "trainable": loss_mask}


def _split_document(row: dict[str, Any], length: int) -> list[dict[str, Any]]:
    """Split a document into pieces of at most ``length`` tokens.

    Each piece starts with the last token of the previous one, outside its loss mask: it only
    predicts the next token. So every token is in the loss mask of exactly one piece.
    """
    ids, loss_mask = row["input_ids"], row["trainable"]
    starts = range(0, max(1, len(ids) - 1), length - 1)
    pieces = [
        row | {"input_ids": ids[i : i + length], "trainable": loss_mask[i : i + length].copy()}
        for i in starts
    ]
    for piece in pieces[1:]:
        piece["trainable"][0] = False
    return pieces


def _bos_and_eos(tokenizer: Any) -> tuple[int, int]:
    """Ids that start and end a plain text; -1 for one that the tokenizer does not have."""
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    starts = bos is not None and first == [bos]
    return (bos if starts else -1), (-1 if eos is None else eos)


def _hash(text: str) -> int:
    """64 bits of BLAKE2b."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def _text_hash(purpose: Purpose, text: Rendered) -> int:
    """A hash that duplicates share: of the prompt for purpose prompts, else of the whole row.

    The same reply with two different labels is two rows: either label may be the wrong one.
    """
    parts = [segment.text for segment in text.segments]
    if purpose != "prompts":
        parts += text.replies
    if purpose == "unpaired":
        parts.append(str(text.columns["label"]))
    if text.flags:  # with other replies in the loss it is another row
        parts.append(str(text.flags))
    return _hash(json.dumps(parts))
