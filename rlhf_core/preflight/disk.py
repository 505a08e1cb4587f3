"""Checks the disks of a run. Does not import torch."""

from __future__ import annotations

from pathlib import Path

from rlhf_core.jobs import PipelineConfig
from rlhf_core.model_files.shape import ModelShape
from rlhf_core.pipeline import recipe
from rlhf_core.pipeline.placements import placements
from rlhf_core.preflight.memory import GIB
from rlhf_core.store import Store, rlhf_home
from rlhf_core.system.machine import free_disk


def check_disk(config: PipelineConfig, shape: ModelShape, store: Store | None) -> list[str]:
    """Disk space for what a run writes to the store and to the working folder.

    The store gets four models (all fp32, except for the imported one), the further members of an
    ensemble of reward models, and PPO's checkpoints, with the weights of earlier steps from which
    replies are still to be sampled. The working folder has a copy of each model that a stage reads,
    its result, and one checkpoint.
    """
    models = 4 + max(0, recipe.reward_models(config) - 1)
    keep = max(r.keep_checkpoints for r in placements(config).values()) + 1
    checkpoint = (12 * 2 + 4 * _older_weights(config)) * shape.parameters
    sizes: dict[Path, tuple[int, str]] = {}
    home = rlhf_home()
    sizes[home] = (4 * models * shape.parameters + 2 * checkpoint, f"the working folder {home}")
    if store is not None and store.url.startswith("file://"):
        place = Path(store.url.removeprefix("file://"))
        sizes[place] = (4 * models * shape.parameters + keep * checkpoint, f"the store {store.url}")
    return [
        f"{name} needs about {size / GIB:.1f} GiB for {shape.parameters:,} parameters, but its "
        f"disk has {free_disk(path) / GIB:.1f} GiB free; free some space, or use another disk "
        f"with {'RLHF_HOME' if path == home else 'the setting store'}"
        for path, (size, name) in sizes.items()
        if free_disk(path) < size
    ]


def _older_weights(config: PipelineConfig) -> int:
    """Versions of the weights that a checkpoint may hold beside the newest."""
    rollouts = [getattr(recipe.section(config, stage), "rollout", None) for stage in config.stages]
    return max((rollout.max_staleness for rollout in rollouts if rollout is not None), default=0)
