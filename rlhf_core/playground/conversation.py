"""A conversation on the page: one history per model, and the feedback on the last turn.

Two replies form a preference pair only if they answer the same conversation. By default all models
therefore continue from one reply: the one that was voted for, else the first model's. With
`common` off each model continues from its own reply, and votes are possible as long as the
histories are equal. A thumb judges a single reply, so it is always possible.

In a blind conversation nobody knows which model says what: until the vote, names and scores are
hidden, and each turn puts the models in a new order.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlhf_core.data.sources.feedback import Candidate
from rlhf_core.data.sources.thumbs import Thumb
from rlhf_core.data.sources.votes import Undecided, Verdict, Vote
from rlhf_core.playground.catalogue import Choice
from rlhf_core.playground.replies import PartialReply

if TYPE_CHECKING:
    from rlhf_core.data.rows.row import Message


@dataclass
class Conversation:
    """The state of one browser's page.

    Attributes:
        choices: the models, from left to right.
        histories: per model, the user's and assistant's messages in turn.
        scores: per model, one per assistant message; None: no score.
        last: the newest replies; empty before the first turn and while one is generated.
        best: index of the model that was voted for in the newest turn.
        thumbs: index of a model -> up (True) or down, for the newest replies.
        system: the newest turn's system message.
        prompts: per model, the messages that the newest replies answer, without the system message.
        verdict: of the newest turn, if no reply was better.
        tried: votes and thumbs on the newest replies, by what was chosen. Who chooses the same
            again, since it could not be saved, repeats them.
        blind: hide which model says what until the vote.
    """

    choices: list[Choice] = field(default_factory=list)
    histories: list[list[Message]] = field(default_factory=list)
    scores: list[list[float | None]] = field(default_factory=list)
    last: list[PartialReply] = field(default_factory=list)
    best: int | None = None
    thumbs: dict[int, bool] = field(default_factory=dict)
    system: str | None = None
    prompts: list[list[Message]] = field(default_factory=list)
    verdict: Verdict | None = None
    tried: dict[int | Verdict | tuple[int, bool], Any] = field(default_factory=dict)
    blind: bool = False

    @classmethod
    def of(cls, choices: Sequence[Choice], blind: bool = False) -> Conversation:
        """An empty conversation with these models."""
        empty: tuple[list[list[Message]], list[list[float | None]]] = (
            [[] for _ in choices],
            [[] for _ in choices],
        )
        return cls(list(choices), *empty, blind=blind)

    @property
    def hidden(self) -> bool:
        """Whether names and scores are hidden: in a blind conversation, while a vote may come."""
        return self.blind and len(self.choices) > 1 and self.vote_obstacle() in ("", "nothing")

    def begin(self, text: str, common: bool, system: str | None) -> list[list[Message]]:
        """Start a turn with the user's message; the messages that each model must answer."""
        source = self._source()
        if common and source is not None:
            self.histories = [list(self.histories[source]) for _ in self.choices]
            self.scores = [list(self.scores[source]) for _ in self.choices]
        # Once a model's history is its own, its side tells who it is.
        alike = all(history == self.histories[0] for history in self.histories)
        self.blind = self.blind and (alike or self.hidden)
        if self.blind and alike:
            random.shuffle(self.choices)
        self.last, self.best, self.verdict, self.thumbs, self.system = [], None, None, {}, system
        self.tried = {}
        asked: Message = {"role": "user", "content": text}
        self.prompts = [[*history, asked] for history in self.histories]
        return self.prompts

    def _source(self) -> int | None:
        """Index of the model whose history all models continue; None before the first turn."""
        if self.best is not None:
            return self.best
        answered = (i for i, reply in enumerate(self.last) if reply.state == "done")
        started = (i for i, history in enumerate(self.histories) if history)
        return next(answered, next(started, None))

    def finish(self, replies: Sequence[PartialReply]) -> None:
        """Add the replies to the histories, but for those that failed."""
        self.last = list(replies)
        for i, reply in enumerate(replies):
            if reply.state == "done":
                answer: Message = {"role": "assistant", "content": reply.text.strip()}
                self.histories[i] = [*self.prompts[i], answer]
                self.scores[i].append(reply.score)

    def vote_obstacle(self) -> str:
        """Why no vote is possible: "nothing", "voted", "failed", "diverged", "identical" or
        "empty"; "" if it is possible."""
        if self.best is not None or self.verdict is not None:
            return "voted"
        if len(self.last) < 2:
            return "nothing"
        done = [i for i, reply in enumerate(self.last) if reply.state == "done"]
        if len(done) < 2:
            return "failed"
        if any(self.histories[i][:-1] != self.histories[done[0]][:-1] for i in done):
            return "diverged"
        texts = [self.last[i].text.strip() for i in done]
        if sum(map(bool, texts)) < 2:
            return "empty"
        return "identical" if len(set(texts)) == 1 else ""

    def can_vote(self, choice: int | Verdict) -> bool:
        """Whether this vote is possible: a reply is the best, or a verdict. After one that could
        not be saved, or not all of it, only the same."""
        before = [tried for tried in self.tried if not isinstance(tried, tuple)]
        return not self.vote_obstacle() and (not before or choice in before)

    def vote(self, best: int, details: dict[str, Any]) -> list[Vote]:
        """Votes that one reply is better than each of the others.

        Call it only where `can_vote` is true. Pairs with an empty or an equal reply are left out.

        Args:
            best: index of the model.
            details: stored with each vote.
        """
        prompt = self._prompt(best)
        pairs = [
            Vote(prompt, self._candidate(best), self._candidate(i), details)
            for i, reply in enumerate(self.last)
            if i != best and reply.state == "done"
        ]
        if votes := [vote for vote in pairs if not vote.problem()]:
            self.best = best
            votes = self.tried.setdefault(best, votes)
        return votes

    def undecided(self, verdict: Verdict, details: dict[str, Any]) -> Undecided:
        """The vote that no reply is better. Call it only where `can_vote` is true."""
        self.verdict = verdict
        done = [i for i, reply in enumerate(self.last) if reply.state == "done"]
        replies = [self._candidate(i) for i in done]
        vote = Undecided(self._prompt(done[0]), replies, verdict, details)
        found: Undecided = self.tried.setdefault(verdict, vote)
        return found

    def can_judge(self, i: int) -> bool:
        """Whether the newest reply of model ``i`` can get a thumb and has none yet."""
        if i >= len(self.last) or i in self.thumbs:
            return False
        return self.last[i].state == "done" and bool(self.last[i].text.strip())

    def thumb(self, i: int, good: bool, details: dict[str, Any]) -> Thumb:
        """A thumb on the newest reply of model ``i``. Call it only where `can_judge` is true."""
        self.thumbs[i] = good
        thumb = Thumb(self._prompt(i), self._candidate(i), good, details)
        found: Thumb = self.tried.setdefault((i, good), thumb)
        return found

    def _prompt(self, i: int) -> list[Message]:
        """The messages that the newest reply of model ``i`` answers."""
        first: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self.prompts[i]]

    def _candidate(self, i: int) -> Candidate:
        reply, choice = self.last[i], self.choices[i]
        return Candidate(reply.text.strip(), choice.name, choice.digest, reply.score)
