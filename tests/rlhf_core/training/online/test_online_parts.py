"""Parts of online algorithms that need no ranks: reference, bounds of the collapse, repetition."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rlhf_core.jobs import GRPOJob, LoRA, ModelReward, PPOJob
from rlhf_core.models.loading import load_causal_lm
from rlhf_core.nn.layers import choose_trainable
from rlhf_core.nn.modules import Policy
from rlhf_core.nn.padding import batch_on, pad_right
from rlhf_core.rollout import variety
from rlhf_core.training.online.batches import split_minibatches, update_order
from rlhf_core.training.online.collapse import find_collapse, warn_of_openings
from rlhf_core.training.online.kl_control import next_coefficient
from rlhf_core.training.online.models import AdapterOff
from rlhf_core.training.online.summary import distinct_2, neighbour_pairs, repetition
from tests.rlhf_core.tiny_models import copy_of

DIGESTS = {"model": "a" * 64, "prompts": "b" * 64, "reward_model": "c" * 64}


def test_adapter_switched_off_is_the_reference_loaded_apart(tmp_path):
    folder = copy_of("llama", tmp_path / "model")
    job = GRPOJob(**DIGESTS, lora=LoRA(rank=2, alpha=8))
    policy = Policy(choose_trainable(load_causal_lm(folder), job, 0))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:  # they start at 0, where policy and reference are one
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    input_ids, mask = pad_right([[5, 9, 200, 31, 7], [8, 44, 90]])
    batch = batch_on(torch.device("cpu"), input_ids, mask, mask & (torch.arange(5) > 0))
    with torch.no_grad():
        reference, learned = Policy(load_causal_lm(folder))(*batch, 0.7), policy(*batch, 0.7)
    assert torch.equal(AdapterOff(policy)(*batch, 0.7), reference)
    assert (learned - reference).abs().max() > 0.1
    assert torch.equal(policy(*batch, 0.7), learned), "the adapter is on again"
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == trained


def rollouts(**columns):
    count = len(next(iter(columns.values())))
    healthy = {"kl": 1.0, "repetition": 0.05, "length": 20.0, "entropy": 2.0, "finished": 1.0,
               "top_opening": 0.1, "distinct_2": 0.8}  # fmt: skip
    return [
        {"step": i + 1, **healthy, **{name: values[i] for name, values in columns.items()}}
        for i in range(count)
    ]


def strict(**settings):
    bounds = {"max_kl": 10.0, "max_repetition": 0.5, "min_length": 3.0, "max_length": 50.0,
              "min_entropy": 0.2, "max_unfinished": 0.6, "max_opening": 0.4,
              "min_distinct": 0.5}  # fmt: skip
    return PPOJob(**DIGESTS, **({"collapse_window": 3} | bounds | settings))


@pytest.mark.parametrize(
    ("column", "values", "setting", "value"),
    [
        ("kl", [1.0, 9.0, 12.0, 12.0], "max_kl", 11.0),
        ("repetition", [0.9, 0.4, 0.6, 0.8], "max_repetition", 0.6),
        ("length", [1.0, 2.0, 1.0, 3.0], "min_length", 2.0),
        ("length", [20.0, 20.0, 70.0, 66.0], "max_length", 52.0),
        ("entropy", [0.0, 0.2, 0.2, 0.1], "min_entropy", 0.5 / 3),
        ("finished", [1.0, 0.2, 0.2, 0.2], "max_unfinished", 0.8),
        ("top_opening", [0.1, 0.3, 0.5, 0.7], "max_opening", 0.5),
        ("distinct_2", [1.5, 0.75, 0.15, 0.15], "min_distinct", 0.35 / 0.8),
    ],
)
def test_collapse_is_the_mean_of_the_last_rollouts(column, values, setting, value):
    found = find_collapse(strict(), rollouts(**{column: values}))
    assert (found["setting"], found["step"], found["window"]) == (setting, 4, 3)
    assert found["value"] == pytest.approx(value)
    off = {setting: 100.0 if setting == "max_kl" else None}
    assert find_collapse(strict(**off), rollouts(**{column: values})) is None
    assert find_collapse(strict(), rollouts(**{column: values[:2]})) is None, "too few to judge"


def test_one_odd_rollout_is_no_collapse():
    assert find_collapse(strict(), rollouts(kl=[1.0, 25.0, 1.0], finished=[1.0, 0.0, 1.0])) is None


def test_evaluation_before_the_first_rollout_is_no_rollout():
    lines = [{"step": 0, "heldout_kl": 0.0}, *rollouts(kl=[12.0, 12.0, 12.0])]
    assert find_collapse(strict(), lines)["step"] == 3
    assert find_collapse(strict(), lines[:-1]) is None


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ([0.1, 0.1, 0.1, 0.6, 0.9, 0.9], [5]),  # the mean of three is 0.53 after the fifth
        ([0.1, 0.1, 0.1, 0.4, 0.4, 0.4], []),
        ([0.4, 0.4, 0.4, 0.7, 0.7, 0.7], []),  # a form that replies have from the beginning
    ],
)
def test_openings_that_become_alike_are_said_once(shares, said):
    lines = rollouts(top_opening=shares)
    for last in range(1, len(lines) + 1):
        heard = []
        warn_of_openings(strict(), lines[:last], heard.append)
        assert bool(heard) == (last in said)
        assert all("53% of the replies of the last 3 rollouts begin" in text for text in heard)


def test_coefficient_of_the_kl_follows_it():
    # Ziegler et al.: an error of at most 0.2, times K_beta = 1 / horizon.
    found = [next_coefficient(0.1, kl, target=6.0, horizon=10.0) for kl in (6.0, 6.6, 60.0, 5.7, 0)]
    assert found == pytest.approx([0.1, 0.101, 0.102, 0.0995, 0.098])


def test_short_stage_is_judged_at_its_end():
    assert find_collapse(strict(steps=2), rollouts(kl=[5.0, 20.0]))["window"] == 2


def test_repetition_counts_pieces_that_stood_before():
    # 1 2 3 4 1 2 3 4 1: the grams 1234 2341 3412 4123 1234 2341, of which two are repeated
    replies = [[1, 2, 3, 4, 1, 2, 3, 4, 1], [1, 1, 1]]
    assert repetition(neighbour_pairs(replies)) == pytest.approx((2 / 6 + 0.0) / 2)


def test_pieces_of_many_replies_are_counted_as_sets_of_tuples_would():
    generator = np.random.default_rng(0)
    vocabulary = [0, 1, 7, 2**31 - 1]  # few tokens, so that much is repeated
    lengths = (30, 1, 4, 0, 200, 3)
    replies = [[vocabulary[i] for i in generator.integers(0, 4, length)] for length in lengths]
    pairs, shares = neighbour_pairs(replies), []
    for reply in replies:
        grams = list(zip(*(reply[i:] for i in range(4)), strict=False))
        shares.append(1.0 - len(set(grams)) / len(grams) if grams else 0.0)
    assert 0.0 < repetition(pairs) == sum(shares) / len(shares)
    assert 0.0 < distinct_2(pairs) == variety.distinct_2(replies) < 1.0
    nothing = neighbour_pairs([[5], []])
    assert (repetition(nothing), distinct_2(nothing)) == (0.0, 0.0)


def test_updates_of_a_rollout_are_numbered_over_the_stage():
    assert split_minibatches(6, 2) == [[0, 2, 4], [1, 3, 5]]
    found = list(update_order(seed=0, step=3, epochs=2, minibatches=2))
    assert [(e, i) for e, i, _ in found[:2]] == [(0, 0), (0, 1)]
    assert sorted(number for _, _, number in found) == [12, 13, 14, 15]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reward_model": None}, "but reward_model is empty; give a reward model"),
        ({"rewards": ()}, "rewards is empty, so there is nothing to learn"),
        ({"rewards": (ModelReward(), ModelReward())}, '2 entries of type "model"'),
        ({"group_size": 1}, "greater than or equal to 2"),
        ({"ptx_coef": 0.5}, "ptx_coef is 0.5 but ptx is empty"),
        ({"max_new_tokens": 1}, "min_length is 1.5 and max_new_tokens 1, so every reply"),
        ({"max_length": 128}, "max_length is 128 and max_new_tokens 128, so no reply could"),
        ({"min_length": 9, "max_length": 8}, "min_length 9 is above max_length 8"),
        ({"kl_budget": 3}, "kl_budget is 3 but eval_every is empty"),
        ({"patience": 2}, "patience is 2 but eval_every is empty"),
        ({"select_by": "length"}, "select_by is length, .* expected reward or model"),
        ({"kl_target": 6, "kl_coef": 0}, "kl_target is 6 but kl_coef is 0, which no factor"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused(change, said):
    with pytest.raises(ValidationError, match=said):
        GRPOJob(**(DIGESTS | change))
