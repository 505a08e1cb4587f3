"""One question to several models at once: replies as they grow, then their scores."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.chat.model import ChatModel, Sampling, fit_context, generate_reply, load_chat_model
from rlhf_core.errors import DataError, RLHFError
from rlhf_core.model_files.remote_code import allow, is_trusted
from rlhf_core.playground.catalogue import Choice
from rlhf_core.playground.pool import ModelPool
from rlhf_core.store import Store

if TYPE_CHECKING:
    from rlhf_core.data.rows.row import Message


@dataclass(frozen=True)
class PartialReply:
    """A reply as it is now.

    Attributes:
        state: "waiting" (for the model), "talking", "done" or "failed".
        error: why it failed; for people.
        dropped: oldest turns that no longer fit the model's context.
        score: the reward model's. score_error: why there is none, though there is a reward model.
    """

    text: str = ""
    state: str = "waiting"
    error: str = ""
    dropped: int = 0
    score: float | None = None
    score_error: str = ""


@dataclass
class Asker:
    """Asks models of a store.

    Attributes:
        trust: run Python code that came with a model.
    """

    store: Store
    pool: ModelPool
    trust: bool = False

    def ask(
        self,
        choices: Sequence[Choice],
        conversations: Sequence[Sequence[Message]],
        sampling: Sampling,
        *,
        system: str | None = None,
        reward_model: str | None = None,
        stop: threading.Event | None = None,
    ) -> Iterator[list[PartialReply]]:
        """The replies of all models, again and again while they grow; the last time with scores.

        What goes wrong with one model is told in its reply, and leaves the others alone.

        Args:
            conversations: one per model; each ends with the user's message.
            reward_model: digest of the one that scores; None: no scores.
            stop: ends all replies where they are, once it is set.
        """
        stop = stop or threading.Event()
        left = threading.Event()  # nobody reads any more
        news: queue.SimpleQueue[tuple[int, dict[str, Any]]] = queue.SimpleQueue()
        replies = [PartialReply() for _ in choices]

        def work(place: int) -> None:
            try:
                self._reply(
                    choices[place].digest, conversations[place], system, sampling,
                    lambda change: news.put((place, change)),
                    lambda: stop.is_set() or left.is_set(),
                )  # fmt: skip
                news.put((place, {"state": "done"}))
            except Exception as error:
                news.put((place, {"state": "failed", "error": describe(error)}))

        threads = [
            threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(choices))
        ]
        for thread in threads:
            thread.start()
        try:
            yield list(replies)
            while any(reply.state in ("waiting", "talking") for reply in replies):
                place, change = news.get()
                _apply(replies, place, change)
                while not news.empty():
                    _apply(replies, *news.get())
                yield list(replies)
        finally:
            left.set()
            for thread in threads:
                thread.join()
        if reward_model is not None:
            yield self._scored(reward_model, replies, conversations, system)

    def _reply(
        self,
        digest: str,
        conversation: Sequence[Message],
        system: str | None,
        sampling: Sampling,
        tell: Any,
        stopped: Any,
    ) -> None:
        allow(self.trust)  # of this thread
        folder = self.store.fetch(digest)
        with self.pool.use(digest, folder, load_chat_model) as chat_model:
            _refuse_special(
                chat_model, [*([system] if system else []), conversation[-1]["content"]]
            )
            ids, dropped = fit_context(
                chat_model.tokenizer,
                chat_model.context,
                system,
                conversation,
                sampling.max_new_tokens,
            )
            tell({"state": "talking", "dropped": dropped})
            generate_reply(chat_model, ids, sampling, lambda text: tell({"text": text}), stopped)

    def _scored(
        self,
        digest: str,
        replies: Sequence[PartialReply],
        conversations: Sequence[Sequence[Message]],
        system: str | None,
    ) -> list[PartialReply]:
        allow(self.trust)
        first: list[Message] = [{"role": "system", "content": system}] if system else []
        try:
            folder = self.store.fetch(digest)
            with self.pool.use(digest, folder, load_scorer) as scorer:
                found = []
                for reply, conversation in zip(replies, conversations, strict=True):
                    if reply.state == "done":
                        said: Message = {"role": "assistant", "content": reply.text.strip()}
                        score = scorer.score([*first, *conversation, said])
                        reply = replace(reply, score=score if math.isfinite(score) else None)
                    found.append(reply)
                return found
        except Exception as error:
            return [replace(reply, score_error=describe(error)) for reply in replies]


def _apply(replies: list[PartialReply], place: int, change: dict[str, Any]) -> None:
    if "text" in change:
        change = {"text": replies[place].text + change["text"]}
    replies[place] = replace(replies[place], **change)


def describe(error: Exception) -> str:
    """An error for the page: of an expected one only what it says."""
    if isinstance(error, RLHFError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _refuse_special(chat_model: ChatModel, texts: Sequence[str]) -> None:
    from rlhf_core.data.encoding.templates import special_text

    for text in texts:
        if found := special_text(chat_model.tokenizer, text):
            raise DataError(
                f"The message contains {found!r}, which this model reads as a special token; take "
                "it out of the text."
            )


@dataclass
class Scorer:
    """A reward model with its tokenizer."""

    model: Any
    tokenizer: Any
    device: str

    def score(self, messages: Sequence[Message]) -> float:
        """Score of a conversation that ends with a reply, as if its turn had ended there."""
        import torch

        from rlhf_core.data.encoding.templates import encode_segments, render

        texts = [segment.text for segment in render(self.tokenizer, messages)]
        ids = [token for piece in encode_segments(self.tokenizer, texts) for token in piece]
        input_ids = torch.tensor([ids], device=self.device)  # (1,S)
        with torch.no_grad():
            return float(self.model(input_ids, torch.ones_like(input_ids, dtype=torch.bool))[0])


def load_scorer(folder: Path) -> Scorer:
    """The reward model in a folder.

    Raises:
        ModelError: it is none, or is damaged.
    """
    import torch

    from rlhf_core.data.encoding.tokenizer import load_tokenizer
    from rlhf_core.models.loading import load_scalar_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(folder, trust_remote_code=is_trusted(folder))
    return Scorer(load_scalar_model(folder).requires_grad_(False).to(device), tokenizer, device)
