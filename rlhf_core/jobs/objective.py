"""What the settings of all stages with `rewards` check."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_core.jobs.rewards import ModelReward, Reward


def needs_reward_model(rewards: Sequence[Reward]) -> bool:
    """Whether the reward model's score is one of the rewards."""
    return any(isinstance(reward, ModelReward) for reward in rewards)


def checked_rewards(
    rewards: tuple[Reward, ...], *, environment: bool = False
) -> tuple[Reward, ...]:
    """The rewards as they are.

    Args:
        environment: whether the stage can have one.

    Raises:
        ValueError: there is none, or the reward model or the environment comes twice.
    """
    if not rewards:
        raise ValueError("rewards is empty, so there is nothing to learn; add a reward")
    if not environment and any(reward.type == "environment" for reward in rewards):
        raise ValueError(
            "rewards has an entry of type environment, but this stage samples single replies; "
            "take other rewards"
        )
    for kind, name in (("model", "reward model"), ("environment", "environment")):
        count = sum(reward.type == kind for reward in rewards)
        if count > 1:
            raise ValueError(
                f'rewards has {count} entries of type "{kind}", but there is one {name}; '
                "keep one and give it the sum of the weights"
            )
    return rewards


def check_reward_model(rewards: Sequence[Reward], given: bool, *, other_use: bool = False) -> None:
    """A job has a reward model where its rewards need one, and only there.

    Args:
        given: whether it has one. other_use: a critic can start from it.

    Raises:
        ValueError: it does not fit.
    """
    wanted = needs_reward_model(rewards)
    if wanted and not given:
        raise ValueError(
            'rewards has an entry of type "model" but reward_model is empty; give a reward '
            "model, or leave only rules in rewards"
        )
    if given and not (wanted or other_use):
        raise ValueError(
            'reward_model is given but rewards has no entry of type "model", so it would '
            "not be used; add one, or clear reward_model"
        )
