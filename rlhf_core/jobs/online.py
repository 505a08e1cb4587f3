"""Online reinforcement learning: algorithms that sample from the model they train."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from rlhf_core.jobs.base import Digest, PositiveInt, Resources, Settings, job_input
from rlhf_core.jobs.ensemble import EnsembleJob
from rlhf_core.jobs.environments import Environment, check_environment
from rlhf_core.jobs.objective import check_reward_model, checked_rewards, needs_reward_model
from rlhf_core.jobs.reward_services import without_asking
from rlhf_core.jobs.rewards import ModelReward, Reward, reward_names
from rlhf_core.jobs.rollouts import BuiltinRollout, Rollout, RolloutCorrection
from rlhf_core.jobs.training import HeldOutJob, HeldOutSettings

LATER = (
    "min_length",
    "max_length",
    "score_clip",
    "score_whiten",
    "max_opening",
    "min_distinct",
    "kl_target",
    "kl_horizon",
    "eval_prompts",
    "select_by",
    "kl_budget",
    "environment",
    "clip_range_high",
    "dual_clip",
    "objective",
    "kl_in",
    "kl_estimator",
    "kl_correction",
    "curriculum",
    "mask_truncated_completions",
    "max_resamples",
    "outcome_rewards",
    "judge",
)
"""Settings that are younger than stored results, of all algorithms: their defaults are not in the
key."""


class Curriculum(Settings):
    """Prompts by difficulty: a rollout takes prompts of the levels that are unlocked so far. A
    prompt's level is its number in the column that data.prompts.curriculum names."""

    pass_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 0.7
    """The next level is unlocked when more than this fraction of the replies to prompts of the
    newest level passes, as a mean over window rollouts."""
    passing_score: float = 1.0
    """A reply passes when the weighted sum of its rewards is at least this."""
    window: PositiveInt = 5
    """Rollouts over which the pass rate is a mean, counted from the last unlocking."""


class OnlineSettings(HeldOutSettings):
    """Settings that all online algorithms share."""

    one_action: ClassVar[bool] = False  # a whole reply is one action, not each of its tokens
    takes_weights: ClassVar[bool] = True  # the loss has a surrogate that importance weights scale

    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-6
    """Peak learning rate of the policy."""
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    """Learning rate after the warm-up. cosine and linear end at 0."""
    steps: PositiveInt = 100
    """Number of rollouts."""
    batch_size: PositiveInt = 64
    """Prompts per rollout over all ranks, with one reply each."""
    minibatches: PositiveInt = 1
    """Optimizer steps per epoch over a rollout."""
    max_new_tokens: PositiveInt = 128
    """Longest reply in tokens; with an environment of one turn."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Sampling temperature. Log-probabilities are computed at the same temperature."""
    rollout: Rollout = BuiltinRollout()
    """The engine that samples replies."""
    environment: Environment | None = None
    """What answers replies, such as tools, so that an episode has several turns. Rules see an
    episode's last reply. Empty: one reply to each prompt."""
    rewards: tuple[Reward, ...] = (ModelReward(),)
    """The objective: a weighted sum of the reward model's score and of rules."""
    kl_coef: Annotated[float, Field(ge=0.0)] = 0.05
    """Weight of the per-token KL penalty to the SFT model."""
    kl_target: Annotated[float, Field(gt=0.0)] | None = None
    """KL to the SFT model (nats per reply) at which to hold the policy: kl_coef is then the first
    value of a coefficient that follows the KL of the rollouts (arXiv 1909.08593). Empty: off."""
    kl_horizon: Annotated[float, Field(gt=0.0)] = 10.0
    """Each rollout changes the coefficient by (KL / kl_target - 1, at most ± 0.2) / kl_horizon."""
    curriculum: Curriculum | None = None
    """Begin with the easiest prompts, and unlock harder ones as the policy passes. Empty: off."""
    eval_prompts: PositiveInt = 64
    """Held-out prompts of each evaluation during training, see eval_every: the last ones (the
    evaluation of the finished model takes the first), with the same random numbers each time."""
    select_by: str = "reward"
    """What is highest at the best evaluation: reward (the objective), or one of the rewards by its
    type, such as model or a rule; one of weight 0 is measured and not trained on."""
    kl_budget: Annotated[float, Field(gt=0.0)] | None = None
    """KL to the SFT model (nats per reply, on held-out prompts) above which an evaluation is not
    the best one; if all are above, the lowest KL is. Empty: any KL."""
    clip_range: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """The probability ratio is clipped to 1 - clip_range and 1 + clip_range, see objective."""
    missing_eos_penalty: Annotated[float, Field(ge=0.0)] = 1.0
    """Subtracted from the score of a reply that was cut at max_new_tokens, and of an episode that
    was cut at one of its limits."""
    mask_truncated_completions: bool = False
    """Leave replies that were cut at max_new_tokens out of the loss (overlong filtering, arXiv
    2503.14476), and episodes that were cut. Their scores still count in the mean of their group."""
    score_clip: Annotated[float, Field(gt=0.0)] | None = None
    """The reward model's score is clipped to -score_clip and score_clip, in standard deviations of
    the SFT model's replies: a policy gains nothing from what scores beyond. Empty: off."""
    score_whiten: bool = False
    """Shift and scale the sum of the rewards to mean 0 and standard deviation 1 over each rollout,
    before missing_eos_penalty. kl_coef then weighs the same whatever the rewards' scale."""
    ptx_coef: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of a language-modelling loss mixed into each step (PPO-ptx), for every online
    algorithm. 0: off."""
    collapse_window: PositiveInt = 5
    """The bounds below apply to means over this many rollouts, or over all steps if there are
    fewer."""
    max_kl: Annotated[float, Field(gt=0.0)] | None = 100.0
    """The stage fails when the mean KL to the SFT model (nats per reply) exceeds this. Empty: no
    bound. Where kl_coef is 0 and kl_budget empty as well, no KL is measured: the SFT model is not
    loaded beside the policy, and a rollout takes one pass less."""
    max_repetition: Annotated[float, Field(gt=0.0, le=1.0)] | None = 0.9
    """The stage fails when the mean fraction of repeated 4-grams in a reply exceeds this. Replies
    of fewer than 14 tokens cannot reach 0.9. Empty: no bound."""
    min_length: Annotated[float, Field(gt=0.0)] | None = 1.5
    """The stage fails when the mean reply length (tokens, end of turn included) falls below this.
    At 1.5 half of the replies are empty. Empty: no bound."""
    max_length: Annotated[float, Field(gt=0.0)] | None = None
    """The stage fails when the mean reply length (tokens) exceeds this; it must be below
    max_new_tokens. Empty: no bound, when replies should grow."""
    min_entropy: Annotated[float, Field(gt=0.0)] | None = None
    """The stage fails when the mean entropy (nats per token) falls below this: replies no longer
    differ, so there is nothing left to learn from. Empty: no bound."""
    max_unfinished: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """The stage fails when more than this fraction of replies has no end-of-turn token. Empty: no
    bound, when replies are cut on purpose."""
    max_opening: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """The stage fails when more than this fraction of the replies begins with the same three
    tokens. Empty: no bound, only a warning in the log from one half on."""
    min_distinct: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """The stage fails when distinct-2 (different pairs of neighbouring tokens in a rollout, among
    all of them) falls below this fraction of the first rollouts'. Empty: no bound."""

    @field_validator("rewards")
    @classmethod
    def _some_rewards(cls, rewards: tuple[Reward, ...]) -> tuple[Reward, ...]:
        return checked_rewards(rewards, environment=True)

    @model_validator(mode="after")
    def _environment_can_be_used(self) -> Self:
        parallel = getattr(self.rollout, "tensor_parallel", 1)
        check_environment(self.environment, self.rewards, self.max_new_tokens, parallel)
        return self

    @model_validator(mode="after")
    def _rollouts_fit_together(self) -> Self:
        self.rollout.fits_together()
        if self.environment is not None and self.rollout.max_staleness:
            raise ValueError(
                f"rollout.max_staleness is {self.rollout.max_staleness} with an environment, whose "
                "episodes are sampled with the newest weights; set it to 0, or clear environment"
            )
        if self.curriculum is not None and self.rollout.max_staleness:
            raise ValueError(
                f"rollout.max_staleness is {self.rollout.max_staleness} with a curriculum, whose "
                "prompts are chosen by the steps that are not trained yet; set it to 0, or clear "
                "curriculum"
            )
        if self.rollout.segments > self.max_new_tokens:
            raise ValueError(
                f"rollout.segments is {self.rollout.segments} and max_new_tokens "
                f"{self.max_new_tokens}, so a segment would have no token; lower segments"
            )
        return self

    @model_validator(mode="after")
    def _bounds_of_the_length_can_be_kept(self) -> Self:
        least, most, longest = self.min_length, self.max_length, self.response_tokens
        limit = "max_new_tokens" if self.environment is None else "environment.max_episode_tokens"
        if least is not None and least > longest:
            raise ValueError(
                f"min_length is {least:g} and {limit} {longest}, so every reply would "
                f"be too short; clear min_length or raise {limit}"
            )
        if most is not None and most >= longest:
            raise ValueError(
                f"max_length is {most:g} and {limit} {longest}, so no reply could be "
                "too long; lower max_length, or clear it"
            )
        if least is not None and most is not None and least > most:
            raise ValueError(f"min_length {least:g} is above max_length {most:g}; swap them")
        return self

    @model_validator(mode="after")
    def _prompts_are_chosen_in_time(self) -> Self:
        placed = getattr(self.rollout, "placement", "colocated")
        if self.curriculum is not None and placed != "colocated":
            raise ValueError(
                f"curriculum is set and rollout.placement is {placed}, where prompts are taken "
                "before the rollouts that unlock their level; clear curriculum, or set placement "
                "to colocated"
            )
        return self

    @model_validator(mode="after")
    def _scores_can_be_shaped(self) -> Self:
        if self.score_clip is not None and not self.wants_reward_model:
            raise ValueError(
                f"score_clip is {self.score_clip:g}, but rewards has no entry of type model whose "
                "score it would clip; add one, or clear score_clip"
            )
        if self.score_whiten and self.replies < 2:
            raise ValueError(
                "score_whiten is set, but a rollout has one reply, which has no standard "
                "deviation; raise batch_size"
            )
        return self

    @model_validator(mode="after")
    def _best_point_can_be_found(self) -> Self:
        if self.kl_budget is not None and self.eval_every is None:
            raise ValueError(
                f"kl_budget is {self.kl_budget:g} but eval_every is empty, so the KL would never "
                "be measured on held-out prompts; set eval_every, or clear kl_budget"
            )
        known = ["reward", *reward_names(self.rewards)]
        if self.select_by not in known:
            names = " or ".join(known)
            raise ValueError(f"select_by is {self.select_by}, not a reward; expected {names}")
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError(
                f"kl_target is {self.kl_target:g} but kl_coef is 0, which no factor raises; set "
                "kl_coef to its first value, such as 0.05, or clear kl_target"
            )
        return self

    @model_validator(mode="after")
    def _actions_have_weights(self) -> Self:
        correction = self.rollout.correction
        if self.one_action and correction is not None and correction.level == "token":
            raise ValueError(
                "rollout.correction.level is token, but here a whole reply is one action, which "
                "has one weight; set it to sequence, or clear it"
            )
        return self

    @property
    def correction(self) -> RolloutCorrection | None:
        """The importance weights of the loss, see `Placement.correction_in_force`; None: none."""
        return self.rollout.correction_in_force if self.takes_weights else None

    @property
    def needs_reference(self) -> bool:
        """Whether the SFT model runs beside the policy: the KL to it counts, or has a bound."""
        return self.kl_coef > 0 or self.max_kl is not None or self.kl_budget is not None

    @property
    def replies(self) -> int:
        """Replies per rollout over all ranks."""
        return self.batch_size

    @property
    def response_tokens(self) -> int:
        """The most tokens that can follow a prompt: of one reply, or of an episode."""
        return (
            self.max_new_tokens if self.environment is None else self.environment.max_episode_tokens
        )

    @property
    def wants_reward_model(self) -> bool:
        """Whether the reward model's score is one of the rewards."""
        return needs_reward_model(self.rewards)


class OnlineJob(OnlineSettings, EnsembleJob, HeldOutJob):
    """An online algorithm's settings and inputs."""

    kind: ClassVar[str] = "model"
    critic: ClassVar[bool] = False  # a critic can start from a reward model that scores nothing

    model: Digest = job_input()
    """SFT model: start of the policy, and the reference."""
    reward_model: Digest | None = job_input(default=None)
    """Reward model. Empty when all rewards are rules."""
    prompts: Digest = job_input()
    """Data set of purpose prompts."""
    ptx: Digest | None = job_input(default=None)
    """Data set of purpose sft or pretrain, mixed in when ptx_coef is above 0."""
    resources: Resources = Resources()
    """Placement of the job."""

    @property
    def samplers(self) -> int:
        return self.rollout.gpus

    def key_settings(self) -> dict[str, Any]:
        """Leaves out default values of later settings (built-in rollout, `LATER`), so that older
        results keep their keys, and what changes no result: where replies are sampled, and how
        services that score them are asked."""
        settings = super().key_settings()
        for name in LATER:
            fields = type(self).model_fields
            if name in settings and getattr(self, name) == fields[name].default:
                del settings[name]
        without_asking(self.rewards, settings["rewards"])
        settings["rollout"] = self.rollout.key_settings()
        if settings["rollout"] == BuiltinRollout().key_settings():
            del settings["rollout"]
        return settings

    @model_validator(mode="after")
    def _mixed_in_is_there(self) -> Self:
        if self.ptx_coef > 0 and self.ptx is None:
            raise ValueError(
                f"ptx_coef is {self.ptx_coef:g} but ptx is empty, so nothing would be mixed "
                "in; give a data set of purpose sft or pretrain, or set ptx_coef to 0"
            )
        return self

    @model_validator(mode="after")
    def _rewards_have_their_model(self) -> Self:
        given = self.reward_model is not None
        check_reward_model(self.rewards, given, other_use=self.critic)
        return self
