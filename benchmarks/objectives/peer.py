"""TRL's side, in a process of its own: `python peer.py FOLDER`, in .venv-bench.

For each case a trainer as its documentation shows it. Its rollout takes the replies of the batch,
its reward function their scores, so that the advantages are its own; then the log-probabilities
before the update and of the reference are replaced by the batch's. Writes theirs.pt to the folder.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.update(TRL_EXPERIMENTAL_SILENCE="1", HF_HUB_OFFLINE="1", WANDB_DISABLED="true")

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from benchmarks.objectives.cases import CASES, GROUP, REPLY_LENGTH, Case, load


def main() -> None:
    folder = Path(sys.argv[1])
    batch = load(folder)
    torch.save({case.name: measure(case, folder, batch) for case in CASES}, folder / "theirs.pt")


def measure(case: Case, folder: Path, batch: dict[str, Any]) -> dict[str, Any]:
    """Loss, gradients and clipped fractions of a case."""
    trainer = trainer_of(case, folder, batch)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = [{"prompt": f"{i // GROUP}"} for i in range(len(batch["replies"]))]
    inputs = trainer._generate_and_score_completions(rows)
    old, ref = (pad(batch[name], inputs) for name in ("old_logprobs", "ref_logprobs"))
    mask = inputs["completion_mask"]
    inputs |= {"old_per_token_logps": old, "ref_per_token_logps": ref,
               "old_logps": (old * mask).sum(1)}  # fmt: skip
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    metrics = trainer._metrics["train"]
    fractions = [metrics.get(f"clip_ratio/{side}_mean", [None])[-1] for side in ("low", "high")]
    gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
    return {"loss": loss.item(), "gradients": gradients, "fractions": fractions,
            "advantages": inputs["advantages"]}  # fmt: skip


def trainer_of(case: Case, folder: Path, batch: dict[str, Any]) -> Any:
    """The trainer of a case, whose rollouts are the batch."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    prompts = [ids for ids in batch["prompts"] for _ in range(GROUP)]

    def score(completions: list[str], **kwargs: Any) -> list[float]:
        return batch["scores"]  # type: ignore[no-any-return]

    def replay(_: list[Any], trainer: Any) -> dict[str, Any]:
        return {"prompt_ids": prompts, "completion_ids": batch["replies"],
                "logprobs": batch["old_logprobs"]}  # fmt: skip

    class Replaying(RLOOTrainer):  # type: ignore[misc]
        """RLOOTrainer has no rollout_func."""

        def _generate(self, _: list[Any]) -> tuple[Any, ...]:
            return prompts, batch["replies"], [""] * len(prompts)

    if case.algorithm == "grpo":
        trainer, config, more = GRPOTrainer, GRPOConfig, {"rollout_func": replay}
    else:
        trainer, config, more = Replaying, RLOOConfig, {}
    arguments = config(
        output_dir=str(folder / "scratch"), per_device_train_batch_size=len(prompts),
        gradient_accumulation_steps=1, num_generations=GROUP, max_completion_length=REPLY_LENGTH,
        bf16=False, use_cpu=True, gradient_checkpointing=False, report_to="none", temperature=1.0,
        **case.theirs,
    )  # fmt: skip
    return trainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        reward_funcs=score, args=arguments, processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": "0"}] * len(prompts)), **more,
    )  # fmt: skip


def pad(rows: list[list[float]], inputs: dict[str, Any]) -> torch.Tensor:
    """One number for each token -> (B,T)."""
    result = torch.zeros(inputs["completion_mask"].shape)
    for i, row in enumerate(rows):
        result[i, : len(row)] = torch.tensor(row)
    return result


if __name__ == "__main__":
    main()
