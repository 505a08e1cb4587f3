"""Where time goes: synchronisations by line, kernels of a step, fast paths on and off."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check import inputs
from benchmarks.gpu_check.check import Check, NotHere
from benchmarks.gpu_check.running import Done, Ran, run_stage
from benchmarks.gpu_check.sizes import Run
from benchmarks.gpu_check.speed import sft_job
from benchmarks.gpu_check.stages import job_here
from rlhf_core.nn.modules import Policy

ROOT = str(Path(__file__).parents[2])
HERE = "benchmarks/gpu_check/"
TOP = 15  # kernels
WARM = 2  # steps before the one that is looked at

# Words in a kernel's name -> what it does; the first that occurs counts.
KINDS = {
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "xmma", "::mm", "addmm", "bmm"),
    "optimizer": ("adam", "multi_tensor", "foreach"),
    "copies and casts": ("copy", "memcpy", "memset", "catarray", "index", "gather", "scatter"),
    "reductions": ("reduce", "softmax", "logsumexp", "norm"),
}


# ----------------------------------------------------------------------------- synchronisations


def syncs(check: Check, found: dict[str, Any]) -> list[str]:
    """Times that the host waits for the GPU: in a step of SFT and in steps of decoding, by line."""
    if not check.on_gpu:
        raise NotHere("a CPU does not wait for itself")
    lines: Counter[str] = Counter()
    passes: list[int] = []  # rows of each micro-batch
    watching = contextlib.ExitStack()

    def after_step(step: int, ran: Ran) -> None:
        if step == 1:
            watching.enter_context(policy_calls(passes))
            watching.enter_context(counted(lines))
        else:
            watching.close()
            raise Done

    with watching:
        run_stage(check, job_here(check, "sft", "bf16", steps=3), after_step=after_step)
    found["sft_step"] = {
        "micro_batches": len(passes),
        "waits": sum(lines.values()),
        "lines": by_count(lines),
    }
    check.saves()
    found["decoding"] = {}
    for steps in (8, 24):
        found["decoding"][f"{steps} steps"] = decoding_waits(check, steps)
    return []


def decoding_waits(check: Check, steps: int) -> dict[str, Any]:
    """Waits of a rollout of four prompts; without an end-of-turn token all steps are taken."""
    from rlhf_core.models.loading import load_causal_lm
    from rlhf_core.rollout.generate import generate

    model = load_causal_lm(check.store.fetch(inputs.tiny(check)["model"])).to(check.device)

    def sample() -> None:
        with torch.autocast(check.device, dtype=torch.bfloat16):
            generate(model, [[5, 6, 7]] * 4, max_new_tokens=steps, eos_ids=set(), pad_id=0,
                     row_seeds=[1, 2, 3, 4])  # fmt: skip

    sample()
    lines: Counter[str] = Counter()
    with counted(lines):
        sample()
    return {"waits": sum(lines.values()), "lines": by_count(lines)}


@contextlib.contextmanager
def policy_calls(rows: list[int]) -> Iterator[None]:
    """Inside the block, note the rows of each forward pass of a policy."""

    def note(module: Any, args: Any) -> None:
        if isinstance(module, Policy):
            rows.append(args[0].shape[0])

    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def counted(lines: Counter[str]) -> Iterator[None]:
    """Inside the block, count the calls that wait for the GPU, by the project's innermost line."""

    def note(message: Any, *rest: Any, **more: Any) -> None:
        line = own_line()
        if "synchroniz" in str(message) and not line.startswith(HERE):
            lines[line] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown, warnings.showwarning = warnings.showwarning, note
        always = torch.is_warn_always_enabled()
        torch.set_warn_always(True)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.set_warn_always(always)
            warnings.showwarning = shown


def own_line() -> str:
    """File and line of the innermost frame that is this project's, but for that of `note`."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and "site-packages" not in name:
            return f"{name.removeprefix(ROOT).lstrip('/')}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def by_count(lines: Counter[str]) -> dict[str, int]:
    return dict(lines.most_common())


# ------------------------------------------------------------------------------------ profiles


def profile(check: Check, found: dict[str, Any]) -> list[str]:
    """Kernels of one SFT step of the large model, and of some decoding steps."""
    run = Run(min(8, check.sizes.batch))
    watching = contextlib.ExitStack()
    profiler = new_profiler(check)

    def after_step(step: int, ran: Ran) -> None:
        if step == WARM:
            watching.enter_context(profiler)
        elif step > WARM:
            watching.close()
            raise Done

    with watching:
        ran = run_stage(check, sft_job(check, run), after_step=after_step)
    found["sft"] = {"run": run.name, **summary(check, profiler, ran.step_seconds(WARM)[0])}
    check.saves()
    found["decoding"] = decoding_profile(check)
    return []


def new_profiler(check: Check) -> Any:
    from torch.profiler import ProfilerActivity

    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * check.on_gpu
    return torch.profiler.profile(activities=kinds)


def decoding_profile(check: Check, steps: int = 16) -> dict[str, Any]:
    """Kernels of a rollout of the large model; the prompt's pass is among them."""
    import time

    from rlhf_core.models.loading import load_causal_lm
    from rlhf_core.rollout.generate import generate

    made = inputs.large(check)
    source = check.store.fetch(made["digests"]["model"])
    model = load_causal_lm(source).to(check.device).requires_grad_(False)
    rows = [[5 + i % 90] * 8 for i in range(check.sizes.rollout[0])]

    def sample() -> float:
        began = time.perf_counter()
        with torch.autocast(check.device, dtype=torch.bfloat16):
            generate(model, rows, max_new_tokens=steps, eos_ids=set(), pad_id=inputs.PAD,
                     row_seeds=list(range(len(rows)))).response_ids.tolist()  # fmt: skip
        return time.perf_counter() - began

    sample()
    with new_profiler(check) as profiler:
        seconds = sample()
    return {"replies": len(rows), "steps": steps, **summary(check, profiler, seconds)}


def summary(check: Check, profiler: Any, seconds: float) -> dict[str, Any]:
    """The kernels with the most time, the sums by kind, and how busy the device was.

    On a CPU operators stand for kernels. With the profiler a step takes longer than without.
    """
    wanted = torch.autograd.DeviceType.CUDA if check.on_gpu else torch.autograd.DeviceType.CPU
    rows = []
    for event in profiler.key_averages():
        spent = event.self_device_time_total if check.on_gpu else event.self_cpu_time_total
        if event.device_type == wanted and spent > 0:
            rows.append((spent / 1000, event.count, event.key))
    rows.sort(reverse=True)
    total = sum(spent for spent, _, _ in rows) or 1.0
    kinds: Counter[str] = Counter()
    for spent, _, name in rows:
        kinds[kind_of(name)] += spent  # type: ignore[assignment]
    return {
        "milliseconds": round(1000 * seconds, 2),
        "milliseconds_in_kernels": round(total, 2),
        "busy": round(total / (1000 * seconds), 4),
        "kernels": sum(count for _, count, _ in rows),
        "by_kind": {k: round(v / total, 4) for k, v in kinds.most_common()},
        "top": [
            {"share": round(spent / total, 4), "milliseconds": round(spent, 3), "calls": count,
             "name": name[:160]}
            for spent, count, name in rows[:TOP]
        ],
    }  # fmt: skip


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    name = kernel.lower()
    return next((k for k, words in KINDS.items() if any(w in name for w in words)), "elementwise")


# ---------------------------------------------------------------------------------- fast paths


def fast_paths(check: Check, found: dict[str, Any]) -> list[str]:
    """Which fast paths the large model may take in fp32 on this device, and why not the others."""
    from rlhf_core.models.loading import load_causal_lm
    from rlhf_core.nn import backbone, shared_prompt, small_batch_linear, unpadded
    from rlhf_core.rollout import grouped_attention, kv_cache

    folder = check.store.fetch(inputs.large(check)["digests"]["model"])
    model = load_causal_lm(folder).to(check.device)
    base = backbone.backbone(model)
    asked: dict[str, Any] = {
        "RMSNorm as one kernel": lambda: isinstance(base.norm.forward, functools.partial),
        "rows without padding": lambda: unpadded.is_used(base),
        "right-padded rows without a mask": lambda: backbone.WITHOUT_MASK.works(base),
        "pairs in a shared row": lambda: shared_prompt.takes_block_masks(base),
        "grouped attention in decoding": lambda: grouped_attention.is_used(model),
        "small products the other way round": lambda: small_batch_linear.is_used(model),
        "preallocated key-value cache": lambda: kv_cache.is_used(model),
    }
    found["on"] = {name: bool(ask()) for name, ask in asked.items()}
    return []
