"""The jobs that prepare a run's data sets: one for each source, and one for each mixture."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_core.data.fingerprint import fingerprint
from rlhf_core.jobs import DataJob, DataSettings, Job, MixedData, MixJob, MixSource, Mixture
from rlhf_core.jobs.sources import EpochSettings
from rlhf_core.pipeline import recipe
from tasks.run import Run, StageResult


def source_jobs(run: Run, model: str) -> dict[str, Job]:
    """Name of the result -> job, of each source: data-sft, or data-sft-NAME in a mixture.

    Args:
        model: digest of the base model, whose tokenizer is used.
    """
    return {
        _name(setting, part): DataJob(
            **{field: getattr(part, field) for field in DataSettings.model_fields},
            seed=run.config.seed,
            purpose=purpose,
            model=model,
            trust_remote_code=run.config.model.trust_remote_code,
            fingerprint=fingerprint(part, run.store),
        )
        for purpose, setting, settings in recipe.data_sets(run.config)
        for part in settings.parts
    }


def mixture_jobs(run: Run, model: str, prepared: Mapping[str, StageResult]) -> dict[str, Job]:
    """Name of the result -> job, of each mixture.

    Args:
        prepared: the results of `source_jobs`.
    """
    return {
        _name(setting): MixJob(
            purpose=purpose,
            model=model,
            mix=tuple(
                MixedData(
                    name=part.label,
                    data=prepared[_name(setting, part)].digest,
                    weight=part.weight,
                    rows=part.rows,
                    deduplicate=part.deduplicate,
                )
                for part in settings.mix
            ),
            **{field: getattr(settings, field) for field in EpochSettings.model_fields},
            seed=run.config.seed,
            trust_remote_code=run.config.model.trust_remote_code,
        )
        for purpose, setting, settings in recipe.data_sets(run.config)
        if isinstance(settings, Mixture)
    }


def _name(setting: str, part: DataSettings | None = None) -> str:
    """Of a data set's result, or of that of a source of a mixture."""
    name = f"data-{setting.rpartition('.')[2]}"
    return f"{name}-{part.label}" if isinstance(part, MixSource) else name
