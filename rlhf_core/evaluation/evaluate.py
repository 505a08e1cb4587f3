"""Base, SFT and finished model on held-out data: the same prompts, the same seeds.

Writes evaluation.json (numbers) and samples.jsonl (every prompt with each model's reply). KL is
that of a model's own replies to the reference, in nats per reply: the model that the alignment
started from, else the base model. Without a reward model there are no rewards.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.encoding.tokenizer import load_tokenizer
from rlhf_core.errors import DataError
from rlhf_core.evaluation.statistics import mean, spread, standard_error, win_rate
from rlhf_core.jobs import EvaluateJob
from rlhf_core.judges.endpoint import EndpointJudge
from rlhf_core.judges.lexicon import get_judge
from rlhf_core.model_files.remote_code import is_trusted
from rlhf_core.models.loading import load_causal_lm, load_scalar_model
from rlhf_core.nn.layers import share_frozen
from rlhf_core.nn.modules import Policy, ScalarModel
from rlhf_core.nn.padding import mark_from
from rlhf_core.rollout.replies import Reply, fast_inference, inference_dtype, sample_replies
from rlhf_core.rollout.variety import variety
from rlhf_core.runtime.context import StageContext
from rlhf_core.runtime.distributed import Group
from rlhf_core.store import Artifact, Store
from rlhf_core.training.batching import split_batch
from rlhf_core.training.language_modelling import heldout_loss
from rlhf_core.training.reading import read_rows

Sequences = list[tuple[list[int], int]]  # prompt + reply, and the prompt's length


MODELS = ("base", "sft", "policy")
"""Names in the report, and fields of the job."""


@dataclass(frozen=True)
class Inputs:
    """What an evaluation reads.

    Attributes:
        rows: held-out prompts.
        sft_rows: held-out rows for the language-modelling loss, if the job names a data set.
        folders: name in `MODELS` -> the model's files.
        start: the model that the alignment started from: the reference.
    """

    rows: list[dict[str, Any]]
    sft_rows: Rows | None
    folders: dict[str, Path]
    start: str


@dataclass(frozen=True)
class Measured:
    """What was measured of one model, with an entry for each prompt.

    Attributes:
        rewards: of the reward model; empty without one.
        kl: to the reference, nats per reply.
        heldout: loss and perplexity; empty without held-out rows.
    """

    replies: list[Reply]
    rewards: list[float]
    kl: list[float]
    heldout: dict[str, float]


def run(job: EvaluateJob, context: StageContext) -> Artifact | None:
    """Sample, score, compare. Rank 0 returns the artifact.

    Raises:
        DataError: no prompts were held out.
    """
    group = Group(job.resources)
    inputs = load_inputs(job, context.store)
    reference = load_policy(inputs.folders[inputs.start], group)
    reward = None
    if job.reward_model is not None:
        folder = context.store.fetch(job.reward_model)
        reward = load_scalar_model(folder, inference_dtype(group.device)).requires_grad_(False)
        reward.to(group.device)
    found: dict[str, Measured] = {}
    for stream, (name, folder) in enumerate(inputs.folders.items()):
        model = reference
        if name != inputs.start:
            model = load_policy(folder, group)
            share_frozen(reference, model, *([reward] if reward is not None else []))
        found[name] = measure(job, inputs, group, folder, stream, model, reference, reward)
        if reward is not None:
            context.log(f"{name}: mean reward {mean(found[name].rewards):.3f}")
    if not context.main:
        return None

    tokenizer = load_tokenizer(inputs.folders["policy"], is_trusted(inputs.folders["policy"]))
    texts = {name: [r.text(tokenizer) for r in m.replies] for name, m in found.items()}
    prompts = [prompt_text(row["prompt"]) for row in inputs.rows]
    gold = judge_all(job, prompts, texts)
    result = numbers(found, gold, inputs.start)
    for name, replies in texts.items():
        result["models"][name] |= variety(replies)
    if job.reward_model is not None:
        trained = context.store.get(job.reward_model).metadata.get("metrics", {})
        result["reward_model"] = trained.get("heldout", {})
    if job.judge_endpoint is not None:
        judge = EndpointJudge(job.judge_endpoint)
        wins = judge.compare(prompts, texts["policy"], texts[inputs.start])
        result["win_rate"]["judge"] = win_rate(wins, [0.5] * len(wins))
        result["judge"] = {"model": job.judge_endpoint.model, **judge.counts}
        context.log(f"{job.judge_endpoint.model} prefers the policy's reply on {mean(wins):.0%}")
    folder = context.scratch("result")
    (folder / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    write_samples(folder / "samples.jsonl", prompts, texts, found, gold)
    return context.publish(job, folder, {"metrics": result})


def load_inputs(job: EvaluateJob, store: Store) -> Inputs:
    """Fetch the models' files, the held-out prompts and the held-out rows.

    Raises:
        DataError: no prompts were held out.
    """
    prompts = Rows(store.fetch(job.prompts), "heldout", purpose="prompts")
    if len(prompts) == 0:
        raise DataError(
            "The prompt data set holds no held-out prompts to evaluate on: raise "
            "data.prompts.heldout_fraction or give it more prompts."
        )
    sft_rows = None
    if job.sft_data is not None:
        sft_rows = Rows(store.fetch(job.sft_data), "heldout", purpose="sft")
    digests = {name: getattr(job, name) for name in MODELS}
    folders = {name: store.fetch(digest) for name, digest in digests.items() if digest}
    rows = prompts.take(list(range(min(job.max_prompts, len(prompts)))))
    return Inputs(rows, sft_rows, folders, "sft" if "sft" in folders else "base")


def load_policy(folder: Path, group: Group) -> Policy:
    """A frozen model on this rank's device."""
    model = load_causal_lm(folder, inference_dtype(group.device))
    return Policy(model).requires_grad_(False).to(group.device)


def measure(
    job: EvaluateJob,
    inputs: Inputs,
    group: Group,
    folder: Path,
    stream: int,
    model: Policy,
    reference: Policy,
    reward: ScalarModel | None,
) -> Measured:
    """Sample one model's replies to all prompts and score them, by all ranks together.

    Args:
        folder: the model's files. stream: a number of its own, for the random numbers.
    """
    micro = job.resources.micro_batch_size
    prompt_ids = [row["prompt_ids"] for row in inputs.rows]
    replies = sample_replies(
        model.model, folder, prompt_ids, group, seed=job.seed, stream=stream,
        max_new_tokens=job.max_new_tokens, temperature=job.temperature,
    )  # fmt: skip
    sequences = [([*p, *r.ids], len(p)) for p, r in zip(prompt_ids, replies, strict=True)]
    heldout = {}
    with fast_inference(group):
        rewards, kl = score_replies(
            sequences, model, reference, reward, group, micro, job.temperature
        )
        if inputs.sft_rows is not None:
            heldout = heldout_loss(model, inputs.sft_rows, group, micro, None)
    return Measured(replies, rewards if reward is not None else [], kl, heldout)


def numbers(found: dict[str, Measured], gold: dict[str, list[float]], start: str) -> dict[str, Any]:
    """The report's numbers of each model, and of the policy beside the model that it started from.

    Args:
        gold: the judge's scores by model; empty without a judge.
    """
    policy, reference = found["policy"], found[start]
    result: dict[str, Any] = {
        "models": {
            name: {
                **(spread("reward", m.rewards) if m.rewards else {}),
                **(spread("gold", gold[name]) if gold else {}),
                **spread("kl", m.kl),
                "length_mean": mean([len(r.ids) for r in m.replies]),
                "finished": mean([r.finished for r in m.replies]),
                "n": len(m.replies),
            }
            for name, m in found.items()
        },
        "win_rate": {},
        "heldout": {
            name: {"loss": m.heldout["heldout_loss"], "perplexity": m.heldout["heldout_perplexity"]}
            for name, m in found.items()
            if m.heldout
        },
        "reward_model": {},
    }
    if policy.rewards:
        result["win_rate"]["reward"] = win_rate(policy.rewards, reference.rewards)
    if gold:
        result["win_rate"]["gold"] = win_rate(gold["policy"], gold[start])
        gains = [a - b for a, b in zip(gold["policy"], gold[start], strict=True)]
        result["gold_gain"] = {"mean": mean(gains), "se": standard_error(gains)}
    return result


@torch.no_grad()
def score_replies(
    sequences: Sequences,
    policy: Policy,
    reference: Policy,
    reward: ScalarModel | None,
    group: Group,
    micro: int,
    temperature: float,
) -> tuple[list[float], list[float]]:
    """Reward and KL to the reference (k1, nats) of every sequence, in order, on every rank.

    Without a reward model the first list is of zeros.
    """
    rewards, kls = [], []
    for indices in split_batch([len(s) for s, _ in sequences], group, micro):
        ids, prompt_lengths = zip(*(sequences[i] for i in indices), strict=True)
        batch = mark_from(ids, prompt_lengths, group.device)  # (b,S) each
        scores = kl = torch.zeros(len(indices), device=group.device)  # (b,)
        if reward is not None:
            scores = reward(batch.input_ids, batch.mask, batch.index)  # (b,)
        if policy is not reference:
            log_ratio = policy(*batch, temperature) - reference(*batch, temperature)  # (b,S)
            kl = log_ratio.sum(dim=1)  # (b,)
        rewards.append((indices, scores))
        kls.append((indices, kl))
    return group.in_order(read_rows(rewards)), group.in_order(read_rows(kls))


def judge_all(
    job: EvaluateJob, prompts: Sequence[str], texts: dict[str, list[str]]
) -> dict[str, list[float]]:
    """The gold judge's score of every reply; empty without a judge."""
    if job.judge == "none":
        return {}
    judge = get_judge(job.judge)
    return {
        name: [judge(p, t) for p, t in zip(prompts, replies, strict=True)]
        for name, replies in texts.items()
    }


def prompt_text(messages: str) -> str:
    """A prompt as text for people: its only user turn, or the whole conversation."""
    turns = [m for m in json.loads(messages) if m["role"] != "system"]
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n".join(f"{m['role']}: {m['content']}" for m in turns)


def write_samples(
    path: Path,
    prompts: Sequence[str],
    texts: dict[str, list[str]],
    found: dict[str, Measured],
    gold: dict[str, list[float]],
) -> None:
    """One line per prompt: prompt, each model's reply, reward and gold scores."""
    rewards = {name: m.rewards for name, m in found.items() if m.rewards}
    with path.open("w") as file:
        for i, prompt in enumerate(prompts):
            line: dict[str, Any] = {"prompt": prompt}
            line |= {name: texts[name][i] for name in texts}
            if rewards:
                line["reward"] = {name: round(rewards[name][i], 4) for name in rewards}
            if gold:
                line["gold"] = {name: round(gold[name][i], 4) for name in gold}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
