"""Speed and memory of the large model: SFT, rollouts, PPO.

Shares are of the peak that `facts.peak` measured on this device. Model FLOPs are those of
`benchmarks.speed.flops`: 6 per weight and trained token, and causal attention; nothing for what is
computed again.
"""

from __future__ import annotations

import time
from typing import Any, get_args

import torch

from benchmarks.gpu_check import inputs
from benchmarks.gpu_check.check import Check, NotHere, describe
from benchmarks.gpu_check.facts import synchronize
from benchmarks.gpu_check.running import Ran, run_stage, shown, stop_after
from benchmarks.gpu_check.sizes import Run
from benchmarks.speed.flops import forward
from rlhf_core.jobs import PPOJob, Resources, SFTJob
from rlhf_core.jobs.base import Strategy
from rlhf_core.preflight.memory import estimate
from rlhf_core.training.batching import batch_rows

AIM = 0.45  # share of the peak in SFT, on a chip of the class of these:
AIMED_AT = ("H100", "H200")
WITHIN = (0.9, 1.25)  # estimate over measured memory


def sft(check: Check, found: dict[str, Any]) -> list[str]:
    """Tokens per second and share of the peak, for several micro-batches."""
    made, problems = inputs.large(check), []
    found["model"] = {"parameters": made["parameters"], **check.sizes.large}
    found["runs"] = {}
    for run in check.sizes.runs:
        entry = found["runs"][run.name] = {}
        reason = obstacle(check, run)
        if reason:
            entry["not_run"] = reason
            continue
        try:
            ran = run_stage(check, sft_job(check, run), after_step=stop_after(steps(check)))
        except Exception as error:
            entry["traceback"] = describe(error)
            problems.append(f"{run.name}: {type(error).__name__}: {error}".splitlines()[0][:300])
        else:
            entry |= measured(check, run, ran, made)
        check.saves()
    shares = {k: v["share_of_peak"] for k, v in found["runs"].items() if v.get("share_of_peak")}
    if shares:
        found["best"] = max(shares, key=lambda name: shares[name])
        found["best_share_of_peak"] = shares[found["best"]]
        chip = str(check.found("device").get("chip"))
        if shares[found["best"]] < AIM and any(name in chip for name in AIMED_AT):
            problems.append(
                f"SFT reached {shares[found['best']]:.1%} of the peak, aimed at {AIM:.0%}"
            )
    return problems


def steps(check: Check) -> int:
    return check.sizes.warm_up + check.sizes.steps


def obstacle(check: Check, run: Run) -> str:
    """Why a run is left out; empty where it is not."""
    if run.strategy not in get_args(Strategy):
        return f"this version has no strategy {run.strategy}"
    if check.on_gpu and torch.cuda.get_device_properties(0).total_memory < run.memory:
        return f"needs a device with {run.memory / 2**30:.0f} GiB"
    return ""


def sft_job(check: Check, run: Run) -> SFTJob:
    made = inputs.large(check)["digests"]
    return SFTJob(
        model=made["model"], data=made["mixed" if run.mixed else "sft"], learning_rate=1e-5,
        batch_size=check.sizes.batch, max_steps=steps(check), precision="bf16",
        resources=Resources(
            micro_batch_size=run.micro_batch, gradient_checkpointing=run.checkpointing,
            strategy=run.strategy,  # type: ignore[arg-type]
            fast_paths=run.fast_paths,
            device=check.device, threads=None if check.on_gpu else 1, checkpoint_every=1000,
        ),
    )  # fmt: skip


def measured(check: Check, run: Run, ran: Ran, made: dict[str, Any]) -> dict[str, Any]:
    """Of the steps after the warm-up."""
    sizes = check.sizes
    lengths = [sizes.length] * inputs.ROWS * (4 if check.on_gpu else 1)
    if run.mixed:
        lengths = made["mixed_lengths"]
    rows = [
        [lengths[i] for i in batch_rows(len(lengths), sizes.batch, step, 0)]
        for step in range(sizes.warm_up, steps(check))
    ]
    seconds = ran.step_seconds(sizes.warm_up)
    tokens = sum(map(sum, rows))
    flops = 3 * sum(forward(made["shape"], step, sum(step) - len(step)) for step in rows)
    entry = {
        "step_seconds": [round(s, 4) for s in seconds],
        "tokens_per_second": round(tokens / sum(seconds), 1),
        "tflops": round(flops / sum(seconds) / 1e12, 4),
        "share_of_peak": share(check, flops / sum(seconds)),
        "losses": [round(m["loss"], 4) for m in ran.metrics],
    }
    return entry | memory_of(check, sft_job(check, run), ran, sizes.length)


def share(check: Check, flops_per_second: float) -> float | None:
    """Share of the measured peak; None where that was not measured."""
    peak = check.found("peak").get("peak_tflops")
    return round(flops_per_second / 1e12 / peak, 4) if peak else None


def memory_of(check: Check, job: Any, ran: Ran, length: int) -> dict[str, Any]:
    """Peak of the allocator beside the estimate, without what the estimate has for the process."""
    if not check.on_gpu:
        return {}
    config = inputs.large(check)["config"]
    whole = estimate(config, job, job.resources, job.algorithm, max_length=length, device="cuda")
    tensors = whole.total - whole.parts.get("process", 0)
    return {
        "allocated_gib": round(ran.allocated / 2**30, 2),
        "reserved_gib": round(ran.reserved / 2**30, 2),
        "estimated_gib": round(tensors / 2**30, 2),
        "estimate_over_allocated": round(tensors / max(1, ran.allocated), 3),
        "estimate": str(whole),
    }


def memory(check: Check, found: dict[str, Any]) -> list[str]:
    """What the parts `sft` and `ppo` measured, beside the estimates."""
    if not check.on_gpu:
        raise NotHere("torch counts the peak of its allocator on a GPU only")
    runs = check.found("sft").get("runs", {}) | {"ppo": check.found("ppo")}
    problems = []
    for name, run in runs.items():
        ratio = run.get("estimate_over_allocated")
        if ratio is None or "mixed" in name:  # the estimate is for rows of the greatest length
            continue
        found[name] = {
            key: run[key] for key in ("estimated_gib", "allocated_gib", "reserved_gib")
        } | {"ratio": ratio}
        if not WITHIN[0] <= ratio <= WITHIN[1]:
            problems.append(
                f"{name}: estimated {run['estimated_gib']} GiB, measured {run['allocated_gib']}"
            )
    return problems


def rollout(check: Check, found: dict[str, Any]) -> list[str]:
    """Replies of full length, sampled in bf16 from the frozen large model."""
    from rlhf_core.models.loading import load_causal_lm
    from rlhf_core.rollout.generate import generate

    made, sizes = inputs.large(check), check.sizes
    model = load_causal_lm(check.store.fetch(made["digests"]["model"])).to(check.device)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for count in sizes.rollout:
        rows = torch.randint(100, sizes.large["vocab_size"], (count, sizes.prompt),
                             generator=generator).tolist()  # fmt: skip
        seconds = []
        for length in (8, sizes.reply // 2, sizes.reply):  # the first one warms up
            synchronize(check)
            began = time.perf_counter()
            with torch.autocast(check.device, dtype=torch.bfloat16):
                out = generate(
                    model, rows, max_new_tokens=length, eos_ids=set(), pad_id=inputs.PAD,
                    row_seeds=list(range(count)), batch_size=count,
                )  # fmt: skip
            synchronize(check)
            seconds.append(time.perf_counter() - began)
        assert int(out.response_mask.sum()) == count * sizes.reply
        per_token = (seconds[2] - seconds[1]) / (sizes.reply - sizes.reply // 2)
        found[f"{count} replies"] = {
            "tokens_per_second": round(count * sizes.reply / seconds[2], 1),
            "seconds": round(seconds[2], 3),
            "milliseconds_per_step": round(1000 * per_token, 3),
            "steps_read_weights_at_gb_per_second": round(
                2 * made["parameters"] / per_token / 1e9, 1
            ),
        }
        check.saves()
    return []


def ppo(check: Check, found: dict[str, Any]) -> list[str]:
    """Two rollouts with policy, critic, reference and reward model of the large size."""
    made, sizes = inputs.large(check), check.sizes
    job = ppo_job(check)
    ran = run_stage(check, job, after_step=stop_after(2))
    (seconds,) = ran.step_seconds(1)
    last = ran.metrics[-1]
    rest = seconds - last["rollout_seconds"]
    row = sizes.prompt + int(last["length"])
    forwards = 4 + 3 * 2 * job.ppo_epochs  # four models score; two are trained
    flops = forwards * sizes.ppo_batch * forward(made["shape"], [row], int(last["length"]))
    found |= {
        "step_seconds": round(seconds, 3),
        "rollout_seconds": round(last["rollout_seconds"], 3),
        "replied_tokens_per_second": round(sizes.ppo_batch * last["length"] / seconds, 1),
        "trained_tokens_per_second": round(sizes.ppo_batch * row / rest, 1),
        "share_of_peak_outside_the_rollout": share(check, flops / rest),
        "last": shown(ran.numbers(-1)),
        **memory_of(check, job, ran, sizes.prompt + sizes.reply),
    }
    return []


def ppo_job(check: Check) -> PPOJob:
    made, sizes = inputs.large(check)["digests"], check.sizes
    return PPOJob(
        model=made["model"], reward_model=made["reward_model"], prompts=made["prompts"], steps=2,
        batch_size=sizes.ppo_batch, max_new_tokens=sizes.reply, ppo_epochs=2, precision="bf16",
        resources=Resources(
            micro_batch_size=sizes.ppo_micro, device=check.device,  # type: ignore[arg-type]
            threads=None if check.on_gpu else 1, checkpoint_every=1000,
        ),
    )  # fmt: skip
