"""The stage `data`: prepare a data set and publish it."""

from __future__ import annotations

from rlhf_core.data.encoding.render import UNLISTED
from rlhf_core.data.encoding.tokenizer import load_tokenizer
from rlhf_core.data.fingerprint import check_unchanged
from rlhf_core.data.prepare import data_settings, prepare
from rlhf_core.jobs import DataJob
from rlhf_core.model_files.remote_code import is_trusted
from rlhf_core.runtime.context import StageContext
from rlhf_core.store import Artifact


def run(job: DataJob, context: StageContext) -> Artifact | None:
    """Prepare the data set and publish it. Rank 0 returns the artifact."""
    if not context.main:
        return None
    check_unchanged(data_settings(job), job.fingerprint)
    source = context.store.fetch(job.model)
    tokenizer = load_tokenizer(source, trust_remote_code=is_trusted(source))
    folder = context.scratch("dataset")
    card = prepare(job, tokenizer, folder, log=context.log, store=context.store)
    context.log(card.summary())
    if unused := [note.removesuffix(" not used") for note in card.notes if "not used" in note]:
        context.log(f"not used of these rows: {', '.join(unused)}")
    if unlisted := card.notes.get(UNLISTED):
        context.log(f"{unlisted:,} rows have {UNLISTED}. The model is not told what it may call")
    if card.left_out:
        shown = ", ".join(f"{name} ({why})" for name, why in list(card.left_out.items())[:5])
        more = f", {len(card.left_out) - 5:,} more" if len(card.left_out) > 5 else ""
        context.log(f"left out of the source: {shown}{more}")
    return context.publish(job, folder, card.metadata())
