"""Tiny model folders for the tests of this folder."""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from pathlib import Path

from rlhf_core.jobs import ImportModelJob
from rlhf_core.runtime.context import StageContext
from rlhf_core.store import Artifact, open_store

os.environ.setdefault("OMP_NUM_THREADS", "1")


def import_model(base: Path, job: ImportModelJob) -> tuple[Artifact, Path]:
    """Run an import job with a store below `base`; the artifact and a private copy of its files."""
    from rlhf_core.stages.import_model import run

    store = open_store(f"file://{base}/store")
    base.mkdir(exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=base))
    artifact = run(job, StageContext(store=store, key=job.key(), folder=work))
    return artifact, store.fetch(artifact.digest, work / "fetched")


@functools.cache
def _made(architecture: str) -> Path:
    import atexit

    base = Path(tempfile.mkdtemp(prefix="rlhf-test-"))
    atexit.register(shutil.rmtree, base, True)
    _, folder = import_model(base, ImportModelJob(source=f"random:{architecture}"))
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    return folder


def copy_of(architecture: str, folder: Path) -> Path:
    """A fresh copy of an imported random model that a test may damage."""
    shutil.copytree(_made(architecture), folder)
    for path in folder.iterdir():
        path.chmod(0o644)
    return folder


def wide_copy(architecture: str, folder: Path, scale: float = 3.0) -> Path:
    """The same with two heads of width 32 instead of four of 16, which vLLM has no CPU kernel for,
    and new weights, `scale` times as large as they usually start: replies are then less random."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    copy_of(architecture, folder)
    sizes = json.loads((folder / "config.json").read_text())
    heads = {"num_attention_heads": 2, "n_head": 2, "num_key_value_heads": 1, "head_dim": 32}
    config = AutoConfig.for_model(**{k: heads.get(k, v) for k, v in sizes.items()})
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() > 1:
                param.mul_(scale)
    model.save_pretrained(folder)
    return folder
