"""Best of n: several replies to a prompt, of which the best become demonstrations.

The first half of rejection sampling (RAFT, arXiv 2304.06767, algorithm 1; Llama 2, arXiv
2307.09288, section 3.2.3). With a rule that checks answers, `min_score` and a larger
`keep_per_prompt` it is RFT (arXiv 2308.01825): all different correct replies. The second half is
SFT on the data set that this stage publishes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.dataset.writer import write_dataset
from rlhf_core.errors import DataError
from rlhf_core.jobs.best_of_n import BestOfNJob
from rlhf_core.jobs.rewards import reward_names
from rlhf_core.rewards import Rules
from rlhf_core.rewards.services import Services
from rlhf_core.rollout.replies import Reply, fast_inference, inference_dtype, sample_replies
from rlhf_core.runtime.context import StageContext
from rlhf_core.runtime.distributed import Group
from rlhf_core.stages.sampled_model import load_sampled
from rlhf_core.store import Artifact
from rlhf_core.training.ensemble import load_ensemble
from rlhf_core.training.online.scores import weighted_sum
from rlhf_core.training.online.service_rewards import service_scores
from rlhf_core.training.scoring import score_sequences

Row = dict[str, Any]


@dataclass(frozen=True)
class Kept:
    """What is kept of the n replies to a prompt."""

    indices: list[int]  # of the kept replies, the best one first
    unfinished: int = 0  # replies that were cut at the length limit, and dropped
    repeated: int = 0  # replies that a better or earlier one equals
    too_low: int = 0  # replies below the bound


def run(job: BestOfNJob, context: StageContext) -> Artifact | None:
    """Sample, score, keep the best, write them. Rank 0 returns the artifact."""
    group = Group(job.resources)
    source, tokenizer, model = load_sampled(job.model, context, group)
    prompts = context.store.fetch(job.prompts)
    score = make_scorer(job, context, group, tokenizer)

    kept: dict[str, list[Row]] = {}
    counts: dict[str, float] = {}
    for stream, (split, limit) in enumerate(
        (("train", job.max_prompts), ("heldout", job.max_heldout_prompts))
    ):
        rows = Rows(prompts, split, purpose="prompts")
        items = rows.take(list(range(min(limit, len(rows)))))
        repeated = [row for row in items for _ in range(job.samples_per_prompt)]
        replies = sample_replies(
            model, source, [row["prompt_ids"] for row in repeated], group, seed=job.seed,
            stream=stream, max_new_tokens=job.max_new_tokens, temperature=job.temperature,
        )  # fmt: skip
        scores = score(repeated, replies)
        if context.main:
            kept[split], found = keep(job, items, replies, scores)
            counts |= {f"{split}_{name}": number for name, number in found.items()}
            context.log(
                f"{split}: {len(items)} prompts, {len(kept[split])} replies kept of {len(replies)}"
                f"{dropped(found)}"
            )
    if not context.main:
        return None
    if not kept["train"]:
        raise DataError(nothing_kept(job, counts))
    folder = context.scratch("result")
    card = {"source": f"best of {job.samples_per_prompt}, sampled from model {job.model[:12]}"}
    write_dataset(folder, "sft", kept, card | {"counts": counts}, ("score",))
    return context.publish(job, folder, {"sampled_from": job.model, "metrics": counts})


Scorer = Callable[[list[Row], list[Reply]], list[float]]
"""Scores of replies, on every rank, from the rows of their prompts and themselves."""


def make_scorer(job: BestOfNJob, context: StageContext, group: Group, tokenizer: Any) -> Scorer:
    """The weighted sum of the job's rewards."""
    rules = Rules(job.rewards, job.seed)
    weights = {
        name: r.weight for name, r in zip(reward_names(job.rewards), job.rewards, strict=True)
    }
    services = Services(job.rewards, context.folder / "reward_answers", group.rank, group.size)
    context.closing.callback(services.close)
    reward = load_ensemble(job, context.store, inference_dtype(group.device), group.device)
    micro = job.resources.micro_batch_size

    def by_rules(rows: list[Row], replies: list[Reply]) -> list[list[float]]:
        """(n replies) x (rules); each rank scores its share."""
        mine = range(group.rank, len(replies), group.size)
        found = rules.score(
            [json.loads(rows[i]["prompt"]) for i in mine],
            [tokenizer.decode(replies[i].ids, skip_special_tokens=True) for i in mine],
            [rows[i] for i in mine],
            [replies[i].finished for i in mine],
            [len(replies[i].ids) for i in mine],
        )
        return group.interleave([list(of_reply) for of_reply in zip(*found, strict=True)])

    def score(rows: list[Row], replies: list[Reply]) -> list[float]:
        components: dict[str, torch.Tensor] = {}
        if reward is not None and replies:
            whole = [[*row["prompt_ids"], *r.ids] for row, r in zip(rows, replies, strict=True)]
            with fast_inference(group):
                components["model"] = torch.tensor(score_sequences(reward, whole, group, micro))
        if rules.names and replies:
            columns = torch.tensor(by_rules(rows, replies), dtype=torch.float64)  # (n, rules)
            components |= dict(zip(rules.names, columns.unbind(1), strict=True))
        if services.names and replies:
            ids, finished = [r.ids for r in replies], [r.finished for r in replies]
            components |= service_scores(services, group, tokenizer, rows, ids, finished).scores
        return weighted_sum(components, weights).tolist() if components else []

    return score


def keep(
    job: BestOfNJob, items: Sequence[Row], replies: Sequence[Reply], scores: Sequence[float]
) -> tuple[list[Row], dict[str, float]]:
    """The rows of a split, and its counts; score_sampled is the mean score of all replies,
    score_kept of those that are kept."""
    n, rows = job.samples_per_prompt, []
    counts: Counter[str] = Counter()
    for number, item in enumerate(items):
        own = slice(number * n, (number + 1) * n)
        found = select(
            [r.ids for r in replies[own]], scores[own], [r.finished for r in replies[own]],
            keep=job.keep_per_prompt, min_score=job.min_score, unfinished=job.keep_unfinished,
        )  # fmt: skip
        for name in ("unfinished", "repeated", "too_low"):
            counts[name] += getattr(found, name)
        counts["prompts_without_reply"] += not found.indices
        rows += [demonstration(item, replies[own][i], scores[own][i]) for i in found.indices]
    means = {}
    if rows:
        means["score_kept"] = sum(row["score"] for row in rows) / len(rows)
        means["score_sampled"] = sum(scores) / len(scores)
    return rows, {"prompts": len(items), "replies": len(rows), **counts, **means}


def select(
    ids: Sequence[list[int]],
    scores: Sequence[float],
    finished: Sequence[bool],
    *,
    keep: int,
    min_score: float | None,
    unfinished: bool,
) -> Kept:
    """Which of the n replies to a prompt are kept: the best different ones.

    Args:
        ids: token ids of each reply. Equal ones count once.
        keep: at most so many; among equal scores the first sampled goes first.
        min_score: least score. unfinished: keep replies that were cut, too.
    """
    indices: list[int] = []
    seen: set[tuple[int, ...]] = set()
    cut = again = low = 0
    for i in sorted(range(len(scores)), key=lambda j: -scores[j]):
        if not (finished[i] or unfinished):
            cut += 1
        elif tuple(ids[i]) in seen:
            again += 1
        elif min_score is not None and scores[i] < min_score:
            low += 1
        else:
            indices.append(i)
        seen.add(tuple(ids[i]))
    return Kept(indices[:keep], cut, again, low)


def demonstration(item: Row, reply: Reply, score: float) -> Row:
    """One row of the data set: the loss covers the reply, with its end-of-turn token."""
    users = [m["content"] for m in json.loads(item["prompt"]) if m["role"] == "user"]
    return {
        "input_ids": [*item["prompt_ids"], *reply.ids],
        "trainable": [False] * len(item["prompt_ids"]) + [True] * len(reply.ids),
        "prompt": users[0] if users else "",
        "score": score,
        "row": item["row"],
    }


def dropped(counts: dict[str, float]) -> str:
    """Why replies of a split were not kept, in brackets; nothing where none of these is why."""
    why = (
        ("unfinished", "cut at max_new_tokens"),
        ("repeated", "repeated"),
        ("too_low", "below min_score"),
    )
    told = [f"{counts[name]:,.0f} {what}" for name, what in why if counts[name]]
    return f" ({', '.join(told)})" if told else ""


def nothing_kept(job: BestOfNJob, counts: dict[str, float]) -> str:
    """Why no training reply was kept, and what to do."""
    bound = "" if job.min_score is None else f", {counts['train_too_low']} below min_score"
    return (
        f"No reply to any of {counts['train_prompts']} prompts was kept: "
        f"{counts['train_unfinished']} of {counts['train_prompts'] * job.samples_per_prompt} were "
        f"cut at max_new_tokens ({job.max_new_tokens}){bound}. Raise "
        "rejection_sampling.max_new_tokens or samples_per_prompt, lower min_score, give easier "
        "prompts, or set keep_unfinished."
    )
