"""A run in a store, with models that are tiny and untrained, but not the same."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rlhf_core.store import Store
from tests.rlhf_core.tiny_models import copy_of

NAMES = {"model": "base", "sft": "SFT", "ppo": "PPO"}


@dataclass(frozen=True)
class TinyRun:
    """Digests by stage."""

    store: Store
    stages: dict[str, str]


@functools.cache
def model_folders() -> dict[str, Path]:
    """Stage -> model folder."""
    import atexit
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    from rlhf_core.models.loading import new_scalar_model
    from rlhf_core.models.saving import save_scalar_model

    base = Path(tempfile.mkdtemp(prefix="rlhf-test-"))
    atexit.register(shutil.rmtree, base, True)
    folders = {stage: copy_of("llama", base / stage) for stage in NAMES}
    for seed, stage in enumerate(NAMES):
        generator = torch.Generator().manual_seed(seed)
        file = folders[stage] / "model.safetensors"
        weights = load_file(file)
        noisy = {
            name: value + 0.3 * torch.randn(value.shape, generator=generator)
            for name, value in weights.items()
        }
        save_file(noisy, file, metadata={"format": "pt"})
    folders["reward"] = base / "reward"
    scalar = new_scalar_model(folders["sft"], seed=1)
    scalar.mean, scalar.std = 0.25, 0.5
    save_scalar_model(scalar, folders["reward"], folders["sft"])
    return folders


def tiny_run(store: Store, name: str = "tiny") -> TinyRun:
    """Publish the models as stages of a run, and the PPO model under a name."""
    stages, record = {}, {}
    for stage, folder in model_folders().items():
        kind = "reward_model" if stage == "reward" else "model"
        artifact = store.publish(folder, kind=kind, metadata={"algorithm": stage})
        stages[stage] = artifact.digest
        record[stage] = {"digest": artifact.digest, "kind": kind, "reused": False}
    store.write_record(
        f"runs/{name}.json",
        {"id": name, "name": "tiny", "state": "completed", "started": "2026-01-01T00:00:00",
         "stages": record, "host": "elsewhere", "pid": 1},
    )  # fmt: skip
    files = {entry.path: entry for entry in store.get(stages["ppo"]).files}
    published = store.publish_derived(
        kind="published", files=files, metadata={"name": "tiny-chat", "policy": stages["ppo"]}
    )
    store.write_record(
        f"models/tiny-chat/20260101T000000-{published.digest[:12]}.json",
        {"name": "tiny-chat", "digest": published.digest, "run": name},
    )
    return TinyRun(store, {**stages, "published": published.digest})
