"""How much of what a model was measured on is in the data that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks.events import table_cell

SHOWN = 3  # examples
MUCH = 0.05  # share of near-duplicates from which a warning follows


MEASURED = {"prompts": "held-out prompts", "questions": "general questions"}


def known_prompts(evaluation: Mapping[str, Any]) -> str:
    """The part about an evaluation's prompts and questions; "" if nobody looked.

    Args:
        evaluation: evaluation.json.
    """
    found = evaluation.get("contamination") or {}
    parts = (contamination(found.get(key) or {}, what) for key, what in MEASURED.items())
    return "\n\n".join(filter(None, parts))


def contamination(found: Mapping[str, Mapping[str, Any]], what: str) -> str:
    """A table, the closest examples, and a warning if many are known; "" without any numbers.

    Args:
        found: data set -> fields of `rlhf_core.data.overlap.result.Overlap`.
        what: name of what was looked for, such as "held-out prompts".
    """
    if not found:
        return ""
    lines = [
        f"| training data | rows | {what} in it | near-duplicates | rows concerned |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in found.items():
        of = row["rows"] + row["rows_left_out"]
        rows = f"{row['rows']:,}" + (f" of {of:,}" if row["rows_left_out"] else "")
        shares = (_share(row[f"{kind}_prompts"], row["prompts"]) for kind in ("shared", "near"))
        lines.append(
            f"| {table_cell(name)} | {rows} | {' | '.join(shares)} | {row['shared_rows']:,} |"
        )
    note = (
        f"Looked for: passages of 13 words (the whole text of shorter {what}). A near-duplicate "
        "is the same text, or has 80 % of these passages."
    )
    parts = ["\n".join(lines), note]
    worst = max((_part(row["near_prompts"], row["prompts"]) for row in found.values()), default=0.0)
    if worst > MUCH:
        parts.append(
            f"**{worst:.0%} of the {what} are near-duplicates of training rows:** the model may "
            "know them by heart, so the numbers above say less about new ones."
        )
    if examples := [_example(name, e) for name, row in found.items() for e in row["examples"]]:
        best = sorted(examples, key=lambda pair: -pair[0])[:SHOWN]
        parts.append("\n".join(text for _, text in best))
    return "\n\n".join(parts)


def _example(name: str, example: Mapping[str, Any]) -> tuple[float, str]:
    passage = f", such as “{table_cell(example['passage'], 200)}”" if example["passage"] else ""
    source = f" of {table_cell(example['source'])}" if "source" in example else ""
    text = (
        f"- {table_cell(name)}, row {example['row']:,}{source} has {example['share']:.0%} of "
        f"“{table_cell(example['prompt'], 200)}”{passage}"
    )
    return example["share"], text


def _part(count: int, total: int) -> float:
    return count / total if total else 0.0


def _share(count: int, total: int) -> str:
    return f"{count:,} of {total:,} ({_part(count, total):.1%})" if count else f"0 of {total:,}"
