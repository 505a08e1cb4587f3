"""Which evaluation is the best one, and when a stage ends early, against hand values."""

from types import SimpleNamespace

import pytest

from rlhf_core.errors import DataError
from rlhf_core.training.selection import LOWEST_LOSS, Criterion, Selection
from tests.rlhf_core.training.alone import One


def evaluations(values, kls=None, every=2):
    """Lines of a stage that is evaluated every second step, with that of the untrained model."""
    lines = []
    for i, value in enumerate(values):
        line = {"step": every * i, "total": 100, "time": 0.0, "heldout_reward": value}
        lines += [{"step": line["step"] - 1, "reward": 9.0}] if i else []
        lines.append(line | ({} if kls is None else {"heldout_kl": kls[i]}))
    return lines


REWARDS = [0.1, 0.3, 0.9, 0.5, 0.7]
KLS = [0.0, 1.0, 4.0, 2.5, 3.0]


@pytest.mark.parametrize(
    ("budget", "step", "since"),
    [(None, 4, 2), (4.0, 4, 2), (3.0, 8, 0), (2.9, 6, 1), (1.0, 2, 3), (0.5, 2, 3)],
)
def test_best_is_the_highest_within_the_budget(budget, step, since):
    criterion, lines = Criterion("heldout_reward", True, budget), evaluations(REWARDS, KLS)
    best = criterion.best(lines)
    assert (best["step"], criterion.since_best(lines)) == (step, since)
    assert criterion.within(best) == (budget != 0.5), "the lowest KL, where none is within"


def test_best_of_a_loss_is_the_lowest_and_of_equal_ones_the_first():
    lines = [{"step": i, "heldout_loss": x} for i, x in enumerate([0.5, 2.0, 1.0, 1.0, 1.5])]
    assert LOWEST_LOSS.best(lines)["step"] == 2, "step 0 is the untrained model"
    assert LOWEST_LOSS.since_best(lines) == 2
    assert LOWEST_LOSS.best(lines[:1]) is None and LOWEST_LOSS.since_best([]) == 0
    broken = [{"step": 1, "heldout_loss": float("nan")}, *lines[1:2]]
    assert LOWEST_LOSS.best(broken)["heldout_loss"] == 2.0


@pytest.fixture
def made():
    """lines, settings -> the selection of a stage that has logged them, and what it says."""

    def make(lines, budget=None, **settings):
        said = []
        context = SimpleNamespace(main=True, read_metrics=lambda: lines, log=said.append)
        strategy = SimpleNamespace(group=One())
        checkpointer = SimpleNamespace(
            context=context, strategy=strategy, job=SimpleNamespace(algorithm="ppo")
        )
        values = {"eval_every": 2, "patience": None, "selects": True} | settings
        criterion = Criterion("heldout_reward", True, budget)
        return Selection(SimpleNamespace(**values), checkpointer, criterion, 8), said

    return make


@pytest.mark.parametrize(("patience", "left"), [(None, 2), (3, 2), (2, 0), (1, 0)])
def test_patience_counts_evaluations_since_the_best(made, patience, left):
    selection, said = made(evaluations(REWARDS, KLS), patience=patience)
    assert len(list(selection.steps(8, 10))) == left
    assert [line.partition(":")[0] for line in said] == ["stopped after step 8"] * (left == 0)


def test_result_has_the_metrics_of_its_weights(made):
    selection, said = made(evaluations(REWARDS, KLS), budget=2.9)
    assert selection.result() == {
        "steps": 6, "heldout_reward": 0.5, "heldout_kl": 2.5,
        "best": {"step": 6, "by": "heldout_reward", "within": True},
    }  # fmt: skip
    assert said == [
        "the best evaluation is that after step 6 (heldout_reward 0.5, KL 2.5 nats a reply); the "
        "result has the weights after step 6"
    ]
    last = made(evaluations(REWARDS, KLS), budget=2.9, selects=False)[0].result()
    assert (last["steps"], last["heldout_reward"], last["best"]["step"]) == (8, 0.7, 6)
    plain = made([{"step": 1, "kl": 2.0}], eval_every=None, selects=False)[0].result()
    assert plain == {"steps": 1, "kl": 2.0}


def test_result_that_is_no_good_is_named(made):
    selection, said = made(evaluations(REWARDS, KLS), budget=0.5)
    assert selection.result()["best"] == {"step": 2, "by": "heldout_reward", "within": False}
    assert "WARNING: no evaluation is within ppo.kl_budget 0.5" in said[1] and len(said) == 2
    selection, said = made(evaluations([0.4, 0.3, 0.4], [0.0, 1.0, 2.0]))
    assert selection.result()["steps"] == 4
    assert "better than that of the untrained model (heldout_reward 0.4)" in said[1]


def test_evaluation_is_due_every_n_steps_and_at_the_end(made):
    selection, _ = made([])
    due = [
        bool(selection.measure(step, 5, lambda: {"heldout_reward": 1.0})) for step in range(1, 6)
    ]
    assert due == [False, True, False, True, True]


def test_steps_between_evaluations_read_no_metrics_and_exchange_nothing(made):
    selection, _ = made(evaluations(REWARDS, KLS), patience=9)
    kept, exchanged = [], []
    selection.checkpointer.keep_best = lambda: kept.append(True)
    selection.group.broadcast = lambda value: exchanged.append(value) or value
    assert list(selection.steps(1, 4)) == [1, 2, 3]
    for step in range(1, 5):
        selection.keep(step, 100)
    assert exchanged == [2, False, True] and kept == [True], "after steps 2 and 4"


def test_nothing_to_evaluate_on_is_said_before_the_first_step(made):
    selection, _ = made([])
    with pytest.raises(DataError, match=r"ppo.eval_every is 2, but .* raise heldout_fraction"):
        Selection(selection.job, selection.checkpointer, selection.criterion, 0)
