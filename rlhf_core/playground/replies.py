"""Replies of several models to one message: streamed while they are generated, then scored."""

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
from rlhf_core.playground.catalogue import Choice, RewardModels
from rlhf_core.playground.pool import ModelPool
from rlhf_core.store import Store

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.data.rows.row import Message


@dataclass(frozen=True)
class PartialReply:
    """A reply as far as it has been generated.

    Attributes:
        state: "waiting" (the model is loading), "generating", "done" or "failed".
        error: why it failed; for people.
        dropped: number of oldest turns that no longer fit the model's context.
        score: the reward model's score.
        score_error: why there is no score although there is a reward model.
    """

    text: str = ""
    state: str = "waiting"
    error: str = ""
    dropped: int = 0
    score: float | None = None
    score_error: str = ""


@dataclass
class ReplyGenerator:
    """Generates replies with models of a store.

    Attributes:
        trust_remote_code: run Python code that lies beside a model's weights.
    """

    store: Store
    pool: ModelPool
    trust_remote_code: bool = False

    def generate(
        self,
        choices: Sequence[Choice],
        conversations: Sequence[Sequence[Message]],
        sampling: Sampling,
        *,
        system: str | None = None,
        reward_models: RewardModels | None = None,
        stop: threading.Event | None = None,
    ) -> Iterator[list[PartialReply]]:
        """Yield the replies of all models each time one has grown; the last item has the scores.

        An error of one model becomes its reply's `error` and does not affect the others.

        Args:
            conversations: one per model; each ends with the user's message.
            reward_models: those that score together; None: no scores.
            stop: once set, all replies end where they are.
        """
        stop = stop or threading.Event()
        abandoned = threading.Event()  # the caller has stopped reading
        changes: queue.SimpleQueue[tuple[int, dict[str, Any]]] = queue.SimpleQueue()
        replies = [PartialReply() for _ in choices]

        def work(index: int) -> None:
            try:
                self._reply(
                    choices[index].digest,
                    conversations[index],
                    system,
                    sampling,
                    lambda change: changes.put((index, change)),
                    lambda: stop.is_set() or abandoned.is_set(),
                )
                changes.put((index, {"state": "done"}))
            except Exception as error:
                changes.put((index, {"state": "failed", "error": error_text(error)}))

        threads = [
            threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(choices))
        ]
        for thread in threads:
            thread.start()
        try:
            yield list(replies)
            while any(reply.state in ("waiting", "generating") for reply in replies):
                _apply(replies, *changes.get())
                while not changes.empty():
                    _apply(replies, *changes.get())
                yield list(replies)
        finally:
            abandoned.set()
            for thread in threads:
                thread.join()
        if reward_models is not None:
            yield self._scored(reward_models, replies, conversations, system)

    def _reply(
        self,
        digest: str,
        conversation: Sequence[Message],
        system: str | None,
        sampling: Sampling,
        report: Any,
        stopped: Any,
    ) -> None:
        """Generate one reply; ``report`` gets the changes of its PartialReply."""
        allow(self.trust_remote_code)  # per thread
        folder = self.store.fetch(digest)
        with self.pool.use(digest, folder, load_chat_model) as chat_model:
            texts = [*([system] if system else []), conversation[-1]["content"]]
            _check_special_tokens(chat_model, texts)
            ids, dropped = fit_context(
                chat_model.tokenizer,
                chat_model.context,
                system,
                conversation,
                sampling.max_new_tokens,
            )
            report({"state": "generating", "dropped": dropped})
            generate_reply(chat_model, ids, sampling, lambda text: report({"text": text}), stopped)

    def _scored(
        self,
        reward_models: RewardModels,
        replies: Sequence[PartialReply],
        conversations: Sequence[Sequence[Message]],
        system: str | None,
    ) -> list[PartialReply]:
        """The replies with the reward models' combined score."""
        from rlhf_core.nn.ensemble import combine_scores

        allow(self.trust_remote_code)
        first: list[Message] = [{"role": "system", "content": system}] if system else []
        done = [i for i, reply in enumerate(replies) if reply.state == "done"]
        answered: list[list[Message]] = [
            [*first, *conversations[i], {"role": "assistant", "content": replies[i].text.strip()}]
            for i in done
        ]
        if not done:
            return list(replies)
        try:
            members = self._member_scores(reward_models.digests, answered)
            scores = combine_scores(members, reward_models.combine)  # (b,)
        except Exception as error:
            return [replace(reply, score_error=error_text(error)) for reply in replies]
        found = list(replies)
        for i, score in zip(done, scores.tolist(), strict=True):
            found[i] = replace(found[i], score=score if math.isfinite(score) else None)
        return found

    def _member_scores(
        self, digests: Sequence[str], conversations: Sequence[Sequence[Message]]
    ) -> Tensor:
        """Scores (k,b) of k reward models, of which one at a time has to fit into memory."""
        import torch

        scores = []
        for digest in digests:
            with self.pool.use(digest, self.store.fetch(digest), load_scorer) as scorer:
                scores.append([scorer.score(conversation) for conversation in conversations])
        return torch.tensor(scores, dtype=torch.float64)


def _apply(replies: list[PartialReply], index: int, change: dict[str, Any]) -> None:
    """Apply one change in place; a text is appended to what is there."""
    if "text" in change:
        change = {"text": replies[index].text + change["text"]}
    replies[index] = replace(replies[index], **change)


def error_text(error: Exception) -> str:
    """An error for the page: the message alone if it is one of ours, else with its type."""
    if isinstance(error, RLHFError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _check_special_tokens(chat_model: ChatModel, texts: Sequence[str]) -> None:
    """Raise DataError if a text contains one of the tokenizer's special tokens."""
    from rlhf_core.data.encoding.templates import find_special_token

    for text in texts:
        if found := find_special_token(chat_model.tokenizer, text):
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
        """Score of a conversation that ends with a reply, its end-of-turn token included."""
        import torch

        from rlhf_core.data.encoding.templates import encode_segments, render_reply

        texts = [segment.text for segment in render_reply(self.tokenizer, messages)]
        ids = [token for piece in encode_segments(self.tokenizer, texts) for token in piece]
        input_ids = torch.tensor([ids], device=self.device)  # (1,S)
        with torch.no_grad():
            return float(self.model(input_ids, torch.ones_like(input_ids, dtype=torch.bool))[0])


def load_scorer(folder: Path) -> Scorer:
    """The reward model in a folder.

    Raises:
        ModelError: the folder holds no reward model, or a damaged one.
    """
    import torch

    from rlhf_core.data.encoding.tokenizer import load_tokenizer
    from rlhf_core.models.loading import load_scalar_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(folder, trust_remote_code=is_trusted(folder))
    return Scorer(load_scalar_model(folder).requires_grad_(False).to(device), tokenizer, device)
