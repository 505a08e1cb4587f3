"""What online algorithms learn from: the replies of a step and their scores.

B replies of a rollout (global), b rows of a micro-batch, S positions, T response positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.errors import TrainingFailure
from rlhf_core.jobs import OnlineJob, Precision, VllmRollout
from rlhf_core.nn.ensemble import combine_scores, disagreement
from rlhf_core.rewards import Rules
from rlhf_core.runtime.distributed import Group
from rlhf_core.training.online.batches import collate_responses, micro_batches, split_minibatches
from rlhf_core.training.online.first_pass import FirstPass
from rlhf_core.training.online.models import Models
from rlhf_core.training.online.sampling import GlobalRollout
from rlhf_core.training.online.scores import member_means, shape_scores, weighted_sum
from rlhf_core.training.online.service_rewards import ServiceScores, service_scores
from rlhf_core.training.online.stage import OnlineStage
from rlhf_core.training.online.truncated import assert_something_is_left, trained_tokens

LARGEST_GAPS: dict[Precision, float] = {"fp32": 1e-3, "bf16": 0.2, "fp16": 0.2}
"""Mean |difference| of a token's log-probability (nats) between the built-in loop and the trainer.
Measured: 1e-7 to 1e-5 in fp32, and some hundredths in bf16, where keys and values are rounded."""


@dataclass(frozen=True)
class Experience:
    """One rollout of the global batch with its log-probabilities and scores; every rank has all of
    it, on the CPU. Log-probabilities are in nats; what is padding is 0."""

    rollout: GlobalRollout
    # (B,T) bool, response tokens that the policy sampled: no padding, and nothing that an
    # environment wrote between them
    response_mask: Tensor
    rollout_logprobs: Tensor  # (B,T) as the engine computed them when it sampled
    old_logprobs: Tensor  # (B,T) of the policy before the rollout's updates
    ref_logprobs: Tensor | None  # (B,T) of the reference; None: there is none
    values: Tensor | None  # (B,T) of PPO's critic before the rollout's updates
    components: dict[str, Tensor]  # name of a reward -> (B,), without its weight
    raw_scores: Tensor  # (B,) weighted sum of the components
    scores: Tensor  # (B,) what is learned from, see `shape_scores`
    failures: dict[str, int]  # why a rule could not be applied -> replies
    disagreement: Tensor | None  # (B,) of several reward models, see `nn.ensemble`
    loss_mask: Tensor  # (B,T) bool, response tokens that are trained on, a part of response_mask
    component_metrics: dict[str, float] = field(default_factory=dict)  # parts of rewards, means

    @property
    def rewarded_from(self) -> Tensor:
        """(B,T) log-probabilities from which a KL in the reward is measured: the reference's, or
        the policy's own where there is none, as that KL has no weight."""
        return self.old_logprobs if self.ref_logprobs is None else self.ref_logprobs


@dataclass(frozen=True)
class Targets:
    """What an algorithm makes of an experience, and its updates aim at."""

    advantages: Tensor  # (B,T), or (B,): one for all tokens of a reply
    returns: Tensor | None = None  # (B,T) for PPO's critic


class ModelOutputs(NamedTuple):
    """What the models say about one reply of T' tokens."""

    # (T',) each: old logprobs, with a reference its logprobs, with a critic values
    columns: list[Tensor]
    scores: list[float]  # of each of the reward models; empty without one


def score(
    stage: OnlineStage, step: int, rollout: GlobalRollout, *, defer_old_logprobs: bool = False
) -> tuple[Experience, FirstPass]:
    """Log-probabilities, values and rewards of a rollout.

    Args:
        step: of the stage, from 0.
        defer_old_logprobs: nothing needs the old log-probabilities of the first minibatch before
            its update, which is to find them (see `FirstPass`). Never done in the first rollout of
            a process, so that `optimise` can check there that a forward pass repeats itself.

    Raises:
        TrainingFailure: replies of another policy, or none that is trained on.
    """
    job = stage.job
    minibatches = split_minibatches(job.replies, job.minibatches)
    defer = defer_old_logprobs and step > stage.start
    first_pass = FirstPass(stage.models.trunk, minibatches[0] if defer else ())
    experience = score_rollout(stage, rollout, minibatches, first_pass)
    assert_something_is_left(job, experience.loss_mask)
    if not first_pass.unfinished:
        assert_same_policy(job, experience, stage.strategy.precision)
    return experience, first_pass


def score_rollout(
    stage: OnlineStage,
    rollout: GlobalRollout,
    minibatches: list[list[int]],
    first_pass: FirstPass,
) -> Experience:
    """Log-probabilities, values and rewards of a rollout.

    Args:
        minibatches: indices of its replies, see `run_models`.
    """
    job, models, group = stage.job, stage.models, stage.strategy.group
    outputs = run_models(stage, rollout, minibatches, first_pass)
    components, failures = rollout.rule_scores or score_without_model(job, models, group, rollout)
    services = score_by_services(models, group, rollout)
    components, failures = components | services.scores, failures | services.failures
    members = torch.tensor([o.scores for o in outputs]).t()  # (k,B)
    if models.reward is not None:
        components = {"model": combine_scores(members, job), **components}
    columns = zip(*(o.columns for o in outputs), strict=True)
    old_logprobs, *others = (pad_columns(c) for c in columns)  # (B,T) each
    ref_logprobs = None if models.reference is None else others.pop(0)
    mask = response_mask(rollout)  # (B,T)
    raw_scores = torch.zeros(len(mask))  # (B,)
    if components:  # else a judge compares the replies
        raw_scores = weighted_sum(components, models.weights)
    return Experience(
        rollout=rollout,
        response_mask=mask,
        rollout_logprobs=pad_columns([torch.tensor(x) for x in rollout.logprobs]),
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        values=others[0] if others else None,
        components=components,
        raw_scores=raw_scores,
        # A reply that was cut is scored as it stands, less the penalty.
        scores=shape_scores(job, components, models.weights, rollout.finished),
        failures=failures,
        disagreement=disagreement(members) if len(members) > 1 else None,
        component_metrics={**member_means(job, members), **services.metrics()},
        loss_mask=trained_tokens(job, mask, rollout.finished),
    )


@torch.no_grad()
def run_models(
    stage: OnlineStage,
    rollout: GlobalRollout,
    minibatches: list[list[int]],
    first_pass: FirstPass,
) -> list[ModelOutputs]:
    """What policy, reference, critic and reward model say about each reply, in their order, on
    every rank; each rank runs its share.

    Replies are in the micro-batches in which they are trained first, so that both passes compute
    the same numbers.
    """
    job, models, strategy = stage.job, stage.models, stage.strategy
    found = []
    for indices in micro_batches(job, strategy, rollout.sequences, minibatches):
        batch = collate_responses(
            rollout.sequences, rollout.prompt_lengths, indices, strategy.device, rollout.trained
        )
        input_ids, mask, _, index = batch  # (b,S) each, and where their tokens are
        with strategy.autocast(), first_pass.shared_layers(indices, input_ids, mask, index):
            ref = None
            if models.reference is not None:
                ref = models.reference(*batch, job.temperature)  # (b,S)
            if first_pass.defers(indices):
                old, values = torch.zeros(input_ids.shape, device=strategy.device), None
            else:
                old, values, _ = models.trained(*batch, job.temperature)  # (b,S)
            scores = None
            if models.reward is not None:
                scores = models.reward.each(input_ids, mask, index)  # (k,b)
        outputs = [output for output in (old, ref, values) if output is not None]
        found += by_reply(rollout, indices, outputs, scores)
    return strategy.group.in_order(found)


def by_reply(
    rollout: GlobalRollout, indices: list[int], outputs: list[Tensor], scores: Tensor | None
) -> list[tuple[int, ModelOutputs]]:
    """What the models say about each reply of a micro-batch, by one copy from the device.

    Args:
        outputs: n of (b,S) each. scores: (k,b).
    """
    members = [] if scores is None else [s.unsqueeze(1).expand_as(outputs[0]) for s in scores]
    copied = torch.stack([plane.float() for plane in [*outputs, *members]]).cpu()  # (n+k,b,S)
    found = []
    for row, index in enumerate(indices):
        response = slice(rollout.prompt_lengths[index], len(rollout.sequences[index]))
        columns = [plane[row, response].clone() for plane in copied[: len(outputs)]]
        found.append((index, ModelOutputs(columns, copied[len(outputs) :, row, 0].tolist())))
    return found


def response_mask(rollout: GlobalRollout) -> Tensor:
    """(B,T) bool: the tokens of the responses that the policy sampled."""
    if rollout.trained is None:
        return pad_columns([torch.ones(len(x)) for x in rollout.logprobs]).bool()
    return pad_columns([torch.tensor(x) for x in rollout.trained]).bool()


def pad_columns(columns: Sequence[Tensor]) -> Tensor:
    """One number for each token: (T',) of each of B replies -> fp32 (B,T), padded with zeros."""
    result = torch.zeros(len(columns), max(len(c) for c in columns))
    for row, column in enumerate(columns):
        result[row, : len(column)] = column
    return result


def score_without_model(
    job: OnlineJob, models: Models, group: Group, rollout: GlobalRollout
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Rewards of rules and of the environment, and failures, as `score_by_rules` gives them."""
    components, failures = score_by_rules(models, group, rollout)
    return environment_rewards(job, rollout) | components, failures


def score_by_rules(
    models: Models, group: Group, rollout: GlobalRollout
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Rule -> (B,) numbers, and reason -> replies to which a rule could not be applied, on every
    rank; each rank scores its share."""
    rules: Rules = models.rules
    if not rules.names:
        return {}, {}
    before = Counter(rules.failures)
    mine = range(group.rank, len(rollout.rows), group.size)
    sampled = rollout.sampled_ids()
    last = [rollout.last_turn(i) for i in mine]  # of an episode, rules see the last reply
    by_rule = rules.score(
        [messages for messages, _ in last],
        [models.tokenizer.decode(ids, skip_special_tokens=True) for _, ids in last],
        [rollout.rows[i] for i in mine],
        [bool(rollout.finished[i]) for i in mine],
        [len(sampled[i]) for i in mine],
    )
    by_reply = group.interleave(list(zip(*by_rule, strict=True)))
    components = {
        name: torch.tensor([float(numbers[k]) for numbers in by_reply])
        for k, name in enumerate(rules.names)
    }
    return components, dict(sum(group.gather(rules.failures - before), Counter()))


def environment_rewards(job: OnlineJob, rollout: GlobalRollout) -> dict[str, Tensor]:
    """ "environment" -> (B,) that it gave, if this is one of the rewards."""
    if rollout.outcomes is None or all(reward.type != "environment" for reward in job.rewards):
        return {}
    return {"environment": torch.tensor([outcome.reward for outcome in rollout.outcomes])}


def score_by_services(models: Models, group: Group, rollout: GlobalRollout) -> ServiceScores:
    """The scores of services, most of which were asked for while the rollout went on."""
    if models.services is None:
        return ServiceScores()
    last = [rollout.last_turn(i) for i in range(len(rollout.rows))]  # of an episode: its last reply
    prompts, replies = [messages for messages, _ in last], [ids for _, ids in last]
    finished = rollout.finished.tolist()
    return service_scores(
        models.services, group, models.tokenizer, rollout.rows, replies, finished, prompts
    )


def logprob_gap(experience: Experience) -> float:
    """Mean over the tokens of |log-probability in the rollout - in the trainer|, nats."""
    gap = (experience.rollout_logprobs - experience.old_logprobs).abs()  # (B,T)
    mask = experience.response_mask
    return float((gap * mask).sum() / mask.sum())


def assert_same_policy(job: OnlineJob, experience: Experience, precision: Precision) -> None:
    """Replies must come from the policy that is trained on them.

    Args:
        precision: in which the ranks compute.

    Raises:
        TrainingFailure: their log-probabilities differ by more than the job's bound, or are NaN.
    """
    ages = experience.rollout.staleness
    if ages is not None and ages.any():
        return  # sampled by older weights, which differ more and rightly so
    gap, bound = logprob_gap(experience), job.rollout.max_logprob_gap
    if bound is None:
        bound = LARGEST_GAPS[precision]
    if gap <= bound:
        return
    setting = f"{job.algorithm}.rollout.max_logprob_gap"
    if isinstance(job.rollout, VllmRollout):
        raise TrainingFailure(
            f"The log-probabilities of a rollout's tokens differ by {gap:.4g} nats (mean) between "
            f"vLLM and the trainer, more than {setting} {bound:g}: "
            "the replies were sampled from another policy than the one that is trained. Set "
            f"{job.algorithm}.rollout.type to builtin, or precision to fp32; raise the bound only "
            "where rounding explains the difference."
        )
    raise TrainingFailure(
        f"The log-probabilities of a rollout's tokens differ by {gap:.4g} nats (mean) between the "
        f"built-in sampling loop and the trainer, more than {setting} {bound:g} (precision "
        f"{precision}): sampling with a cache of keys and values computes something else than a "
        "pass over whole sequences. Set resources.fast_paths to false; if it still fails, use the "
        "versions of torch and transformers that requirements/ names. Raise the bound only where "
        "rounding explains the difference."
    )
