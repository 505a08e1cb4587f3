"""From rows to tokens: what a worker process does with a piece of the source."""

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
from rlhf_core.data.rows.formats import SERVES, Example, normalise
from rlhf_core.data.rows.row import BadRow, Message, RawRow
from rlhf_core.errors import DataError
from rlhf_core.jobs import DataSettings, Format, Purpose

# Columns that travel beside those of the schema: priority in the shuffle, hash of the whole text,
# hash of the prompt.
EXTRA = ("_priority", "_text", "_prompt")


@dataclass(frozen=True)
class Plan:
    """What a worker needs to know besides the tokenizer."""

    settings: DataSettings
    format: Format
    purpose: Purpose
    seed: int

    def carried(self) -> tuple[str, ...]:
        """Columns beside those of the purpose."""
        return carried(self.settings) if self.purpose == "prompts" else ()


@dataclass
class Piece:
    """What became of a piece of the source: rows, and an account of the others.

    Attributes:
        rows: record batch with the schema's and the extra columns; None without rows.
        read: rows that went in.
        cut: further rows that long documents gave.
        dropped, notes: name -> rows.
        bad: (file, row, reason, message) of the rows that cannot be used, in order; only the first
            one when bad rows end the stage.
    """

    rows: Any = None
    read: int = 0
    cut: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[str, int, str, str]] = field(default_factory=list)


@dataclass(slots=True)
class _Text:
    """A row before tokenisation: pieces of text that are tokenised each on its own."""

    segments: list[templates.Segment]
    columns: dict[str, Any]
    prompt: str
    replies: tuple[str, ...] = ()
    ends: tuple[int, int] | None = None  # bos and eos ids of plain text, -1 for none


def check_purpose(format: Format, purpose: Purpose) -> None:
    """Refuse a format that cannot serve a purpose.

    Raises:
        DataError: with the purposes it serves, and the formats that serve this one.
    """
    if purpose not in SERVES[format]:
        able = ", ".join(name for name, purposes in SERVES.items() if purpose in purposes)
        raise DataError(
            f"Format {format} serves {', '.join(SERVES[format])}, not {purpose}; for {purpose} the "
            f"data must be in one of the formats {able}."
        )


def encode_piece(plan: Plan, tokenizer: Any, raws: Sequence[RawRow]) -> Piece:
    """Parse, check and tokenise some rows.

    Raises:
        ModelError: the chat template cannot be used.
    """
    piece = Piece()
    texts: list[tuple[RawRow, _Text]] = []
    for raw in raws:
        piece.read += 1
        if raw.dropped:
            piece.dropped[raw.dropped] += 1
            continue
        try:
            row = raw.columns(plan.settings.columns)
            example = normalise(row, plan.format, plan.purpose)
            if plan.purpose == "preference" and example.chosen == example.rejected:
                piece.dropped["identical_replies"] += 1
                continue
            if plan.purpose in ("sft", "pretrain") and example.label is False:
                piece.dropped["undesirable"] += 1  # a reply that was not good is no example
                continue
            text = _write_out(plan, tokenizer, example, piece.notes)
            text.columns |= carried_values(row, plan.carried())
            texts.append((raw, text))
        except BadRow as bad:
            piece.bad.append((raw.file, raw.number, bad.reason, bad.message))
            if plan.settings.on_bad_row == "error":
                break
    _tokenise(plan, tokenizer, texts, piece)
    return piece


# --------------------------------------------------------------------------- text


def _write_out(plan: Plan, tokenizer: Any, example: Example, notes: Counter[str]) -> _Text:
    """Render an example for its purpose.

    Raises:
        BadRow: the chat template refuses it, or it holds nothing for this purpose.
    """
    purpose = plan.purpose
    if example.text is not None and purpose in ("sft", "pretrain"):
        text = example.text
        return _Text([templates.Segment(text, True)], {"prompt": text[:200]}, text, ends=(-1, -1))
    if example.text is not None:
        example = Example([{"role": "user", "content": example.text}])
    messages = example.messages
    if plan.settings.system and all(m["role"] != "system" for m in messages):
        messages = [{"role": "system", "content": plan.settings.system}, *messages]
    given = (example.chosen, example.rejected, example.completion)
    replies = [reply for reply in given if reply is not None]
    _refuse_special(tokenizer, [*(m["content"] for m in messages), *replies])
    prompt = first_prompt(messages)
    try:
        if purpose == "preference":
            columns = {"chosen": example.chosen, "rejected": example.rejected}
            return _replies(tokenizer, messages, replies, prompt, columns)
        if purpose == "unpaired":
            columns = {"completion": example.completion, "label": example.label}
            return _replies(tokenizer, messages, replies, prompt, columns)
        if purpose == "prompts":
            text = _prompt(tokenizer, messages, replies, prompt)
            if example.label is False:
                text.columns["reference"] = None
            return text
        if replies:
            messages = [*messages, {"role": "assistant", "content": replies[0]}]
        return _conversation(tokenizer, messages, prompt, purpose, notes)
    except DataError as error:
        raise BadRow("template", str(error)) from None


def _refuse_special(tokenizer: Any, texts: Sequence[str]) -> None:
    for text in texts:
        if found := templates.special_text(tokenizer, text):
            raise BadRow(
                "special_token",
                f"a message contains {found!r}, which the tokenizer reads as a special token; take "
                "it out of the text",
            )


def _conversation(
    tokenizer: Any, messages: list[Message], prompt: str, purpose: Purpose, notes: Counter[str]
) -> _Text:
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
    return _Text(segments, {"prompt": prompt}, prompt)


def _prompt(tokenizer: Any, messages: list[Message], replies: Sequence[str], prompt: str) -> _Text:
    reference = replies[0] if replies else None
    if not replies:
        first = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), None)
        if first is not None:
            reference = messages[first]["content"]
            messages = messages[:first]
    columns = {"prompt": dump_messages(messages), "reference": reference}
    return _Text(templates.render_prompt(tokenizer, messages), columns, prompt)


def _replies(
    tokenizer: Any,
    messages: list[Message],
    replies: Sequence[str],
    prompt: str,
    columns: dict[str, Any],
) -> _Text:
    """One prompt with a reply or two, each tokenised on its own; `columns` hold their texts."""
    before = templates.render_prompt(tokenizer, messages)
    endings = []
    for reply in replies:
        segments = templates.render(tokenizer, [*messages, {"role": "assistant", "content": reply}])
        assert segments[:-1] == before or _joined(segments[:-1]) == _joined(before), messages
        endings.append(segments[-1].text)
    columns = {"prompt": dump_messages(messages), **columns}
    return _Text(before, columns, prompt, replies=tuple(endings))


def _joined(segments: Sequence[templates.Segment]) -> str:
    return "".join(segment.text for segment in segments)


# --------------------------------------------------------------------------- tokens


def _tokenise(
    plan: Plan, tokenizer: Any, texts: Sequence[tuple[RawRow, _Text]], piece: Piece
) -> None:
    import pyarrow as pa

    wanted: dict[str, int] = {}
    for _, text in texts:
        for part in (*(s.text for s in text.segments), *text.replies):
            wanted.setdefault(part, len(wanted))
    ids = templates.encode_segments(tokenizer, list(wanted))
    ends = _plain_ends(tokenizer) if any(text.ends for _, text in texts) else (-1, -1)

    rows: list[dict[str, Any]] = []
    for raw, text in texts:
        parts = [(ids[wanted[s.text]], s.trainable) for s in text.segments]
        if text.ends is not None:
            parts = [([t for t in ends[:1] if t >= 0], False), *parts,
                     ([t for t in ends[1:] if t >= 0], True)]  # fmt: skip
        replies = [ids[wanted[reply]] for reply in text.replies]
        try:
            row = _row(plan, parts, replies, piece)
        except BadRow as bad:
            piece.bad.append((raw.file, raw.number, bad.reason, bad.message))
            continue
        if row is None:
            continue
        row |= text.columns
        row["row"] = raw.number
        row["_prompt"] = prompt_hash(text.prompt)
        whole = _text_hash(plan.purpose, text)
        file = raw.file.rpartition("/")[2]  # the same order wherever the folder lies
        pieces = _cut(row, plan.settings.max_length) if plan.purpose == "pretrain" else [row]
        for number, part in enumerate(pieces):
            # A later piece is a duplicate where the whole document is one.
            part["_text"] = _hash(f"{whole}\0{number}") if number else whole
            part["_priority"] = _hash(f"{plan.seed}\0{file}\0{raw.number}\0{part['_text']}")
        piece.cut += len(pieces) - 1
        rows += pieces
    piece.bad.sort(key=lambda bad: (bad[0], bad[1]))
    if rows:
        kind = schema(plan.purpose, plan.carried())
        for name in EXTRA:
            kind = kind.append(pa.field(name, pa.uint64()))
        piece.rows = pa.RecordBatch.from_pylist(rows, schema=kind)


def _row(
    plan: Plan, parts: list[tuple[list[int], bool]], replies: list[list[int]], piece: Piece
) -> dict[str, Any] | None:
    """The id columns of a row, or None when a limit drops it."""
    settings = plan.settings
    all_ids = [token for ids, _ in parts for token in ids]
    prompt = 0
    for ids, trainable in parts:
        if trainable:
            break
        prompt += len(ids)
    longest = len(all_ids) + max((len(reply) for reply in replies), default=0)
    if plan.purpose in ("preference", "unpaired", "prompts"):
        prompt = len(all_ids)
    if settings.max_prompt_length and prompt > settings.max_prompt_length:
        piece.dropped["prompt_too_long"] += 1
        return None
    if longest > settings.max_length and plan.purpose != "pretrain":  # which is cut
        piece.dropped["too_long"] += 1
        return None
    if plan.purpose == "prompts":
        return {"prompt_ids": all_ids}
    if plan.purpose == "preference":
        return {"prompt_ids": all_ids, "chosen_ids": replies[0], "rejected_ids": replies[1]}
    if plan.purpose == "unpaired":
        return {"prompt_ids": all_ids, "completion_ids": replies[0]}
    marks = [marked for ids, marked in parts for _ in ids]
    if not any(marks[1:]):  # the first token has nothing before it to be predicted from
        raise BadRow("nothing_to_train", "the row has no token that a loss could be computed on")
    return {"input_ids": all_ids, "trainable": marks}


def _cut(row: dict[str, Any], length: int) -> list[dict[str, Any]]:
    """A document in pieces of `length` tokens at most.

    Each piece begins with the last token of the one before, which is not trained on again but
    predicts the next one: so every trained token is trained on in exactly one piece.
    """
    ids, marks = row["input_ids"], row["trainable"]
    return [
        row | {"input_ids": ids[i : i + length], "trainable": [i == 0 and marks[0],
               *marks[i + 1 : i + length]]}
        for i in range(0, max(1, len(ids) - 1), length - 1)
    ]  # fmt: skip


def _plain_ends(tokenizer: Any) -> tuple[int, int]:
    """Ids that start and end a plain text; -1 where the tokenizer has none."""
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    starts = bos is not None and first == [bos]
    return (bos if starts else -1), (-1 if eos is None else eos)


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def _text_hash(purpose: Purpose, text: _Text) -> int:
    """What two rows must have in common to be duplicates: for prompts the prompt, else all.

    Two labels of one reply are two rows: which of them was wrong nobody can say here.
    """
    parts = [segment.text for segment in text.segments]
    if purpose != "prompts":
        parts += text.replies
    if purpose == "unpaired":
        parts.append(str(text.columns["label"]))
    return _hash(json.dumps(parts))
