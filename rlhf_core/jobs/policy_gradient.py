"""Settings and jobs of PPO, GRPO, RLOO and REINFORCE++."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from rlhf_core.jobs.base import Digest, Fraction, PositiveInt, Resources, job_input
from rlhf_core.jobs.online import OnlineJob, OnlineSettings
from rlhf_core.jobs.rewards import OF_FORM, reward_names

GroupSize = Annotated[int, Field(ge=2, le=1024)]


AVERAGES = {"reply": "seq-mean-token-mean", "token": "token-mean"}
"""Earlier name of an average -> its name in the field; keys of results have the earlier one."""


def _current_average(value: Any) -> Any:
    return AVERAGES.get(value, value) if isinstance(value, str) else value


class PolicyGradientSettings(OnlineSettings):
    """What PPO, GRPO, RLOO and REINFORCE++ share: the clip and the KL."""

    clip_range_high: Annotated[float, Field(gt=0.0)] | None = None
    """The ratio is clipped to 1 + this from above. Larger than clip_range (clip-higher; 0.28 in
    DAPO, arXiv 2503.14476), unlikely tokens can become likely sooner. Empty: clip_range."""
    dual_clip: Annotated[float, Field(gt=1.0)] | None = None
    """With a negative advantage, the ratio counts as at most this (arXiv 1912.09729, 3 there): a
    bad token that has become likely cannot outweigh the rest. Empty: off."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL to the SFT model counts. reward: in the reward of the tokens, so that it becomes
    part of the advantages. loss: as a term of the loss, averaged as the loss is."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """Estimate of the KL per token, with x the log-probability less the SFT model's: x (k1), x^2/2
    (k2), exp(-x) - 1 + x (k3). In the reward use k1; in the loss, k2 has the KL's gradient, k3 its
    approximation near the SFT model (arXiv 2510.01555). Empty: k1 in the reward, k3 in the loss."""
    kl_correction: bool = False
    """Multiply the KL in the loss by the probability ratio: the gradient of k3 (of k1 with much
    noise) is then the KL's, also in later updates (DeepSeek-V3.2, arXiv 2512.02556)."""

    @property
    def kl_kind(self) -> Literal["k1", "k2", "k3"]:
        """The estimator, where it is empty that of `kl_in`."""
        return self.kl_estimator or ("k1" if self.kl_in == "reward" else "k3")

    @property
    def kl_is_rewarded(self) -> bool:
        """Whether the rewards hold a KL, for which they need the old log-probabilities."""
        return self.kl_in == "reward" and self.kl_coef > 0

    @model_validator(mode="after")
    def _kl_holds_the_policy(self) -> Self:
        if self.kl_in == "reward" and self.kl_correction:
            raise ValueError(
                "kl_correction weights the KL in the loss, but kl_in is reward; set kl_in to loss, "
                "or clear kl_correction"
            )
        if self.kl_in == "loss" and self.kl_kind == "k1" and not self.kl_correction:
            raise ValueError(
                "kl_estimator is k1 and kl_in is loss: the gradient of k1 is 0 on average, so the "
                "KL would hold nothing back; set kl_estimator to k2 or k3, kl_in to reward, or "
                "kl_correction to true"
            )
        if self.kl_correction and self.kl_kind == "k2":
            raise ValueError(
                "kl_estimator is k2 and kl_correction is set, but the ratio makes the gradient of "
                "k2 wrong; set kl_estimator to k1 or k3, or clear kl_correction"
            )
        return self

    @model_validator(mode="after")
    def _dual_clip_is_beyond_the_clip(self) -> Self:
        objective = getattr(self, "objective", "clip")
        if self.dual_clip is None:
            return self
        if objective in ("gspo", "cispo"):
            raise ValueError(
                f"dual_clip is {self.dual_clip:g}, but {objective} bounds the ratio otherwise; "
                "clear dual_clip, or set objective to clip or dppo"
            )
        high = self.clip_range if self.clip_range_high is None else self.clip_range_high
        if objective == "clip" and self.dual_clip <= 1 + high:
            raise ValueError(
                f"dual_clip is {self.dual_clip:g}, within the clip, which goes up to {1 + high:g}; "
                "raise dual_clip, to 3 for example"
            )
        return self


class ObjectiveSettings(PolicyGradientSettings):
    """What algorithms with a ratio for each token share."""

    objective: Literal["clip", "gspo", "cispo", "dppo"] = "clip"
    """What bounds an update. clip: the ratio of a token (PPO, GRPO, DAPO). gspo: the ratio of a
    reply, per token (arXiv 2507.18071; clip_range 3e-4, clip_range_high 4e-4 there). cispo: weights
    of at most 1 + clip_range_high, and every token keeps its gradient (arXiv 2506.13585). dppo: a
    token's probability changes by at most clip_range (arXiv 2602.04879; 0.15 there). All are the
    same in the first update on a rollout."""

    @model_validator(mode="after")
    def _objective_has_its_bounds(self) -> Self:
        default = type(self).model_fields["clip_range"].default
        if self.objective == "cispo" and self.clip_range_high is None:
            raise ValueError(
                "objective is cispo but clip_range_high is empty, so its weights have no bound; "
                "set clip_range_high, to 4 for example (arXiv 2510.13786)"
            )
        if self.objective == "cispo" and self.clip_range != default:
            raise ValueError(
                f"clip_range is {self.clip_range:g}, but cispo has no lower bound; leave it out, "
                "and set clip_range_high"
            )
        if self.objective == "dppo" and (self.clip_range_high or 0.0) >= 1:
            raise ValueError(
                f"clip_range_high is {self.clip_range_high:g}, but for dppo it is the change of a "
                "probability, below 1; set it to 0.2 for example, or clear it"
            )
        return self


class TokenObjectiveSettings(ObjectiveSettings):
    """The same where advantages differ from token to token."""

    @model_validator(mode="after")
    def _ratio_is_that_of_a_token(self) -> Self:
        if self.objective == "gspo":
            raise ValueError(
                "objective is gspo, which has one ratio and one advantage for a reply, but this "
                "algorithm has an advantage for each token; set it to clip, cispo or dppo, or use "
                "grpo"
            )
        return self


class PPOSettings(TokenObjectiveSettings):
    """Proximal policy optimisation with a critic (arXiv 1707.06347)."""

    critic_learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Peak learning rate of the critic. Empty: five times the policy's."""
    ppo_epochs: PositiveInt = 4
    """Epochs over each rollout."""
    value_clip_range: Annotated[float, Field(gt=0.0)] = 0.2
    """A value is clipped to this distance from the rollout's value."""
    value_coef: Annotated[float, Field(ge=0.0)] = 0.1
    """Weight of the value loss."""
    gamma: Fraction = 1.0
    """Discount per token."""
    gae_lambda: Fraction = 0.95
    """Lambda of generalised advantage estimation (GAE)."""


class PPOJob(PPOSettings, OnlineJob):
    """PPO."""

    module: ClassVar[str] = "rlhf_core.algorithms.ppo"
    critic: ClassVar[bool] = True

    algorithm: Literal["ppo"] = "ppo"
    """Name of the algorithm."""
    reward_model: Digest | None = job_input(default=None)
    """Reward model, and start of the critic. Empty when all rewards are rules; the critic then
    starts from the SFT model."""
    resources: Resources = Resources()
    """Placement of the job."""


class GroupSettings(PolicyGradientSettings):
    """Settings of algorithms that compare several replies to one prompt."""

    batch_size: PositiveInt = 16
    """Prompts per rollout over all ranks, with group_size replies each."""
    group_size: GroupSize = 8
    """Replies to each prompt."""
    epochs: PositiveInt = 1
    """Epochs over each rollout."""
    max_resamples: Annotated[int, Field(ge=0, le=1000)] = 0
    """Dynamic sampling (arXiv 2503.14476): groups whose replies all have the same outcome teach
    nothing and are replaced by replies to further prompts, in at most this many rounds per rollout;
    sampling then takes up to 1 + max_resamples times as long. 0: off."""
    outcome_rewards: tuple[str, ...] = ()
    """Rewards whose weighted sum is the outcome that max_resamples compares, by their names in the
    metrics (the type, with -2 for a second one). Empty: all except rules of form (length,
    length_penalty, regex, must_end, forbidden_words, repetition, language), unless there are no
    others."""

    @model_validator(mode="after")
    def _outcomes_are_rewards(self) -> Self:
        known = reward_names(self.rewards)
        if unknown := [name for name in self.outcome_rewards if name not in known]:
            raise ValueError(
                f"outcome_rewards has {', '.join(unknown)}, not among the rewards; expected "
                f"{' or '.join(known)}"
            )
        if self.outcome_rewards and not self.max_resamples:
            raise ValueError(
                "outcome_rewards is given but max_resamples is 0, so nothing would be compared; "
                "set max_resamples, such as 5, or clear outcome_rewards"
            )
        if self.max_resamples and self.curriculum is not None:
            raise ValueError(
                f"max_resamples is {self.max_resamples} and curriculum is set, but the pass rate "
                "that unlocks a level would be that of the replaced groups; clear one of them"
            )
        if self.max_resamples and self.rollout.max_staleness:
            raise ValueError(
                f"max_resamples is {self.max_resamples} and rollout.max_staleness "
                f"{self.rollout.max_staleness}, but replies that were begun in earlier steps leave "
                "no time for further prompts; set one of them to 0"
            )
        return self

    @property
    def outcomes(self) -> list[str]:
        """Names of the rewards whose weighted sum is a reply's outcome."""
        if self.outcome_rewards:
            return list(self.outcome_rewards)
        names = zip(reward_names(self.rewards), self.rewards, strict=True)
        found = [name for name, reward in names if not isinstance(reward, OF_FORM)]
        return found or reward_names(self.rewards)

    @property
    def replies(self) -> int:
        return self.batch_size * self.group_size


class GRPOSettings(GroupSettings, ObjectiveSettings):
    """Group relative policy optimisation (arXiv 2402.03300): the group's mean and standard
    deviation replace the critic."""

    kl_coef: Annotated[float, Field(ge=0.0)] = 0.04
    """Weight of the KL to the SFT model, by default a term of the loss."""
    kl_in: Literal["reward", "loss"] = "loss"
    """Where the KL to the SFT model counts. loss: as a term of the loss, averaged as the loss is.
    reward: in the score of a reply, summed over its tokens, before it is compared with the
    group."""
    scale_rewards: bool = True
    """Divide advantages by the standard deviation of the group's scores. false (Dr. GRPO): prompts
    whose replies hardly differ weigh less."""
    average: Annotated[
        Literal[
            "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
        ],
        BeforeValidator(_current_average),
    ] = "seq-mean-token-mean"
    """How the loss is averaged. seq-mean-token-mean: over each reply's tokens, then over replies,
    as in the paper; bad replies then tend to grow. token-mean: over all tokens of the rollout
    (DAPO). seq-mean-token-sum: each reply's sum, then over replies. seq-mean-token-sum-norm: that
    divided by max_new_tokens (Dr. GRPO). reply and token are earlier names of the first two."""

    @model_validator(mode="after")
    def _scores_are_scaled_once(self) -> Self:
        if self.score_whiten and self.scale_rewards:
            raise ValueError(
                "score_whiten and scale_rewards are both set, and scale_rewards scales the scores "
                "of each group already; clear one"
            )
        return self


class GRPOJob(GRPOSettings, OnlineJob):
    """GRPO."""

    module: ClassVar[str] = "rlhf_core.algorithms.grpo"

    algorithm: Literal["grpo"] = "grpo"
    """Name of the algorithm."""
    resources: Resources = Resources()
    """Placement of the job."""

    def key_settings(self) -> dict[str, Any]:
        """Has the earlier name of an average, so that older results keep their keys."""
        earlier = {current: name for name, current in AVERAGES.items()}
        settings = super().key_settings()
        return settings | {"average": earlier.get(self.average, self.average)}


class RLOOSettings(GroupSettings):
    """REINFORCE leave-one-out (arXiv 2402.14740): a reply's baseline is the mean of the other
    replies in its group."""

    one_action: ClassVar[bool] = True

    group_size: GroupSize = 4
    """Replies to each prompt."""


class RLOOJob(RLOOSettings, OnlineJob):
    """RLOO."""

    module: ClassVar[str] = "rlhf_core.algorithms.rloo"

    algorithm: Literal["rloo"] = "rloo"
    """Name of the algorithm."""
    resources: Resources = Resources()
    """Placement of the job."""


class ReinforcePPSettings(TokenObjectiveSettings):
    """REINFORCE++ (arXiv 2501.03262): per-token rewards, whitened over the global batch, with one
    reply to each prompt."""

    kl_coef: Annotated[float, Field(ge=0.0)] = 0.01
    """Weight of the per-token KL penalty to the SFT model."""
    epochs: PositiveInt = 1
    """Epochs over each rollout."""
    gamma: Fraction = 1.0
    """Discount per token."""


class ReinforcePPJob(ReinforcePPSettings, OnlineJob):
    """REINFORCE++."""

    module: ClassVar[str] = "rlhf_core.algorithms.reinforce_pp"

    algorithm: Literal["reinforce_pp"] = "reinforce_pp"
    """Name of the algorithm."""
    resources: Resources = Resources()
    """Placement of the job."""
