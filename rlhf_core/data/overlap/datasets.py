"""Looks for the prompts of a measurement in the training rows of whole data sets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.dataset.writer import prompt_text
from rlhf_core.data.overlap import ngrams
from rlhf_core.data.overlap.heldout import Comparison, HeldoutPrompts
from rlhf_core.data.rows.row import message_text

MOST_ROWS = 200_000  # of each data set; its rows are shuffled, so the first are a fair sample
BATCH_ROWS = 500


def contamination(
    measured: Mapping[str, Iterable[str]], folders: Mapping[str, Path], tokenizer: Any
) -> dict[str, dict[str, dict[str, Any]]]:
    """How much of the prompts of measurements is in the training rows of data sets.

    Args:
        measured: name of a measurement -> its prompts, texts.
        folders: name of a data set -> folder of its artifact.
        tokenizer: of the data sets.

    Returns:
        measurement -> data set -> the fields of `Overlap`.
    """
    indexes = {name: HeldoutPrompts.of(texts) for name, texts in measured.items()}
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in indexes}
    for data_set, folder in folders.items():
        rows = Rows(folder, "train")
        left_out = max(0, len(rows) - MOST_ROWS)
        comparisons = {name: Comparison(index) for name, index in indexes.items()}
        for batch in _batches(rows, tokenizer):
            for comparison in comparisons.values():
                comparison.add(*batch)
        for name, comparison in comparisons.items():
            result = comparison.result()
            result.rows_left_out = left_out
            result.examples = [_with_row(example, rows) for example in result.examples]
            found[name][data_set] = asdict(result)
    return found


def _batches(rows: Rows, tokenizer: Any) -> Iterator[tuple[list[int], list[int], list[Any]]]:
    """(positions, `whole` of the prompts, `grams` of all words) of at most MOST_ROWS rows."""
    end = min(len(rows), MOST_ROWS)
    for start in range(0, end, BATCH_ROWS):
        positions = list(range(start, min(start + BATCH_ROWS, end)))
        part = rows.take(positions)
        whole = [ngrams.whole(prompt_text(row["prompt"])) for row in part]
        texts = _texts(part, tokenizer)
        yield positions, whole, ngrams.grams(list(map(ngrams.words, texts)))


def _with_row(example: dict[str, Any], rows: Rows) -> dict[str, Any]:
    """The example with the row's number in its file in place of its position; and in a mixture,
    whose files have numbers of their own, with its source."""
    [row] = rows.take([example["row"]])
    source = {"source": row["source"]} if "source" in row else {}
    return example | {"row": row["row"]} | source


def _texts(part: list[dict[str, Any]], tokenizer: Any) -> list[str]:
    """All texts of each row: prompt and replies, without special tokens."""
    if "input_ids" in part[0]:
        ids = [row["input_ids"] for row in part]
        return list(tokenizer.batch_decode(ids, skip_special_tokens=True))
    replies = [name for name in ("chosen", "rejected", "completion") if name in part[0]]
    return [
        " ".join([*map(message_text, json.loads(row["prompt"])), *(row[name] for name in replies)])
        for row in part
    ]
