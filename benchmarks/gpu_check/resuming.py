"""Stages that are cut off and go on, and stages that run out of memory and try again."""

from __future__ import annotations

import contextlib
import re
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.gpu_check import inputs
from benchmarks.gpu_check.check import Check
from benchmarks.gpu_check.running import Done, Ran, free, run_stage, stop_after
from benchmarks.gpu_check.stages import job_here
from rlhf_core.errors import JobFailed
from rlhf_core.jobs import Job, Resources, SFTJob
from rlhf_core.nn.modules import Policy
from rlhf_core.runtime.rank import classify
from rlhf_core.training.checkpoint import newest_first, step_of
from tasks.out_of_memory import MAX_HALVINGS, fit, shrink

STEPS, SAVED, CUT = 5, 2, 3  # a checkpoint after step 2, the end after step 3, before the next
NOISE = 4  # times the difference of two runs: where these differ, chance decides by how much


def resume(check: Check, found: dict[str, Any]) -> list[str]:
    """Weights of a stage that was cut off and went on, beside those of one that was not.

    First with torch's deterministic kernels, where resuming must not change a byte; then with the
    kernels of the product, where two whole runs say what those leave open.
    """
    problems = []
    for name in ("sft", "dpo", "ppo", "grpo"):
        job = job_here(check, name, "bf16", steps=STEPS)
        entry: dict[str, Any] = {}
        found[name] = entry
        with deterministic() as told:
            whole, again = (weights(check, run_stage(check, job)) for _ in range(2))
            key = f"cut-{name}-{time.time_ns()}"
            run_stage(check, job, key=key, after_step=cut(check, key))
            resumed = run_stage(check, job, key=key)
        entry["steps_after_the_cut"] = known = len(resumed.metrics)
        entry["after_a_cut"] = apart = distance(whole, weights(check, resumed))
        entry["between_two_runs"] = noise = distance(whole, again)
        entry["without_a_deterministic_kernel"] = sorted(told)
        plain = [weights(check, run_stage(check, job)) for _ in range(2)] if check.on_gpu else []
        entry["between_two_runs_of_the_product"] = distance(*plain) if plain else noise
        check.saves()
        if known != STEPS - SAVED:
            problems.append(f"{name}: {known} steps after the cut, not {STEPS - SAVED}")
        if apart > NOISE * noise:
            problems.append(f"{name}: the weights differ by {apart:.3g} after a cut")
    return problems


@contextlib.contextmanager
def deterministic() -> Iterator[set[str]]:
    """Inside the block, kernels that add up in a fixed order; collects the names of the operators
    that have none."""
    told: set[str] = set()

    def note(message: Any, *rest: Any, **more: Any) -> None:
        found = re.match(r"(\S+) does not have a deterministic implementation", str(message))
        told.update([found[1]] if found else [])

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown, warnings.showwarning = warnings.showwarning, note
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield told
        finally:
            torch.use_deterministic_algorithms(False)
            warnings.showwarning = shown


def cut(check: Check, key: str) -> Callable[[int, Ran], None]:
    """Ends a stage once its checkpoint is in the store."""
    store = check.store.scoped(f"checkpoints/{key}")

    def after_step(step: int, ran: Ran) -> None:
        if step < CUT:
            return
        end = time.monotonic() + 30
        while not any(step_of(artifact) == SAVED for artifact in newest_first(store)):
            assert time.monotonic() < end, "the checkpoint did not reach the store"
            time.sleep(0.05)
        raise Done

    return after_step


def weights(check: Check, ran: Ran) -> dict[str, torch.Tensor]:
    assert ran.artifact is not None
    folder = check.store.fetch(ran.artifact.digest)
    return {
        k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()
    }


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of two weights; 0 where all bytes are equal."""
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


# ------------------------------------------------------------------------------ out of memory


def out_of_memory(check: Check, found: dict[str, Any]) -> list[str]:
    """SFT with less memory than its micro-batch needs; then what the orchestrator makes of it.

    A rank ends with an error of category "oom". The orchestrator's task halves the micro-batch and
    starts the stage again (`tasks.out_of_memory`). Here both happen in one process: on a GPU the
    allocator is given less memory than the first attempt needs, on a CPU the error is imitated.
    """
    job = oom_job(check, check.sizes.oom_micro)
    smallest = check.sizes.oom_micro // 2**MAX_HALVINGS
    if check.on_gpu:
        peaks = {
            micro: run_stage(check, oom_job(check, micro), after_step=stop_after(1)).reserved
            for micro in (smallest, check.sizes.oom_micro)
        }
        cap = sum(peaks.values()) // 2
        found["peak_mib"] = {str(micro): peak // 2**20 for micro, peak in peaks.items()}
        found["cap_mib"] = cap // 2**20
        limit = capped(check, cap)
    else:
        found["imitated"] = True
        limit = imitated(rows=check.sizes.oom_micro // 2)
    found["attempts"] = []
    with limit:
        finished = try_until_it_fits(check, job, found["attempts"])
    micros = [attempt["micro_batch_size"] for attempt in found["attempts"]]
    if len(micros) < 2:
        return ["the first attempt was to run out of memory, and did not"]
    if not finished:
        return [f"no attempt fitted: micro-batches {micros}"]
    return []


def oom_job(check: Check, micro: int) -> SFTJob:
    made = inputs.medium(check)["digests"]
    return SFTJob(
        model=made["model"], data=made["sft"], max_steps=2, batch_size=check.sizes.oom_micro,
        precision="bf16", learning_rate=1e-5,
        resources=Resources(micro_batch_size=micro, device=check.device,  # type: ignore[arg-type]
                            threads=None if check.on_gpu else 1),
    )  # fmt: skip


def try_until_it_fits(check: Check, job: Job, attempts: list[dict[str, Any]]) -> bool:
    """Attempts as the orchestrator makes them; whether one went through all its steps."""
    for _ in range(MAX_HALVINGS + 1):
        now = fit(check.store, job)
        entry: dict[str, Any] = {"micro_batch_size": now.placement().micro_batch_size}
        attempts.append(entry)
        try:
            ran = run_stage(check, now, after_step=stop_after(2))
            entry |= {"ended": "all steps", "peak_mib": ran.reserved // 2**20}
            return True
        except Exception as error:
            entry |= {"ended": classify(error), "error": str(error).splitlines()[0][:200]}
            if classify(error) != "oom":
                raise
            failure = JobFailed(str(error).splitlines()[0], "oom")
        entry["told"] = str(shrink(check.store, job, failure))
        free(check)
        check.saves()
    return False


@contextlib.contextmanager
def capped(check: Check, size: int) -> Iterator[None]:
    """The allocator of this process gets no more than so many bytes of the GPU."""
    free(check)
    torch.cuda.set_per_process_memory_fraction(size / torch.cuda.mem_get_info()[1])
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextlib.contextmanager
def imitated(rows: int) -> Iterator[None]:
    """A policy runs out of memory at more rows than these."""

    def refuse(module: Any, inputs: Any) -> None:
        if isinstance(module, Policy) and inputs[0].shape[0] > rows:
            raise torch.OutOfMemoryError("imitated: out of memory")

    handle = torch.nn.modules.module.register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()
