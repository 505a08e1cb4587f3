"""Divergences between the distributions of a student and a teacher, per token.

P is the teacher's distribution over the vocabulary, Q the student's, both softmax(logits / T). With
M = beta P + (1 - beta) Q (GKD, arXiv 2306.13649, section 2):

    beta = 0        KL(P || Q), forward KL: the student covers all that the teacher does
    0 < beta < 1    beta KL(P || M) + (1 - beta) KL(Q || M), generalised Jensen-Shannon
    beta = 1        KL(Q || P), reverse KL: the student keeps to what the teacher does most
                    (MiniLLM, arXiv 2306.08543)

At both ends the formula of the middle is 0, so they are taken as the limits of it divided by beta,
or by 1 - beta. N positions, V vocabulary; nats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def divergence(student_logits: Tensor, teacher_logits: Tensor, beta: float) -> Tensor:
    """The divergence (N,) at each position; only the student gets a gradient.

    Args:
        student_logits, teacher_logits: (N,V), divided by the temperature.
        beta: from 0 (forward KL) to 1 (reverse KL).
    """
    q = torch.log_softmax(student_logits, dim=-1)  # (N,V)
    p = torch.log_softmax(teacher_logits.detach(), dim=-1)  # (N,V)
    if beta == 0.0:
        return (p.exp() * (p - q)).sum(dim=-1)
    if beta == 1.0:
        return (q.exp() * (q - p)).sum(dim=-1)
    m = _log_mixture(q, p, beta)  # (N,V)
    of_teacher = (p.exp() * (p - m)).sum(dim=-1)
    of_student = (q.exp() * (q - m)).sum(dim=-1)
    return beta * of_teacher + (1.0 - beta) * of_student


def divergence_with_gradient(q: Tensor, p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """`divergence` (N,) and its gradient (N,V) with respect to the student's logits / T.

    With softmax Q the gradient of sum_v f_v is, for D = forward KL, Q - P; for reverse KL
    Q (log Q - log P - D); and for the middle (1 - beta) Q (log Q - log M - KL(Q || M)), where the
    terms of d M cancel.

    Args:
        q, p: (N,V) log-probabilities of student and teacher.
    """
    if beta == 0.0:
        return (p.exp() * (p - q)).sum(dim=-1), q.exp().sub_(p.exp())
    if beta == 1.0:
        gap = q - p  # (N,V)
        prob = q.exp()
        value = (prob * gap).sum(dim=-1)
        return value, gap.sub_(value.unsqueeze(-1)).mul_(prob)
    m = _log_mixture(q, p, beta)
    of_teacher = (p.exp() * (p - m)).sum(dim=-1)
    prob = q.exp()
    gap = q - m
    of_student = (prob * gap).sum(dim=-1)
    grad = gap.sub_(of_student.unsqueeze(-1)).mul_(prob).mul_(1.0 - beta)
    return beta * of_teacher + (1.0 - beta) * of_student, grad


def _log_mixture(q: Tensor, p: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
