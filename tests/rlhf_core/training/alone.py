"""One process without a process group, a few pairs, and an oracle for log-probabilities."""

import contextlib
from types import SimpleNamespace

import torch

from rlhf_core.runtime.distributed import Group

CPU = torch.device("cpu")


class One(Group):
    """The group of one process, without a process group."""

    def __init__(self) -> None:
        self.rank, self.size, self.device = 0, 1, CPU


ALONE = SimpleNamespace(
    group=One(),
    device=CPU,
    autocast=contextlib.nullcontext,
)

PAIRS = [
    {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 2], "rejected_ids": [9, 10, 11, 2]},
    {"prompt_ids": [5], "chosen_ids": [12, 13, 2], "rejected_ids": [2]},
    {"prompt_ids": [20, 21], "chosen_ids": [22, 2], "rejected_ids": [23, 2]},
]


def logp(policy, prompt, response):
    """The oracle: the model's own logits, one sequence at a time and without padding."""
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logits = policy.model(input_ids=ids).logits[0].double()
    steps = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
    return float(steps[torch.arange(len(response)), torch.tensor(response)].sum())
