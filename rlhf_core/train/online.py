"""What PPO, GRPO, RLOO and REINFORCE++ share beside the rollout: models, micro-batches, the end.

b rows of a micro-batch, S positions, T response positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_core.batching import batch_rows, derive_seed, pad_right, split_batch
from rlhf_core.checkpoint import Checkpointer
from rlhf_core.context import StageContext
from rlhf_core.data.reading import Rows
from rlhf_core.data.tokenizer import load_tokenizer
from rlhf_core.errors import TrainingFailure
from rlhf_core.jobs import ModelReward, OnlineJob
from rlhf_core.models import (
    ActorCritic,
    Policy,
    ScalarModel,
    choose_trainable,
    export,
    load_causal_lm,
    load_scalar_model,
    save_causal_lm,
    share_frozen,
)
from rlhf_core.remote_code import is_trusted
from rlhf_core.rewards import Rules
from rlhf_core.store import Artifact
from rlhf_core.strategy import HALF, Strategy
from rlhf_core.train.sft import collate, enable_checkpointing, trained_tokens

Batch = tuple[Tensor, Tensor, Tensor]  # input_ids (b,S), mask (b,S) bool, marked (b,S) bool


class Actor(nn.Module):
    """A policy that is trained without a critic; called as `ActorCritic` is."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def forward(
        self,
        input_ids: Tensor,
        mask: Tensor,
        marked: Tensor,
        temperature: float = 1.0,
        ptx: Batch | None = None,
    ) -> tuple[Tensor, None, Tensor | None]:
        """Log-probabilities (b,S) of the marked tokens, no values, and those of ptx or None."""
        logprobs = self.policy(input_ids, mask, marked, temperature)
        return logprobs, None, None if ptx is None else self.policy(*ptx)


class AdapterOff:
    """The reference of a policy that trains adapters: the policy itself without them."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @torch.no_grad()
    def __call__(
        self, input_ids: Tensor, mask: Tensor, marked: Tensor, temperature: float = 1.0
    ) -> Tensor:
        with self.policy.model.disable_adapter():  # type: ignore[operator]
            return self.policy(input_ids, mask, marked, temperature)


@dataclass
class Models:
    """`trained` trains, all else is frozen; reward is None when all rewards are rules."""

    trained: ActorCritic | Actor
    reference: Policy | AdapterOff
    reward: ScalarModel | None
    rules: Rules
    weights: dict[str, float]  # of each reward, by name
    tokenizer: Any  # None on ranks that decode nothing


# ------------------------------------------------------------------------------------- loading


def load_policy(job: OnlineJob, source: Path, device: torch.device) -> Policy:
    """The model that learns, with its adapters where it has any."""
    policy = Policy(choose_trainable(load_causal_lm(source), job, job.seed))
    if job.resources.gradient_checkpointing:
        enable_checkpointing(policy.model)
    return policy.to(device)


def load_models(
    job: OnlineJob,
    strategy: Strategy,
    source: Path,
    trained: ActorCritic | Actor,
    context: StageContext,
) -> Models:
    """Reference and reward beside the trained module, which is on its device already."""
    # ZeRO and Gemini hold trained weights in half precision; the frozen models then do as well,
    # so that reference and policy start from the same numbers.
    half = strategy.kind != "ddp" and job.precision != "fp32"
    dtype = HALF[job.precision] if half else torch.float32
    # One after another: the peak is then what is kept, not several whole models.
    saved = share_frozen(trained)
    reference: Policy | AdapterOff = AdapterOff(trained.policy)
    frozen: list[nn.Module] = []
    if job.lora is None:
        reference = Policy(load_causal_lm(source, dtype)).requires_grad_(False)
        frozen.append(reference.to(strategy.device))
        saved += share_frozen(trained, *frozen)
    reward = None
    if job.wants_reward_model:
        assert job.reward_model is not None
        folder = context.store.fetch(job.reward_model)
        reward = load_scalar_model(folder, dtype).requires_grad_(False)
        frozen.append(reward.to(strategy.device))
        saved += share_frozen(trained, *frozen)
    if saved:
        context.log(f"frozen layers shared between the models: {saved / 2**20:.0f} MiB saved")
    rules = Rules([r for r in job.rewards if not isinstance(r, ModelReward)], job.seed)
    weights = dict(zip(rules.names, rules.weights, strict=True))
    weights["model"] = sum(r.weight for r in job.rewards if isinstance(r, ModelReward))
    # Rank 0 shows replies to people; rules read them on every rank.
    reads = context.main or bool(rules.names)
    tokenizer = load_tokenizer(source, is_trusted(source)) if reads else None
    return Models(trained, reference, reward, rules, weights, tokenizer)


def load_ptx(job: OnlineJob, context: StageContext) -> Rows | None:
    """Rows of the language-modelling loss that is mixed in, if any is."""
    if job.ptx is None or job.ptx_coef == 0:
        return None
    return Rows(context.store.fetch(job.ptx), "train", purpose=("sft", "pretrain"))


# --------------------------------------------------------------------------------- micro-batches


def split_minibatches(replies: int, minibatches: int) -> list[list[int]]:
    """Row numbers of a rollout, dealt out in turn."""
    return [list(range(i, replies, minibatches)) for i in range(minibatches)]


def passes(seed: int, step: int, epochs: int, minibatches: int) -> Iterator[tuple[int, int, int]]:
    """The updates of a rollout: the first pass in order, later ones shuffled.

    Yields:
        Epoch and minibatch, and the number of the update since the stage began.
    """
    for epoch in range(epochs):
        order = range(minibatches)
        if epoch > 0:
            generator = np.random.default_rng(derive_seed(seed, step, epoch))
            order = generator.permutation(minibatches).tolist()
        for index in order:
            yield epoch, index, (step * epochs + epoch) * minibatches + index


def micro_batches(
    job: OnlineJob, strategy: Strategy, sequences: Sequence[list[int]], minibatches: list[list[int]]
) -> list[list[int]]:
    """This rank's micro-batches, as row numbers of the rollout, minibatch after minibatch."""
    result = []
    for rows in minibatches:
        for positions in split_batch(
            [len(sequences[r]) for r in rows],
            strategy.rank, strategy.world_size, job.resources.micro_batch_size,
        ):  # fmt: skip
            result.append([rows[p] for p in positions])
    return result


def ptx_batches(
    job: OnlineJob, strategy: Strategy, ptx: Rows | None, count: int, number: int, micro: int
) -> list[tuple[Batch, float] | None]:
    """As many language-modelling rows as the minibatch has replies, cut alike, with their count.

    Args:
        count: rows. number: of the update, see `passes`. micro: micro-batches of this rank.
    """
    if ptx is None:
        return [None] * micro
    rows = ptx.take(batch_rows(len(ptx), count, number, derive_seed(job.seed, 0x907)))
    tokens = float(sum(trained_tokens(r) for r in rows))
    parts = split_batch(
        [len(r["input_ids"]) for r in rows],
        strategy.rank, strategy.world_size, job.resources.micro_batch_size,
    )  # fmt: skip
    assert len(parts) == micro, f"{len(parts)} ptx micro-batches for {micro}"
    return [(collate([rows[p] for p in part], strategy.device), tokens) for part in parts]


def collate_responses(
    sequences: Sequence[list[int]],
    prompt_lengths: Sequence[int],
    positions: Sequence[int],
    device: torch.device,
) -> Batch:
    """The rows at some positions; marked is True at response tokens."""
    input_ids, mask = pad_right([sequences[p] for p in positions])
    marked = mask.clone()
    for i, p in enumerate(positions):
        marked[i, : prompt_lengths[p]] = False
    return input_ids.to(device), mask.to(device), marked.to(device)


def aligned(flat: Tensor, marked: Tensor, mask: Tensor) -> Tensor:
    """(b,S) at the marked places -> fp32 (b,T) at the mask's, with its gradient."""
    zeros = torch.zeros(mask.shape, device=flat.device)
    return zeros.masked_scatter(mask, flat.float()[marked])


def log_ratio_gap(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> float:
    """Largest |log-ratio| of a real token."""
    return float(((logprobs.detach() - old_logprobs).abs() * mask).max())


def assert_ratio_is_one(strategy: Strategy, gap: float) -> None:
    """Before the first update of a rollout, training must see the log-probabilities it scored.

    Raises:
        TrainingFailure: a log-ratio is off by more than rounding.
    """
    bound = 1e-3 if strategy.precision == "fp32" else 0.05
    if gap > bound:
        raise TrainingFailure(
            f"Before the first update the log-probability of a token differs by {gap:.4f} between "
            f"scoring and training (bound {bound}): the model is not deterministic. Switch off "
            "dropout and custom kernels, or use precision fp32."
        )


def mean_over_updates(history: Sequence[dict[str, float]], ptx: bool) -> dict[str, float]:
    """Means over a rollout's updates; approx_kl is the last one's, which is the farthest."""
    mean = {k: float(np.mean([h[k] for h in history])) for k in history[0]}
    mean["approx_kl"] = history[-1]["approx_kl"]
    if not ptx:
        del mean["ptx_loss"]
    return mean


# --------------------------------------------------------------------------------------- the end


def save_policy(trained: nn.Module, weights: dict[str, Tensor], folder: Path, source: Path) -> None:
    """Write the policy with the given (master) weights as a Hugging Face folder. Rank 0, once."""
    whole = export(trained, weights)
    save_causal_lm(whole.policy.model, folder, source)  # type: ignore[union-attr,arg-type]


def publish_policy(
    job: OnlineJob,
    context: StageContext,
    strategy: Strategy,
    checkpointer: Checkpointer,
    trained: nn.Module,
    source: Path,
) -> Artifact | None:
    """The stage's result. Every rank calls; rank 0 returns the artifact."""
    weights = strategy.weights(keep=context.main)
    if not context.main:
        return None
    folder = context.scratch("result")
    save_policy(trained, weights, folder, source)
    last = context.read_metrics()[-1]
    kept = {k: v for k, v in last.items() if k not in ("step", "total", "time")}
    artifact = context.publish(job, folder, {"metrics": {"steps": job.steps, **kept}})
    checkpointer.finish()
    return artifact
