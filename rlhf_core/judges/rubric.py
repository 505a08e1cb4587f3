"""LLM-as-a-judge, one reply at a time: a rating by a rubric (single answer grading of "Judging
LLM-as-a-Judge with MT-Bench and Chatbot Arena", arXiv 2306.05685)."""

from __future__ import annotations

import re

import httpx

from rlhf_core.errors import JudgeError
from rlhf_core.jobs.judging import RubricSettings
from rlhf_core.judges.chat import ChatEndpoint, Said

_NUMBER = r"[-+]?\d+(?:\.\d+)?"
_RATING = re.compile(rf"\[\[\s*({_NUMBER})(?:\s*/\s*\d+)?\s*\]\]")
_BARE = re.compile(rf"\W*({_NUMBER})(?:\s*/\s*\d+)?\W*")


class RubricJudge:
    """Rates replies with a model over HTTP.

    Raises:
        ConfigError: the environment variable with the key is not set.
    """

    def __init__(self, settings: RubricSettings) -> None:
        self.settings = settings
        self.endpoint = ChatEndpoint(settings)

    def rate(self, client: httpx.Client, prompt: str, reply: str, answer: str = "") -> Said[float]:
        """The score, 0 (lowest) to 1, and the tokens of question and answer.

        Args:
            client: of `endpoint`. answer: the row's, for rubrics with {answer}.

        Raises:
            JudgeError: the endpoint rejected the request, or kept failing.
        """
        parts = {"{prompt}": prompt, "{reply}": reply, "{answer}": answer}
        return self.endpoint.ask(client, parts, self.read)

    def read(self, text: str) -> float | None:
        """The score in an answer: of the last rating in double brackets, or of a text that is only
        a number. None: there is none, or it is not on the scale."""
        low, high = self.settings.lowest, self.settings.highest
        found = _RATING.findall(text)
        bare = _BARE.fullmatch(text.strip())
        if not found and not bare:
            return None
        rating = float(found[-1] if found else bare[1])  # type: ignore[index]
        return (rating - low) / (high - low) if low <= rating <= high else None


def check_clear(settings: RubricSettings, unclear: int, count: int) -> None:
    """Raise JudgeError if more than `max_unclear` of so many answers, and more than one, hold no
    rating."""
    if unclear > max(1.0, settings.max_unclear * count):
        raise JudgeError(
            f"{unclear} of {count} answers of {settings.model} at {settings.url} held no rating "
            f"from {settings.lowest:g} to {settings.highest:g} in double brackets, the limit is "
            f"{settings.max_unclear:.0%}: raise the judge's max_new_tokens if answers are cut off, "
            "change its template, or use a stronger model."
        )
