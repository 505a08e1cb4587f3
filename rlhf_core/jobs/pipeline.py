"""The configuration of one run of the pipeline."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rlhf_core.jobs.base import Resources, Seed, Settings, Slug
from rlhf_core.jobs.best_of_n import RejectionSamplingSettings
from rlhf_core.jobs.data import DataConfig, ModelSettings
from rlhf_core.jobs.distillation import DistillSettings
from rlhf_core.jobs.harness import LmEvalSettings
from rlhf_core.jobs.launchers import Launcher, LocalLauncher, Priority
from rlhf_core.jobs.online_dpo import OnlineDPOSettings
from rlhf_core.jobs.policy_gradient import (
    GRPOSettings,
    PPOSettings,
    ReinforcePPSettings,
    RLOOSettings,
)
from rlhf_core.jobs.preference import DPOSettings, KTOSettings, ORPOSettings, SimPOSettings
from rlhf_core.jobs.pretraining import NewModelSettings, PretrainSettings
from rlhf_core.jobs.results import EvaluateSettings, PublishSettings
from rlhf_core.jobs.tracking import MlflowTracking, OpenLineage
from rlhf_core.jobs.training import RewardSettings, SFTSettings

TrainingStage = Literal[
    "pretrain", "sft", "reward", "dpo", "simpo", "orpo", "kto", "ppo", "grpo", "rloo",
    "reinforce_pp", "rejection_sampling", "distill",
    "online_dpo",
]  # fmt: skip
"""Stages that train. Each has a section of settings of the same name, and a job."""


class PipelineConfig(Settings):
    """Everything that a run depends on. The defaults run on an empty machine."""

    name: Slug = "rlhf"
    """Name of the run in lists."""
    seed: Seed = 0
    """Seed of all shuffles, splits, initialisations and samples."""
    author: Annotated[str, Field(max_length=200)] | None = None
    """Who is responsible for the run, for lists and reports. Empty: $RLHF_AUTHOR, else the user who
    starts it."""
    priority: Priority = "normal"
    """Which stages of a work pool go first: those of runs with high priority before all others, and
    those with low after all others. Among equals the oldest run goes first, but the further runs of
    an author (of a name, where none is set) after the first ones of others."""
    gpu_hour_price: Annotated[float, Field(ge=0.0)] | None = None
    """Price of one GPU for an hour, in any currency, for the costs in reports. Empty: none."""
    store: str | None = None
    """URL of the artifact store (file://, s3://, gs:// or az://). Empty: $RLHF_STORE, else
    .rlhf/store here."""
    stages: tuple[TrainingStage, ...] = ("sft", "reward", "ppo")
    """Training stages in their order. Each starts from the newest language model; reward trains the
    reward model beside it."""
    rounds: Annotated[int, Field(ge=1, le=100)] = 1
    """How often the stages after sft and reward run, each time from the newest policy. With more
    than one round, each samples new preference pairs, as data.rounds says."""
    model: ModelSettings = ModelSettings()
    """Base model."""
    new_model: NewModelSettings | None = None
    """Create the base model from scratch instead of importing one: random weights, and a tokenizer
    trained on data.pretrain. Of model, only trust_remote_code and quantization are
    then used."""
    reward_model: str | tuple[str, ...] | None = None
    """An existing reward model, when reward is not among the stages: artifact:DIGEST, a local
    folder or a Hugging Face id. Or a list of several, which score together as reward.combine
    says."""
    teacher: str | None = None
    """The model that the stage distill learns from, with the same vocabulary as model:
    artifact:DIGEST, a local folder, a Hugging Face id or builtin:NAME."""
    data: DataConfig = DataConfig()
    """Data sets."""
    resources: Resources = Resources()
    """Placement of all stages. A stage's own resources override it."""
    pretrain: PretrainSettings = PretrainSettings()
    """Settings of the stage pretrain."""
    sft: SFTSettings = SFTSettings()
    """Settings of the stage sft."""
    reward: RewardSettings = RewardSettings()
    """Settings of the stage reward."""
    dpo: DPOSettings = DPOSettings()
    """Settings of the stage dpo."""
    simpo: SimPOSettings = SimPOSettings()
    """Settings of the stage simpo."""
    orpo: ORPOSettings = ORPOSettings()
    """Settings of the stage orpo."""
    kto: KTOSettings = KTOSettings()
    """Settings of the stage kto."""
    ppo: PPOSettings = PPOSettings()
    """Settings of the stage ppo."""
    grpo: GRPOSettings = GRPOSettings()
    """Settings of the stage grpo."""
    rloo: RLOOSettings = RLOOSettings()
    """Settings of the stage rloo."""
    reinforce_pp: ReinforcePPSettings = ReinforcePPSettings()
    """Settings of the stage reinforce_pp."""
    rejection_sampling: RejectionSamplingSettings = RejectionSamplingSettings()
    """Settings of the stage rejection_sampling, and of best_of_n, which samples for it."""
    distill: DistillSettings = DistillSettings()
    """Settings of the stage distill."""
    online_dpo: OnlineDPOSettings = OnlineDPOSettings()
    """Settings of the stage online_dpo."""
    evaluate: EvaluateSettings = EvaluateSettings()
    """Evaluation."""
    lm_eval: LmEvalSettings | None = None
    """Standard benchmarks after the evaluation (package lm-eval). Empty: not run."""
    publish: PublishSettings = PublishSettings()
    """Name of the published model, and its approval."""
    tracking: MlflowTracking | None = None
    """Mirror of the run in an experiment tracker. Empty: none."""
    openlineage: OpenLineage | None = None
    """Lineage events for other programs. Empty: none."""
    launcher: Launcher = LocalLauncher()
    """How stages are started."""

    @model_validator(mode="before")
    @classmethod
    def _no_preset(cls, data: Any) -> Any:
        """Records of older versions say `preset: none`: it was a field, and had been applied."""
        if isinstance(data, dict) and data.get("preset") == "none":
            return {name: value for name, value in data.items() if name != "preset"}
        return data
