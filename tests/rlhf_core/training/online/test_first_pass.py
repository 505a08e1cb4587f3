"""Old log-probabilities that the first update finds, and layers that run once."""

import torch

from rlhf_core.training.online.first_pass import FirstPass


class Ranks:
    """The group of several ranks, of which this one is the first."""

    def __init__(self, *others):
        self.others = others

    def gather(self, value):
        return [value, *self.others]


class Trunk:
    """Counts its runs; its hidden states are the token ids."""

    def __init__(self):
        self.runs, self.seen = 0, []

    def run(self, input_ids, mask, index):
        self.runs += 1
        return input_ids.clone()

    def replaced_by(self, hidden):
        self.seen.append(hidden)
        return torch.no_grad()


def test_logprobs_of_all_ranks_fill_the_deferred_rows():
    first_pass = FirstPass(None, deferred=[0, 2, 3])
    assert first_pass.unfinished
    assert first_pass.defers([2, 0]) and not first_pass.defers([0, 1])
    old = torch.tensor([[0.0, 0.0], [-5.0, -6.0], [0.0, 0.0], [0.0, 0.0]])
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    first_pass.record([2], logprobs)
    other = ([3, 0], torch.tensor([[-3.0, -4.0], [-7.0, -8.0]]))
    whole = first_pass.complete(old, Ranks(other))
    assert whole.tolist() == [[-7.0, -8.0], [-5.0, -6.0], [-1.0, -2.0], [-3.0, -4.0]]
    assert not whole.requires_grad and old[2].tolist() == [0.0, 0.0], "the argument is unchanged"
    assert not first_pass.unfinished and not first_pass.defers([2])


def test_nothing_is_deferred_by_itself():
    first_pass = FirstPass(None)
    assert not first_pass.unfinished and not first_pass.defers([0])


def test_shared_layers_run_once_for_each_micro_batch():
    trunk = Trunk()
    first_pass = FirstPass(trunk)
    first, second = torch.tensor([[5, 6]]), torch.tensor([[7, 8]])
    for _ in range(2):
        for indices, ids in (([0], first), ([1], second)):
            with first_pass.shared_layers(indices, ids, ids > 0):
                pass
    assert trunk.runs == 2
    assert [h.tolist() for h in trunk.seen] == [[[5, 6]], [[7, 8]]] * 2
