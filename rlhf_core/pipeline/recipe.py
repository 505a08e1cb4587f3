"""The steps of a configuration's stages, and the data that they need. Does not import torch.

    stages [sft, reward, ppo]          sft, label, reward, ppo
    the same, 2 reward.members         sft, label, reward-1, reward-2, ppo
    stages [sft, dpo]                  sft, label, dpo
    stages [sft, reward, dpo], 2 rounds  sft, label, reward, label-1, dpo-1, label-2, dpo-2
    stages [sft, rejection_sampling]   sft, best_of_n, rejection_sampling

"label" is a step only if preference pairs are sampled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rlhf_core.jobs import (
    BaseJob,
    DataSettings,
    EndpointJudgeSettings,
    Mixture,
    OnlineSettings,
    PipelineConfig,
    Purpose,
    SampledPreferences,
    Source,
    TrainSettings,
    job_class,
)
from rlhf_core.jobs.best_of_n import BestOfNSettings
from rlhf_core.jobs.judging import EndpointSettings
from rlhf_core.jobs.rewards import Reward

BEFORE_ALIGNMENT = ("pretrain", "sft", "reward")
"""Stages before the alignment, which rounds do not repeat."""

LABELS = {"reward": "reward model", "simpo": "SimPO", "reinforce_pp": "REINFORCE++",
          "pretrain": "pretraining", "rejection_sampling": "best-of-n SFT",
          "distill": "distillation", "online_dpo": "online DPO"}  # fmt: skip

Rewarded = OnlineSettings | BestOfNSettings
"""Settings with `rewards`."""


@dataclass(frozen=True)
class Step:
    """One stage that runs on ranks.

    Attributes:
        name: in the run's record: the algorithm, with the round if there are several.
        algorithm: "label", "best_of_n", or one of the configuration's stages.
        round: from 0; 0 for stages that are not repeated.
        member: of an ensemble of reward models, from 0; 0 for all other stages.
    """

    name: str
    algorithm: str
    round: int = 0
    member: int = 0

    @property
    def job(self) -> type[BaseJob]:
        return job_class(self.algorithm)

    @property
    def result_role(self) -> str:
        """Role of the step's result, see `job_input`; `member_role` of a reward model."""
        return member_role(self.member) if self.job.kind == "reward_model" else self.job.kind


def member_role(member: int) -> str:
    """Role of a reward model: `reward_model`, `reward_model-2` and so on."""
    return f"reward_model-{member + 1}" if member else "reward_model"


def steps(config: PipelineConfig) -> list[Step]:
    """All steps, in order."""
    result: list[Step] = []
    before, repeated = split(config)
    sampled = isinstance(config.data.preference, SampledPreferences)
    for algorithm in before:
        if sampled and "preference" in roles(config, algorithm).values() and not _labelled(result):
            result.append(Step("label", "label"))
        members = config.reward.members if algorithm == "reward" else 1
        names = [algorithm] if members == 1 else [f"{algorithm}-{i + 1}" for i in range(members)]
        result += [Step(name, algorithm, member=i) for i, name in enumerate(names)]
    for number in range(config.rounds):
        suffix = f"-{number + 1}" if config.rounds > 1 else ""
        for algorithm in repeated:
            if "preference" in roles(config, algorithm).values():
                anew = config.rounds > 1 and not _labelled(result, number)
                if anew or (config.rounds == 1 and sampled and not _labelled(result)):
                    result.append(Step(f"label{suffix}", "label", number))
            if algorithm == "rejection_sampling":
                result.append(Step(f"best_of_n{suffix}", "best_of_n", number))
            result.append(Step(f"{algorithm}{suffix}", algorithm, number))
    return result


def _labelled(before: list[Step], number: int | None = None) -> bool:
    suffix = "" if number is None else f"-{number + 1}"
    return any(step.name == f"label{suffix}" for step in before)


def split(config: PipelineConfig) -> tuple[list[str], list[str]]:
    """The stages that run once, and those that each round repeats."""
    first = next((i for i, s in enumerate(config.stages) if s not in BEFORE_ALIGNMENT), None)
    if first is None:
        return list(config.stages), []
    return list(config.stages[:first]), list(config.stages[first:])


def policy_label(config: PipelineConfig) -> str:
    """Display name of the run's final model, after the last stage that made a model."""
    made = model_stages(config)
    return display_name(made[-1]) if made else "base"


def display_name(stage: str) -> str:
    """Display name of a stage's model; the stage may have a round, as ppo-2, or a member, as
    reward-2."""
    algorithm, _, number = stage.partition("-")
    label = LABELS.get(algorithm, algorithm.upper())
    if algorithm == "reward" and number:
        return f"{label} {number}"
    return f"{label}, round {number}" if number else label


def model_stages(config: PipelineConfig) -> list[str]:
    """The stages that train a language model."""
    return [stage for stage in config.stages if job_class(stage).kind == "model"]


def produces_model(config: PipelineConfig) -> bool:
    """Whether the run trains a language model, which is evaluated and published."""
    return bool(model_stages(config))


def stage_names(config: PipelineConfig) -> list[str]:
    """All stages, in order; `until` takes these names."""
    last = [*evaluation_stages(config), "publish"] if produces_model(config) else []
    return ["model", "data", *(step.name for step in steps(config)), *last]


def evaluation_stages(config: PipelineConfig) -> list[str]:
    """The stages between training and publishing, in order."""
    return ["evaluate"] if config.lm_eval is None else ["evaluate", "lm_eval"]


def check_until(config: PipelineConfig, until: str) -> list[str]:
    """Problems if the run does not have the stage `until`."""
    names = stage_names(config)
    known = {*names, *(step.algorithm for step in steps(config))}
    if until in known or until == "publish":
        return []
    return [f"until is {until}, but this run has no such stage; its stages are {', '.join(names)}"]


def reward_models(config: PipelineConfig) -> int:
    """Number of reward models that the run trains or imports."""
    if "reward" in config.stages:
        return config.reward.members
    return len(imported_rewards(config))


def imported_rewards(config: PipelineConfig) -> tuple[str, ...]:
    """Sources of the existing reward models that the run uses."""
    given = config.reward_model
    return () if given is None else (given,) if isinstance(given, str) else given


def has_reward_model(config: PipelineConfig) -> bool:
    """Whether the run trains or imports a reward model."""
    return reward_models(config) > 0


def online_rewards(config: PipelineConfig) -> tuple[Reward, ...]:
    """The rewards of the last stage that has any: online RL, or rejection sampling. Without that of
    an environment, which single replies cannot have."""
    found = [section(config, stage) for stage in config.stages]
    rewards = [settings.rewards for settings in found if isinstance(settings, Rewarded)]
    last = rewards[-1] if rewards else ()
    return tuple(reward for reward in last if reward.type != "environment")


def label_settings(config: PipelineConfig, step: Step) -> tuple[str, SampledPreferences]:
    """Name and value of the settings of a label step."""
    if step.name != "label":
        return "data.rounds", config.data.rounds
    assert isinstance(config.data.preference, SampledPreferences)
    return "data.preference", config.data.preference


def labelling_judges(config: PipelineConfig) -> dict[str, EndpointSettings]:
    """Setting -> the judge behind an endpoint that labels pairs, before training or in it."""
    labels = [step for step in steps(config) if step.algorithm == "label"]
    found = {f"{name}.judge": s.judge for name, s in (label_settings(config, x) for x in labels)}
    if "online_dpo" in config.stages:
        found["online_dpo.judge"] = config.online_dpo.judge
    return {name: judge for name, judge in found.items() if judge is not None}


def judges(config: PipelineConfig) -> dict[str, EndpointSettings]:
    """Setting -> the judge behind an endpoint that labels pairs or evaluates."""
    endpoint = config.evaluate.judge_endpoint
    own = {} if endpoint is None else {"evaluate.judge_endpoint": endpoint}
    return labelling_judges(config) | own


def section(config: PipelineConfig, algorithm: str) -> TrainSettings:
    """The settings of a stage; best_of_n has them from the stage that it samples for."""
    settings = getattr(config, "rejection_sampling" if algorithm == "best_of_n" else algorithm)
    assert isinstance(settings, TrainSettings)
    return settings


def roles(config: PipelineConfig, algorithm: str) -> dict[str, str]:
    """Field of each of the stage's inputs -> its role, see `job_input`."""
    found = job_class(algorithm).roles()
    if algorithm == "label":
        return found
    settings = section(config, algorithm)
    if not getattr(settings, "ptx_coef", 0.0):
        found = {name: role for name, role in found.items() if role != "ptx"}
    if isinstance(settings, Rewarded) and not settings.wants_reward_model:
        critic = getattr(job_class(algorithm), "critic", False) and has_reward_model(config)
        found = {k: role for k, role in found.items() if role != "reward_model" or critic}
    if config.data.unpaired is None:
        found = {k: "preference" if role == "unpaired" else role for k, role in found.items()}
    return found


def data_sources(config: PipelineConfig) -> Iterator[tuple[Purpose, str, DataSettings]]:
    """The sources that the run reads: purpose, setting name, settings. Those of a mixture come one
    by one, as data.sft.mix.0."""
    for purpose, name, settings in data_sets(config):
        for number, part in enumerate(settings.parts):
            yield purpose, f"{name}.mix.{number}" if isinstance(settings, Mixture) else name, part


def data_sets(config: PipelineConfig) -> Iterator[tuple[Purpose, str, Source]]:
    """The data sets that the run reads: purpose, setting name, settings.

    The last part of the setting's name is also the role of the data set.
    """
    data = config.data
    needed = {role for s in steps(config) for role in roles(config, s.algorithm).values()}
    if data.pretrain is not None and "pretrain" in needed:
        yield "pretrain", "data.pretrain", data.pretrain
    if "sft" in needed or ("ptx" in needed and data.ptx is None):
        yield "sft", "data.sft", data.sft
    if "prompts" in needed or produces_model(config):
        yield "prompts", "data.prompts", data.prompts
    if "preference" in needed and not isinstance(data.preference, SampledPreferences):
        yield "preference", "data.preference", data.preference
    if "unpaired" in needed and data.unpaired is not None:
        yield "unpaired", "data.unpaired", data.unpaired
    if "ptx" in needed and data.ptx is not None:
        yield "pretrain", "data.ptx", data.ptx


def problems(config: PipelineConfig) -> list[str]:
    """Problems of the list of stages, one text each."""
    found = []
    before, repeated = split(config)
    if not config.stages:
        found.append("stages is empty; expected at least one, such as [sft, reward, ppo]")
    twice = sorted({s for s in config.stages if config.stages.count(s) > 1})
    found += [f"stages has {stage} twice; use rounds to repeat the alignment" for stage in twice]
    found += [
        f"stages has {late} after {repeated[0]}; put it before the alignment"
        for late in repeated
        if late in BEFORE_ALIGNMENT
    ]
    if config.rounds > 1 and not repeated:
        found.append(
            f"rounds is {config.rounds}, but stages {list(config.stages)} has nothing to repeat: "
            "add an alignment such as ppo, or set rounds to 1"
        )
    there = has_reward_model(config)
    weights, models = len(config.reward.member_weights), reward_models(config)
    if weights and weights != models:
        found.append(
            f"reward.member_weights has {weights} numbers for {models} reward models; give one for "
            "each, or clear it"
        )
    if "reward" in config.stages and config.reward_model is not None:
        found.append("stages has reward and reward_model is set too; leave one out")
    for stage in [*before, *repeated]:
        samples = "best_of_n" if stage == "rejection_sampling" else stage
        if "reward_model" in roles(config, samples).values() and not there:
            found.append(
                f"{stage} needs a reward model: put reward before {stage} in stages, or set "
                "reward_model to an existing one"
            )
    if "distill" in config.stages and config.teacher is None:
        found.append(
            "stages has distill, but teacher is empty; set it to a model of the same family, such "
            "as a larger one"
        )
    if config.teacher is not None and "distill" not in config.stages:
        found.append(
            f"teacher is {config.teacher}, but stages {list(config.stages)} has no distill, which "
            "would use it; add distill, or clear teacher"
        )
    if "pretrain" in config.stages and config.data.pretrain is None:
        found.append(
            "stages has pretrain, but data.pretrain is empty; give it a source of plain text, such "
            "as {source: texts/*.txt, format: text}"
        )
    if config.lm_eval is not None and config.stages and not produces_model(config):
        found.append(
            f"lm_eval is set, but stages {list(config.stages)} train no language model to "
            "measure; clear lm_eval"
        )
    if config.new_model is not None and config.data.pretrain is None:
        found.append("new_model needs text for its tokenizer; set data.pretrain")
    found += _labelling(config, there)
    return found


def _labelling(config: PipelineConfig, there: bool) -> list[str]:
    found = []
    for step in steps(config):
        if step.algorithm != "label":
            continue
        name, settings = label_settings(config, step)
        early = step.name == "label" and not imported_rewards(config) and "reward" in config.stages
        if settings.labeller == "reward_model" and (early or not there):
            found.append(
                f"{name}.labeller is reward_model, but there is none "
                f"{'yet when the pairs for training it are made' if early else 'in this run'}; "
                "set reward_model, or use another labeller"
            )
        trained = "reward" in config.stages and config.reward.margin_coef > 0
        if trained and isinstance(settings.judge, EndpointJudgeSettings):
            found.append(
                f"reward.margin_coef is {config.reward.margin_coef:g}, but {name}.judge compares "
                "replies and gives no scores; set its type to rubric, or clear margin_coef"
            )
    return list(dict.fromkeys(found))
