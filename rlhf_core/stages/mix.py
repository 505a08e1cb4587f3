"""The stage `mix`: make one data set of several, and publish it."""

from __future__ import annotations

from rlhf_core.data.encoding.tokenizer import load_tokenizer
from rlhf_core.data.mix import mix
from rlhf_core.jobs import MixJob
from rlhf_core.model_files.remote_code import is_trusted
from rlhf_core.runtime.context import StageContext
from rlhf_core.store import Artifact


def run(job: MixJob, context: StageContext) -> Artifact | None:
    """Mix the data sets and publish the result. Rank 0 returns the artifact."""
    if not context.main:
        return None
    source = context.store.fetch(job.model)
    folders = [context.store.fetch(part.data) for part in job.mix]
    tokenizer = load_tokenizer(source, trust_remote_code=is_trusted(source))
    folder = context.scratch("dataset")
    card = mix(job, folders, tokenizer, folder)
    assert card.mixture is not None
    context.log(card.summary())
    if job.purpose != "pretrain":  # which counts packed sequences
        context.log(card.mixture.plan.describe([s.train for s in card.mixture.sources]))
    return context.publish(job, folder, card.metadata())
