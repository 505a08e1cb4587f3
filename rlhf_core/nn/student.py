"""A policy that is trained towards a teacher's distributions, and the teacher's part of it."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_core.losses.distillation import divergence
from rlhf_core.losses.reductions import upcast
from rlhf_core.nn.chunked_divergence import TeacherLogits, divergence_sum
from rlhf_core.nn.modules import Policy
from rlhf_core.nn.padding import Batch, TokenIndex
from rlhf_core.nn.response_logprobs import predicting


class Student(Policy):
    """A policy; with a teacher it returns how far it is from it instead of log-probabilities."""

    def forward(
        self,
        input_ids: Tensor,
        mask: Tensor | None,
        loss_mask: Tensor,
        index: TokenIndex | None = None,
        temperature: float = 1.0,
        position_ids: Tensor | None = None,
        teacher: TeacherLogits | None = None,
        beta: float = 0.0,
        vocabulary: int = 0,
    ) -> Tensor:
        """The divergence (nats) summed over the positions that predict the loss mask's tokens.

        Args:
            teacher: of the same positions; None: log-probabilities, as `Policy` gives them.
            beta: see `losses.distillation`. vocabulary: tokens that both have.
        """
        if teacher is None:
            return super().forward(input_ids, mask, loss_mask, index, temperature, position_ids)
        found = predicting(self.model, input_ids, mask, position_ids, loss_mask, index)
        if found.head is not None:
            return divergence_sum(found.states, found.head, teacher, beta, temperature, vocabulary)
        own = found.states[:, :vocabulary] / temperature  # (N,V)
        if len(own) == 0:
            return found.states.sum()
        other = teacher(slice(0, len(own)))[:, :vocabulary] / temperature
        return divergence(own, other, beta).sum()


@torch.no_grad()
def teacher_logits(teacher: Policy, batch: Batch) -> TeacherLogits:
    """The teacher's logits at the positions that predict the loss mask's tokens, head by chunk.

    Call it, and what it returns, within `teacher.within`: where the teacher is sharded, its head is
    whole only there.
    """
    found = predicting(
        teacher.model, batch.input_ids, batch.mask, None, batch.loss_mask, batch.index
    )
    head, states = found.head, found.states
    if head is None:
        return lambda rows: states[rows]

    @torch.no_grad()
    def logits(rows: slice) -> Tensor:
        return upcast(head.logits(states[rows]))

    return logits
