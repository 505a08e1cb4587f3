"""One measurement of our side, in a process of its own.

    python -m benchmarks.speed.ours ROW FOLDER

Runs the stage that a pipeline runs, from its job, in one process, and prints one line of JSON.
With --given the rollouts take the workload's replies instead of sampling their own, so that both
sides can be held to the same numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.speed import workload


class Done(Exception):
    """Enough steps were measured."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("row")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--given", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision")
    arguments = parser.parse_args()
    values = workload.load(arguments.folder)
    with contextlib.redirect_stdout(sys.stderr):
        found = measure(arguments, values)
    print(json.dumps(found), flush=True)
    os._exit(0)


def measure(arguments: argparse.Namespace, values: dict[str, Any]) -> dict[str, Any]:
    """Run the stage until its last step is logged."""
    from rlhf_core.jobs import OnlineJob
    from rlhf_core.runtime.context import StageContext
    from rlhf_core.runtime.rank import silence_libraries
    from rlhf_core.store import open_store

    silence_libraries()
    job = make_job(arguments, values)
    marks: list[float] = []
    work: list[float] = []
    history: list[Mapping[str, float]] = []
    sequences: list[int] = []

    class Context(StageContext):
        def log_metrics(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
            marks.append(time.perf_counter())
            work.append(time.process_time())
            history.append(dict(metrics))
            if step == total:
                raise Done

    module = importlib.import_module(job.module)
    if isinstance(job, OnlineJob):
        watch_rollouts(values if arguments.given else None, sequences)
    store = open_store(f"file://{arguments.folder / 'store'}")
    with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(Done):
        module.run(job, Context(store=store, key=job.key(), folder=Path(scratch)))
    sizes = values["sizes"]
    before = sizes.warm_up
    seconds = marks[-1] - marks[before - 1]
    tokens = real_tokens(arguments.row, values) or sum(sequences[before:])
    steps = sizes.steps if arguments.row in ("sft", "reward") else sizes.rollouts
    return {
        "tokens": tokens,
        "seconds": seconds,
        "rate": tokens / seconds,
        "cpu_seconds": work[-1] - work[before - 1],
        "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "losses": losses(arguments.row, history),
        "steps": steps,
        **{k: v for k, v in history[-1].items() if k in ("rollout_seconds", "length")},
    }


def losses(row: str, history: list[Mapping[str, float]]) -> list[float]:
    """What must be equal on both sides, step by step."""
    if row in workload.PPO:
        return [h[k] for h in history for k in ("policy_loss", "value_loss")]
    return [h["policy_loss" if row == "grpo" else "loss"] for h in history]


def real_tokens(row: str, values: dict[str, Any]) -> int:
    """Unpadded tokens of the measured steps; 0 where they are sampled."""
    sizes = values["sizes"]
    if row == "sft":
        return sum(len(r["input_ids"]) for r in sizes.measured(values["sft"], sizes.batch))
    if row == "reward":
        return sum(
            2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"])
            for r in sizes.measured(values["pairs"], sizes.batch // 2)
        )
    return 0


def watch_rollouts(values: dict[str, Any] | None, sequences: list[int]) -> None:
    """Count the tokens of each rollout; put the workload's replies in the place of sampled ones."""
    from rlhf_core.training.online import sampling

    roll_out = sampling.roll_out

    def watched(job: Any, strategy: Any, policy: Any, source: Any, prompts: Any, *rest: Any) -> Any:
        if values is None:
            replies = roll_out(job, strategy, policy, source, prompts, *rest)
        else:
            replies = [
                sampling.SampledReply(ids, [0.0] * len(ids), False)
                for ids in replies_of(values, prompts, job.algorithm)
            ]
        sequences.append(sum(len(p) + len(r.ids) for p, r in zip(prompts, replies, strict=True)))
        return replies

    sampling.roll_out = watched


def replies_of(values: dict[str, Any], prompts: list[list[int]], algorithm: str) -> list[list[int]]:
    """A reply for each prompt, a different one each time that it comes."""
    replies = values["full_replies" if algorithm == "ppo" else "replies"]
    seen: dict[int, int] = {}
    found = []
    for prompt in prompts:
        number = values["prompts"].index(prompt)
        seen[number] = seen.get(number, -1) + 1
        found.append(replies[(number + 7 * seen[number]) % len(replies)])
    return found


def make_job(arguments: argparse.Namespace, values: dict[str, Any]) -> Any:
    """The job of a row."""
    from rlhf_core.jobs import BuiltinRollout, GRPOJob, PPOJob, Resources, RewardJob, SFTJob
    from rlhf_core.jobs.rewards import PythonReward

    sizes, digests = values["sizes"], values["digests"]
    common: dict[str, Any] = {
        "model": digests["model"],
        "learning_rate": workload.rate(arguments.row, arguments.given),
        "schedule": "constant",
        "warmup_fraction": 0.0,
        "precision": arguments.precision or sizes.precision,
        "seed": workload.SEED,
        "resources": Resources(micro_batch_size=sizes.micro, threads=arguments.threads,
                               device="cpu", checkpoint_every=10**6),
    }  # fmt: skip
    online: dict[str, Any] = {
        "prompts": digests["prompts"], "steps": sizes.all_rollouts,
        "max_new_tokens": sizes.reply_length, "kl_coef": 0.04, "missing_eos_penalty": 0.0,
        "max_kl": 1e9, "max_repetition": None,
    }  # fmt: skip
    if arguments.given:  # replies that nobody sampled have no log-probabilities
        online["rollout"] = BuiltinRollout(max_logprob_gap=1e9)
    if arguments.row == "sft":
        return SFTJob(**common, data=digests["sft"], batch_size=sizes.batch,
                      max_steps=sizes.all_steps)  # fmt: skip
    if arguments.row == "reward":
        common["resources"] = common["resources"].model_copy(
            update={"micro_batch_size": sizes.micro // 2}
        )
        return RewardJob(**common, data=digests["preference"], batch_size=sizes.batch // 2,
                         max_steps=sizes.all_steps, normalization_prompts=1,
                         max_new_tokens=1)  # fmt: skip
    if arguments.row == "grpo":
        rewards = (PythonReward(function="benchmarks.speed.rule:even_words"),)
        return GRPOJob(**common, **online, rewards=rewards, group_size=sizes.group,
                       batch_size=sizes.prompts // sizes.group)  # fmt: skip
    assert arguments.row in workload.PPO
    if arguments.row == "ppo-top":
        common["trainable_layers"] = values["shape"]["layers"] // workload.TOP
    if arguments.given:  # the peer's PPO does not clip the gradient, and Adam's epsilon shows that
        common["max_grad_norm"] = 1e9
    return PPOJob(**common, **online, reward_model=digests["scorer"], batch_size=sizes.prompts,
                  ppo_epochs=1 if arguments.given else workload.EPOCHS, minibatches=1,
                  critic_learning_rate=common["learning_rate"])  # fmt: skip


if __name__ == "__main__":
    main()
