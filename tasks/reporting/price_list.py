"""The table of an evaluation: what was gained, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Shape = Literal["mean", "number", "share", "rate"]


@dataclass(frozen=True)
class Row:
    """A number of each model.

    Attributes:
        part: of evaluation.json, a mapping of models.
        key: of the number in a model's mapping; of a mean, without its ending.
        change: name among the differences; "": none is measured.
    """

    label: str
    part: Literal["models", "heldout", "greedy", "questions"]
    key: str
    shape: Shape
    change: str = ""


GAINED = (
    Row("reward", "models", "reward", "mean", "reward"),
    Row("reward, greedy", "greedy", "reward", "mean", "greedy_reward"),
    Row("right answers (verifier)", "models", "answers", "mean", "answers"),
    Row("right answers, greedy", "greedy", "answers", "mean", "greedy_answers"),
    Row("gold score", "models", "gold", "mean", "gold"),
    Row("gold score, greedy", "greedy", "gold", "mean", "greedy_gold"),
)
COST = (
    Row("KL to {start} (nats per reply)", "models", "kl", "mean"),
    Row("reward models disagree (std)", "models", "disagreement", "mean", "disagreement"),
    Row("length (tokens)", "models", "length_mean", "number", "length"),
    Row("general questions, right", "questions", "rate", "rate", "questions"),
    Row("held-out loss (nats per token)", "heldout", "loss", "number", "loss"),
    Row("perplexity", "heldout", "perplexity", "number"),
    Row("entropy (nats per token)", "models", "entropy", "number", "entropy"),
    Row("distinct-1", "models", "distinct_1", "number"),
    Row("distinct-2", "models", "distinct_2", "number"),
    Row("self-BLEU", "models", "self_bleu", "number"),
    Row("begin with the same words", "models", "top_opening", "share"),
    Row("begin with the same words, greedy", "greedy", "top_opening", "share"),
    Row("same reply to several prompts", "models", "repeated", "share"),
    Row("same reply to several prompts, greedy", "greedy", "repeated", "share"),
    Row("finished replies", "models", "finished", "share", "finished"),
    Row("refusals", "models", "refusals", "share", "refusals"),
    Row("another script than the prompt", "models", "language_changes", "share",
        "language_changes"),
)  # fmt: skip
GROUPS = (("What was gained", GAINED), ("What it cost", COST))


def price_list(data: Mapping[str, Any], columns: Mapping[str, str], start: str) -> str:
    """The table in Markdown; "" if no number is there.

    Args:
        data: evaluation.json. columns: model -> its display name. start: key of the model that the
            final one is compared with.
    """
    changes = data.get("differences") or {}
    width = len(columns) + bool(changes)
    lines = []
    for title, rows in GROUPS:
        body = [line for row in rows if (line := _line(row, data, columns, start))]
        if body:
            lines += [f"| **{title}** |" + " |" * width, *body]
    if not lines:
        return ""
    counts = sorted({m["n"] for m in (data.get("models") or {}).values() if "n" in m})
    on = f" ({', '.join(map(str, counts))} held-out prompts)" if counts else ""
    names = list(columns.values())
    names += [f"{columns.get('policy')} − {columns.get(start)}"] if changes else []
    head = f"| mean ± standard error{on} |" + "".join(f" {name} |" for name in names)
    return "\n".join([head, "| --- |" + " ---: |" * width, *lines])


def sampling(data: Mapping[str, Any]) -> str:
    """How the replies were made, as a sentence; "" if that is not known."""
    how = data.get("sampling") or {}
    if not how:
        return ""
    asked = ((data.get("questions") or {}).get("models") or {}).get("policy") or {}
    likeliest = [
        text
        for count, text in (
            (how.get("greedy"), f"to the first {how.get('greedy')} of them"),
            (asked.get("n"), f"to {asked.get('n')} general questions"),
        )
        if count
    ]
    greedy = f" Greedy replies {' and '.join(likeliest)}." if likeliest else ""
    return (
        f"One reply to each of {how['n']} held-out prompts, sampled at temperature "
        f"{how['temperature']:g} with seed {how['seed']}, at most {how['max_new_tokens']} tokens."
        f"{greedy} Differences have 95 % intervals of a paired bootstrap over the prompts."
    )


def openings(data: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """The most common openings of each model, as a sentence; "" if they are not known."""
    found = []
    for model, name in columns.items():
        known = ((data.get("models") or {}).get(model) or {}).get("openings") or []
        shown = ", ".join(f'"{_plain(words)}" {share:.0%}' for words, share in known if words)
        found += [f"{name}: {shown}"] if shown else []
    return f"Most common openings. {'; '.join(found)}." if found else ""


def _plain(text: str) -> str:
    return "".join(char for char in text if char.isalnum() or char in " '’")


def part_of(row: Row, data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Model -> the numbers that the row's is among."""
    part = data.get(row.part) or {}
    return (part.get("models") or {}) if row.part in ("greedy", "questions") else part


def _line(row: Row, data: Mapping[str, Any], columns: Mapping[str, str], start: str) -> str:
    part = part_of(row, data)
    cells = [cell(part.get(model) or {}, row) for model in columns]
    if not any(cells):
        return ""
    changes = data.get("differences") or {}
    if changes:
        cells.append(_change(changes.get(row.change) or {}, row.shape))
    label = row.label.format(start=columns.get(start, "base"))
    return f"| {label} |" + "".join(f" {cell or '–'} |" for cell in cells)


def cell(numbers: Mapping[str, Any], row: Row) -> str:
    """The number of one model as text; "" if it is not there."""
    if row.shape == "mean":
        value, error = numbers.get(f"{row.key}_mean"), numbers.get(f"{row.key}_se")
        if value is None:
            return ""
        return f"{value:.3f} ± {error:.3f}" if error is not None else f"{value:.3f}"
    value = numbers.get(row.key)
    if value is None:
        return ""
    if row.shape == "rate":
        return f"{_percent(value)} ({100 * numbers['low']:.0f} to {_percent(numbers['high'])})"
    return _percent(value) if row.shape == "share" else _number(value)


def _change(found: Mapping[str, Any], shape: Shape) -> str:
    if "mean" not in found:
        return ""
    mean, low, high = (found[key] for key in ("mean", "low", "high"))
    if shape in ("share", "rate"):
        return f"{100 * mean:+.0f} ({100 * low:+.0f} to {100 * high:+.0f}) points"
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _number(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}" if value >= 1 else f"{value:.2f}"
