"""Generates the replies to all requests at once, in one thread.

Requests join the running batch between two tokens, in the order in which they came. A request whose
client has left leaves the batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf_core.chat.model import ChatModel
from rlhf_core.rollout.sharded import free_memory
from rlhf_core.serving.api_error import ApiError
from rlhf_core.serving.batch import Batch, decoding
from rlhf_core.serving.reply_text import ReplyText
from rlhf_core.serving.sampling import Options, Sampler, TokenLogprob, defaults, draw
from rlhf_core.system.host_memory import is_out_of_memory
from rlhf_core.system.machine import this_machine

MAX_ROWS = 64  # replies that are generated at a time
MAX_REPLIES = 1024  # to one request
PROMPT_TOKENS = (
    4096  # of new rows, padding included, that are read between two tokens of the others
)
MEMORY_SHARE = 0.4  # of what is free once the model is loaded, for keys and values
LONGEST_REPLY = 1024  # tokens, where a request names no limit

logger = logging.getLogger("rlhf_core.serving")


@dataclass(frozen=True)
class Update:
    """What is new of one reply.

    Attributes:
        choice: number of the reply among those to the request.
        finish: "stop" or "length" with the last update.
        tokens: of the reply so far.
    """

    choice: int
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: str | None = None
    tokens: int = 0
    error: ApiError | None = None


class Replies:
    """The replies to one request, as the server's event loop sees them.

    Iterate over it for the updates; that ends with the last reply. An iteration that is left
    earlier, because the client has, ends the generation.
    """

    def __init__(self, rows: list[Row], put: Any) -> None:
        self.rows = rows
        self.loop = asyncio.get_running_loop()
        self.updates: asyncio.Queue[Update] = asyncio.Queue()
        for row in rows:
            row.replies = self
        for row in rows:
            put(row)

    async def __aiter__(self) -> AsyncIterator[Update]:
        left = len(self.rows)
        try:
            while left:
                update = await self.updates.get()
                if update.error is not None:
                    raise update.error
                left -= update.finish is not None
                yield update
        finally:
            self.leave()

    def leave(self) -> None:
        """End the generation."""
        for row in self.rows:
            row.gone = True

    async def whole(self) -> list[Update]:
        """Each reply in one update."""
        found = [update async for update in self if update.finish]
        return sorted(found, key=lambda update: update.choice)


@dataclass(eq=False)
class Row:
    """One reply that is generated."""

    prompt: Sequence[int]
    longest: int
    sampler: Sampler
    text: ReplyText
    choice: int
    streamed: bool
    replies: Any = None
    gone: bool = False
    ids: list[int] = field(default_factory=list)
    new_text: str = ""
    new_logprobs: list[TokenLogprob] = field(default_factory=list)

    def update(self, finish: str | None) -> Update:
        """What is new since the last update."""
        text, logprobs = self.new_text, tuple(self.new_logprobs)
        self.new_text, self.new_logprobs = "", []
        return Update(self.choice, text, logprobs, finish, len(self.ids))


class Generator:
    """A chat model and the thread that generates with it."""

    def __init__(self, chat_model: ChatModel) -> None:
        self.chat_model = chat_model
        model = chat_model.model
        self._default = defaults(model.generation_config)
        end = model.generation_config.eos_token_id
        self._ends = set(end if isinstance(end, list) else [] if end is None else [end])
        self._vocabulary = model.get_input_embeddings().weight.shape[0]
        self._batch = Batch(model)
        self._max_rows = MAX_ROWS if self._batch.joins else 1
        self._memory = MEMORY_SHARE * free_memory(self._batch.device)
        if self._batch.device.type == "cpu":
            self._memory = min(self._memory, MEMORY_SHARE * this_machine().ram)
        self._position_bytes = 0
        self._rows: list[Row] = []
        self._waiting: deque[Row] = deque()
        self._coming: queue.SimpleQueue[Row] = queue.SimpleQueue()
        self._updates: list[tuple[Replies, Update]] = []
        threading.Thread(target=self._run, name="generator", daemon=True).start()

    def reply(
        self, prompts: Sequence[Sequence[int]], options: Options, n: int, streamed: bool
    ) -> Replies:
        """Begin n replies to each prompt, of token ids. Call it in the event loop.

        Raises:
            ApiError: a prompt is empty or leaves too little of the context, or the request names
                tokens that are none, or wants more than MAX_REPLIES replies.
        """
        if n * len(prompts) > MAX_REPLIES:
            text = f"{len(prompts)} prompts with n {n} are more than {MAX_REPLIES} replies."
            raise ApiError(text, param="n", code="invalid_value")
        longest = [self._longest(prompt, options.max_new_tokens) for prompt in prompts]
        for name, ids in [("logit_bias", options.logit_bias), *(("prompt", p) for p in prompts)]:
            if wrong := [token for token in ids if not 0 <= token < self._vocabulary]:
                text = f"{name} has token {wrong[0]}; the model's are 0 to {self._vocabulary - 1}."
                raise ApiError(text, param=name, code="invalid_value")
        rows = [
            Row(
                prompt=prompts[choice // n],
                longest=longest[choice // n],
                sampler=Sampler(options, self._default, choice),
                text=ReplyText(self.chat_model.tokenizer, options.stop, streamed),
                choice=choice,
                streamed=streamed,
            )
            for choice in range(n * len(prompts))
        ]
        return Replies(rows, self._coming.put)

    def _longest(self, prompt: Sequence[int], asked: int | None) -> int:
        """Tokens that a reply may have."""
        if not prompt:
            raise ApiError("The prompt is empty.", param="prompt", code="invalid_value")
        context = self.chat_model.context
        if context is None:
            return asked or LONGEST_REPLY
        left = context - len(prompt)
        if left < (asked or 1):
            rest = f" and the reply may have {asked}" if asked else ", which leaves none to a reply"
            raise ApiError(
                f"The model's context is {context} tokens. The prompt has {len(prompt)} tokens"
                f"{rest}; shorten one of them.",
                code="context_length_exceeded",
            )
        return asked or min(left, LONGEST_REPLY)

    # ------------------------------------------------------------------------ in the thread

    def _run(self) -> None:
        while True:
            try:
                with decoding(self._batch):
                    while True:
                        self._turn()
            except Exception as error:
                self._fail(error)

    def _turn(self) -> None:
        """One token for each row; rows join before it."""
        if not self._rows and not self._waiting:
            self._waiting.append(self._coming.get())
        with contextlib.suppress(queue.Empty):
            while True:
                self._waiting.append(self._coming.get_nowait())
        self._leave([i for i, row in enumerate(self._rows) if row.gone])
        self._waiting = deque(row for row in self._waiting if not row.gone)
        if joining := self._joining():
            before = len(self._rows)
            self._rows += joining
            self._advance(before, self._batch.join([row.prompt for row in joining]))
            self._position_bytes = self._batch.position_bytes or self._position_bytes
        if self._rows:
            self._advance(0, self._batch.step([row.ids[-1] for row in self._rows]))
        self._hand_out()

    def _joining(self) -> list[Row]:
        """The waiting rows that there is room for, oldest first; taken from the queue."""
        found: list[Row] = []
        while self._waiting and len(self._rows) + len(found) < self._max_rows:
            rows = [*found, self._waiting[0]]
            width = max(len(row.prompt) for row in rows)
            columns = max(len(row.prompt) + row.longest for row in [*self._rows, *rows])
            needed = (len(self._rows) + len(rows)) * columns * self._position_bytes
            if found and (len(rows) * width > PROMPT_TOKENS or not self._position_bytes):
                break
            if len(self._rows) + len(found) and needed > self._memory:
                break
            found.append(self._waiting.popleft())
        return found

    def _advance(self, start: int, logits: Tensor) -> None:
        """Draw a token for the rows from `start` on; those that end leave."""
        rows = self._rows[start:]
        samplers = [row.sampler for row in rows]
        tokens, logprobs = draw(logits, samplers, lambda i: [*rows[i].prompt, *rows[i].ids])
        ended = []
        for i, (row, token, logprob) in enumerate(zip(rows, tokens, logprobs, strict=True)):
            row.ids.append(token)
            if token not in self._ends:
                row.new_text += row.text.add(token)
                row.new_logprobs += [logprob] if logprob else []
            finish = None
            if token in self._ends or row.text.stopped:
                finish = "stop"
            elif len(row.ids) >= row.longest:
                finish = "length"
            if finish:
                row.new_text += row.text.end()
                ended.append(start + i)
            if finish or (row.streamed and (row.new_text or row.new_logprobs)):
                self._updates.append((row.replies, row.update(finish)))
        self._leave(ended)

    def _leave(self, gone: list[int]) -> None:
        if gone:
            self._rows = [self._rows[i] for i in self._batch.leave(gone)]

    def _hand_out(self) -> None:
        """Pass all updates to their event loops, each of which is woken once."""
        updates, self._updates = self._updates, []
        for loop in {replies.loop for replies, _ in updates}:
            mine = [(r, update) for r, update in updates if r.loop is loop]
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server ends
                loop.call_soon_threadsafe(_put_all, mine)

    def _fail(self, error: Exception) -> None:
        """Tell the clients of all rows in the batch, and begin with an empty one."""
        if is_out_of_memory(error):
            told = ApiError("Not enough memory for the replies; ask for fewer or shorter ones.",
                            code="out_of_memory", status=503)  # fmt: skip
        else:
            logger.error("generation failed", exc_info=error)
            told = ApiError(f"Generation failed: {type(error).__name__}: {error}", status=500)
        self._updates += [(row.replies, Update(row.choice, error=told)) for row in self._rows]
        self._rows = []
        self._batch = Batch(self.chat_model.model, self._batch.joins)
        if self._batch.device.type == "cuda":
            torch.cuda.empty_cache()
        self._hand_out()


def _put_all(updates: list[tuple[Replies, Update]]) -> None:
    for replies, update in updates:
        replies.updates.put_nowait(update)
