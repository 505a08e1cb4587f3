"""What online algorithms learn from: replies to the prompts of a step, and what they are worth.

B replies of a rollout (global), b rows of a micro-batch, S positions, T response positions.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_core.errors import TrainingFailure
from rlhf_core.jobs import OnlineJob, VllmRollout
from rlhf_core.nn.shared_trunk import States
from rlhf_core.rewards import Rules
from rlhf_core.runtime.distributed import Group
from rlhf_core.training.online.batches import collate_responses, micro_batches
from rlhf_core.training.online.models import Models
from rlhf_core.training.strategy import Strategy


@dataclass
class Experience:
    """One rollout of the whole global batch, on every rank, on the CPU."""

    sequences: list[list[int]]  # B x (prompt + response)
    prompt_lengths: list[int]  # B
    finished: Tensor  # (B,) bool
    mask: Tensor  # (B,T) bool, real response tokens
    rollout_logprobs: Tensor  # (B,T)
    old_logprobs: Tensor  # (B,T), of the policy before the rollout's updates
    ref_logprobs: Tensor  # (B,T)
    components: dict[str, Tensor]  # name of a reward -> (B,), without its weight
    raw_scores: Tensor  # (B,) weighted sum of the components
    scores: Tensor  # (B,) raw_scores less the penalty for a missing end of turn
    failures: dict[str, int]  # what kept a rule from being applied -> replies
    states: States  # hidden states of this rank's micro-batches, where layers are shared
    late: bool = False  # old_logprobs of the first minibatch are left to its update
    values: Tensor | None = None  # (B,T) of PPO's critic
    advantages: Tensor | None = None  # (B,T) or (B,), as the algorithm makes them of the scores
    returns: Tensor | None = None  # (B,T) for PPO's critic


@torch.no_grad()
def score(
    job: OnlineJob,
    strategy: Strategy,
    models: Models,
    rollout: dict[str, Any],
    rows: list[dict[str, Any]],
    minibatches: list[list[int]],
    *,
    late: bool = False,
) -> Experience:
    """Log-probabilities, values and rewards of a rollout.

    The first minibatch is trained on before the policy has changed: what its update computes are
    the old log-probabilities. Where nothing needs them sooner they are left to it, see `optimise`,
    and are zeros until then.

    Args:
        rollout: of `roll_out`. rows: of the prompt data set, one for each reply.
        minibatches: rows that are trained on together, and so scored together.
        late: nothing needs the old log-probabilities before that update. Not with a critic. Not in
            a stage's first rollout, so that `optimise` sees there whether a pass can be repeated.
    """
    sequences, prompt_lengths = rollout["sequences"], rollout["prompt_lengths"]
    group, found, states = strategy.group, [], States(models.trunk)
    first = set(minibatches[0])
    for positions in micro_batches(job, strategy, sequences, minibatches):
        batch = collate_responses(sequences, prompt_lengths, positions, group.device)
        loss_mask = batch[2]
        with strategy.autocast(), states.of(positions, batch[0], batch[1]):
            ref = models.reference(*batch, job.temperature)
            if late and first.issuperset(positions):
                old, values = torch.zeros_like(ref), None
            else:
                old, values, _ = models.trained(*batch, job.temperature)
            scores = models.reward(batch[0], batch[1]) if models.reward is not None else None
        tensors = [old, ref] if values is None else [old, ref, values]
        for i, p in enumerate(positions):
            columns = [x[i][loss_mask[i]].float().cpu() for x in tensors]
            found.append((p, (columns, None if scores is None else float(scores[i]))))

    shape = (len(sequences), max(len(x) for x in rollout["logprobs"]))
    mask = torch.zeros(shape, dtype=torch.bool)
    rollout_logprobs, *places = (torch.zeros(shape) for _ in range(1 + len(tensors)))
    model_scores: list[Any] = []
    for p, (columns, raw) in enumerate(group.in_order(found)):
        n = len(columns[0])
        mask[p, :n] = True
        rollout_logprobs[p, :n] = torch.tensor(rollout["logprobs"][p])
        for place, column in zip(places, columns, strict=True):
            place[p, :n] = column
        model_scores.append(raw)
    components, failures = score_by_rules(models, group, rollout, rows)
    if models.reward is not None:
        components = {"model": torch.tensor(model_scores), **components}
    raw_scores = sum(models.weights[name] * x.double() for name, x in components.items()).float()
    finished = rollout["finished"]
    experience = Experience(
        sequences=sequences,
        prompt_lengths=prompt_lengths,
        finished=finished,
        mask=mask,
        rollout_logprobs=rollout_logprobs,
        old_logprobs=places[0],
        ref_logprobs=places[1],
        values=places[2] if len(places) > 2 else None,
        components=components,
        failures=failures,
        states=states,
        late=late,
        raw_scores=raw_scores,
        # A reply that was cut is scored as it stands, less the penalty.
        scores=raw_scores - job.missing_eos_penalty * (~finished).float(),
    )
    if not late:
        assert_same_policy(job, experience)
    return experience


def add_late(
    job: OnlineJob, group: Group, experience: Experience, micro: Sequence[list[int]]
) -> None:
    """Give every rank the old log-probabilities that the first update found on each.

    Args:
        micro: this rank's micro-batches.

    Raises:
        TrainingFailure: as `assert_same_policy`.
    """
    old = experience.old_logprobs
    for part in group.gather([(positions, old[positions]) for positions in micro]):
        for positions, logprobs in part:
            old[positions] = logprobs
    experience.late = False
    assert_same_policy(job, experience)


def logprob_gap(experience: Experience) -> float:
    """Mean over the tokens of |log-probability in the rollout - in the trainer|, nats."""
    gap = (experience.rollout_logprobs - experience.old_logprobs).abs() * experience.mask
    return float(gap.sum() / experience.mask.sum())


def assert_same_policy(job: OnlineJob, experience: Experience) -> None:
    """Replies of an engine must come from the policy that is trained on them.

    Raises:
        TrainingFailure: their log-probabilities differ by more than the job's bound, or are NaN.
    """
    if not isinstance(job.rollout, VllmRollout):
        return
    gap, bound = logprob_gap(experience), job.rollout.max_logprob_gap
    if not gap <= bound:
        raise TrainingFailure(
            f"The log-probabilities of a rollout's tokens differ by {gap:.4g} nats (mean) between "
            f"vLLM and the trainer, more than {job.algorithm}.rollout.max_logprob_gap {bound:g}: "
            "the replies were sampled from another policy than the one that is trained. Set "
            f"{job.algorithm}.rollout.type to builtin, or precision to fp32; raise the bound only "
            "where rounding explains the difference."
        )


def score_by_rules(
    models: Models, group: Group, rollout: dict[str, Any], rows: list[dict[str, Any]]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Rule -> (B,) numbers and what went wrong -> replies, on every rank; each scores its share."""
    rules: Rules = models.rules
    if not rules.names:
        return {}, {}
    before = Counter(rules.failures)
    mine = range(group.rank, len(rows), group.size)
    replies = [rollout["sequences"][i][rollout["prompt_lengths"][i] :] for i in mine]
    by_rule = rules.score(
        [json.loads(rows[i]["prompt"]) for i in mine],
        [models.tokenizer.decode(ids, skip_special_tokens=True) for ids in replies],
        [rows[i] for i in mine],
        [bool(rollout["finished"][i]) for i in mine],
    )
    by_reply = group.interleave(list(zip(*by_rule, strict=True)))
    components = {
        name: torch.tensor([float(numbers[k]) for numbers in by_reply])
        for k, name in enumerate(rules.names)
    }
    return components, dict(sum(group.gather(rules.failures - before), Counter()))
