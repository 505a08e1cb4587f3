"""One measurement of TRL, in a process of its own: `python peer.py ROW FOLDER`, in .venv-bench.

Runs TRL's trainer as its documentation shows it, on the rows of the workload in the same order,
and prints one line of JSON. With --given its rollouts take the workload's replies.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.update(TRL_EXPERIMENTAL_SILENCE="1", HF_HUB_OFFLINE="1", WANDB_DISABLED="true")

from benchmarks.speed import workload
from benchmarks.speed.ours import real_tokens, replies_of
from benchmarks.speed.rule import of_text


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("row", choices=tuple(ROWS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--given", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision")
    arguments = parser.parse_args()
    values = workload.load(arguments.folder)
    precision = arguments.precision or values["sizes"].precision
    if precision == "bf16":
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as scratch:
        import torch

        torch.set_num_threads(arguments.threads)
        side = Side(arguments, values, precision, scratch)
        found = ROWS[arguments.row](side)
    print(json.dumps(found), flush=True)
    os._exit(0)


class Side:
    """What all four trainers need."""

    def __init__(
        self, arguments: argparse.Namespace, values: dict[str, Any], precision: str, scratch: str
    ) -> None:
        self.row, self.folder, self.given = arguments.row, arguments.folder, arguments.given
        self.values, self.sizes = values, values["sizes"]
        self.precision, self.scratch = precision, scratch
        self.marks: list[float] = []
        self.work: list[float] = []
        self.logs: list[dict[str, float]] = []
        self.rolled: list[int] = []  # real tokens of each rollout

    def tokenizer(self, side: str = "right") -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder / "model", padding_side=side)

    def causal(self) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder / "model", dtype=torch.float32)

    def scorer(self) -> Any:
        import torch
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification.from_pretrained(
            self.folder / "scorer-hf", num_labels=1, dtype=torch.float32
        )

    def common(self, steps: int, batch: int, micro: int) -> dict[str, Any]:
        """Training arguments that mean what our job says."""
        return {
            "output_dir": self.scratch, "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": batch // micro, "max_steps": steps,
            "learning_rate": workload.rate(self.row, self.given),
            "lr_scheduler_type": "constant",
            "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0,
            "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-5,
            "bf16": self.precision == "bf16", "use_cpu": True, "gradient_checkpointing": False,
            "logging_steps": 1, "save_strategy": "no", "report_to": "none", "seed": workload.SEED,
            "disable_tqdm": True, "dataloader_num_workers": 0,
        }  # fmt: skip

    def callback(self) -> Any:
        from transformers import TrainerCallback

        side = self

        class Watch(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                side.marks.append(time.perf_counter())
                side.work.append(time.process_time())

            def on_log(
                self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any
            ) -> None:
                side.logs.append(dict(logs))

        return Watch()

    def result(self, losses: list[float]) -> dict[str, Any]:
        before = self.sizes.warm_up
        tokens = real_tokens(self.row, self.values) or sum(self.rolled[before:])
        seconds = self.marks[-1] - self.marks[before - 1]
        return {
            "tokens": tokens, "seconds": seconds, "rate": tokens / seconds,
            "cpu_seconds": self.work[-1] - self.work[before - 1],
            "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "losses": losses, "steps": len(self.marks) - before,
        }  # fmt: skip


def in_order(trainer: type) -> type:
    """The trainer with its rows in the order of the data set."""
    from torch.utils.data import SequentialSampler

    class InOrder(trainer):  # type: ignore[misc, valid-type]
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    return InOrder


def sft(side: Side) -> dict[str, Any]:
    """SFTTrainer on rows that are tokenised, with their labels."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [
        {
            "input_ids": r["input_ids"],
            "labels": [
                i if t else -100 for i, t in zip(r["input_ids"], r["trainable"], strict=True)
            ],
        }
        for r in side.values["sft"]
    ]
    sizes = side.sizes
    trainer = in_order(SFTTrainer)(
        model=side.causal(),
        args=SFTConfig(
            **side.common(sizes.all_steps, sizes.batch, sizes.micro),
            max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_list(rows), processing_class=side.tokenizer(),
        callbacks=[side.callback()],
    )  # fmt: skip
    trainer.train()
    return side.result([log["loss"] for log in side.logs if "loss" in log])


def reward(side: Side) -> dict[str, Any]:
    """RewardTrainer on pairs that are tokenised."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    rows = [
        {k: [*r["prompt_ids"], *r[k]] for k in ("chosen_ids", "rejected_ids")}
        for r in side.values["pairs"]
    ]
    sizes = side.sizes
    trainer = in_order(RewardTrainer)(
        model=side.scorer(),
        args=RewardConfig(
            **side.common(sizes.all_steps, sizes.batch // 2, sizes.micro // 2), max_length=None
        ),
        train_dataset=Dataset.from_list(rows), processing_class=side.tokenizer(),
        callbacks=[side.callback()],
    )  # fmt: skip
    trainer.train()
    return side.result([log["loss"] for log in side.logs if "loss" in log])


def grpo(side: Side) -> dict[str, Any]:
    """GRPOTrainer with a reward function of the text."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    sizes, values = side.sizes, side.values
    tokenizer = side.tokenizer("left")
    count = sizes.prompts // sizes.group
    from rlhf_core.training.batching import batch_rows

    steps = range(sizes.all_rollouts)
    numbers = [i for s in steps for i in batch_rows(len(values["prompts"]), count, s, 0)]
    texts = [tokenizer.decode(values["prompts"][i]) for i in numbers]

    def score(completions: list[str], completion_ids: Any, **kwargs: Any) -> list[float]:
        side.rolled.append(sum(len(ids) for ids in completion_ids))
        return [of_text(text) for text in completions]

    calls = iter(steps)

    def replay(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        step = next(calls)
        chosen = [
            values["prompts"][i]
            for i in numbers[step * count : (step + 1) * count]
            for _ in range(sizes.group)
        ]
        replies = replies_of(values, chosen, "grpo")
        return {"prompt_ids": chosen, "completion_ids": replies,
                "logprobs": [[0.0] * len(r) for r in replies]}  # fmt: skip

    trainer = GRPOTrainer(
        model=side.causal(),
        reward_funcs=score,
        args=GRPOConfig(
            **side.common(len(steps), sizes.prompts, sizes.micro),
            num_generations=sizes.group, max_completion_length=sizes.reply_length, beta=0.04,
            steps_per_generation=sizes.prompts // sizes.micro, loss_type="grpo", epsilon=0.2,
            temperature=1.0, top_k=0, top_p=1.0, use_bias_correction_kl=False,
            shuffle_dataset=False, scale_rewards="group",
        ),
        train_dataset=Dataset.from_list([{"prompt": t} for t in texts]),
        processing_class=tokenizer, callbacks=[side.callback()],
        rollout_func=replay if side.given else None,
    )  # fmt: skip
    trainer.train()
    # the prompts' tokens, once for each reply, as ours counts them
    for step in steps:
        part = numbers[step * count : (step + 1) * count]
        side.rolled[step] += sizes.group * sum(len(values["prompts"][i]) for i in part)
    return side.result([log["loss"] for log in side.logs if "loss" in log])


def ppo(side: Side) -> dict[str, Any]:
    """PPOTrainer of TRL 1.12.0, the last release that has one."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    sizes, values = side.sizes, side.values
    tokenizer = side.tokenizer("left")
    common = side.common(-1, sizes.prompts, sizes.micro)
    sample = ppo_trainer.batch_generation

    def generation(model: Any, queries: Any, *rest: Any) -> Any:
        import torch

        pad = tokenizer.pad_token_id
        if side.given:
            prompts = [[t for t in row if t != pad] for row in queries.tolist()]
            replies = torch.tensor(replies_of(values, prompts, "ppo"))
            whole = torch.cat([queries, replies], dim=1)
            logits = ppo_trainer.forward(model, whole, pad).logits[:, queries.shape[1] - 1 : -1]
            found = whole, logits
        else:
            found = sample(model, queries, *rest)
        replies = found[0][:, queries.shape[1] :]
        ended = (replies == tokenizer.eos_token_id).int()
        real = (ended.cumsum(dim=1) - ended) == 0  # up to the first end of turn, included
        side.rolled.append(int((queries != pad).sum()) + int((real & (replies != pad)).sum()))
        return found

    ppo_trainer.batch_generation = generation
    # In the order of the data set; and the data set is longer than what is used: at the end of a
    # loader accelerate takes an optimizer step after every micro-batch.
    loader = ppo_trainer.DataLoader
    ppo_trainer.DataLoader = lambda *a, **k: loader(*a, **{**k, "shuffle": False})
    rows = [{"input_ids": p} for p in values["prompts"]] * (sizes.all_rollouts + 1)
    policy, critic = side.causal(), side.scorer()
    if side.row == "ppo-top":
        for model in (policy, critic):
            train_top(model, values["shape"]["layers"] // workload.TOP)
    trainer = PPOTrainer(
        args=PPOConfig(
            **common, total_episodes=sizes.prompts * sizes.all_rollouts,
            num_ppo_epochs=1 if side.given else workload.EPOCHS, num_mini_batches=1,
            response_length=sizes.reply_length,
            local_rollout_forward_batch_size=sizes.prompts, temperature=1.0, stop_token="eos",
            missing_eos_penalty=None, kl_coef=0.04, cliprange=0.2, vf_coef=0.1,
            cliprange_value=0.2, gamma=1.0, lam=0.95, num_sample_generations=0,
            whiten_rewards=False,
        ),
        processing_class=tokenizer, model=policy, ref_model=side.causal(),
        reward_model=side.scorer(), value_model=critic,
        train_dataset=Dataset.from_list(rows),
        callbacks=[side.callback()],
    )  # fmt: skip
    trainer.train()
    names = ("loss/policy_avg", "loss/value_avg")
    logs = [log for log in side.logs if names[0] in log]
    return side.result([log[name] for log in logs for name in names])


def train_top(model: Any, count: int) -> None:
    """Train the upper layers, the last norm and an untied head, as `trainable_layers` does."""
    model.model.requires_grad_(False)
    for module in (*model.model.layers[-count:], model.model.norm):
        module.requires_grad_(True)


ROWS = {"sft": sft, "reward": reward, "grpo": grpo, "ppo": ppo, "ppo-top": ppo}

if __name__ == "__main__":
    main()
