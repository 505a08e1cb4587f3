"""Every stage for some steps on a tiny llama: in bf16, and in fp32 beside the same on the CPU."""

from __future__ import annotations

from typing import Any, get_args

from benchmarks.gpu_check import inputs
from benchmarks.gpu_check.check import Check, NotHere, describe
from benchmarks.gpu_check.running import Ran, not_finite, run_stage, shown
from rlhf_core.jobs import (
    DPOJob,
    EvaluateJob,
    GRPOJob,
    Job,
    KTOJob,
    LabelJob,
    ORPOJob,
    PPOJob,
    PretrainJob,
    ReinforcePPJob,
    Resources,
    RewardJob,
    RLOOJob,
    SFTJob,
    SimPOJob,
)
from rlhf_core.jobs.base import Strategy

NAMES = (
    "sft", "pretrain", "reward_probe", "reward_random", "dpo", "simpo", "orpo", "kto",
    "ppo", "grpo", "rloo", "reinforce_pp", "label", "evaluate",
)  # fmt: skip
STEPS = 3
# Largest difference from the CPU, as a share of the number or of 1, in the first step.
SAME = {"fp32": 1e-3, "bf16": 0.05}
# Metrics that count events, which one differing rounding can change: not held to a bound in bf16.
COUNTED = ("accuracy", "clip_fraction", "finished", "length", "repetition", "kept", "pairs")


def make_job(
    name: str, made: dict[str, str], precision: str, device: str, steps: int = STEPS, **more: Any
) -> Job:
    """A stage's job. `more` goes to a training job; of it, `strategy` to its resources."""
    place = {
        "micro_batch_size": 4, "device": device, "threads": 1 if device == "cpu" else None,
        "checkpoint_every": 2, "strategy": more.pop("strategy", "ddp"),
    }  # fmt: skip
    resources = Resources(**place)
    model = made["model"]
    if name == "label":
        return LabelJob(
            model=model, prompts=made["prompts"], labeller="reward_model",
            reward_model=made["reward_model"], max_prompts=8, max_heldout_prompts=4,
            samples_per_prompt=2, max_new_tokens=6, min_margin=0.0, resources=resources,
        )  # fmt: skip
    if name == "evaluate":
        return EvaluateJob(
            policy=model, sft=model, base=model, reward_model=made["reward_model"],
            prompts=made["prompts"], sft_data=made["sft"], max_prompts=8, max_new_tokens=6,
            resources=resources,
        )  # fmt: skip
    common = {
        "model": model, "learning_rate": 1e-3, "precision": precision, "schedule": "constant",
        "warmup_fraction": 0.0, "resources": resources,
    } | more  # fmt: skip
    if name in ("ppo", "reinforce_pp", "grpo", "rloo"):
        online = {
            "reward_model": made["reward_model"], "prompts": made["prompts"], "steps": steps,
            "max_new_tokens": 6, "batch_size": 8,
        } | common  # fmt: skip
        if name in ("grpo", "rloo"):
            kind = {"grpo": GRPOJob, "rloo": RLOOJob}[name]
            return kind(**online | {"batch_size": 2, "group_size": 4})
        return {"ppo": PPOJob, "reinforce_pp": ReinforcePPJob}[name](**online)
    common |= {"batch_size": 8, "max_steps": steps}
    if name.startswith("reward"):
        head = name.removeprefix("reward_")
        return RewardJob(
            data=made["preference"], head=head, normalization_prompts=8, max_new_tokens=6, **common
        )
    if name == "pretrain":
        return PretrainJob(data=made["pretrain"], length=47, **common)
    kinds: dict[str, tuple[Any, str]] = {
        "sft": (SFTJob, "sft"), "dpo": (DPOJob, "preference"), "simpo": (SimPOJob, "preference"),
        "orpo": (ORPOJob, "preference"), "kto": (KTOJob, "unpaired"),
    }  # fmt: skip
    kind, data = kinds[name]
    return kind(data=made[data], **common)


def in_half_precision(check: Check, found: dict[str, Any]) -> list[str]:
    """Each stage in bf16 to its published result."""
    problems = []
    for name in check.stages or NAMES:
        ran = attempt(check, found, problems, name, lambda n=name: job_here(check, n, "bf16"))
        if ran is not None:
            last = ran.numbers(-1)
            found[name]["last"] = shown(last)
            problems += [f"{name}: {metric} is not finite" for metric in not_finite(last)]
    return problems


def job_here(check: Check, name: str, precision: str, **more: Any) -> Job:
    return make_job(name, inputs.tiny(check), precision, check.device, **more)


def attempt(
    check: Check, found: dict[str, Any], problems: list[str], name: str, make: Any
) -> Ran | None:
    """Run a stage; where it fails, keep the traceback and return None."""
    found[name] = entry = {}
    try:
        ran = run_stage(check, make())
    except Exception as error:
        entry["traceback"] = describe(error)
        problems.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0][:300])
        return None
    finally:
        check.saves()
    entry |= {"seconds": round(ran.seconds, 2), "peak_mib": ran.allocated // 2**20}
    check.saves()
    return ran


def against_the_cpu(check: Check, found: dict[str, Any]) -> list[str]:
    """First step of each stage in fp32, and in bf16, beside fp32 on the CPU."""
    problems: list[str] = []
    made = inputs.tiny(check)
    for name in check.stages or NAMES:
        entry: dict[str, Any] = {}
        found[name] = entry
        try:
            want = run_stage(check, make_job(name, made, "fp32", "cpu", steps=1)).numbers()
            # On a GPU these two sample in bf16 always.
            for precision in ("bf16",) if name in ("label", "evaluate") else SAME:
                job = make_job(name, made, precision, check.device, steps=1)
                problems += compare(entry, name, precision, run_stage(check, job).numbers(), want)
        except Exception as error:
            entry["traceback"] = describe(error)
            problems.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0][:300])
        check.saves()
    return problems


def compare(
    entry: dict[str, Any],
    name: str,
    precision: str,
    numbers: dict[str, float],
    want: dict[str, float],
) -> list[str]:
    """Keep the largest difference; a problem where one is past the bound."""
    apart = {
        metric: abs(numbers[metric] - value) / max(1.0, abs(value))
        for metric, value in want.items()
        if metric in numbers
    }
    held = {
        metric: value
        for metric, value in apart.items()
        if precision == "fp32" or not any(word in metric for word in COUNTED)
    }
    worst = max(held, key=lambda metric: held[metric], default=None)
    if worst is None:
        return [f"{name}: there is no number to compare in {precision}"]
    entry[precision] = {
        "metric": worst, "difference": float(f"{held[worst]:.3g}"),
        "here": float(f"{numbers[worst]:.6g}"), "cpu_fp32": float(f"{want[worst]:.6g}"),
    }  # fmt: skip
    if precision == "bf16":  # rounding may change which tokens are sampled, and all that follows
        bounded = "loss" in held and name not in ("ppo", "grpo", "rloo", "reinforce_pp")
        worst, value = ("loss", held["loss"]) if bounded else (worst, 0.0)
    else:
        value = held[worst]
    if not value <= SAME[precision]:
        return [
            f"{name} in {precision}: {worst} is {numbers[worst]:.6g}, on the CPU in fp32 "
            f"{want[worst]:.6g}"
        ]
    return []


def strategies(check: Check, found: dict[str, Any]) -> list[str]:
    """fsdp2 with one rank: losses beside those of ddp."""
    if "fsdp2" not in get_args(Strategy):
        raise NotHere("this version has no strategy fsdp2")
    problems: list[str] = []
    for name in ("sft", "reward_random", "dpo", "ppo"):
        numbers = {}
        for strategy in ("ddp", "fsdp2"):
            job = job_here(check, name, "fp32", steps=2, strategy=strategy)
            ran = attempt(check, found, problems, f"{name} {strategy}", lambda job=job: job)
            if ran is not None:
                numbers[strategy] = ran.numbers(-1)
        if len(numbers) == 2:
            entry: dict[str, Any] = {}
            found[name] = entry
            problems += compare(entry, f"{name} fsdp2", "fp32", numbers["fsdp2"], numbers["ddp"])
    return problems
