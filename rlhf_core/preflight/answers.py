"""Checks the reference answers of the prompts: a rule that cannot read them rewards nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from rlhf_core.data.dataset.carried import answer_text, carried
from rlhf_core.data.rows.detect import find_format
from rlhf_core.data.rows.row import BadRow
from rlhf_core.data.sources.kind import source_kind
from rlhf_core.data.sources.open import open_rows
from rlhf_core.errors import RLHFError
from rlhf_core.jobs import DataSettings, PipelineConfig
from rlhf_core.jobs.rewards import AnswerReward
from rlhf_core.pipeline import recipe
from rlhf_core.rewards.references import References, read_references
from rlhf_core.store import Store

MOST_ROWS = 10_000  # of local files; two seconds
MOST_ROWS_ELSEWHERE = 100


def check_answers(
    config: PipelineConfig, store: Store | None = None
) -> tuple[list[str], list[str]]:
    """Problems of the reference answers, and remarks about fewer of them; one text each.

    The answers are a problem if a row has none, which would end the stage, or if more than half of
    them cannot be read, so that nearly all replies would get 0.
    """
    problems: list[str] = []
    remarks: list[str] = []
    for name, rule in _rules(config):
        try:
            parts = config.data.prompts.parts
            answers = itertools.chain.from_iterable(_answers(part, store) for part in parts)
            found = read_references(rule, answers)
        except RLHFError:
            continue  # reported where the data source is checked
        if found.missing and rule.without_answer is None:
            problems.append(_missing(name, rule, found))
        if found.unreadable:
            read = found.count - found.missing
            texts = problems if 2 * found.unreadable > read else remarks
            texts.append(_unreadable(name, found))
    return problems, remarks


def _rules(config: PipelineConfig) -> Iterator[tuple[str, AnswerReward]]:
    """Setting name and value of each rule that compares with an answer."""
    for stage in config.stages:
        section = recipe.section(config, stage)
        rewards = section.rewards if isinstance(section, recipe.Rewarded) else ()
        for number, reward in enumerate(rewards):
            if isinstance(reward, AnswerReward):
                yield f"{stage}.rewards.{number} (answer)", reward


def _answers(settings: DataSettings, store: Store | None) -> Iterator[tuple[int, str]]:
    """(row number, answer) of the first rows that can be read."""
    if "answer" not in carried(settings, "prompts"):
        return
    rows, _ = find_format(open_rows(settings, store), settings, "prompts")
    most = MOST_ROWS if source_kind(settings.source) == "local" else MOST_ROWS_ELSEWHERE
    for raw in itertools.islice(rows, most):
        try:
            if not raw.dropped:
                yield raw.number, answer_text(raw.columns(settings.renames).get("answer"))
        except BadRow:
            continue  # reported where the data source is checked


def _missing(name: str, rule: AnswerReward, found: References) -> str:
    needed = "a number" if rule.match == "numeric" else "a text"
    return (
        f"{name}: {found.missing:,} of {found.count:,} rows have no answer, which the rule needs "
        f"({needed} in the column data.prompts.columns.answer): {_show(found.missing_examples)}; "
        "fill them in, or set the rule's without_answer"
    )


def _unreadable(name: str, found: References) -> str:
    return (
        f"{name}: {found.unreadable:,} of {found.count:,} reference answers cannot be read as a "
        "value, so only the same text gets 1, and every other reply 0: "
        f"{_show(found.unreadable_examples)}; set the rule's pattern to the part with the number, "
        "or match: exact, or change the answers"
    )


def _show(examples: list[tuple[int, str]]) -> str:
    return ", ".join(f"row {row} has {answer[:60]!r}" for row, answer in examples)
