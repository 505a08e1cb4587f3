"""Replies that are sampled before they are trained on: whole ones, and those still to be continued.

The queue belongs to rank 0. A checkpoint holds it, so that a stage that was killed goes on with the
replies that it had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


@dataclass(frozen=True)
class QueuedReply:
    """A reply as far as it is sampled; its tokens end with the first end-of-turn token."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Nats, of the weights that sampled each token."""
    versions: list[int] = field(default_factory=list)
    """Finished steps of the weights that sampled each token."""
    finished: bool = False
    """Has an end-of-turn token."""

    def longer(self, more: QueuedReply) -> QueuedReply:
        """This reply, continued by another round's tokens."""
        return QueuedReply(
            self.ids + more.ids,
            self.logprobs + more.logprobs,
            self.versions + more.versions,
            more.finished,
        )


Queue = dict[int, list[QueuedReply]]
"""Step -> its replies, in the order of its prompts."""


def save_queue(queue: Mapping[int, list[QueuedReply]], rounds: int, file: Path) -> None:
    """Write a queue.

    Args:
        rounds: that are finished.
    """
    tensors = {}
    for step, replies in queue.items():
        lengths = [len(reply.ids) for reply in replies]
        flat = {
            "lengths": torch.tensor(lengths, dtype=torch.int32),  # (B,)
            "finished": torch.tensor([reply.finished for reply in replies]),  # (B,)
            # (N,) each, of all replies one after another
            "ids": torch.tensor([x for r in replies for x in r.ids], dtype=torch.int32),
            "versions": torch.tensor([x for r in replies for x in r.versions], dtype=torch.int32),
            "logprobs": torch.tensor([x for r in replies for x in r.logprobs], dtype=torch.float32),
        }
        tensors |= {f"{step}.{name}": value for name, value in flat.items()}
    save_file(tensors, file, metadata={"rounds": str(rounds)})


def load_queue(file: Path) -> tuple[Queue, int]:
    """The queue that `save_queue` was given, and the finished rounds."""
    with safe_open(file, framework="pt") as saved:
        tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
        rounds = int(saved.metadata()["rounds"])
    queue: Queue = {}
    for step in sorted({int(name.partition(".")[0]) for name in tensors}):
        lengths = tensors[f"{step}.lengths"].tolist()
        parts = [
            [part.tolist() for part in tensors[f"{step}.{name}"].split(lengths)]
            for name in ("ids", "logprobs", "versions")
        ]
        finished = tensors[f"{step}.finished"].tolist()
        queue[step] = [QueuedReply(*reply) for reply in zip(*parts, finished, strict=True)]
    return queue, rounds
