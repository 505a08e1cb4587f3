"""Which groups are flat, which rewards are the outcome, and groups of several rollouts as one."""

import pytest
import torch
from pydantic import ValidationError

from rlhf_core.errors import ConfigError
from rlhf_core.jobs import GRPOJob, RLOOJob
from rlhf_core.rewards import Rules
from rlhf_core.training.online.dynamic_sampling import flat_groups, join
from rlhf_core.training.online.sampling import GlobalRollout

DIGESTS = {"model": "a" * 64, "prompts": "b" * 64}
RIGHT = {"type": "answer"}
SHORT = {"type": "length_penalty", "start": 10, "end": 20}
WORDS = {"type": "regex", "pattern": "yes"}


def test_groups_are_flat_when_all_outcomes_are_the_same():
    outcomes = torch.tensor([1.0, 1.0, 0.0, 1.0, -3.0, -3.0, 0.0, 1e-9, 0.1 + 0.2, 0.3])
    assert flat_groups(outcomes, 2) == [True, False, True, False, True]
    assert flat_groups(torch.tensor([1.0, 1.0, 1.0, 0.0]), 4) == [False]


@pytest.mark.parametrize("kind", [GRPOJob, RLOOJob])
def test_outcome_is_what_replies_say_and_not_their_form(kind):
    def outcomes(*rewards, **settings):
        return kind(**DIGESTS, rewards=rewards, max_resamples=1, **settings).outcomes

    assert outcomes(RIGHT, SHORT) == ["answer"]
    assert outcomes(SHORT, RIGHT, RIGHT) == ["answer", "answer-2"]
    assert outcomes(WORDS, SHORT) == ["regex", "length_penalty"], "there are no others"
    assert outcomes(RIGHT, WORDS, outcome_rewards=["regex"]) == ["regex"]
    model = outcomes({"type": "model"}, SHORT, reward_model="c" * 64)
    assert model == ["model"]


def test_settings_of_the_outcome_that_make_no_sense_are_refused():
    with pytest.raises(ValidationError, match=r"outcome_rewards has answr, .* expected answer or"):
        GRPOJob(**DIGESTS, rewards=[RIGHT, SHORT], max_resamples=1, outcome_rewards=["answr"])
    with pytest.raises(ValidationError, match="max_resamples is 0, so nothing"):
        GRPOJob(**DIGESTS, rewards=[RIGHT], outcome_rewards=["answer"])
    ahead = {"type": "builtin", "placement": "separate", "max_staleness": 1}
    with pytest.raises(ValidationError, match="set one of them to 0"):
        GRPOJob(**DIGESTS, rewards=[RIGHT], max_resamples=1, rollout=ahead)
    plain = GRPOJob(**DIGESTS, rewards=[RIGHT])
    assert plain.key() == GRPOJob(**DIGESTS, rewards=[RIGHT], outcome_rewards=[]).key()
    assert plain.key() != GRPOJob(**DIGESTS, rewards=[RIGHT], max_resamples=1).key()


def rollout(name, count, seconds):
    """Replies of one token; every number says which reply it is."""
    numbers = list(range(count))
    return GlobalRollout(
        rows=[{"name": f"{name}{i}"} for i in numbers],
        sequences=[[1, i] for i in numbers],
        prompt_lengths=[1] * count,
        logprobs=[[-float(i)] for i in numbers],
        finished=torch.tensor([i % 2 == 0 for i in numbers]),
        began=3.0 + seconds,
        seconds=seconds,
        rule_scores=({"answer": torch.tensor(numbers) * seconds}, {"regex_timeout": count}),
    )


def test_groups_of_several_rollouts_become_one():
    found = join([rollout("a", 6, 1.0), rollout("b", 4, 2.0)], [(0, 0), (1, 1), (0, 2)], 2)
    assert [row["name"] for row in found.rows] == ["a0", "a1", "b2", "b3", "a4", "a5"]
    assert found.sequences == [[1, i] for i in range(6)]
    assert found.logprobs == [[-float(i)] for i in range(6)]
    assert found.finished.tolist() == [True, False] * 3
    assert (found.began, found.seconds, found.trained) == (4.0, 3.0, None)
    scores, failures = found.rule_scores
    assert scores["answer"].tolist() == [0.0, 1.0, 4.0, 6.0, 4.0, 5.0]
    assert failures == {"regex_timeout": 10}, "of all that were asked"


def test_rank_without_replies_asks_no_rule():
    function = {"type": "python", "function": "nowhere.to.be.found:x"}
    with pytest.raises(ConfigError):
        Rules(GRPOJob(**DIGESTS, rewards=[function]).rewards, seed=0)
    failing = {"type": "python", "function": f"{__name__}:fails"}
    rules = Rules(GRPOJob(**DIGESTS, rewards=[failing, SHORT]).rewards, seed=0)
    assert rules.score([], [], [], [], []) == [[], []]


def fails(prompts, replies, rows, finished):
    raise AssertionError("nobody should ask")
