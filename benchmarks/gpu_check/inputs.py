"""Models and data, made here: the machine has no network.

Tiny ones for whole stages come the way of the product, by its own stages `import_model` and `data`.
Large ones, for measuring, are written and published as they are; their rows are random token ids.
"""

from __future__ import annotations

import importlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.check import Check
from benchmarks.speed.workload import publish
from rlhf_core.jobs import DataJob, ImportModelJob, Job
from rlhf_core.runtime.context import StageContext

WORDS = ("apple", "river", "stone", "cloud", "green", "seven", "music", "paper")
TALKS = 80
END, PAD = 0, 1  # ids of the large models' special tokens
ROWS = 64  # of each of their data sets


def tiny(check: Check) -> dict[str, str]:
    """Digests of a llama of 0.2 million parameters, a reward model of it, and its data sets."""
    return check.once("tiny", lambda: _make_tiny(check))


def _make_tiny(check: Check) -> dict[str, str]:
    from rlhf_core.models.loading import new_scalar_model
    from rlhf_core.models.saving import save_scalar_model

    store, folder = check.store, fresh(check.folder / "tiny")
    made = {"model": _run(check, ImportModelJob(source="random:llama"))}
    for purpose, rows in _talks().items():
        path = folder / f"{purpose}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        job = DataJob(
            purpose=purpose,  # type: ignore[arg-type]
            source=str(path), model=made["model"], heldout_fraction=0.2,
        )  # fmt: skip
        made[purpose] = _run(check, job)
    source, target = store.fetch(made["model"]), fresh(folder / "reward")
    save_scalar_model(new_scalar_model(source, 0), target, source)
    made["reward_model"] = store.publish(target, kind="reward_model").digest
    return made


def _talks() -> dict[str, list[dict[str, Any]]]:
    """Rows of each purpose, of different lengths."""
    rows = []
    for i in range(TALKS):
        words = [WORDS[(i * k) % len(WORDS)] for k in range(1, 3 + i % 5)]
        rows.append((f"Say {' '.join(words)} number {i}", " ".join(reversed(words))))
    return {
        "sft": [{"prompt": p, "completion": c} for p, c in rows],
        "preference": [{"prompt": p, "chosen": f"yes {c}", "rejected": f"no {c}"} for p, c in rows],
        "unpaired": [
            {"prompt": p, "completion": f"{'no' if i % 3 else 'yes'} {c}", "label": i % 3 == 0}
            for i, (p, c) in enumerate(rows)
        ],
        "prompts": [{"prompt": p} for p, _ in rows],
        "pretrain": [{"text": f"{p}. {c}."} for p, c in rows],
    }


def _run(check: Check, job: Job) -> str:
    """Digest of what a stage makes."""
    folder = fresh(check.folder / "made" / job.key()[:16])
    context = StageContext(store=check.store, key=job.key(), folder=folder)
    artifact = importlib.import_module(job.module).run(job, context)
    return str(artifact.digest)


def large(check: Check) -> dict[str, Any]:
    """Digests of the large model, its reward model and data sets; sizes of its weights."""
    return check.once("large", lambda: _make_random(check, "large", check.sizes.length))


def medium(check: Check) -> dict[str, Any]:
    """The same of the model that runs out of memory."""
    return check.once("medium", lambda: _make_random(check, "medium", check.sizes.oom_length))


def _make_random(check: Check, name: str, length: int) -> dict[str, Any]:
    from benchmarks.speed.flops import shape_of

    folder = fresh(check.folder / name)
    config = getattr(check.sizes, name)
    parameters = write_model(folder / "model", config, check.device)
    chance = random.Random(0)
    words, count = config["vocab_size"], ROWS * (4 if check.on_gpu else 1)

    def ids(n: int) -> list[int]:
        return [chance.randrange(100, words) for _ in range(n)]

    def row(n: int) -> dict[str, Any]:
        return {"input_ids": ids(n), "trainable": [True] * n}

    rows = {
        "sft": [row(length) for _ in range(count)],
        "mixed": [row(chance.randint(length // 10, length)) for _ in range(count)],
        "prompts": [{"prompt_ids": ids(check.sizes.prompt)} for _ in range(count)],
    }
    made = {"model": check.store.publish(folder / "model", kind="model").digest}
    for purpose, values in rows.items():
        target = fresh(folder / purpose)
        made[purpose] = publish(
            check.store, target, "prompts" if purpose == "prompts" else "sft", values
        )
    if name == "large":
        made["reward_model"] = write_reward_model(check, folder / "model", fresh(folder / "reward"))
    return {
        "digests": made,
        "parameters": parameters,
        "shape": shape_of(folder / "model"),
        "config": json.loads((folder / "model" / "config.json").read_text()),
        "mixed_lengths": [len(r["input_ids"]) for r in rows["mixed"]],
    }


def write_model(folder: Path, config: dict[str, Any], device: str) -> int:
    """A random llama in bf16 with a vocabulary of made-up words; its number of parameters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<end>": END, "<pad>": PAD} | {f"w{i}": i for i in range(2, config["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", unk_token="w2"
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(
            LlamaConfig(**config, eos_token_id=END, pad_token_id=PAD, bos_token_id=None)
        ).to(torch.bfloat16)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": END, "pad_token_id": PAD, "do_sample": True})
    )
    return int(model.num_parameters())


def write_reward_model(check: Check, source: Path, folder: Path) -> str:
    """Digest of a reward model in bf16 with a random head."""
    from rlhf_core.models.loading import new_scalar_model
    from rlhf_core.models.saving import save_scalar_model

    save_scalar_model(new_scalar_model(source, 0, torch.bfloat16), folder, source)
    return str(check.store.publish(folder, kind="reward_model").digest)


def fresh(folder: Path) -> Path:
    """The folder, empty; what a process left that died in the middle goes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
