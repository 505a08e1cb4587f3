"""Base, SFT and finished model on held-out data: the same prompts, the same settings.

Writes evaluation.json (numbers.py has its form), samples.jsonl and questions.jsonl. KL is that of a
model's own replies to the reference, in nats per reply: the model that the alignment started from,
else the base model. Without a reward model and rules there are no rewards.
"""

from __future__ import annotations

import json
from pathlib import Path

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.dataset.writer import prompt_text
from rlhf_core.data.encoding.tokenizer import load_tokenizer
from rlhf_core.data.overlap.datasets import contamination
from rlhf_core.errors import DataError
from rlhf_core.evaluation.measure import Inputs, Measured, measure
from rlhf_core.evaluation.numbers import beside, marked, numbers
from rlhf_core.evaluation.questions import is_right, questions
from rlhf_core.evaluation.samples import write_answers, write_samples
from rlhf_core.evaluation.scored import Scorer
from rlhf_core.evaluation.statistics import mean
from rlhf_core.jobs import EvaluateJob
from rlhf_core.jobs.results import GeneralQuestion
from rlhf_core.judges.endpoint import EndpointJudge
from rlhf_core.model_files.remote_code import is_trusted
from rlhf_core.models.loading import load_causal_lm
from rlhf_core.nn.layers import share_frozen
from rlhf_core.nn.modules import Policy
from rlhf_core.rollout.replies import inference_dtype
from rlhf_core.runtime.context import StageContext
from rlhf_core.runtime.distributed import Group
from rlhf_core.store import Artifact, Store
from rlhf_core.training.ensemble import load_ensemble

MODELS = ("base", "sft", "policy")
"""Names in the report, and fields of the job."""


def run(job: EvaluateJob, context: StageContext) -> Artifact | None:
    """Sample, score, compare. Rank 0 returns the artifact.

    Raises:
        DataError: no prompts were held out.
    """
    group = Group(job.resources)
    inputs = load_inputs(job, context.store)
    found = measure_all(job, inputs, group, context)
    if not context.main:
        return None

    score = Scorer(job, inputs.rows, inputs.tokenizer, context.log)
    sampled = {name: score(measured) for name, measured in found.items()}
    greedy = {name: score(m.greedy) for name, m in found.items() if m.greedy is not None}
    result = numbers(
        job, sampled, greedy, inputs.start, inputs.sft_rows.sources if inputs.sft_rows else {}
    )
    if job.reward_model is not None:
        trained = context.store.get(job.reward_model).metadata.get("metrics", {})
        result["reward_model"] = trained.get("heldout", {})
        if job.ensemble:
            result["reward_model"] |= {"members": len(job.reward_models)}
    if job.judge_endpoint is not None:
        judge = EndpointJudge(job.judge_endpoint)
        replies = sampled["policy"].texts, sampled[inputs.start].texts
        won = judge.compare(score.prompts, *replies)
        result["win_rate"]["judge"] = beside(won, *replies, job.seed)
        result["judge"] = {"model": job.judge_endpoint.model, **judge.counts}
        context.log(f"{job.judge_endpoint.model} prefers the policy's reply on {mean(won):.0%}")
    data = {name: context.store.fetch(digest) for name, digest in job.training_data().items()}
    measured = {"prompts": [prompt_text(row["prompt"]) for row in inputs.rows]}
    measured |= {"questions": [q.question for q in inputs.asked]} if inputs.asked else {}
    result["contamination"] = contamination(measured, data, inputs.tokenizer)
    folder = context.scratch("result")
    if inputs.asked:
        answers = {name: [r.text(inputs.tokenizer) for r in m.answers] for name, m in found.items()}
        right = {
            name: [is_right(*pair) for pair in zip(inputs.asked, texts, strict=True)]
            for name, texts in answers.items()
        }
        result["questions"], change = marked(right, inputs.start, job.seed)
        result["differences"]["questions"] = change
        write_answers(folder / "questions.jsonl", inputs.asked, answers, right)
    (folder / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    write_samples(folder / "samples.jsonl", score.prompts, sampled, greedy)
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
    start = "sft" if "sft" in folders else "base"
    tokenizer = load_tokenizer(folders["policy"], is_trusted(folders["policy"]))
    return Inputs(rows, sft_rows, questions_of(job), tokenizer, folders, start)


def measure_all(
    job: EvaluateJob, inputs: Inputs, group: Group, context: StageContext
) -> dict[str, Measured]:
    """Load one model after another and measure it; the reference and the reward models stay."""
    reference = load_policy(inputs.folders[inputs.start], group)
    reward = load_ensemble(job, context.store, inference_dtype(group.device), group.device)
    found: dict[str, Measured] = {}
    for stream, (name, folder) in enumerate(inputs.folders.items()):
        model = reference
        if name != inputs.start:
            model = load_policy(folder, group)
            share_frozen(reference, model, *(reward.members if reward is not None else ()))
        found[name] = measure(job, inputs, group, folder, stream, model, reference, reward)
        if reward is not None:
            context.log(f"{name}: mean score of the reward model {mean(found[name].rewards):.3f}")
        del model  # before the next one is loaded
    return found


def load_policy(folder: Path, group: Group) -> Policy:
    """A frozen model on this rank's device."""
    model = load_causal_lm(folder, inference_dtype(group.device))
    return Policy(model).requires_grad_(False).to(group.device)


def questions_of(job: EvaluateJob) -> tuple[GeneralQuestion, ...]:
    """The general questions of a job."""
    return questions() if job.questions == "builtin" else job.own_questions
