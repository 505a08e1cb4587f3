"""Pairs of a rollout, and how far each reply is to rise: by hand, and against autograd."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from rlhf_core.jobs import BuiltinRollout, GRPOJob, RolloutCorrection, VllmRollout
from rlhf_core.jobs.online_dpo import OnlineDPOJob, OnlineDPOSettings
from rlhf_core.losses.preference import dpo_loss, ipo_loss
from rlhf_core.training.online.correction import correction_metrics, correction_weights
from rlhf_core.training.online.pairs import Pairs, pick, reply_weights

ALL = torch.ones(8, dtype=torch.bool)
DIGESTS = {"model": "a" * 64, "prompts": "b" * 64, "reward_model": "c" * 64}
AHEAD = BuiltinRollout(placement="separate", max_staleness=1)


def test_better_reply_of_each_prompt_is_picked():
    scores = torch.tensor([1.0, 0.5, 0.2, 0.9, 3.0, 3.0, 0.0, 0.1])
    pairs = pick(scores, 0.0, ALL)
    assert pairs.chosen.tolist() == [0, 3, 7]
    assert pairs.rejected.tolist() == [1, 2, 6]
    assert pairs.ties == pytest.approx(0.25), "equal scores are no pair"
    close = pick(scores, 0.5, ALL)
    assert close.chosen.tolist() == [0, 3] and close.ties == pytest.approx(0.5)


def test_a_pair_needs_two_replies_that_are_trained_on():
    """Else the loss of a reply that was cut, and its mask of zeros, would move the other one."""
    scores = torch.tensor([1.0, 0.5, 0.2, 0.9, 3.0, 3.0, 0.0, 0.1])
    trained = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1]).bool()
    pairs = pick(scores, 0.0, trained)
    assert pairs.chosen.tolist() == [3, 7] and pairs.rejected.tolist() == [2, 6]
    assert (pairs.ties, pairs.masked) == (pytest.approx(0.25), pytest.approx(0.25))
    logps = torch.arange(8.0)
    weights, _ = reply_weights(logps, logps, pairs, partial(dpo_loss, beta=0.1))
    assert weights[:2].tolist() == weights[4:6].tolist() == [0.0, 0.0]


def test_key_of_a_stage_that_leaves_replies_out_is_a_new_one():
    job = OnlineDPOJob(model="a" * 64, prompts="b" * 64, rewards=[{"type": "repetition"}])
    assert job.current_version() == 1
    assert job.model_copy(update={"mask_truncated_completions": True}).current_version() == 2


def test_weights_of_a_pair_by_hand():
    """Chosen -12 against -13, rejected -15 against -14.5: margin 0.15 at beta 0.1."""
    logps, ref = torch.tensor([-15.0, -12.0]), torch.tensor([-14.5, -13.0])
    pairs = Pairs(torch.tensor([1]), torch.tensor([0]), 0.0)
    weights, found = reply_weights(logps, ref, pairs, partial(dpo_loss, beta=0.1))
    assert found["loss"] == pytest.approx(0.620957, abs=1e-6)
    assert found["margin"] == pytest.approx(0.15, abs=1e-6)
    # 0.1 sigmoid(-0.15): the chosen reply rises, the rejected one falls.
    assert weights.tolist() == pytest.approx([-0.0462570, 0.0462570], abs=1e-6)


@pytest.mark.parametrize(
    "loss", [partial(dpo_loss, beta=0.3, label_smoothing=0.1), partial(ipo_loss, beta=0.3)]
)
def test_replies_one_by_one_have_the_gradient_of_the_pairs(loss):
    """A policy of one parameter per token, through which all log-probabilities go."""
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(5, dtype=torch.float64, generator=generator, requires_grad=True)
    counts = torch.randint(0, 4, (8, 5), generator=generator).double()  # tokens in each reply

    def logps() -> torch.Tensor:
        return counts @ torch.log_softmax(policy, dim=0)  # (8,)

    ref = logps().detach() + torch.randn(8, dtype=torch.float64, generator=generator)
    pairs = pick(torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 2.0, 0.3, 0.1]), 0.0, ALL)
    whole = logps()
    value, _ = loss(whole[pairs.chosen], whole[pairs.rejected], ref[pairs.chosen],
                    ref[pairs.rejected])  # fmt: skip
    (expected,) = torch.autograd.grad(value, policy)
    weights, found = reply_weights(logps(), ref, pairs, loss)
    surrogate = -sum(w * lp for w, lp in zip(weights, logps(), strict=True))
    (by_reply,) = torch.autograd.grad(surrogate, policy)
    torch.testing.assert_close(by_reply, expected)
    assert found["loss"] == pytest.approx(float(value.detach()))
    assert weights[4] == weights[5] == 0.0, "a tie teaches nothing"


def test_rollout_of_ties_has_no_loss():
    logps = torch.tensor([-1.0, -2.0])
    weights, found = reply_weights(logps, logps, pick(torch.ones(2), 0.0, ALL[:2]), dpo_loss)
    assert weights.tolist() == [0.0, 0.0] and found == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_coef": 0.1}, "have no effect in online_dpo, where beta holds"),
        ({"clip_range": 0.3}, "have no effect in online_dpo"),
        ({"minibatches": 2}, "minibatches is 2, but online_dpo takes one optimizer step"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing is 0.1 and loss ipo"),
        ({"rollout": {"type": "builtin", "correction": {}}}, "correction has no effect in online"),
        ({"rollout": {"type": "vllm", "correction": {"mode": "mask"}}}, "has no effect in online"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        OnlineDPOSettings(**settings)


def test_pairs_of_another_sampler_are_not_weighted():
    """DPO's loss of a pair holds whoever sampled it; what would be weighted is no surrogate."""
    for rollout in (VllmRollout(), VllmRollout(correction=None), AHEAD):
        job = OnlineDPOJob(**DIGESTS, rollout=rollout)
        logprobs = torch.tensor([[-1.0, -2.0]])
        mask = torch.ones(1, 2, dtype=torch.bool)
        assert correction_weights(job, logprobs, logprobs - 0.5, mask) is None
        experience = SimpleNamespace(
            loss_mask=mask, old_logprobs=logprobs, rollout_logprobs=logprobs - 0.5
        )
        found = correction_metrics(job, experience)
        assert found["rollout_gap_max"] == pytest.approx(0.5)
        assert not any(name.startswith("rollout_weight") for name in found), "there are none"
    assert OnlineDPOJob(**DIGESTS, rollout=VllmRollout()).correction is None
    assert GRPOJob(**DIGESTS, rollout=VllmRollout()).correction == RolloutCorrection()
    assert GRPOJob(**DIGESTS, rollout=AHEAD).correction == RolloutCorrection()


def test_a_rollout_has_two_replies_to_each_prompt():
    job = OnlineDPOJob(**DIGESTS, batch_size=6)
    assert job.replies == 12
