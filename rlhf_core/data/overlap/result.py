"""What a comparison of training rows with held-out prompts found, for programs and for people."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rlhf_core.data.overlap.ngrams import N

NEAR = 0.8  # share of a prompt's n-grams from which a row is a near-duplicate


@dataclass
class Overlap:
    """How much of some held-out prompts the training rows have.

    Attributes:
        prompts: different held-out prompts that were compared.
        prompts_left_out: held-out rows that were not, beyond the bounds.
        rows: training rows with words that were compared. rows_left_out: those that were not.
        shared_prompts, shared_rows: that have N words in a row in common, or are near-duplicates.
        near_prompts, near_rows: that are near-duplicates.
        examples: {row, prompt, share, passage}, largest share first; in a mixture, source too.
    """

    prompts: int = 0
    prompts_left_out: int = 0
    rows: int = 0
    rows_left_out: int = 0
    shared_prompts: int = 0
    shared_rows: int = 0
    near_prompts: int = 0
    near_rows: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)

    def markdown(self, escape: Callable[[str], str] = str) -> list[str]:
        """The counts as a table, and the examples, in lines of Markdown.

        Args:
            escape: applied to texts of the data.
        """
        if not self.prompts:
            return ["There are no held-out prompts to compare with."]
        counts = [
            (f"a passage of {N} words, or the whole prompt", self.shared_prompts, self.shared_rows),
            (f"of these, near-duplicates: the same text, or {NEAR:.0%} of the prompt",
             self.near_prompts, self.near_rows),
        ]  # fmt: skip
        lines = [
            f"{self.prompts:,} different held-out prompts were looked for in {self.rows:,} "
            "training rows, whatever their case and punctuation. A model may know by heart what it "
            "was trained on, so a measurement on such prompts says little about new ones.",
            "",
            "| found in training rows | held-out prompts | training rows |",
            "| --- | ---: | ---: |",
            *(
                f"| {what} | {_part(prompts, self.prompts)} | {_part(rows, self.rows)} |"
                for what, prompts, rows in counts
            ),
        ]
        if self.prompts_left_out:
            lines += ["", f"{self.prompts_left_out:,} further held-out rows were not compared."]
        if self.examples:
            lines += ["", "The closest:", ""]
        for example in self.examples:
            passage = f", such as “{escape(example['passage'])}”" if example["passage"] else ""
            source = f" of {escape(example['source'])}" if "source" in example else ""
            lines.append(
                f"- row {example['row']:,}{source} has {example['share']:.0%} of the prompt "
                f"“{escape(_line(example['prompt']))}”{passage}"
            )
        return lines


def _part(count: int, total: int) -> str:
    return f"{count:,} ({count / total:.1%})" if count else "0"


def _line(text: str) -> str:
    return " ".join(text.split())
