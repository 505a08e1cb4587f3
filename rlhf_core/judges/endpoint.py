"""LLM-as-a-judge: asks a model behind an OpenAI-compatible endpoint which of two replies is better.

Such judges have a position bias (Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot
Arena", arXiv 2306.05685, section 3.4). So each pair is judged in both orders, and a reply wins only
if it wins in both.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import httpx

from rlhf_core.errors import JudgeError
from rlhf_core.jobs.judging import EndpointJudgeSettings
from rlhf_core.judges.chat import ChatEndpoint

Verdict = Literal["first", "second", "tie", "unclear"]

_ANSWER = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_BARE = re.compile(r"\W*(?:reply\s+)?([ABC])\W*", re.I)
_VERDICTS: dict[str, Verdict] = {"A": "first", "B": "second", "C": "tie"}


class EndpointJudge:
    """Compares replies with a model over HTTP.

    Attributes:
        counts: of the last comparison: pairs; wins (left, right); ties (agreed: a tie in both
            orders; by_position: the two orders preferred different replies; half: one order
            undecided; identical: equal replies); unclear: answers without a verdict.
        requests, tokens: of the last comparison: questions that were answered, and their tokens
            where the endpoint tells.

    Args:
        spare: answers without a verdict that are allowed whatever `max_unclear` is.

    Raises:
        ConfigError: the environment variable with the key is not set.
    """

    def __init__(self, settings: EndpointJudgeSettings, spare: int = 0) -> None:
        self.settings, self.spare = settings, spare
        self.counts: dict[str, int] = {}
        self.requests = self.tokens = 0
        self._endpoint = ChatEndpoint(settings)

    def compare(
        self, prompts: Sequence[str], left: Sequence[str], right: Sequence[str]
    ) -> list[float]:
        """Per prompt 1.0 if the left reply is better, 0.0 if the right one is, 0.5 for a tie.

        Identical replies are a tie without a request.

        Raises:
            JudgeError: the endpoint rejected a request or kept failing, or too many answers had no
                verdict.
        """
        triples = list(zip(prompts, left, right, strict=True))
        different = [i for i, (_, a, b) in enumerate(triples) if a != b]
        questions = [
            (prompt, *replies)
            for prompt, a, b in (triples[i] for i in different)
            for replies in ((a, b), (b, a))
        ]
        verdicts = self._query_all(questions)
        self._check_clear(verdicts)
        self.counts = dict.fromkeys(
            ("pairs", "left", "right", "agreed", "by_position", "half", "identical"), 0
        )
        self.counts |= {"pairs": len(triples), "identical": len(triples) - len(different)}
        self.counts["unclear"] = verdicts.count("unclear")
        found = [0.5] * len(triples)
        for i, original, swapped in zip(different, verdicts[::2], verdicts[1::2], strict=True):
            found[i] = self._combine(original, swapped)
        return found

    def _combine(self, original: Verdict, swapped: Verdict) -> float:
        """A pair's result from its verdicts in the two orders."""
        if (original, swapped) == ("first", "second"):
            self.counts["left"] += 1
            return 1.0
        if (original, swapped) == ("second", "first"):
            self.counts["right"] += 1
            return 0.0
        decided = [verdict for verdict in (original, swapped) if verdict in ("first", "second")]
        self.counts[("agreed", "half", "by_position")[len(decided)]] += 1
        return 0.5

    def _check_clear(self, verdicts: list[Verdict]) -> None:
        """Raise JudgeError if more than `max_unclear` of the answers, and more than `spare`, have
        no verdict."""
        unclear = verdicts.count("unclear")
        if unclear > max(self.spare, self.settings.max_unclear * len(verdicts)):
            raise JudgeError(
                f"{unclear} of {len(verdicts)} answers of {self.settings.model} at "
                f"{self.settings.url} held no verdict ([[A]], [[B]] or [[C]]), the limit is "
                f"{self.settings.max_unclear:.0%}: raise the judge's max_new_tokens if answers are "
                "cut off, change its template, or use a stronger model."
            )

    def _query_all(self, questions: list[tuple[str, str, str]]) -> list[Verdict]:
        """The verdicts in order; the first failure stops all further requests."""
        stop = self._endpoint.stop
        stop.clear()
        failures: list[BaseException] = []

        def one(question: tuple[str, str, str]) -> tuple[Verdict, int]:
            if stop.is_set():
                return "unclear", 0  # another question failed, so this result is not used
            try:
                return self._query(client, *question)
            except BaseException as error:
                failures.append(error)
                stop.set()  # interrupts the pauses of the other threads too
                raise

        with self._endpoint.client() as client:
            pool = ThreadPoolExecutor(self.settings.parallel, thread_name_prefix="rlhf-judge")
            try:
                found = list(pool.map(one, questions))
                self.requests, self.tokens = len(found), sum(tokens for _, tokens in found)
                return [verdict for verdict, _ in found]
            except BaseException:
                stop.set()
                if failures:
                    raise failures[0] from None  # the later ones are consequences
                raise
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _query(
        self, client: httpx.Client, prompt: str, first: str, second: str
    ) -> tuple[Verdict, int]:
        """The verdict on one question, with the retries of the settings, and its tokens."""
        parts = {"{prompt}": prompt, "{first}": first, "{second}": second}
        said = self._endpoint.ask(client, parts, read_verdict)
        return said.value or "unclear", said.tokens


def read_verdict(text: str) -> Verdict | None:
    """The verdict in an answer: the last [[A]], [[B]] or [[C]], or a text that is only the letter.
    None: there is none."""
    found = _ANSWER.findall(text)
    bare = _BARE.fullmatch(text.strip())
    if found:
        return _VERDICTS[found[-1]]
    return _VERDICTS[bare[1].upper()] if bare else None
