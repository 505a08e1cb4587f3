"""Overlong filtering: replies that were cut are not in the loss, as if they were not there."""

from dataclasses import fields, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from rlhf_core.algorithms import grpo, ppo, reinforce_pp, rloo
from rlhf_core.errors import TrainingFailure
from rlhf_core.jobs import GRPOJob, PPOJob, ReinforcePPJob, RLOOJob
from rlhf_core.training.online.experience import Targets
from rlhf_core.training.online.truncated import (
    assert_something_is_left,
    masked_metrics,
    trained_tokens,
)
from rlhf_core.training.online.updates import MicroBatch

DIGESTS = {"model": "a" * 64, "prompts": "b" * 64, "reward_model": "c" * 64}
MASK = torch.arange(4) < torch.tensor([[4], [4], [2]])  # the second reply was cut
FINISHED = torch.tensor([True, False, True])


def job(kind=GRPOJob, **settings):
    return kind(**DIGESTS, **({"mask_truncated_completions": True} | settings))


def test_only_finished_replies_are_trained_on():
    assert trained_tokens(job(), MASK, FINISHED).tolist() == [
        [True] * 4, [False] * 4, [True, True, False, False]
    ]  # fmt: skip
    assert trained_tokens(job(mask_truncated_completions=False), MASK, FINISHED) is MASK


def test_rollout_without_a_finished_reply_ends_the_stage():
    nothing = trained_tokens(job(), MASK, torch.zeros(3, dtype=torch.bool))
    with pytest.raises(TrainingFailure, match=r"3 of the 3 replies .* cut at max_new_tokens 128"):
        assert_something_is_left(job(), nothing)
    assert_something_is_left(job(), trained_tokens(job(), MASK, FINISHED))
    assert_something_is_left(job(mask_truncated_completions=False), nothing)


def test_masked_replies_and_minibatches_are_counted():
    left = trained_tokens(job(), MASK, FINISHED)
    assert masked_metrics(job(), left) == pytest.approx(
        {"masked_replies": 1 / 3, "masked_minibatches": 0.0}
    )
    # dealt out in turn: 0 and 2, then 1
    assert masked_metrics(job(minibatches=2), left)["masked_minibatches"] == 0.5
    assert masked_metrics(job(mask_truncated_completions=False), left) == {}


def test_critic_is_judged_by_what_it_is_trained_on():
    """Its values of the reply that was cut are far off, and never corrected."""
    returns = torch.tensor([[1.0, 2, 3, 4], [9, 9, 9, 9], [5, 6, 0, 0]])
    values = returns.clone()
    values[1] = -50.0
    seen = SimpleNamespace(
        values=values, response_mask=MASK, loss_mask=trained_tokens(job(), MASK, FINISHED)
    )
    assert ppo.variance_explained(seen, Targets(returns, returns)) == 1.0
    seen.loss_mask = MASK  # where nothing is left out
    assert ppo.variance_explained(seen, Targets(returns, returns)) < 0.0


LOSSES = {
    "grpo": partial(grpo.loss, job(), 0.1),
    "grpo-token": partial(grpo.loss, job(average="token"), 0.1),
    "rloo": partial(rloo.loss, job(RLOOJob), 0.1),
    "reinforce_pp": partial(reinforce_pp.loss, job(ReinforcePPJob), 0.1),
    "ppo": partial(ppo.loss, job(PPOJob), 0.1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_that_of_a_batch_without_the_masked_reply(name):
    generator = torch.Generator().manual_seed(3)
    columns = [-torch.rand(3, 4, generator=generator) * 2 for _ in range(7)]
    per_reply = name.startswith(("grpo", "rloo"))
    loss_mask = trained_tokens(job(), MASK, FINISHED)
    whole = MicroBatch(
        logprobs=columns[0].requires_grad_(), old_logprobs=columns[0].detach() + 0.02 * columns[1],
        ref_logprobs=columns[2], response_mask=MASK,
        advantages=torch.tensor([1.0, 5.0, -1.0]) if per_reply else columns[3] + 1.0,
        values=columns[4].requires_grad_(), old_values=columns[5], returns=columns[6],
        replies=2.0, tokens=6.0, loss_mask=loss_mask,
    )  # fmt: skip
    rows = torch.tensor([0, 2])
    tensors = {f.name: getattr(whole, f.name) for f in fields(whole)}
    kept = {k: v[rows] for k, v in tensors.items() if isinstance(v, torch.Tensor)}
    (loss, metrics), (expected, same) = (LOSSES[name](m) for m in (whole, replace(whole, **kept)))
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(
        {k: float(v) for k, v in same.items()}, rel=1e-6
    )
    inputs = [whole.logprobs, whole.values] if name == "ppo" else [whole.logprobs]
    for found, wanted in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(found, wanted)
        assert (found[1] == 0).all() and (found[0] != 0).any()
