"""The questions of the harness's tasks, to look for them in training data."""

from __future__ import annotations

import itertools
import re
from typing import Any

# What templates put around a question, and a training prompt has not.
_LABELS = re.compile(
    r"\A\s*(?:question|problem|q)\s*:\s*|\s*(?:answer|solution|a)\s*:\s*\Z", re.IGNORECASE
)


def questions(task: Any, limit: int | None) -> list[str]:
    """The question of each measured example; its text where there is only a text.

    Args:
        task: a task of lm-eval. limit: only the first ones; None: all.
    """
    return [_question(task, doc) for doc in itertools.islice(task.eval_docs, limit)]


def _question(task: Any, doc: Any) -> str:
    asked = task.doc_to_text(doc)
    if isinstance(asked, int):  # each choice has a context of its own
        asked = task.doc_to_choice(doc)[asked]
    return _LABELS.sub("", str(asked or task.doc_to_target(doc)))
