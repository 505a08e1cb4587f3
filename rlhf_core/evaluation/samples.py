"""samples.jsonl: every prompt with each model's reply; questions.jsonl: the same of questions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_core.evaluation.scored import Scored
from rlhf_core.jobs.results import GeneralQuestion


def write_samples(
    path: Path,
    prompts: Sequence[str],
    sampled: Mapping[str, Scored],
    greedy: Mapping[str, Scored],
) -> None:
    """One line per prompt: prompt, each model's reply, its scores, and the first greedy replies."""
    lines = []
    for i, prompt in enumerate(prompts):
        line: dict[str, Any] = {"prompt": prompt}
        line |= {name: replies.texts[i] for name, replies in sampled.items()}
        for judge in ("reward", "gold"):
            known = {n: r.columns[judge] for n, r in sampled.items() if judge in r.columns}
            if known:
                line[judge] = {name: round(scores[i], 4) for name, scores in known.items()}
        if shown := {n: r.texts[i] for n, r in greedy.items() if i < len(r.texts)}:
            line["greedy"] = shown
        lines.append(line)
    write_lines(path, lines)


def write_answers(
    path: Path,
    asked: Sequence[GeneralQuestion],
    texts: Mapping[str, Sequence[str]],
    right: Mapping[str, Sequence[bool]],
) -> None:
    """One line per question: it, accepted answers, each model's reply and whether it is right."""
    write_lines(
        path,
        (
            {
                "question": question.question, "answers": question.answers,
                **{name: replies[i] for name, replies in texts.items()},
                "right": {name: marks[i] for name, marks in right.items()},
            }
            for i, question in enumerate(asked)
        ),
    )  # fmt: skip


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """A JSON object per line."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
