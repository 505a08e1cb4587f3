"""What was said on the page so far: one history per model, and what people say of the last turn.

Two replies are a preference pair only if they answer the same conversation. So by default all
models go on from one reply, that which was voted for (else the first model's); with `common` off
each goes on from its own, and votes are possible for as long as the conversations are the same.
A thumb is about one reply alone, so it is always possible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlhf_core.data.sources.feedback import Candidate
from rlhf_core.data.sources.thumbs import Thumb
from rlhf_core.data.sources.votes import Vote
from rlhf_core.playground.asking import PartialReply
from rlhf_core.playground.catalogue import Choice

if TYPE_CHECKING:
    from rlhf_core.data.rows.row import Message


@dataclass
class Conversation:
    """The state of one browser's page.

    Attributes:
        choices: the models, from left to right.
        histories: of each model: user and assistant in turn.
        scores: of each model, of each assistant's message; None: no score.
        last: the newest replies; empty while there is no turn to vote on.
        best: the model that was voted for in the newest turn.
        thumbs: of the newest replies: place of the model -> up (True) or down.
        system: the newest turn's system message.
    """

    choices: list[Choice] = field(default_factory=list)
    histories: list[list[Message]] = field(default_factory=list)
    scores: list[list[float | None]] = field(default_factory=list)
    last: list[PartialReply] = field(default_factory=list)
    best: int | None = None
    thumbs: dict[int, bool] = field(default_factory=dict)
    system: str | None = None

    @classmethod
    def of(cls, choices: Sequence[Choice]) -> Conversation:
        return cls(list(choices), [[] for _ in choices], [[] for _ in choices])

    def begin(self, text: str, common: bool, system: str | None) -> list[list[Message]]:
        """A new message of the user's; what each model is to answer."""
        source = self._source()
        if common and source is not None:
            self.histories = [list(self.histories[source]) for _ in self.choices]
            self.scores = [list(self.scores[source]) for _ in self.choices]
        self.last, self.best, self.thumbs, self.system = [], None, {}, system
        return [[*history, {"role": "user", "content": text}] for history in self.histories]

    def _source(self) -> int | None:
        """The model whose reply all go on from."""
        if self.best is not None:
            return self.best
        answered = (i for i, reply in enumerate(self.last) if reply.state == "done")
        said = (i for i, history in enumerate(self.histories) if history)
        return next(answered, next(said, None))

    def finish(self, asked: Sequence[Sequence[Message]], replies: Sequence[PartialReply]) -> None:
        """The replies to `begin`'s conversations; a model that failed has not heard the message."""
        self.last = list(replies)
        for i, reply in enumerate(replies):
            if reply.state == "done":
                answer: Message = {"role": "assistant", "content": reply.text.strip()}
                self.histories[i] = [*asked[i], answer]
                self.scores[i].append(reply.score)

    def obstacle(self) -> str:
        """Why there is nothing to vote on: "nothing", "voted", "failed", "apart", "identical",
        "empty"; or "" if there is."""
        if self.best is not None:
            return "voted"
        if len(self.last) < 2:
            return "nothing"
        done = [i for i, reply in enumerate(self.last) if reply.state == "done"]
        if len(done) < 2:
            return "failed"
        if any(self.histories[i][:-1] != self.histories[done[0]][:-1] for i in done):
            return "apart"
        texts = [self.last[i].text.strip() for i in done]
        if sum(map(bool, texts)) < 2:
            return "empty"
        return "identical" if len(set(texts)) == 1 else ""

    def vote(self, best: int, details: dict[str, Any]) -> list[Vote]:
        """That one reply is better than each of the others. To be called without an obstacle.

        Pairs that nothing can be learned from (an empty or an equal reply) are left out.
        """
        prompt = self._prompt(best)
        pairs = [
            Vote(prompt, self._candidate(best), self._candidate(i), details)
            for i, reply in enumerate(self.last)
            if i != best and reply.state == "done"
        ]
        votes = [vote for vote in pairs if not vote.problem()]
        if votes:
            self.best = best
        return votes

    def can_judge(self, i: int) -> bool:
        """Whether a model's newest reply can have a thumb, and has none yet."""
        if i >= len(self.last) or i in self.thumbs:
            return False
        return self.last[i].state == "done" and bool(self.last[i].text.strip())

    def thumb(self, i: int, good: bool, details: dict[str, Any]) -> Thumb:
        """That a model's newest reply is good or bad. To be called where `can_judge` is true."""
        self.thumbs[i] = good
        return Thumb(self._prompt(i), self._candidate(i), good, details)

    def _prompt(self, i: int) -> list[Message]:
        """What a model's newest reply answers."""
        first: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self.histories[i][:-1]]

    def _candidate(self, i: int) -> Candidate:
        reply, choice = self.last[i], self.choices[i]
        return Candidate(reply.text.strip(), choice.name, choice.digest, reply.score)
