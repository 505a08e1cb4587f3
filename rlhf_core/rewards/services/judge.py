"""A model behind an OpenAI-compatible endpoint rates each reply by a rubric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

from rlhf_core.data.rows.conversation import conversation
from rlhf_core.errors import DataError
from rlhf_core.jobs.reward_services import JudgeReward
from rlhf_core.judges.rubric import RubricJudge, check_clear
from rlhf_core.rewards.services.answer import Answer, Item, Question

UNCLEAR = "judge_unclear"


class JudgeScorer:
    """Asks the judge; see `RubricJudge`."""

    batch_size = 1

    def __init__(self, settings: JudgeReward) -> None:
        self.settings = settings
        self.parallel = settings.parallel
        excluded = {*settings.excluded_from_key, "weight"}
        self.identity: Mapping[str, Any] = settings.model_dump(mode="json", exclude=excluded)
        self._judge = RubricJudge(settings)
        self._reads_answer = "{answer}" in settings.template

    def question(self, item: Item) -> Question:
        """The parts of the template.

        Raises:
            DataError: the template asks for the row's answer, and it has none.
        """
        answer = str(item.row.get("answer") or "") if self._reads_answer else ""
        if self._reads_answer and not answer:
            raise DataError(
                "The reward judge has {answer} in its template, and prompt row "
                f"{item.row.get('row', '?')} has no answer: fill in column 'answer' (see "
                "data.prompts.columns), or take {answer} out of the template."
            )
        return {"prompt": conversation(item.prompt), "reply": item.reply, "answer": answer}

    def ask(self, client: httpx.Client, questions: list[Question]) -> list[Answer]:
        """One request: there is one question."""
        (question,) = questions
        rated = self._judge.rate(client, question["prompt"], question["reply"], question["answer"])
        tokens = {"tokens": float(rated.tokens)}
        if rated.value is None:
            return [Answer(0.0, tokens, UNCLEAR)]
        return [Answer(rated.value, tokens)]

    def client(self) -> httpx.Client:
        """A client for all threads."""
        return self._judge.endpoint.client(self.parallel)

    def stop(self) -> None:
        """Try no request again."""
        self._judge.endpoint.stop.set()

    def check(self, answers: list[Answer]) -> None:
        """Raise JudgeError if more than `max_unclear` of the answers hold no rating."""
        check_clear(self.settings, sum(bool(a.failure) for a in answers), len(answers))
