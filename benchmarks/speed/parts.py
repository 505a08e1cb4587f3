"""Rows that are no training stage, each in a process of its own.

    python -m benchmarks.speed.parts rollout|scoring|generate|whole-logits|peak FOLDER

`rollout` and `scoring` are ours; `generate` is transformers' own decoding of the same prompts, and
`whole-logits` a forward pass whose logits all exist, as without our head. `peak` is the rate of a
large matrix product.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.speed import workload
from rlhf_core.system.host_memory import resident_peak

REPLIES = {"tiny": (96, 128), "smollm2": (64, 64)}  # prompts, longest reply
BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision")
    arguments = parser.parse_args()
    values = workload.load(arguments.folder)
    arguments.precision = arguments.precision or values["sizes"].precision
    with contextlib.redirect_stdout(sys.stderr):
        import torch

        torch.set_num_threads(arguments.threads)
        part = {"rollout": rollout, "generate": generate, "scoring": scoring,
                "whole-logits": whole_logits, "peak": peak}[arguments.part]  # fmt: skip
        found = part(arguments, values)
    found["rss"] = resident_peak(os.getpid())
    print(json.dumps(found), flush=True)
    os._exit(0)


def autocast(arguments: argparse.Namespace) -> Any:
    import torch

    return torch.autocast("cpu", torch.bfloat16, enabled=arguments.precision == "bf16")


def model_of(arguments: argparse.Namespace) -> Any:
    from rlhf_core.models.loading import load_causal_lm

    return load_causal_lm(arguments.folder / "model").requires_grad_(False)


def prompts_of(values: dict[str, Any]) -> tuple[list[list[int]], int]:
    """Prompts and the longest reply."""
    count, length = REPLIES[values["sizes"].model]
    chance = random.Random(1)
    ids = [i for p in values["prompts"] for i in p]
    limit = values["sizes"].prompt_length
    lengths = [chance.randint(limit // 10 or 1, limit) for _ in range(count)]
    return [chance.sample(ids, min(n, len(ids))) for n in lengths], length


def ends_of(arguments: argparse.Namespace, model: Any, prompts: list[list[int]]) -> list[int]:
    """Tokens that end a reply: the tiny model's own, else so many that a reply of mean length ends.

    Where a model has no reason to end its replies early, every thirtieth token of its distribution
    (by probability, on the prompts) does: the lengths are then spread from one to the limit.
    """
    import torch

    if workload.load(arguments.folder)["sizes"].model == "tiny":
        return [workload.END]
    with torch.no_grad():
        ids = torch.tensor([p[-4:] if len(p) >= 4 else (p * 4)[:4] for p in prompts])
        mean = model(input_ids=ids).logits.softmax(-1).mean(dim=(0, 1))  # (V,)
    order = torch.randperm(len(mean), generator=torch.Generator().manual_seed(0))
    return order[: int((mean[order].cumsum(0) < 0.03).sum()) + 1].tolist()


def rollout(arguments: argparse.Namespace, values: dict[str, Any]) -> dict[str, Any]:
    """Our decode loop."""
    from rlhf_core.rollout.generate import generate as decode

    model = model_of(arguments)
    prompts, length = prompts_of(values)
    ends = set(ends_of(arguments, model, prompts))

    def run(some: list[list[int]], limit: int) -> Any:
        with autocast(arguments):
            return decode(model, some, max_new_tokens=limit, eos_ids=ends, pad_id=0,
                          row_seeds=list(range(len(some))), batch_size=BATCH)  # fmt: skip

    run(prompts[:BATCH], 4)
    began = start()
    found = run(prompts, length)
    return told(int(found.response_mask.sum()), time.perf_counter() - began, len(prompts))


def generate(arguments: argparse.Namespace, values: dict[str, Any]) -> dict[str, Any]:
    """transformers' `generate`, prompts of like length together, as ours has them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.folder / "model", padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(arguments.folder / "model", dtype=torch.float32)
    prompts, length = prompts_of(values)
    ends = ends_of(arguments, model, prompts)
    torch.manual_seed(1)

    def run(some: list[list[int]], limit: int) -> int:
        batch = tokenizer.pad({"input_ids": some}, return_tensors="pt")
        with torch.no_grad(), autocast(arguments):
            out = model.generate(
                **batch, max_new_tokens=limit, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                eos_token_id=ends, pad_token_id=tokenizer.pad_token_id,
            )[:, batch["input_ids"].shape[1] :]  # fmt: skip
        ended = torch.isin(out, torch.tensor(ends)).int()
        return int(((ended.cumsum(dim=1) - ended) == 0).sum())

    run(prompts[:BATCH], 4)
    prompts.sort(key=len, reverse=True)
    began = start()
    tokens = sum(run(prompts[i : i + BATCH], length) for i in range(0, len(prompts), BATCH))
    return told(tokens, time.perf_counter() - began, len(prompts))


def start() -> float:
    """The time, from which on memory counts as well: neither loading the model nor what was needed
    before is to be its peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # where the kernel does not allow it, loading counts
        Path("/proc/self/clear_refs").write_text("5")
    return time.perf_counter()


def told(tokens: int, seconds: float, replies: int) -> dict[str, Any]:
    return {"tokens": tokens, "seconds": seconds, "rate": tokens / seconds,
            "mean_length": tokens / replies}  # fmt: skip


def scoring(arguments: argparse.Namespace, values: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities of the SFT rows under a frozen model."""
    import torch

    from rlhf_core.jobs import Resources
    from rlhf_core.nn.modules import Policy, padding_cost
    from rlhf_core.runtime.distributed import Group
    from rlhf_core.training.batching import split_batch
    from rlhf_core.training.language_modelling import collate

    policy = Policy(model_of(arguments))
    sizes, rows = values["sizes"], values["sft"][: values["sizes"].batch * 2]
    lengths = [len(r["input_ids"]) for r in rows]
    one = Group(Resources(device="cpu"))
    batches = split_batch(lengths, one, sizes.micro, padding_cost(policy))

    def run(some: list[list[int]]) -> float:
        total = 0.0
        with torch.inference_mode(), autocast(arguments):
            for positions in some:
                batch = collate([rows[p] for p in positions], torch.device("cpu"))
                total += float(policy(*batch).double().sum())
        return total

    run(batches[-1:])
    began = start()
    total = run(batches)
    return scored(rows, total, time.perf_counter() - began)


def whole_logits(arguments: argparse.Namespace, values: dict[str, Any]) -> dict[str, Any]:
    """The same with all logits at once, rows in their order and padded, a batch at a time."""
    import torch

    from rlhf_core.training.language_modelling import collate

    model = model_of(arguments)
    sizes, rows = values["sizes"], values["sft"][: values["sizes"].batch * 2]

    def run(some: list[dict[str, Any]]) -> float:
        ids, mask, loss_mask, _ = collate(some, torch.device("cpu"))
        with torch.inference_mode(), autocast(arguments):
            logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
            logprobs = logits[:, :-1].float().log_softmax(-1)
        found = logprobs.gather(2, ids[:, 1:, None]).squeeze(2)
        return float(found[loss_mask[:, 1:]].double().sum())

    run(rows[:1])
    began = start()
    total = sum(run(rows[i : i + sizes.micro]) for i in range(0, len(rows), sizes.micro))
    return scored(rows, total, time.perf_counter() - began)


def scored(rows: list[dict[str, Any]], total: float, seconds: float) -> dict[str, Any]:
    tokens = sum(len(r["input_ids"]) for r in rows)
    return {"tokens": tokens, "seconds": seconds, "rate": tokens / seconds,
            "losses": [-total / tokens]}  # fmt: skip


def peak(arguments: argparse.Namespace, values: dict[str, Any]) -> dict[str, Any]:
    """FLOP/s of a product of two 2048 x 2048 matrices, the best of ten."""
    import torch

    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(2048, 2048).to(dtype)
        a @ a
        times = []
        for _ in range(10):
            began = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - began)
        found[name] = 2 * 2048**3 / min(times)
    return found


if __name__ == "__main__":
    main()
