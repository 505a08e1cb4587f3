"""Reads general questions of the user's own, {question, answers}. Imports no torch."""

from __future__ import annotations

from rlhf_core.data.rows.row import BadRow, short
from rlhf_core.data.sources.open import open_rows
from rlhf_core.errors import DataError
from rlhf_core.jobs import DataSettings
from rlhf_core.jobs.results import GeneralQuestion

LARGEST = 10_000  # questions: they travel in the job


def read_questions(source: str) -> tuple[GeneralQuestion, ...]:
    """All questions of a source.

    Args:
        source: as `data.prompts.source`. Each row has a question and answers, a text or a list of
            texts of which one must stand in a reply.

    Raises:
        DataError: the source or a row cannot be read, or there are no rows or too many.
        StoreUnavailable: S3 or the hub cannot be reached.
    """
    found = []
    for raw in open_rows(DataSettings(source=source)):
        try:
            row = raw.columns({})
        except BadRow as error:
            raise DataError(f"{raw.where()}: {error.message}.") from None
        question, answers = row.get("question"), row.get("answers")
        answers = [answers] if isinstance(answers, str) else answers
        texts = [question, *answers] if isinstance(answers, list) and answers else [None]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise DataError(
                f"{raw.where()} has question {short(question)} and answers "
                f"{short(answers)}; expected a text, and a text or a list of texts."
            )
        found.append(GeneralQuestion(question=question, answers=tuple(answers or ())))
        if len(found) > LARGEST:
            raise DataError(f"{source} has more than {LARGEST:,} questions.")
    if not found:
        raise DataError(f"{source} has no rows.")
    return tuple(found)
