"""Numbers of many micro-batches by one copy."""

import pytest
import torch

from rlhf_core.training.reading import detached, read_all, read_rows


def test_numbers_come_back_under_their_names_in_full():
    third = torch.tensor(1 / 3)
    found = [
        {"loss": third, "ptx": 0.5, "wide": torch.tensor(1 / 3, dtype=torch.float64)},
        {"loss": torch.tensor([2.0]), "ptx": 0.0, "wide": torch.tensor(3.0)},
    ]
    assert read_all(found) == [
        {"loss": third.item(), "ptx": 0.5, "wide": 1 / 3},
        {"loss": 2.0, "ptx": 0.0, "wide": 3.0},
    ]
    assert read_all([]) == [] and read_all([{"a": 1.0}]) == [{"a": 1.0}]


def test_one_reading_whatever_the_number_of_micro_batches(monkeypatch):
    readings = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: readings.append(x.shape) or tolist(x))
    read_all([{"loss": torch.tensor(1.0), "margin": torch.tensor(2.0)} for _ in range(7)])
    read_rows([([0, 2], torch.tensor([1.0, 2.0])), ([1], torch.tensor([3.0]))])
    assert readings == [(14,), (3,)]


def test_rows_have_their_positions():
    found = read_rows([([3, 0], torch.tensor([0.5, 1.5])), ([1], torch.tensor([2.5]))])
    assert found == [(3, 0.5), (0, 1.5), (1, 2.5)]
    assert read_rows([]) == []
    with pytest.raises(ValueError):
        read_rows([([3, 0, 1], torch.tensor([0.5, 1.5]))])


def test_detached_numbers_hold_no_graph():
    weight = torch.tensor(2.0, requires_grad=True)
    numbers = detached({"loss": weight * 3, "tokens": 4.0})
    assert not numbers["loss"].requires_grad and numbers["tokens"] == 4.0
