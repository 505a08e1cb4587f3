"""One run of the pipeline."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlhf_core.jobs.base import Resources, Seed, Settings, Slug
from rlhf_core.jobs.data import DataConfig, ModelSettings
from rlhf_core.jobs.harness import LmEvalSettings
from rlhf_core.jobs.launchers import Launcher, LocalLauncher
from rlhf_core.jobs.online import GRPOSettings, PPOSettings, ReinforcePPSettings, RLOOSettings
from rlhf_core.jobs.preference import DPOSettings, KTOSettings, ORPOSettings, SimPOSettings
from rlhf_core.jobs.pretraining import NewModelSettings, PretrainSettings
from rlhf_core.jobs.results import EvaluateSettings, PublishSettings
from rlhf_core.jobs.training import RewardSettings, SFTSettings

Preset = Literal[
    "none", "smoke", "demo", "dpo", "simpo", "orpo", "kto", "grpo", "rloo", "reinforce_pp",
    "iterative-dpo", "grpo-rules", "pretrain", "bloom-560m", "llama-7b",
]  # fmt: skip
"""Settings that come with the project, in deployments/presets."""

TrainingStage = Literal[
    "pretrain", "sft", "reward", "dpo", "simpo", "orpo", "kto", "ppo", "grpo", "rloo",
    "reinforce_pp",
]  # fmt: skip
"""Algorithms that train: each has a section of settings of its name, and a job."""


class PipelineConfig(Settings):
    """Everything a run of the pipeline depends on. The defaults run on an empty machine."""

    preset: Preset = "none"
    """Settings to start from; what is set below to something else than its default lies over
    them."""
    name: Slug = "rlhf"
    """Name of the run, shown in lists."""
    seed: Seed = 0
    """Seed of every shuffle, split, initialisation and sample."""
    store: str | None = None
    """URL of the artifact store (file:// or s3://); empty: $RLHF_STORE, else .rlhf/store here."""
    stages: tuple[TrainingStage, ...] = ("sft", "reward", "ppo")
    """Training stages in their order. Each language model goes on from the one before it; reward
    trains the reward model beside it."""
    rounds: Annotated[int, Field(ge=1, le=100)] = 1
    """How often the stages after sft and reward are repeated, each time from the newest policy. In
    several rounds, preference pairs are sampled anew in each, as data.rounds says."""
    model: ModelSettings = ModelSettings()
    """Base model."""
    new_model: NewModelSettings | None = None
    """Make the base model from nothing, with a tokenizer of the text in data.pretrain, instead of
    importing one; model then counts for nothing but its trust_remote_code."""
    reward_model: str | None = None
    """Reward model that is there already, when reward is not among the stages: artifact:DIGEST,
    local folder, or Hugging Face id."""
    data: DataConfig = DataConfig()
    """Data sets."""
    resources: Resources = Resources()
    """Placement of every stage that has none of its own."""
    pretrain: PretrainSettings = PretrainSettings()
    """Pretraining on plain text, where stages has pretrain."""
    sft: SFTSettings = SFTSettings()
    """Supervised fine-tuning, where stages has sft."""
    reward: RewardSettings = RewardSettings()
    """Reward model, where stages has reward."""
    dpo: DPOSettings = DPOSettings()
    """Direct preference optimisation, where stages has dpo."""
    simpo: SimPOSettings = SimPOSettings()
    """SimPO, where stages has simpo."""
    orpo: ORPOSettings = ORPOSettings()
    """ORPO, where stages has orpo."""
    kto: KTOSettings = KTOSettings()
    """KTO, where stages has kto."""
    ppo: PPOSettings = PPOSettings()
    """PPO, where stages has ppo."""
    grpo: GRPOSettings = GRPOSettings()
    """GRPO, where stages has grpo."""
    rloo: RLOOSettings = RLOOSettings()
    """RLOO, where stages has rloo."""
    reinforce_pp: ReinforcePPSettings = ReinforcePPSettings()
    """REINFORCE++, where stages has reinforce_pp."""
    evaluate: EvaluateSettings = EvaluateSettings()
    """Evaluation."""
    lm_eval: LmEvalSettings | None = None
    """Standard benchmarks after the evaluation, by the package lm-eval; empty: not run."""
    publish: PublishSettings = PublishSettings()
    """Publishing."""
    launcher: Launcher = LocalLauncher()
    """How stages are started."""
