"""What an environment wrote between a policy's replies is read, and not trained on."""

import torch

from rlhf_core.losses.advantages import gae, token_rewards
from rlhf_core.models.loading import load_causal_lm
from rlhf_core.nn.modules import Policy
from rlhf_core.training.online.batches import collate_responses
from rlhf_core.training.online.experience import response_mask
from rlhf_core.training.online.sampling import GlobalRollout
from tests.rlhf_core.tiny_models import copy_of

SEQUENCES = [[5, 9, 200, 31, 7, 12], [8, 44, 90, 3]]
TRAINED = [[True, False, False, True], [True, True]]  # after prompts of two tokens


def test_only_sampled_tokens_are_in_the_loss_mask(tmp_path):
    cpu = torch.device("cpu")
    policy = Policy(load_causal_lm(copy_of("llama", tmp_path / "model")))
    batch = collate_responses(SEQUENCES, [2, 2], [1, 0], cpu, TRAINED)
    assert batch.loss_mask.tolist() == [
        [False, False, True, True, False, False],
        [False, False, True, False, False, True],
    ]
    whole = collate_responses(SEQUENCES, [2, 2], [1, 0], cpu)
    with torch.no_grad():
        some, every = policy(*batch), policy(*whole)  # (b,S)
    # What the environment wrote is read by the tokens after it, and has no log-probability.
    torch.testing.assert_close(some, torch.where(batch.loss_mask, every, 0.0))
    assert (every[1, 3:5] != 0).all()


def test_without_an_environment_all_tokens_are_the_policy_own():
    rollout = GlobalRollout(
        [{}] * 2, SEQUENCES, [2, 2], [[-1.0] * 4, [-1.0] * 2], torch.ones(2), 0.0, 0.0
    )
    assert response_mask(rollout).tolist() == [[True] * 4, [True, True, False, False]]
    assert rollout.sampled_ids() == [[200, 31, 7, 12], [90, 3]]


def test_advantages_pass_over_what_the_environment_wrote():
    """The same as of a reply without those tokens."""
    rollout = GlobalRollout(
        [{}], [SEQUENCES[0]], [2], [[-1.0, 0.0, 0.0, -2.0]], torch.ones(1), 0.0, 0.0, [TRAINED[0]]
    )
    mask = response_mask(rollout)
    assert mask.tolist() == [TRAINED[0]]
    assert rollout.sampled_ids() == [[200, 12]]
    old, ref = torch.tensor([[-1.0, 0.0, 0.0, -2.0]]), torch.tensor([[-1.5, 0.0, 0.0, -1.0]])
    rewards = token_rewards(torch.tensor([3.0]), old, ref, mask, 0.5)
    assert rewards.tolist() == [[-0.25, 0.0, 0.0, 3.5]]
    values = torch.tensor([[0.5, 9.0, 9.0, 1.0]])
    advantages, returns = gae(rewards, values, mask, gamma=1.0, gae_lambda=0.5)
    # delta: 3.5 - 1 = 2.5, then -0.25 + 1 - 0.5 = 0.25, and 0.25 + 0.5 * 2.5
    assert advantages.tolist() == [[1.5, 0.0, 0.0, 2.5]]
    assert returns.tolist() == [[2.0, 0.0, 0.0, 3.5]]
