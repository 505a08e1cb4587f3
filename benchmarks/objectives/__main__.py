"""Losses and gradients of the objectives beside TRL's, on the same batch: `make bench-objectives`.

A tiny random llama, eight replies of one to twelve tokens to two prompts, and log-probabilities
before the update and of the reference that differ from the policy's. Each side computes advantages,
loss and gradients by its own code, fp32. Prints a table and fails where a number differs by more
than rounding. Under a minute.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.objectives.cases import CASES, GROUP, REPLY_LENGTH, Case, load
from rlhf_core.algorithms import grpo, rloo
from rlhf_core.jobs import GRPOJob, RLOOJob
from rlhf_core.losses.advantages import group_advantages
from rlhf_core.models.random_model import make_model, make_tokenizer
from rlhf_core.nn.modules import Policy
from rlhf_core.nn.padding import mark_from
from rlhf_core.training.online.experience import pad_columns
from rlhf_core.training.online.updates import MicroBatch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PEER = ROOT / ".venv-bench" / "bin" / "python"
TOLERANCE = 1e-5  # relative, of fp32; a loss below 0.1 is a difference of larger numbers
INPUTS = {"model": "0" * 64, "prompts": "0" * 64, "reward_model": "0" * 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, default=PEER, help="Python that has TRL")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_batch(folder)
        done = subprocess.run(
            [str(arguments.peer), str(HERE / "peer.py"), str(folder)],
            cwd=ROOT, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"TRL's side ended with {done.returncode}:\n{done.stderr[-3000:]}")
        theirs = torch.load(folder / "theirs.pt", weights_only=True)
        rows = [compare(case, measure(case, folder), theirs[case.name]) for case in CASES]
    print("| objective | loss | TRL's | difference | of the gradient | clipped low, high | TRL's |")
    print("| --- | ---: | ---: | ---: | ---: | --- | --- |")
    print("\n".join(row["line"] for row in rows))
    worst = max(max(row["differences"]) for row in rows)
    print(f"\nlargest relative difference {worst:.1e}, allowed {TOLERANCE:g}")
    if not worst <= TOLERANCE:
        raise SystemExit("the objectives differ from TRL's")


def policy_of(folder: Path) -> Policy:
    from transformers import AutoModelForCausalLM

    return Policy(AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32))


def logprobs_of(folder: Path, policy: Policy, batch: dict[str, Any]) -> Tensor:
    """(B,T) of the replies' tokens."""
    prompts = [ids for ids in batch["prompts"] for _ in range(GROUP)]
    sequences = [[*p, *r] for p, r in zip(prompts, batch["replies"], strict=True)]
    starts = [len(p) for p in prompts]
    flat = policy(*mark_from(sequences, starts, torch.device("cpu")))  # (B,S)
    parts = [row[s : len(ids)] for row, s, ids in zip(flat, starts, sequences, strict=True)]
    width = max(len(p) for p in parts)
    return torch.stack([torch.cat([p, p.new_zeros(width - len(p))]) for p in parts])  # (B,T)


def make_batch(folder: Path) -> None:
    """Writes the model and batch.json, see `cases.load`."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    make_model("llama", tokenizer, 0).save_pretrained(folder / "model")
    random = torch.Generator().manual_seed(5)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 900, (count,), generator=random).tolist()  # no special tokens

    lengths = torch.randint(1, REPLY_LENGTH + 1, (2 * GROUP,), generator=random).tolist()
    batch: dict[str, Any] = {
        "prompts": [ids(5), ids(3)],
        "replies": [ids(n) for n in lengths],
        "scores": torch.randn(2 * GROUP, generator=random).tolist(),
    }
    with torch.no_grad():
        logprobs = logprobs_of(folder, policy_of(folder), batch)
    for name in ("old_logprobs", "ref_logprobs"):
        moved = logprobs + 0.3 * torch.randn(logprobs.shape, generator=random)
        batch[name] = [row[:n].tolist() for row, n in zip(moved, lengths, strict=True)]
    (folder / "batch.json").write_text(json.dumps(batch))


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Loss, gradients and clipped fractions of a case, by the loss of the algorithm's module."""
    batch, policy = load(folder), policy_of(folder)
    scores = torch.tensor(batch["scores"])  # (B,)
    mask = pad_columns([torch.ones(len(r)) for r in batch["replies"]]).bool()  # (B,T)
    old, ref = (
        pad_columns([torch.tensor(r) for r in batch[k]]) for k in ("old_logprobs", "ref_logprobs")
    )
    values = {**INPUTS, "batch_size": 2, "group_size": GROUP, "max_new_tokens": REPLY_LENGTH}
    job: GRPOJob | RLOOJob
    if case.algorithm == "grpo":
        job = GRPOJob(**(values | case.ours))
        advantages = group_advantages(scores, GROUP, "grpo" if job.scale_rewards else "dr_grpo")
    else:
        job = RLOOJob(**(values | case.ours))
        advantages = group_advantages(scores, GROUP, "rloo")
    micro_batch = MicroBatch(
        logprobs=logprobs_of(folder, policy, batch), old_logprobs=old, ref_logprobs=ref,
        response_mask=mask, loss_mask=mask, advantages=advantages,
        values=None, old_values=None, returns=None,
        replies=float(len(mask)), tokens=float(mask.sum()),
    )  # fmt: skip
    loss = grpo.loss if isinstance(job, GRPOJob) else rloo.loss
    total, metrics = loss(job, job.kl_coef, micro_batch)  # type: ignore[arg-type]
    total.backward()
    return {
        "loss": float(total.detach()), "advantages": advantages,
        "gradients": {n: p.grad for n, p in policy.model.named_parameters()},
        "fractions": [float(metrics[f"clip_fraction_{s}"]) for s in ("low", "high")],
    }  # fmt: skip


def compare(case: Case, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """A line of the table, and the relative differences of advantages, loss and gradients."""
    assert ours["gradients"].keys() == theirs["gradients"].keys()
    pairs = [(g, theirs["gradients"][name]) for name, g in ours["gradients"].items()]
    scale = max(float(g.abs().max()) for _, g in pairs)
    gap = max(float((a - b).abs().max()) for a, b in pairs) / scale
    loss = abs(ours["loss"] - theirs["loss"]) / max(abs(theirs["loss"]), 0.1)
    # The dual clip is counted apart; TRL's CISPO has no such fractions.
    advantages = float((ours["advantages"] - theirs["advantages"]).abs().max())
    shown = [
        ", ".join("-" if f is None else f"{f:.3f}" for f in side["fractions"])
        for side in (ours, theirs)
    ]
    line = (
        f"| {case.name} | {ours['loss']:.6f} | {theirs['loss']:.6f} | {loss:.1e} | {gap:.1e} | "
        f"{shown[0]} | {shown[1]} |"
    )
    return {"line": line, "differences": [loss, gap, advantages]}


if __name__ == "__main__":
    main()
