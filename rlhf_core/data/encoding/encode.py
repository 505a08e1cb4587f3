"""Encodes rows to tokens: the work of one worker process on a batch of rows."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_core.data.dataset.carried import carried, carried_values
from rlhf_core.data.dataset.schema import dump_messages, schema
from rlhf_core.data.dataset.split import first_prompt, prompt_hash
from rlhf_core.data.encoding import templates
from rlhf_core.data.rows.formats import PURPOSES_OF, Example, normalise
from rlhf_core.data.rows.row import BadRow, Message, RawRow
from rlhf_core.errors import DataError
from rlhf_core.jobs import DataSettings, Format, Purpose

# Columns beside those of the schema, used only while preparing: priority in the shuffle, hash of
# the whole text, hash of the prompt.
SCRATCH_COLUMNS = ("_priority", "_text", "_prompt")


@dataclass(frozen=True)
class Plan:
    """What a worker needs besides the tokenizer."""

    settings: DataSettings
    format: Format
    purpose: Purpose
    seed: int

    def carried(self) -> tuple[str, ...]:
        """The columns `answer` and `extra`, as far as the data set has them."""
        return carried(self.settings) if self.purpose == "prompts" else ()


@dataclass
class EncodedBatch:
    """The encoded rows of a batch, and the counts of the other rows.

    Attributes:
        rows: record batch with the schema's columns and SCRATCH_COLUMNS; None without rows.
        read: number of rows read.
        cut: number of additional rows that long documents were split into.
        dropped: reason -> number of rows. notes: remark -> number of rows.
        bad: (file, row, reason, message) of the bad rows, in order; only the first one with
            ``on_bad_row: error``.
    """

    rows: Any = None
    read: int = 0
    cut: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[str, int, str, str]] = field(default_factory=list)


@dataclass(slots=True)
class _Rendered:
    """A row before tokenisation. Each segment and each reply is tokenised on its own.

    Attributes:
        columns: the row's columns besides the token ids.
        prompt: text of the prompt, for the split.
        replies: the rendered replies after the prompt, for pairs and labelled replies.
        bos_eos: ids for plain text, -1 for a missing one; None: the template writes its own.
    """

    segments: list[templates.Segment]
    columns: dict[str, Any]
    prompt: str
    replies: tuple[str, ...] = ()
    bos_eos: tuple[int, int] | None = None


def check_purpose(format: Format, purpose: Purpose) -> None:
    """Check that rows of a format can be used for a purpose.

    Raises:
        DataError: they cannot; the text lists the possible purposes and formats.
    """
    if purpose not in PURPOSES_OF[format]:
        able = ", ".join(name for name, purposes in PURPOSES_OF.items() if purpose in purposes)
        raise DataError(
            f"Format {format} can be used for {', '.join(PURPOSES_OF[format])}, not for {purpose}; "
            f"{purpose} needs one of the formats {able}."
        )


def encode_batch(plan: Plan, tokenizer: Any, rows_in: Sequence[RawRow]) -> EncodedBatch:
    """Parse, check, render and tokenise some rows.

    Bad and dropped rows are counted in the result.

    Raises:
        ModelError: the chat template cannot be used.
    """
    batch = EncodedBatch()
    texts: list[tuple[RawRow, _Rendered]] = []
    for raw in rows_in:
        batch.read += 1
        if raw.dropped:
            batch.dropped[raw.dropped] += 1
            continue
        try:
            row = raw.columns(plan.settings.columns)
            example = normalise(row, plan.format, plan.purpose)
            if plan.purpose == "preference" and example.chosen == example.rejected:
                batch.dropped["identical_replies"] += 1
                continue
            if plan.purpose in ("sft", "pretrain") and example.label is False:
                batch.dropped["undesirable"] += 1  # SFT must not imitate a bad reply
                continue
            text = _render_example(plan, tokenizer, example, batch.notes)
            text.columns |= carried_values(row, plan.carried())
            texts.append((raw, text))
        except BadRow as bad:
            batch.bad.append((raw.file, raw.number, bad.reason, bad.message))
            if plan.settings.on_bad_row == "error":
                break
    _tokenise(plan, tokenizer, texts, batch)
    return batch


# --------------------------------------------------------------------------- text


def _render_example(plan: Plan, tokenizer: Any, example: Example, notes: Counter[str]) -> _Rendered:
    """Render an example for its purpose.

    Raises:
        BadRow: the chat template rejects it, or it holds nothing for this purpose.
    """
    purpose = plan.purpose
    if example.text is not None and purpose in ("sft", "pretrain"):
        text = example.text
        return _Rendered(
            [templates.Segment(text, True)], {"prompt": text[:200]}, text, bos_eos=(-1, -1)
        )
    if example.text is not None:
        example = Example([{"role": "user", "content": example.text}])
    messages = example.messages
    if plan.settings.system and all(m["role"] != "system" for m in messages):
        messages = [{"role": "system", "content": plan.settings.system}, *messages]
    texts = (example.chosen, example.rejected, example.completion)
    replies = [reply for reply in texts if reply is not None]
    _check_special_tokens(tokenizer, [*(m["content"] for m in messages), *replies])
    prompt = first_prompt(messages)
    try:
        if purpose == "preference":
            columns = {"chosen": example.chosen, "rejected": example.rejected}
            return _render_replies(tokenizer, messages, replies, prompt, columns)
        if purpose == "unpaired":
            columns = {"completion": example.completion, "label": example.label}
            return _render_replies(tokenizer, messages, replies, prompt, columns)
        if purpose == "prompts":
            text = _render_prompt(tokenizer, messages, replies, prompt)
            if example.label is False:
                text.columns["reference"] = None
            return text
        if replies:
            messages = [*messages, {"role": "assistant", "content": replies[0]}]
        return _render_conversation(tokenizer, messages, prompt, purpose, notes)
    except DataError as error:
        raise BadRow("template", str(error)) from None


def _check_special_tokens(tokenizer: Any, texts: Sequence[str]) -> None:
    """Raise BadRow if a text contains one of the tokenizer's special tokens."""
    for text in texts:
        if found := templates.find_special_token(tokenizer, text):
            raise BadRow(
                "special_token",
                f"a message contains {found!r}, which the tokenizer reads as a special token; "
                "remove it from the text",
            )


def _render_conversation(
    tokenizer: Any, messages: list[Message], prompt: str, purpose: Purpose, notes: Counter[str]
) -> _Rendered:
    """All turns up to the last reply. The loss covers the replies; for pretraining, everything."""
    replies = sum(m["role"] == "assistant" for m in messages)
    if not replies:
        raise BadRow("nothing_to_train", "the conversation has no assistant message")
    if messages[-1]["role"] != "assistant":
        notes["turns after the last reply left out"] += 1
        while messages[-1]["role"] != "assistant":
            messages = messages[:-1]
    segments = templates.render(tokenizer, messages)
    if purpose == "pretrain":
        segments = [templates.Segment(segment.text, True) for segment in segments]
    return _Rendered(segments, {"prompt": prompt}, prompt)


def _render_prompt(
    tokenizer: Any, messages: list[Message], replies: Sequence[str], prompt: str
) -> _Rendered:
    """The messages before the first reply; that reply becomes the column `reference`."""
    reference = replies[0] if replies else None
    if not replies:
        first = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), None)
        if first is not None:
            reference = messages[first]["content"]
            messages = messages[:first]
    columns = {"prompt": dump_messages(messages), "reference": reference}
    return _Rendered(templates.render_prompt(tokenizer, messages), columns, prompt)


def _render_replies(
    tokenizer: Any,
    messages: list[Message],
    replies: Sequence[str],
    prompt: str,
    columns: dict[str, Any],
) -> _Rendered:
    """A prompt with one or two replies; ``columns`` are their texts by column name."""
    before = templates.render_prompt(tokenizer, messages)
    reply_texts = []
    for reply in replies:
        segments = templates.render(tokenizer, [*messages, {"role": "assistant", "content": reply}])
        assert segments[:-1] == before or _join(segments[:-1]) == _join(before), messages
        reply_texts.append(segments[-1].text)
    columns = {"prompt": dump_messages(messages), **columns}
    return _Rendered(before, columns, prompt, replies=tuple(reply_texts))


def _join(segments: Sequence[templates.Segment]) -> str:
    return "".join(segment.text for segment in segments)


# --------------------------------------------------------------------------- tokens


def _tokenise(
    plan: Plan, tokenizer: Any, texts: Sequence[tuple[RawRow, _Rendered]], batch: EncodedBatch
) -> None:
    """Tokenise rendered rows into ``batch.rows``; bad and dropped ones are counted."""
    import pyarrow as pa

    positions: dict[str, int] = {}
    for _, text in texts:
        for part in (*(s.text for s in text.segments), *text.replies):
            positions.setdefault(part, len(positions))
    ids = templates.encode_segments(tokenizer, list(positions))
    bos_eos = _bos_and_eos(tokenizer) if any(text.bos_eos for _, text in texts) else (-1, -1)

    rows: list[dict[str, Any]] = []
    for raw, text in texts:
        parts = [(ids[positions[s.text]], s.in_loss) for s in text.segments]
        if text.bos_eos is not None:
            parts = [([t for t in bos_eos[:1] if t >= 0], False), *parts,
                     ([t for t in bos_eos[1:] if t >= 0], True)]  # fmt: skip
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
        row["_prompt"] = prompt_hash(text.prompt)
        whole = _text_hash(plan.purpose, text)
        file = raw.file.rpartition("/")[2]  # the folder's path must not change the order
        length = plan.settings.max_length
        pieces = _split_document(row, length) if plan.purpose == "pretrain" else [row]
        for number, part in enumerate(pieces):
            # A later piece is a duplicate only if its whole document is one.
            part["_text"] = _hash(f"{whole}\0{number}") if number else whole
            part["_priority"] = _hash(f"{plan.seed}\0{file}\0{raw.number}\0{part['_text']}")
        batch.cut += len(pieces) - 1
        rows += pieces
    batch.bad.sort(key=lambda bad: (bad[0], bad[1]))
    if rows:
        kind = schema(plan.purpose, plan.carried())
        for name in SCRATCH_COLUMNS:
            kind = kind.append(pa.field(name, pa.uint64()))
        batch.rows = pa.RecordBatch.from_pylist(rows, schema=kind)


def _row(
    plan: Plan, parts: list[tuple[list[int], bool]], replies: list[list[int]], batch: EncodedBatch
) -> dict[str, Any] | None:
    """The token columns of a row; None if a length limit drops it.

    Args:
        parts: (token ids, whether the loss covers them) of each segment.
        replies: token ids of each reply.

    Raises:
        BadRow: the loss covers no token.
    """
    settings = plan.settings
    all_ids = [token for ids, _ in parts for token in ids]
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
        return {"prompt_ids": all_ids, "chosen_ids": replies[0], "rejected_ids": replies[1]}
    if plan.purpose == "unpaired":
        return {"prompt_ids": all_ids, "completion_ids": replies[0]}
    loss_mask = [in_loss for ids, in_loss in parts for _ in ids]
    if not any(loss_mask[1:]):  # no token precedes the first one, so it cannot be predicted
        raise BadRow("nothing_to_train", "the loss mask of the row is empty: no token to train on")
    return {"input_ids": all_ids, "trainable": loss_mask}


def _split_document(row: dict[str, Any], length: int) -> list[dict[str, Any]]:
    """Split a document into pieces of at most ``length`` tokens.

    Each piece starts with the last token of the previous one, outside its loss mask: it only
    predicts the next token. So every token is in the loss mask of exactly one piece.
    """
    ids, loss_mask = row["input_ids"], row["trainable"]
    return [
        row
        | {
            "input_ids": ids[i : i + length],
            "trainable": [i == 0 and loss_mask[0], *loss_mask[i + 1 : i + length]],
        }
        for i in range(0, max(1, len(ids) - 1), length - 1)
    ]


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


def _text_hash(purpose: Purpose, text: _Rendered) -> int:
    """A hash that duplicates share: of the prompt for purpose prompts, else of the whole row.

    The same reply with two different labels is two rows: either label may be the wrong one.
    """
    parts = [segment.text for segment in text.segments]
    if purpose != "prompts":
        parts += text.replies
    if purpose == "unpaired":
        parts.append(str(text.columns["label"]))
    return _hash(json.dumps(parts))
