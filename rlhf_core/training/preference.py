"""Batches of replies for preference optimisation, and their log-probabilities.

A *reply* here is a prompt's token ids and a response's; a *pair* is a chosen and a rejected reply
to one prompt. A response's log-probability is the sum over its tokens, the end of turn included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.jobs import PreferenceJob
from rlhf_core.losses.reductions import Metrics, sequence_logps
from rlhf_core.nn.modules import Policy
from rlhf_core.nn.padding import Batch, TokenIndex, mark_from, rows_on
from rlhf_core.training.batching import Sampled, batch_rows, scoring_passes
from rlhf_core.training.reading import read_rows
from rlhf_core.training.strategy import Strategy

Reply = tuple[list[int], list[int]]  # prompt ids, response ids


def collate_replies(replies: Sequence[Reply], device: torch.device) -> Batch:
    """Replies, with their responses in the loss mask."""
    whole = [[*prompt, *response] for prompt, response in replies]
    return mark_from(whole, [len(prompt) for prompt, _ in replies], device)


def pair_replies(rows: Sequence[Mapping[str, Any]]) -> list[Reply]:
    """The chosen replies of b pairs, then the rejected ones, for one forward pass of both."""
    return [(r["prompt_ids"], r[key]) for key in ("chosen_ids", "rejected_ids") for r in rows]


def by_pair(values: Tensor) -> Tensor:
    """Values (2b,) in the order of `pair_replies` as (b,2): chosen, rejected."""
    return values.view(2, -1).t()


def pair_tokens(row: Mapping[str, Any]) -> int:
    """Tokens that go through the model for a pair."""
    return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])


def pair_response_lengths(rows: Rows) -> Tensor:
    """Tokens (n,2) of the chosen and rejected responses."""
    lengths = [torch.from_numpy(rows.lengths(key)) for key in ("chosen_ids", "rejected_ids")]
    return torch.stack(lengths, dim=1)


def visited(rows: int | Sampled, job: PreferenceJob, total: int) -> list[int]:
    """Numbers of the rows that `total` steps will train on, in order; fewer than all of them when
    max_steps ends the stage before the first epoch does, or where epochs are samples."""
    steps = (batch_rows(rows, job.batch_size, step, job.seed) for step in range(total))
    return sorted({number for numbers in steps for number in numbers})


@torch.no_grad()
def response_logps(
    module: Policy,
    lengths: Sequence[int],
    load: Callable[[list[int]], list[Reply]],
    strategy: Strategy,
    micro: int,
) -> Tensor:
    """Log-probabilities (n,) fp64 of n responses, computed by all ranks together.

    The same module and number of ranks give the same bits each time.

    Args:
        lengths: tokens of each of the n replies, prompt and response together.
        load: loads the replies with some of the numbers; they are never all in memory at once.
        micro: replies in one forward pass.
    """
    group = strategy.group
    found = []
    for numbers, counts in scoring_passes(lengths, group, micro):
        batch = collate_replies(load(numbers), strategy.device)
        with strategy.autocast():
            logps = sequence_logps(module(*batch), batch.loss_mask)  # (b,)
        if counts:
            found.append((numbers, logps))
    return torch.tensor(group.in_order(read_rows(found)), dtype=torch.float64)


def pair_logps(
    module: Policy, rows: Rows, numbers: Sequence[int], strategy: Strategy, micro: int
) -> Tensor:
    """Log-probabilities (n,2) of both responses of the pairs with these numbers.

    The other rows are NaN, so that no loss can use them by mistake.

    Args:
        micro: pairs in one forward pass.
    """
    result = torch.full((len(rows), 2), torch.nan, dtype=torch.float64)
    if not numbers:
        return result
    lengths = (torch.from_numpy(rows.lengths("prompt_ids")).unsqueeze(1)
               + pair_response_lengths(rows))[numbers].flatten().tolist()  # fmt: skip

    def load(indices: list[int]) -> list[Reply]:
        taken = rows.take([numbers[index // 2] for index in indices])
        keys = ("chosen_ids", "rejected_ids")
        return [(r["prompt_ids"], r[keys[p % 2]]) for r, p in zip(taken, indices, strict=True)]

    result[numbers] = response_logps(module, lengths, load, strategy, 2 * micro).view(-1, 2)
    return result


def heldout_metrics(loss: Tensor, metrics: Metrics) -> dict[str, float]:
    """A loss over all held-out rows, its accuracy, margin and (ORPO) nll, under their published
    names."""
    names = [name for name in ("accuracy", "margin", "nll") if name in metrics]
    return {"heldout_loss": float(loss), **{f"heldout_{n}": float(metrics[n]) for n in names}}


def by_source(
    sources: Mapping[str, Sequence[int]],
    measure: Callable[[list[int]], dict[str, float]],
    rows: Sequence[int],
) -> dict[str, float]:
    """Metrics of held-out rows, and NAME/SOURCE of those of each source that has some.

    Args:
        sources: numbers of the rows of each source of a mixture; empty for other data sets.
        measure: the metrics of some rows. rows: numbers of all rows.
    """
    found = measure(list(rows))
    for source, numbers in sources.items():
        if len(numbers):
            own = measure([int(number) for number in numbers])
            found |= {f"{name}/{source}": value for name, value in own.items()}
    return found


def pair_length(row: dict[str, Any]) -> int:
    """Tokens of the longer of the two sequences."""
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def collate_pairs(
    rows: Sequence[dict[str, Any]], device: torch.device
) -> tuple[Tensor, Tensor, TokenIndex]:
    """input_ids and mask (2b,S): the chosen sequences, then the rejected ones; and their index."""
    sequences = [
        [*r["prompt_ids"], *r[key]] for key in ("chosen_ids", "rejected_ids") for r in rows
    ]
    return rows_on(device, sequences)
