"""Base, SFT and finished model on held-out data: the same prompts, the same seeds.

Writes evaluation.json (numbers) and samples.jsonl (every prompt with each model's reply). KL is
that of a model's own replies to the reference, in nats per reply: the model that the alignment
started from, else the base model. Without a reward model there are no rewards in it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
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
from rlhf_core.rollout.replies import Reply, fast_inference, sample_replies
from rlhf_core.runtime.context import StageContext
from rlhf_core.runtime.distributed import Group
from rlhf_core.store import Artifact
from rlhf_core.training.batching import split_batch
from rlhf_core.training.language_modelling import heldout_loss

Sequences = list[tuple[list[int], int]]  # prompt + reply, and the prompt's length


def run(job: EvaluateJob, context: StageContext) -> Artifact | None:
    """Sample, score, compare. Rank 0 returns the artifact."""
    group = Group(job.resources)
    store = context.store
    prompts = Rows(store.fetch(job.prompts), "heldout", purpose="prompts")
    if len(prompts) == 0:
        raise DataError(
            "The prompt data set holds no held-out prompts to evaluate on: raise "
            "data.prompts.heldout_fraction or give it more prompts."
        )
    sft_rows = None
    if job.sft_data is not None:
        sft_rows = Rows(store.fetch(job.sft_data), "heldout", purpose="sft")
    rows = prompts.take(list(range(min(job.max_prompts, len(prompts)))))
    prompt_ids = [r["prompt_ids"] for r in rows]
    digests = {name: getattr(job, name) for name in MODELS}
    folders = {name: store.fetch(digest) for name, digest in digests.items() if digest}
    start = "sft" if "sft" in folders else "base"
    micro = job.resources.micro_batch_size

    reference = Policy(load_causal_lm(folders[start])).requires_grad_(False).to(group.device)
    reward = None
    if job.reward_model is not None:
        reward = load_scalar_model(store.fetch(job.reward_model)).requires_grad_(False)
        reward.to(group.device)
    replies: dict[str, list[Reply]] = {}
    scores: dict[str, list[float]] = {}
    kl: dict[str, list[float]] = {}
    heldout: dict[str, Any] = {}
    for stream, (name, folder) in enumerate(folders.items()):
        model = reference
        if name != start:
            model = Policy(load_causal_lm(folder)).requires_grad_(False).to(group.device)
            share_frozen(reference, model, *([reward] if reward is not None else []))
        replies[name] = sample_replies(
            model.model, folder, prompt_ids, group, seed=job.seed, stream=stream,
            max_new_tokens=job.max_new_tokens, temperature=job.temperature,
        )  # fmt: skip
        sequences = [([*p, *r.ids], len(p)) for p, r in zip(prompt_ids, replies[name], strict=True)]
        with fast_inference(group):
            rewards, kl[name] = score_replies(
                sequences, model, reference, reward, group, micro, job.temperature
            )
        if reward is not None:
            scores[name] = rewards
        loss = {}
        if sft_rows is not None:
            with fast_inference(group):
                loss = heldout_loss(model, sft_rows, group, micro, None)
        if loss:
            heldout[name] = {
                "loss": loss["heldout_loss"], "perplexity": loss["heldout_perplexity"]
            }  # fmt: skip
        if reward is not None:
            context.log(f"{name}: mean reward {mean(scores[name]):.3f}")
    if not context.main:
        return None

    tokenizer = load_tokenizer(folders["policy"], is_trusted(folders["policy"]))
    texts = {name: [r.text(tokenizer) for r in replies[name]] for name in replies}
    shown = [prompt_text(r["prompt"]) for r in rows]
    gold = judge_all(job, shown, texts)
    result: dict[str, Any] = {
        "models": {
            name: {
                **(spread("reward", scores[name]) if scores else {}),
                **(spread("gold", gold[name]) if gold else {}),
                **spread("kl", kl[name]),
                "length_mean": mean([len(r.ids) for r in replies[name]]),
                "finished": mean([r.finished for r in replies[name]]),
                "n": len(rows),
            }
            for name in folders
        },
        "win_rate": {"reward": win_rate(scores["policy"], scores[start])} if scores else {},
        "heldout": heldout,
        "reward_model": {},
    }
    if job.reward_model is not None:
        trained = store.get(job.reward_model).metadata.get("metrics", {})
        result["reward_model"] = trained.get("heldout", {})
    if gold:
        result["win_rate"]["gold"] = win_rate(gold["policy"], gold[start])
        gains = [a - b for a, b in zip(gold["policy"], gold[start], strict=True)]
        result["gold_gain"] = {"mean": mean(gains), "se": standard_error(gains)}
    if job.judge_endpoint is not None:
        judge = EndpointJudge(job.judge_endpoint)
        wins = judge.compare(shown, texts["policy"], texts[start])
        result["win_rate"]["judge"] = win_rate(wins, [0.5] * len(wins))
        result["judge"] = {"model": job.judge_endpoint.model, **judge.counts}
        context.log(f"{job.judge_endpoint.model} prefers the policy's reply on {mean(wins):.0%}")
    folder = context.scratch("result")
    (folder / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    write_samples(folder / "samples.jsonl", shown, texts, scores, gold)
    return context.publish(job, folder, {"metrics": result})


MODELS = ("base", "sft", "policy")
"""Names in the report, and fields of the job."""


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
    found: list[tuple[int, tuple[float, float]]] = []
    for positions in split_batch([len(s) for s, _ in sequences], group.rank, group.size, micro):
        input_ids, mask, loss_mask = mark_from(
            [sequences[p][0] for p in positions], [sequences[p][1] for p in positions],
            group.device,
        )  # fmt: skip
        scores = kl = torch.zeros(len(positions))
        if reward is not None:
            scores = reward(input_ids, mask)
        if policy is not reference:
            gap = policy(input_ids, mask, loss_mask, temperature) - reference(
                input_ids, mask, loss_mask, temperature
            )
            kl = gap.sum(dim=1)
        pairs = zip(scores.tolist(), kl.tolist(), strict=True)
        found += zip(positions, pairs, strict=True)
    merged = group.in_order(found)
    return [score for score, _ in merged], [kl for _, kl in merged]


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
    """What a person sees of a prompt: its only user turn, or the whole talk."""
    turns = [m for m in json.loads(messages) if m["role"] != "system"]
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n".join(f"{m['role']}: {m['content']}" for m in turns)


def write_samples(
    path: Path,
    prompts: Sequence[str],
    texts: dict[str, list[str]],
    scores: dict[str, list[float]],
    gold: dict[str, list[float]],
) -> None:
    """One line per prompt: prompt, each model's reply, reward and gold scores."""
    with path.open("w") as file:
        for i, prompt in enumerate(prompts):
            line: dict[str, Any] = {"prompt": prompt}
            line |= {name: texts[name][i] for name in texts}
            if scores:
                line["reward"] = {name: round(scores[name][i], 4) for name in scores}
            if gold:
                line["gold"] = {name: round(gold[name][i], 4) for name in gold}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
