"""One optimizer step on a batch: what is read, when, and which rows a bad loss is told of."""

from types import SimpleNamespace

import pytest
import torch

from rlhf_core.errors import NonFinite
from rlhf_core.jobs import Resources
from rlhf_core.training import updates
from rlhf_core.training.strategy import Strategy

MICRO_BATCHES = [[0, 3], [1], [2, 4]]


@pytest.fixture(autouse=True)
def no_group_is_left():
    """Other tests in this process make groups of their own."""
    yield
    torch.distributed.destroy_process_group()


def start(monkeypatch):
    """A strategy with one weight of 2, on the CPU; readings of tensors are noted."""
    strategy = Strategy(Resources(device="cpu", threads=1), "fp32", 1e9)
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    module = torch.nn.ParameterList([weight])
    group = {"params": [weight], "lr": 0.5, "peak_lr": 0.5}
    strategy.prepare(module, torch.optim.SGD([group]))
    readings = []
    for name in ("item", "tolist", "__float__", "__bool__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda x, real=real: readings.append(x.numel()) or real(x)
        )
    return strategy, weight, readings


def update(strategy, loss):
    return updates.update_on_batch(strategy, SimpleNamespace(), 6, [{}] * 5, MICRO_BATCHES, loss)


def test_sums_and_step_by_hand(monkeypatch):
    strategy, weight, readings = start(monkeypatch)

    def loss(indices):
        return (weight * sum(indices)).sum(), {"rows": float(len(indices)), "two": weight[0]}

    before = len(readings)
    found = update(strategy, loss)
    assert len(readings) - before <= 4, "a fixed number per step, whatever the micro-batches"
    monkeypatch.undo()
    assert found == {"loss": 20.0, "rows": 5.0, "two": 6.0, "grad_norm": 10.0}
    assert weight.tolist() == [2.0 - 0.5 * 10]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_of_the_loss_that_is_not_finite_are_told_and_no_weight_changes(monkeypatch, bad):
    strategy, weight, _ = start(monkeypatch)
    told = []
    monkeypatch.setattr(updates, "failure", lambda *said: told.append(said) or NonFinite("saved"))

    def loss(indices):
        return (weight * (bad if indices == [1] else 1.0)).sum(), {}

    with pytest.raises(NonFinite, match="saved"):
        update(strategy, loss)
    monkeypatch.undo()
    [(error, _, step, rows, indices)] = told
    assert str(error) == f"the loss is {bad}" and (step, indices) == (7, [1]) and len(rows) == 5
    assert weight.tolist() == [2.0]
