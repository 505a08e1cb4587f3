"""Episodes of several turns: a policy and an environment answer each other.

Token in, token out: the next turn goes on from the tokens that were sampled, which are never
decoded and tokenised again; only what the environment writes is rendered (`data.encoding.turns`). A
token depends on (seed, step, reply, turn), not on the ranks or on which episodes still go on.

Each rank drives its own episodes turn by turn: it samples a reply in all that go on, asks their
environments side by side, and writes the observations behind the replies.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from rlhf_core.data.encoding import templates
from rlhf_core.data.encoding.tool_facts import probe_call, tool_facts_of
from rlhf_core.data.encoding.turns import check_turns, continuation_ids, written_call
from rlhf_core.data.rows.row import CALLS, TOOLS, Message
from rlhf_core.environments.calls import find_calls
from rlhf_core.environments.interface import Environment, Step
from rlhf_core.environments.make import Environments, make_environments
from rlhf_core.environments.tools import announcement
from rlhf_core.errors import DataError, ModelError, TrainingFailure
from rlhf_core.jobs import OnlineJob
from rlhf_core.jobs.environments import PythonEnvironment
from rlhf_core.rollout.sampling import make_row_seeds
from rlhf_core.system.seeds import derive_seed
from rlhf_core.training.online.observations import (
    Where,
    as_messages,
    checked_messages,
    checked_step,
    in_time,
)

TURNS = 0x7042  # seeds of later turns are derived with it, apart from those of all first turns
PARALLEL = 32  # environments of a rank that are asked at once


SHORT: Message = {"role": "assistant", "content": "Fine."}  # templates write it as it is

SampleTurn = Callable[[list[list[int]], list[int]], Sequence[Any]]
"""A `SampledReply` to each prompt, from a seed for each."""


class Outcome(NamedTuple):
    """What came of an episode, beside its tokens."""

    reward: float  # of all steps
    turns: int
    counts: dict[str, int]  # by the environment, such as tool_calls
    messages: list[Message]  # the conversation before the last reply
    last: int  # index of the last reply's first token in the response
    at_limit: bool  # it was cut for its tokens, not for its turns


@dataclass
class Episode:
    """An episode while it goes on."""

    row: dict[str, Any]
    environment: Environment
    messages: list[Message] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    room: int = 0  # tokens that may follow the prompt
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)  # whether the policy sampled each id
    last: int = 0
    turns: int = 0
    reward: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    over: bool = False
    finished: bool = False  # the environment ended it
    at_limit: bool = False

    def add_reply(self, reply: Any) -> None:
        """Append a sampled turn; one without an end ends the episode."""
        self.last = len(self.ids)
        self.ids += reply.ids
        self.logprobs += reply.logprobs
        self.trained += [True] * len(reply.ids)
        self.turns += 1
        if not reply.finished:
            self.over = self.at_limit = True

    def add_observation(self, ids: Sequence[int]) -> None:
        """Append what the environment wrote, with the next generation prompt."""
        self.ids += ids
        self.logprobs += [0.0] * len(ids)
        self.trained += [False] * len(ids)

    def outcome(self) -> Outcome:
        """What came of it."""
        return Outcome(
            self.reward, self.turns, dict(self.counts), self.messages, self.last, self.at_limit
        )


def start_environments(job: OnlineJob, tokenizer: Any) -> Environments | None:
    """What makes the environments that the job asks for.

    Raises:
        ConfigError: code or settings of the environment are wrong.
        ModelError: the chat template cannot write the results of tools, or writes calls in a form
            that is not read.
        TrainingFailure: a tool server does not answer.
    """
    if job.environment is None:
        return None
    made = make_environments(job.environment)
    if not isinstance(job.environment, PythonEnvironment):
        check_turns(tokenizer, "tool")
    if made.schemas:
        check_form_of_calls(tokenizer)
    return made


def check_form_of_calls(tokenizer: Any) -> None:
    """Check that calls can be read in the form in which the chat template tells the policy to write
    them.

    Raises:
        ModelError: they cannot, so that every call would be an answer or an error.
    """
    text = written_call(tokenizer)
    meant = probe_call()[CALLS][0]["function"]
    found = [(call.name, call.arguments) for call in find_calls(text)]
    if text and found != [(meant["name"], meant["arguments"])]:
        raise ModelError(
            "The chat template tells the policy to write calls of tools in a form that "
            f"environments do not read: {text.strip()[:200]!r}. Set model.chat_template to hermes, "
            "or write an environment of your own (type python) that reads these calls."
        )


class EpisodeSampler:
    """What all episodes of a rollout share."""

    def __init__(
        self, job: OnlineJob, environments: Environments, tokenizer: Any, stream: int
    ) -> None:
        self.job, self.environments, self.tokenizer = job, environments, tokenizer
        self.stream = stream
        assert job.environment is not None
        self.settings = job.environment

    def run(
        self,
        rows: Sequence[tuple[int, dict[str, Any]]],
        sample_turn: SampleTurn,
        any_rank: Callable[[bool], bool],
    ) -> list[Episode]:
        """This rank's episodes, from their beginning to their end.

        Args:
            rows: index in the global batch, and row of the prompts, of each.
            any_rank: whether a flag is set on one of the ranks that sample together.

        Raises:
            TrainingFailure: an environment failed, took too long or gave something else.
        """
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="environment") as pool:
            episodes = list(pool.map(self._begin, rows))
            for episode in episodes:
                self._write_prompt(episode)
            live = list(zip([index for index, _ in rows], episodes, strict=True))
            turn = 0
            while any_rank(bool(live)):
                seed = derive_seed(self.job.seed, TURNS, turn) if turn else self.job.seed
                seeds = make_row_seeds(seed, self.stream, [index for index, _ in live])
                replies = sample_turn([e.prompt + e.ids for _, e in live], seeds)
                for (_, episode), reply in zip(live, replies, strict=True):
                    episode.add_reply(reply)
                asked = [episode for _, episode in live if not episode.over]
                for episode, step in zip(asked, pool.map(self._ask, asked), strict=True):
                    self._go_on(episode, step)
                live = [(index, episode) for index, episode in live if not episode.over]
                turn += 1
        return episodes

    # ----------------------------------------------------------------- beginning

    def _begin(self, numbered: tuple[int, dict[str, Any]]) -> Episode:
        """Make and reset an environment."""
        index, row = numbered
        own = json.loads(row["prompt"])
        shown = {k: v for k, v in row.items() if k in ("reference", "answer", "extra", "row")}
        shown |= {"prompt": own, "episode": f"{self.job.seed}-{self.stream}-{index}"}
        which = f"prompt row {row.get('row', '?')}"
        environment = self._in_time(self.environments.new, "class", which)
        first = self._in_time(partial(environment.reset, shown), "reset", which)
        episode = Episode(row, environment, own)
        if first is not None:
            episode.messages = self._messages(first, "reset", episode.counts)
        return episode

    def _write_prompt(self, episode: Episode) -> None:
        """The tokens that an episode begins with: the row's, unless something else is said."""
        own, schemas = json.loads(episode.row["prompt"]), self.environments.schemas
        if schemas and TOOLS not in episode.messages[0]:
            episode.messages = self._announce(episode.messages)
        prompt = list(episode.row["prompt_ids"])
        if episode.messages != own:
            try:
                episode.prompt = templates.prompt_ids(self.tokenizer, episode.messages)
            except DataError as error:
                raise TrainingFailure(
                    f"The prompt of an episode cannot be written: {error}."
                ) from (error)
        else:
            episode.prompt = prompt
        added = len(episode.prompt) - len(prompt)
        limit, reply = self.settings.max_episode_tokens, self.job.max_new_tokens
        episode.room = limit - added
        if reply > episode.room:
            raise TrainingFailure(
                f"The environment's prompt has {added} tokens more than its row's (row "
                f"{episode.row.get('row', '?')}), which leaves no room for a reply of "
                f"{reply} tokens in environment.max_episode_tokens {limit}; set at least "
                f"{added + self.settings.max_turns * reply}."
            )

    def _announce(self, messages: list[Message]) -> list[Message]:
        """The conversation with its tools."""
        schemas = list(self.environments.schemas)
        if tool_facts_of(self.tokenizer).tools:
            return [{**messages[0], TOOLS: schemas}, *messages[1:]]
        text = announcement(schemas)
        if messages[0]["role"] == "system":
            whole = f"{messages[0]['content']}\n\n{text}"
            return [{**messages[0], "content": whole}, *messages[1:]]
        return [{"role": "system", "content": text}, *messages]

    # --------------------------------------------------------------------- turns

    def _ask(self, episode: Episode) -> Step:
        """What the environment answers to the last reply."""
        ids = episode.ids[episode.last :]
        text = self._text(ids)
        which = f"prompt row {episode.row.get('row', '?')}, reply {text[:80]!r}"
        step = partial(episode.environment.step, text, ids)
        return checked_step(self._in_time(step, "step", which))

    def _go_on(self, episode: Episode, step: Step) -> None:
        """Write an observation behind the reply, unless the episode is over."""
        episode.reward += step.reward
        episode.counts.update(step.counts)
        if step.done:
            episode.over = episode.finished = True
            return
        if episode.turns >= self.settings.max_turns:
            episode.over = True
            return
        new = self._messages(step.observation, "step", episode.counts)
        reply: Message = {"role": "assistant", "content": self._text(episode.ids[episode.last :])}
        ids = self._continuation(episode, reply, new)
        if len(episode.ids) + len(ids) + self.job.max_new_tokens > episode.room:
            episode.over = episode.at_limit = True
            return
        episode.messages = [*episode.messages, reply, *new]
        episode.add_observation(ids)

    def _continuation(
        self, episode: Episode, reply: Message, new: Sequence[Message]
    ) -> Sequence[int]:
        """The tokens of an observation. Where the template would write the reply before it in
        another way than it was sampled, that is counted, and the reply stays as it is."""
        try:
            return continuation_ids(self.tokenizer, [*episode.messages, reply], new)
        except DataError:
            episode.counts["rewritten_replies"] += 1
        try:
            return continuation_ids(self.tokenizer, [*episode.messages, SHORT], new)
        except DataError as error:
            raise TrainingFailure(
                f"What the environment answers cannot be written: {error}."
            ) from error

    def _text(self, ids: Sequence[int]) -> str:
        """A finished reply's text without its end of turn, with the markers of tool calls."""
        return str(self.tokenizer.decode(ids[:-1], skip_special_tokens=False))

    def _messages(self, given: Any, where: Where, counts: Counter[str]) -> list[Message]:
        """What an environment gave for the policy to see."""
        find_special = partial(templates.find_special_token, self.tokenizer)
        return checked_messages(as_messages(given, where), where, find_special, counts)

    def _in_time(self, function: Callable[[], Any], what: str, which: str) -> Any:
        """The result of an environment's code. Tools have time limits of their own."""
        if not isinstance(self.settings, PythonEnvironment):
            return function()
        return in_time(function, what, which, self.settings.time_limit)
