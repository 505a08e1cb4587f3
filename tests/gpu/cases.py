"""The stages that run on the pretended GPU: their jobs, and the store with what they read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core import jobs
from rlhf_core.jobs import BaseJob, Resources
from tests.rlhf_core.algorithms.conftest import talk

STEPS = 2
ARCHITECTURES = ("llama", "gpt2", "bloom", "qwen2", "opt")
ALGORITHMS = (
    "sft", "pretrain", "reward", "reward_probe", "dpo", "simpo", "orpo", "kto", "ppo", "grpo",
    "rloo", "reinforce_pp", "online_dpo", "distill", "label", "best_of_n", "evaluate",
)  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "lora": {"lora": jobs.LoRA(rank=2, alpha=8)},
    "top": {"trainable_layers": 1},
    "checkpointing": {"resources": {"gradient_checkpointing": True}},
    "slow_paths": {"resources": {"fast_paths": False}},
    "mean": {"pooling": "mean"},
    "epochs": {"minibatches": 2, "ppo_epochs": 2},
    "kl": {"kl_coef": 0.1, "minibatches": 2, "epochs": 2},
    "ptx": {"ptx_coef": 1.0},
}


@dataclass(frozen=True)
class Case:
    """One stage. Attributes: keys of `ALGORITHMS` and `VARIANTS`; a random model's name."""

    algorithm: str
    architecture: str = "llama"
    precision: str = "fp32"
    variant: str = ""

    @property
    def name(self) -> str:
        parts = (self.algorithm, self.architecture, self.precision, self.variant)
        return "-".join(part for part in parts if part)

    @property
    def trains(self) -> bool:
        return self.algorithm not in ("label", "best_of_n", "evaluate")


@dataclass(frozen=True)
class Inputs:
    """Digests in the store: models and random reward models by architecture, data by purpose, and
    a teacher."""

    models: dict[str, str]
    rewards: dict[str, str]
    data: dict[str, str]


def job(case: Case, inputs: Inputs, device: str, **changes: Any) -> BaseJob:
    """The job of a case.

    Args:
        device: cuda or cpu. changes: settings that differ; those of `resources` as a dict.
    """
    settings = VARIANTS[case.variant] | changes
    places = VARIANTS[case.variant].get("resources", {}) | changes.get("resources", {})
    settings = {name: value for name, value in settings.items() if name != "resources"}
    place = {"micro_batch_size": 4, "checkpoint_every": 1, "threads": 1, "device": device}
    model, reward = inputs.models[case.architecture], inputs.rewards[case.architecture]
    base: dict[str, Any] = {"model": model, "resources": Resources(**(place | places))}
    if case.trains:
        base |= {
            "learning_rate": 1e-3, "precision": case.precision, "schedule": "constant",
            "warmup_fraction": 0.0,
        }  # fmt: skip
    if settings.get("ptx_coef"):
        base["ptx"] = inputs.data["sft"]
    return _MAKE[case.algorithm](inputs.data, reward, base | settings)


def _trains_on(kind: Any, purpose: str, **own: Any) -> Callable[..., BaseJob]:
    def make(data: dict[str, str], reward: str, settings: dict[str, Any]) -> BaseJob:
        common = {"data": data[purpose], "batch_size": 8, "max_steps": STEPS}
        return kind(**(common | own | settings))

    return make


def _samples(kind: Any, **own: Any) -> Callable[..., BaseJob]:
    def make(data: dict[str, str], reward: str, settings: dict[str, Any]) -> BaseJob:
        common = {
            "reward_model": reward, "prompts": data["prompts"], "steps": STEPS,
            "max_new_tokens": 6, "batch_size": 8, "min_length": None,
        }  # fmt: skip
        return kind(**(common | own | settings))

    return make


def _distill(data: dict[str, str], reward: str, settings: dict[str, Any]) -> BaseJob:
    common = {
        "teacher": data["teacher"], "prompts": data["prompts"], "steps": STEPS,
        "max_new_tokens": 6, "batch_size": 8,
    }  # fmt: skip
    return jobs.DistillJob(**(common | settings))


def _label(data: dict[str, str], reward: str, settings: dict[str, Any]) -> BaseJob:
    common = {
        "prompts": data["prompts"], "labeller": "reward_model", "reward_model": reward,
        "max_prompts": 8, "max_heldout_prompts": 4, "samples_per_prompt": 2, "max_new_tokens": 6,
        "min_margin": 0.0,
    }  # fmt: skip
    return jobs.LabelJob(**(common | settings))


def _best_of_n(data: dict[str, str], reward: str, settings: dict[str, Any]) -> BaseJob:
    common = {
        "prompts": data["prompts"], "reward_model": reward, "max_prompts": 8,
        "max_heldout_prompts": 4, "samples_per_prompt": 2, "max_new_tokens": 6,
        "keep_unfinished": True, "rewards": ({"type": "model"}, {"type": "must_end"}),
    }  # fmt: skip
    return jobs.BestOfNJob(**(common | settings))


def _evaluate(data: dict[str, str], reward: str, settings: dict[str, Any]) -> BaseJob:
    model = settings["model"]
    common = {
        "policy": model, "sft": model, "base": model, "reward_model": reward,
        "prompts": data["prompts"], "sft_data": data["sft"], "max_prompts": 5, "max_new_tokens": 6,
        "greedy_prompts": 3, "rewards": ({"type": "model"}, {"type": "must_end", "weight": 0.5}),
    }  # fmt: skip
    return jobs.EvaluateJob(**(common | {k: v for k, v in settings.items() if k != "model"}))


_REWARD = {"normalization_prompts": 8, "max_new_tokens": 6}
_MAKE: dict[str, Callable[..., BaseJob]] = {
    "sft": _trains_on(jobs.SFTJob, "sft"),
    "pretrain": _trains_on(jobs.PretrainJob, "pretrain", length=47, batch_size=6),
    "reward": _trains_on(jobs.RewardJob, "preference", head="random", **_REWARD),
    "reward_probe": _trains_on(jobs.RewardJob, "preference", head="probe", **_REWARD),
    "dpo": _trains_on(jobs.DPOJob, "preference"),
    "simpo": _trains_on(jobs.SimPOJob, "preference"),
    "orpo": _trains_on(jobs.ORPOJob, "preference"),
    "kto": _trains_on(jobs.KTOJob, "unpaired"),
    "ppo": _samples(jobs.PPOJob, ppo_epochs=1),
    "grpo": _samples(jobs.GRPOJob, batch_size=2, group_size=4),
    "rloo": _samples(jobs.RLOOJob, batch_size=2, group_size=4),
    "reinforce_pp": _samples(jobs.ReinforcePPJob),
    "online_dpo": _samples(jobs.OnlineDPOJob, batch_size=4),
    "distill": _distill,
    "label": _label,
    "best_of_n": _best_of_n,
    "evaluate": _evaluate,
}


# ------------------------------------------------------------------------------------ inputs


def make_inputs(
    run: Callable[[BaseJob], str], store: Any, folder: Path, architectures: Iterable[str]
) -> Inputs:
    """Tiny models and small data sets, made on the CPU.

    Args:
        run: runs a job and returns its artifact's digest.
        store: where artifacts go. folder: for the files that are read.
        architectures: of the models; the first must be llama, whose tokenizer all have.
    """
    from rlhf_core.models.loading import new_scalar_model
    from rlhf_core.models.saving import save_scalar_model

    models, rewards = {}, {}
    for name in architectures:
        models[name] = run(jobs.ImportModelJob(source=f"random:{name}"))
        source, made = store.fetch(models[name]), folder / f"reward-{name}"
        made.mkdir()
        save_scalar_model(new_scalar_model(source, 0), made, source)
        rewards[name] = store.publish(made, kind="reward_model").digest
    data = {"teacher": run(jobs.ImportModelJob(source="random:llama", seed=9))}
    for purpose, rows in _rows().items():
        path = folder / f"{purpose}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        base = {"purpose": purpose, "source": str(path), "model": models["llama"]}
        data[purpose] = run(jobs.DataJob(heldout_fraction=0.2, **base))
        if purpose in ("sft", "preference"):
            data[f"{purpose}, half"] = run(jobs.DataJob(heldout_fraction=0.1, **base))
    return Inputs(models, rewards, data)


def _rows() -> dict[Any, list[dict[str, Any]]]:
    talks = [talk(i) for i in range(40)]
    return {
        "sft": [{"prompt": p, "completion": c} for p, c in talks],
        "preference": [
            {"prompt": p, "chosen": f"yes {c}", "rejected": f"no {c}"} for p, c in talks
        ],
        "unpaired": [
            {"prompt": p, "completion": f"{'no' if i % 3 else 'yes'} {c}", "label": i % 3 == 0}
            for i, (p, c) in enumerate(talks)
        ],
        "prompts": [{"prompt": p} for p, _ in talks],
        "pretrain": [{"text": f"{p}. {c}."} for p, c in talks],
    }
