"""Language modelling mixed into the updates of online algorithms (PPO-ptx, InstructGPT, eq. 2)."""

from __future__ import annotations

from typing import NamedTuple

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.jobs import OnlineJob
from rlhf_core.nn.padding import Batch
from rlhf_core.runtime.context import StageContext
from rlhf_core.system.seeds import derive_seed
from rlhf_core.training.batching import batch_rows, split_evenly
from rlhf_core.training.language_modelling import collate, trained_tokens
from rlhf_core.training.strategy import Strategy

SEED = 0x907  # of the order in which rows are mixed in


class PtxBatch(NamedTuple):
    """Language-modelling rows that go through the policy together with a micro-batch."""

    batch: Batch
    tokens: float  # trained tokens of the minibatch's rows on all ranks


def load_ptx(job: OnlineJob, context: StageContext) -> Rows | None:
    """Rows of the language-modelling loss, None where none is mixed in."""
    if job.ptx is None or job.ptx_coef == 0:
        return None
    return Rows(context.store.fetch(job.ptx), "train", purpose=("sft", "pretrain"))


def ptx_batches(
    job: OnlineJob,
    strategy: Strategy,
    rows: Rows | None,
    *,
    replies: int,
    update: int,
    micro_batches: int,
) -> list[PtxBatch | None]:
    """As many language-modelling rows as a minibatch has replies, one batch for each micro-batch
    of this rank; None in each place where nothing is mixed in.

    Args:
        replies: of the minibatch. update: its number since the stage began.
    """
    if rows is None:
        return [None] * micro_batches
    taken = rows.take(batch_rows(rows, replies, update, derive_seed(job.seed, SEED)))
    tokens = float(sum(trained_tokens(row) for row in taken))
    parts = split_evenly(
        [len(row["input_ids"]) for row in taken],
        strategy.rank, strategy.world_size, micro_batches,
    )  # fmt: skip
    return [PtxBatch(collate([taken[i] for i in part], strategy.device), tokens) for part in parts]
