"""A folder with tasks of one's own: a multiple choice with examples to show, and one to write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHOICE = """\
task: own_choice
dataset_path: json
dataset_kwargs: {data_files: {train: data/shown.jsonl, test: data/choice.jsonl}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1}
"""
WORDS = """\
task: own_words
dataset_path: json
dataset_kwargs: {data_files: {test: data/words.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 4, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
metadata: {version: 1}
"""
TEXT = """\
task: own_text
dataset_path: json
dataset_kwargs: {data_files: {test: data/words.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: word_perplexity}
metadata: {version: 1}
"""
GROUP = """\
group: own_group
task: [own_choice, own_words]
"""
COLOURS = ("red", "blue", "green", "black", "white", "yellow", "a very dark brown")


def questions(count: int) -> list[dict[str, Any]]:
    """Rows of the multiple choice, with answers in every place."""
    return [
        {
            "question": f"Which colour has stone number {i}?",
            "choices": [COLOURS[(i + k) % len(COLOURS)] for k in range(3)],
            "answer": i % 3,
        }
        for i in range(count)
    ]


def write_tasks(folder: Path, words: list[dict[str, str]] | None = None) -> Path:
    """The folder, with 12 questions to choose for; `words` are those to write."""
    (folder / "data").mkdir(parents=True)
    words = words or [{"question": f"Say {n}.", "answer": str(n)} for n in range(5)]
    rows = {"choice": questions(12), "shown": questions(16)[12:], "words": words}
    for name, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "data" / f"{name}.jsonl").write_text(text)
    for name, text in (("choice", CHOICE), ("words", WORDS), ("text", TEXT), ("group", GROUP)):
        (folder / f"{name}.yaml").write_text(text)
    return folder
