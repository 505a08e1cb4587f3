"""The pipeline: from a base model to an aligned chat model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from prefect import flow, runtime
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Completed

import tasks
from flows import approval
from rlhf_core.jobs import PipelineConfig
from rlhf_core.presets import resolve_preset
from tasks.events import say, without_tracebacks
from tasks.run import Run, new_run_id, recorded
from tasks.watch import watched

Stage = Literal["model", "data", "sft", "label", "reward", "ppo", "evaluate", "publish"]

without_tracebacks()


@flow(name="rlhf-pipeline", flow_run_name="{config.name}", persist_result=False)
def rlhf_pipeline(
    config: PipelineConfig = PipelineConfig(),  # noqa: B008 (frozen)
    until: Stage = "publish",
) -> dict[str, Any] | State[dict[str, Any]]:
    """Data, supervised fine-tuning, reward model, PPO, evaluation and publishing.

    A stage whose result is in the store already is reused, whoever made it.

    Args:
        config: all settings of the run.
        until: last stage to run.
    """
    config = resolve_preset(config)
    flow_run = runtime.flow_run.id
    run = Run(
        config, new_run_id(flow_run, runtime.flow_run.scheduled_start_time), flow_run=flow_run
    )
    say(
        get_run_logger(), "run", "", f"run {run.id}, store {run.store.url}",
        id=run.id, name=config.name, store=run.store.url, url=run.page,
    )  # fmt: skip
    approval.check(config)
    with watched():
        tasks.preflight(config)
        with recorded(run):
            for stage in pipeline(run):
                if stage == until:
                    break
            tasks.report(run)
    if run.decision.get("decision") == "reject":
        reason = run.decision.get("reason") or "no reason given"
        return Completed(name="Rejected", message=f"not published: {reason}", data=run.summary())
    return run.summary()


def pipeline(run: Run) -> Iterator[Stage]:
    """Yields the name of each stage when it is done."""
    model = tasks.import_model(run)
    yield "model"

    data = tasks.prepare_data(run, model.digest)
    yield "data"

    sft = tasks.sft(run, model.digest, data["sft"].digest)
    yield "sft"

    prompts = data["prompts"].digest
    pairs = data.get("preference") or tasks.label(run, sft.digest, prompts)
    yield "label"

    reward = tasks.reward(run, sft.digest, pairs.digest)
    yield "reward"

    mixed_in = data.get("pretrain", data["sft"]).digest
    policy = tasks.ppo(run, sft.digest, reward.digest, prompts, mixed_in)
    yield "ppo"

    evaluation = tasks.evaluate(
        run, model.digest, sft.digest, policy.digest, reward.digest, prompts, data["sft"].digest
    )
    yield "evaluate"

    if run.config.publish.approval == "manual":
        decision = approval.ask(run.config, tasks.render(run, has_curves=False))
        run.decision = decision.model_dump()
        if decision.decision == "reject":
            return
    tasks.publish(run, policy.digest, evaluation.digest)
    yield "publish"
