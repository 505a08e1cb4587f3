"""On-policy distillation (GKD, arXiv 2306.13649, algorithm 1 with lambda 1).

The student answers prompts, the teacher gives its distribution at each token of the answers, and
the student's distributions are pulled to them by a divergence over the whole vocabulary
(`losses.distillation`). Deviations from the paper:

* Every reply is the student's: demonstrations are what an SFT stage before is for.
* No gradient flows through the sampling, as in the paper; and no sampled-token form (a reward of
  log P - log Q for policy gradient): the whole distribution has less variance at the same cost,
  because the teacher's logits are computed either way.
* Logits are divided by the sampling temperature, and the loss is not multiplied by its square.

B replies of a step (global), b rows of a micro-batch, S positions.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.jobs.distillation import DistillJob
from rlhf_core.models.loading import load_causal_lm
from rlhf_core.nn.layers import choose_trainable
from rlhf_core.nn.modules import Policy
from rlhf_core.nn.student import Student, teacher_logits
from rlhf_core.runtime.context import StageContext
from rlhf_core.store import Artifact
from rlhf_core.training.batching import batch_rows, scoring_passes, split_batch
from rlhf_core.training.checkpoint import Checkpointer
from rlhf_core.training.online.batches import collate_responses
from rlhf_core.training.online.sampling import SampledReply, roll_out
from rlhf_core.training.optimizer import adamw
from rlhf_core.training.policy import enable_checkpointing, frozen_storage, publish_policy
from rlhf_core.training.reading import read_all
from rlhf_core.training.schedule import set_learning_rate
from rlhf_core.training.selection import LOWEST_LOSS, Selection
from rlhf_core.training.strategy import HALF, Strategy
from rlhf_core.training.updates import add_up, update_on_batch

HELD_OUT = 2**32  # stream of the random numbers of evaluations, beyond those of all steps


@dataclass(frozen=True)
class Models:
    """The student is trained, the teacher frozen."""

    student: Student
    teacher: Policy
    source: Path  # folder of the model that the student starts from
    vocabulary: int  # tokens that both have


@dataclass(frozen=True)
class Answers:
    """The student's replies to the prompts of a step, over all ranks, on every rank."""

    sequences: list[list[int]]  # B x (prompt + response) token ids
    prompt_lengths: list[int]  # B, tokens
    replies: list[SampledReply]

    @property
    def tokens(self) -> int:
        """Of all replies."""
        return sum(len(reply.ids) for reply in self.replies)


def run(job: DistillJob, context: StageContext) -> Artifact | None:
    """Sample, compare, update; publish the student. Rank 0 returns the artifact."""
    strategy = Strategy(job.resources, job.precision, job.max_grad_norm)
    prompts = context.store.fetch(job.prompts)
    train = Rows(prompts, "train", purpose="prompts")
    heldout = Rows(prompts, "heldout", purpose="prompts")
    models = load_models(job, context, strategy)
    checkpointer = Checkpointer(context, strategy, job)
    start, _ = checkpointer.restore()
    selection = Selection(job, checkpointer, LOWEST_LOSS, len(heldout))
    evaluate = partial(heldout_loss, job, strategy, models, heldout)
    if job.eval_every is not None and start == 0:
        context.log_metrics(0, job.steps, evaluate())

    for step in selection.steps(start, job.steps):
        began = time.perf_counter()
        # 1. The student answers the prompts of the step.
        rows = train.take(batch_rows(train, job.batch_size, step, job.seed))
        answers = answer(job, strategy, models, [row["prompt_ids"] for row in rows], step)
        checkpointer.stop_if_asked(step)
        rollout_seconds = time.perf_counter() - began
        # 2. Update towards the teacher's distributions.
        learning_rate = set_learning_rate(job, strategy, checkpointer, step, job.steps)
        micro_batches = split_batch(
            [len(ids) for ids in answers.sequences],
            strategy.group, job.resources.micro_batch_size, strategy.padding,
        )  # fmt: skip
        records = [{"input_ids": ids} for ids in answers.sequences]
        metrics = update_on_batch(
            strategy, checkpointer, step, records, micro_batches,
            partial(loss, job, strategy, models, answers),
        )  # fmt: skip
        # 3. Report, evaluate and save.
        metrics |= {
            **shape_of(answers.replies),
            "learning_rate": learning_rate,
            "rollout_seconds": rollout_seconds,
            "tokens_per_second": answers.tokens / (time.perf_counter() - began),
        }
        selection.after_step(step + 1, job.steps, metrics, evaluate)

    result = {"metrics": selection.heldout(job.steps, evaluate)}
    return publish_policy(
        job, context, strategy, checkpointer, models.student, models.source, result
    )


def load_models(job: DistillJob, context: StageContext, strategy: Strategy) -> Models:
    """The student with its optimizer, and the teacher, each where the strategy puts it."""
    source = context.store.fetch(job.model)
    dtype, nf4, empty = frozen_storage(job, strategy)
    student = Student(choose_trainable(load_causal_lm(source, dtype, nf4, empty), job, job.seed))
    if job.resources.gradient_checkpointing:
        enable_checkpointing(student.model)
    sizes = [student.model.get_input_embeddings().weight.shape[0]]  # type: ignore[union-attr,operator]
    strategy.prepare(student, adamw(student, job, {"": job.learning_rate}))
    # It has no gradients and no updates to be exact for. Under ddp on a CPU it stays as it was, so
    # that runs repeat bit by bit.
    exact = job.precision == "fp32" or (strategy.kind == "ddp" and strategy.device.type == "cpu")
    teacher = load_causal_lm(
        context.store.fetch(job.teacher), dtype if exact else HALF[job.precision], nf4, empty
    )
    sizes.append(teacher.get_input_embeddings().weight.shape[0])
    frozen = Policy(teacher).requires_grad_(False)
    strategy.place_frozen(frozen)
    return Models(student, frozen, source, min(sizes))


def answer(
    job: DistillJob, strategy: Strategy, models: Models, prompt_ids: list[list[int]], stream: int
) -> Answers:
    """The student's replies to some prompts.

    Args:
        stream: of the random numbers; a step, or a number that is none.
    """
    replies = roll_out(job, strategy, models.student, models.source, prompt_ids, stream)
    sequences = [[*p, *r.ids] for p, r in zip(prompt_ids, replies, strict=True)]
    return Answers(sequences, [len(p) for p in prompt_ids], replies)


def loss(
    job: DistillJob, strategy: Strategy, models: Models, answers: Answers, indices: list[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean divergence (nats) over the reply tokens of the global batch: the micro-batch's share."""
    assert strategy.module is not None
    batch = collate_responses(
        answers.sequences, answers.prompt_lengths, indices, strategy.device
    )  # (b,S) each
    found: list[Tensor] = []

    def compare() -> None:
        logits = teacher_logits(models.teacher, batch)
        found.append(
            strategy.module(*batch, job.temperature, None, logits, job.beta, models.vocabulary)
        )

    models.teacher.within(compare)  # where the teacher is sharded, its head is whole only here
    return found[0] / answers.tokens, {}


@torch.no_grad()
def heldout_loss(
    job: DistillJob, strategy: Strategy, models: Models, heldout: Rows
) -> dict[str, float]:
    """The divergence on replies to held-out prompts, always with the same random numbers; {}
    without such prompts."""
    count = min(job.eval_prompts, len(heldout))
    if count == 0:
        return {}
    rows = heldout.take(list(range(len(heldout) - count, len(heldout))))
    answers = answer(job, strategy, models, [row["prompt_ids"] for row in rows], HELD_OUT)
    lengths = [len(ids) for ids in answers.sequences]
    found: list[dict[str, float | Tensor]] = [{"loss": 0.0}]  # also of a rank without replies
    for indices, counts in scoring_passes(lengths, strategy.group, job.resources.micro_batch_size):
        with strategy.autocast():
            share, _ = loss(job, strategy, models, answers, list(indices))
        if counts:
            found.append({"loss": share})
    total = add_up(read_all(found), strategy.group)
    shown = total | shape_of(answers.replies)
    return {f"heldout_{name}": value for name, value in shown.items()}


def shape_of(replies: Sequence[SampledReply]) -> dict[str, float]:
    """Mean tokens of a reply, and the fraction that ended with an end of turn."""
    return {
        "length": sum(len(r.ids) for r in replies) / len(replies),
        "finished": sum(r.finished for r in replies) / len(replies),
    }
