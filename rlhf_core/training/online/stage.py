"""The beginning and the end of an online stage, which all online algorithms have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.environments.make import Environments
from rlhf_core.jobs import OnlineJob
from rlhf_core.models.loading import load_causal_lm
from rlhf_core.nn.modules import Actor, ActorCritic, Policy
from rlhf_core.runtime.context import StageContext
from rlhf_core.store import Artifact
from rlhf_core.training.checkpoint import Checkpointer
from rlhf_core.training.online.engine import Engine, start_engine
from rlhf_core.training.online.episodes import start_environments
from rlhf_core.training.online.models import Models, load_models, share_trunk
from rlhf_core.training.online.ptx import load_ptx
from rlhf_core.training.optimizer import adamw
from rlhf_core.training.policy import frozen_storage, new_policy, publish_policy
from rlhf_core.training.selection import Criterion, Selection
from rlhf_core.training.strategy import Strategy


@dataclass(frozen=True)
class Inputs:
    """What an online stage takes from the store, beside the reward model."""

    source: Path  # folder of the SFT model: start of the policy, and the reference
    prompts: Rows
    heldout: Rows  # prompts that are not trained on
    ptx: Rows | None  # rows of the language-modelling loss that is mixed in


@dataclass(frozen=True)
class OnlineStage:
    """What every step of an online stage works with."""

    job: OnlineJob
    context: StageContext
    strategy: Strategy
    inputs: Inputs
    models: Models
    checkpointer: Checkpointer
    selection: Selection
    engine: Engine | None  # None: the built-in sampling loop
    start: int  # steps that were finished before, from a checkpoint
    environments: Environments | None = None  # None: one reply to each prompt


def fetch_inputs(job: OnlineJob, context: StageContext) -> Inputs:
    """The SFT model's folder and the data sets."""
    prompts = context.store.fetch(job.prompts)
    return Inputs(
        source=context.store.fetch(job.model),
        prompts=Rows(prompts, "train", purpose="prompts"),
        heldout=Rows(prompts, "heldout", purpose="prompts"),
        ptx=load_ptx(job, context),
    )


def load_policy(job: OnlineJob, source: Path, strategy: Strategy) -> Policy:
    """The SFT model as the policy that will be trained."""
    policy = new_policy(job, load_causal_lm(source, *frozen_storage(job, strategy)))
    strategy.place(policy)
    return policy


def prepare(
    job: OnlineJob,
    context: StageContext,
    strategy: Strategy,
    inputs: Inputs,
    trained: Actor | ActorCritic,
    learning_rates: Mapping[str, float],
) -> OnlineStage:
    """Load the frozen models, make the optimizer, restore the newest checkpoint, start the engine.

    Args:
        trained: what the algorithm trains, where `Strategy.place` has put it.
        learning_rates: peak rates by the prefix of the parameters' names, see `adamw`.
    """
    optimizer = adamw(trained, job, learning_rates)
    if strategy.sharded:  # before the next model is loaded: one whole model in memory at a time
        strategy.prepare(trained, optimizer)
        models = load_models(job, strategy, inputs.source, trained, context)
    else:  # while what is frozen can still share memory
        models = load_models(job, strategy, inputs.source, trained, context)
        strategy.prepare(trained, optimizer)
    models = share_trunk(job, strategy, models, context)
    checkpointer = Checkpointer(context, strategy, job)
    start, _ = checkpointer.restore()
    read = [inputs.prompts] if job.eval_every is None else [inputs.prompts, inputs.heldout]
    engine = start_engine(job, strategy, inputs.source, read, checkpointer, start)
    part = "" if job.select_by == "reward" else "reward_"
    criterion = Criterion(f"heldout_{part}{job.select_by}", highest=True, kl_budget=job.kl_budget)
    selection = Selection(job, checkpointer, criterion, len(inputs.heldout))
    environments = start_environments(job, models.tokenizer)
    return OnlineStage(
        job, context, strategy, inputs, models, checkpointer, selection, engine, start, environments
    )


def publish(stage: OnlineStage) -> Artifact | None:
    """Publish the policy with the metrics of the last rollout, or those of the best evaluation's
    step. Every rank calls; rank 0 returns the artifact."""
    job, context = stage.job, stage.context
    context.closing.close()  # the engine
    metrics = stage.selection.result()
    return publish_policy(
        job, context, stage.strategy, stage.checkpointer, stage.models.trained,
        stage.inputs.source, {"metrics": metrics},
    )  # fmt: skip
