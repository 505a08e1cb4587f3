"""Preference pairs: several replies to a prompt, compared by a labeller (InstructGPT, step 2).

The labeller (a lexicon, a reward model, or a judge behind an endpoint) takes the place of a person.
Every two replies to a training prompt that it can tell apart (where it gives scores: by
`min_margin`) become a pair. A held-out prompt gives one pair, its best and worst reply, so that
held-out pairs are independent and an interval on their number is valid. Comparisons that are too
close are counted.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.dataset.writer import write_dataset
from rlhf_core.data.rows.row import message_text
from rlhf_core.errors import DataError
from rlhf_core.jobs import EndpointJudgeSettings, LabelJob
from rlhf_core.judges.lexicon import get_judge
from rlhf_core.rollout.replies import Reply, fast_inference, inference_dtype, sample_replies
from rlhf_core.runtime.context import StageContext
from rlhf_core.runtime.distributed import Group
from rlhf_core.stages.label_judge import PairJudge, RubricJudge, better_and_worse
from rlhf_core.stages.sampled_model import load_sampled
from rlhf_core.store import Artifact
from rlhf_core.training.ensemble import load_ensemble
from rlhf_core.training.scoring import score_sequences

Row = dict[str, Any]


def run(job: LabelJob, context: StageContext) -> Artifact | None:
    """Sample, compare, write the pairs. Rank 0 returns the artifact."""
    group = Group(job.resources)
    source, tokenizer, model = load_sampled(job.model, context, group)
    prompts = context.store.fetch(job.prompts)
    labeller = make_labeller(job, context, group, tokenizer)

    pairs: dict[str, list[Row]] = {}
    counts: dict[str, int] = {}
    rows_of = {split: Rows(prompts, split, purpose="prompts") for split in ("train", "heldout")}
    for stream, (split, rows) in enumerate(rows_of.items()):
        wanted = job.max_prompts if split == "train" else job.max_heldout_prompts
        items = rows.take(list(range(min(wanted, len(rows)))))
        n = job.samples_per_prompt
        repeated = [r["prompt_ids"] for r in items for _ in range(n)]
        replies = sample_replies(
            model, source, repeated, group, seed=job.seed, stream=stream,
            max_new_tokens=job.max_new_tokens, temperature=job.temperature,
        )  # fmt: skip
        decided = labeller.decide([r for r in items for _ in range(n)], replies, split == "heldout")
        if not context.main:
            continue
        pairs[split] = []
        for i, (item, (kept, too_close)) in enumerate(zip(items, decided, strict=True)):
            candidates = replies[i * n :][:n]
            for b, w, margin in kept:
                carried = {"margin": margin} if job.margins else {}
                pairs[split].append(pair(item, candidates[b], candidates[w], tokenizer) | carried)
            counts[f"{split}_too_close"] = counts.get(f"{split}_too_close", 0) + too_close
        counts[f"{split}_prompts"] = len(items)
        counts[f"{split}_pairs"] = len(pairs[split])
        context.log(f"{split}: {len(items)} prompts, {len(pairs[split])} pairs")
    counts |= {f"judge_{name}": count for name, count in labeller.totals().items()}
    if not context.main:
        return None
    if not pairs["train"]:
        raise DataError(
            f"The labeller {job.labeller_name} could not tell the replies of any of "
            f"{counts['train_prompts']} prompts apart by {job.min_margin}: lower "
            "min_margin, raise samples_per_prompt or max_new_tokens (of data.preference, or of "
            "data.rounds where there are rounds)."
        )
    folder = context.scratch("result")
    write_pairs(folder, pairs, counts, job)
    return context.publish(job, folder, {"sampled_from": job.model, "metrics": counts})


Decision = tuple[list[tuple[int, int, float]], int]
"""Of the replies to a prompt: (better, worse, margin) for each pair, positions; and how many
comparisons were too close."""


class Labeller(Protocol):
    """Who compares replies."""

    def decide(self, rows: list[Row], replies: list[Reply], best_worst: bool) -> list[Decision]:
        """Which replies to each of P prompts become pairs, on every rank. Every rank calls.

        Args:
            rows, replies: P x n, those to one prompt are neighbours.
            best_worst: only the best against the worst, else every two.
        """

    def totals(self) -> dict[str, int]:
        """What it took so far: name -> count. Every rank calls."""


class ByScores:
    """A labeller that gives each reply a score.

    Args:
        score: of replies, on every rank, from their rows and themselves.
        totals: see `Labeller`.
    """

    def __init__(
        self,
        job: LabelJob,
        score: Callable[[list[Row], list[Reply]], list[float]],
        totals: Callable[[], dict[str, int]] = dict,
    ) -> None:
        self.job, self.score, self.totals = job, score, totals

    def decide(self, rows: list[Row], replies: list[Reply], best_worst: bool) -> list[Decision]:
        """See `Labeller`."""
        n, all_scores = self.job.samples_per_prompt, self.score(rows, replies)
        found: list[Decision] = []
        for start in range(0, len(replies), n):
            scores = all_scores[start : start + n]
            kept, too_close = compare(scores, self.job.min_margin, best_worst=best_worst)
            found.append(([(b, w, scores[b] - scores[w]) for b, w in kept], too_close))
        return found


class ByComparison:
    """A labeller that compares every two replies; margins are 1."""

    def __init__(self, job: LabelJob, judge: PairJudge, tokenizer: Any) -> None:
        self.job, self.judge, self.tokenizer = job, judge, tokenizer

    def decide(self, rows: list[Row], replies: list[Reply], best_worst: bool) -> list[Decision]:
        """See `Labeller`."""
        n, texts = self.job.samples_per_prompt, [r.text(self.tokenizer) for r in replies]
        groups = [texts[start : start + n] for start in range(0, len(texts), n)]
        found: list[Decision] = []
        for results in self.judge.compare(rows[::n], groups):
            kept, ties = better_and_worse(results, n, best_worst=best_worst)
            found.append(([(b, w, 1.0) for b, w in kept], ties))
        return found

    def totals(self) -> dict[str, int]:
        """See `Labeller`."""
        return self.judge.totals()


def make_labeller(job: LabelJob, context: StageContext, group: Group, tokenizer: Any) -> Labeller:
    """The labeller that the job names."""
    if job.labeller == "reward_model":
        reward = load_ensemble(job, context.store, inference_dtype(group.device), group.device)
        assert reward is not None
        micro = job.resources.micro_batch_size

        def score(rows: list[Row], replies: list[Reply]) -> list[float]:
            whole = [[*row["prompt_ids"], *r.ids] for row, r in zip(rows, replies, strict=True)]
            with fast_inference(group):
                return score_sequences(reward, whole, group, micro)

        return ByScores(job, score)
    if isinstance(job.judge, EndpointJudgeSettings):
        return ByComparison(job, PairJudge(job.judge, group), tokenizer)
    if job.judge is not None:
        rubric = RubricJudge(job.judge, group, context.folder / "reward_answers")
        context.closing.callback(rubric.close)

        def rate(rows: list[Row], replies: list[Reply]) -> list[float]:
            texts = [reply.text(tokenizer) for reply in replies]
            return rubric.rate(rows, texts, [reply.finished for reply in replies])

        return ByScores(job, rate, rubric.totals)
    judge = get_judge(job.labeller)

    def read(rows: list[Row], replies: list[Reply]) -> list[float]:
        prompts = [message_text(json.loads(row["prompt"])[-1]) for row in rows]
        return [judge(p, r.text(tokenizer)) for p, r in zip(prompts, replies, strict=True)]

    return ByScores(job, read)


def compare(
    scores: list[float], min_margin: float, *, best_worst: bool
) -> tuple[list[tuple[int, int]], int]:
    """Which replies become pairs.

    Args:
        scores: the labeller's, one per reply.
        min_margin: least difference of a pair; equal scores never make one.
        best_worst: only the best against the worst, else every two.

    Returns:
        (better, worse) positions, and how many comparisons were too close.
    """
    order = sorted(range(len(scores)), key=lambda j: -scores[j])
    candidates = [(order[0], order[-1])] if best_worst else itertools.combinations(order, 2)
    kept, too_close = [], 0
    for better, worse in candidates:
        margin = scores[better] - scores[worse]
        if margin > 0 and margin >= min_margin:
            kept.append((better, worse))
        else:
            too_close += 1
    return kept, too_close


def pair(item: Row, chosen: Reply, rejected: Reply, tokenizer: Any) -> Row:
    """One row of the preference data set."""
    return {
        "prompt_ids": item["prompt_ids"],
        "chosen_ids": chosen.ids,
        "rejected_ids": rejected.ids,
        "prompt": item["prompt"],
        "chosen": chosen.text(tokenizer),
        "rejected": rejected.text(tokenizer),
        "row": item["row"],
    }


def write_pairs(
    folder: Any, pairs: dict[str, Iterable[Row]], counts: dict[str, int], job: LabelJob
) -> None:
    """The data set, with its card."""
    card = {
        "purpose": "preference",
        "source": f"sampled from model {job.model[:12]}, compared by {job.labeller_name}",
        "counts": counts,
    }
    write_dataset(folder, "preference", pairs, card, ("margin",) if job.margins else ())
