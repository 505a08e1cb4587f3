"""Bytes that PPO sends to the store where it trains 6 of SmolLM2-135M's 30 layers.

    python benchmarks/store_bytes.py

Builds: the files here, and those of the commit before weights were stored in files of some layers
each; `git archive` takes them from this repository's history. The model has SmolLM2-135M's shape
and random weights. Three real stages run, on one CPU rank and an empty file store: the import of
the model, SFT of all weights, and PPO of the top layers. Each trains for one step, too few for a
checkpoint. Counted is what the store's backend is told to write: files, manifests, records.

Prints a table; exits with 1 if PPO sends more than `ALLOWED` of what it sent before.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.inputs import fresh, write_model
from benchmarks.memory.sharding import QUIET, SMOLLM2_135M
from benchmarks.speed.workload import publish
from rlhf_core.jobs import ImportModelJob, Job, PPOJob, Resources, SFTJob
from rlhf_core.jobs.rewards import LengthReward
from rlhf_core.runtime.context import StageContext
from rlhf_core.store import open_store
from rlhf_core.store.local import LocalBackend

BEFORE = "05d5b7b"  # the last commit whose model folders had whole files
TRAINED = 6  # of 30 layers
STAGES = ("import", "sft", "ppo")
ALLOWED = 0.3


def main() -> int:
    from benchmarks.earlier_build import ROOT, extract  # which earlier builds do not have

    with tempfile.TemporaryDirectory() as folder:
        old = extract(BEFORE, Path(folder) / "before")
        before, now = (
            measure(build, Path(folder) / name) for build, name in ((old, "old"), (ROOT, "new"))
        )
    print("| stage | trains | bytes before | bytes now | ratio |\n" + "| --- " * 5 + "|")
    trains = {"import": "–", "sft": "all layers", "ppo": f"{TRAINED} of 30 layers"}
    for stage in STAGES:
        was, is_now = before[stage], now[stage]
        print(f"| {stage} | {trains[stage]} | {was:,} | {is_now:,} | {is_now / was:.2f} |")
    return int(now["ppo"] > ALLOWED * before["ppo"])


def measure(build: Path, folder: Path) -> dict[str, int]:
    """Bytes that each stage of this build sends."""
    subprocess.run(
        [sys.executable, __file__, "--stages", str(folder)],
        check=True, env={**os.environ, **QUIET, "PYTHONPATH": str(build)}, stdout=sys.stderr,
    )  # fmt: skip
    found: dict[str, int] = json.loads((folder / "bytes.json").read_text())
    return found


def count_bytes() -> dict[str, int]:
    """Has every local backend of this process add to "bytes" what it is told to write."""
    count = {"bytes": 0}
    own_write, own_create, own_upload = (
        LocalBackend.write, LocalBackend.create, LocalBackend.upload,
    )  # fmt: skip

    def write(self: LocalBackend, key: str, data: bytes) -> None:
        count["bytes"] += len(data)
        own_write(self, key, data)

    def create(self: LocalBackend, key: str, data: bytes) -> bool:
        count["bytes"] += len(data)
        return own_create(self, key, data)

    def upload(self: LocalBackend, source: Path, key: str, size: int, *, replace: bool) -> None:
        count["bytes"] += size
        own_upload(self, source, key, size, replace=replace)

    LocalBackend.write, LocalBackend.create = write, create  # type: ignore[method-assign]
    LocalBackend.upload = upload  # type: ignore[method-assign]
    return count


def run_stages(folder: Path) -> None:
    """Import, SFT and PPO one after the other; writes what each sent."""
    folder = fresh(folder)
    store = open_store(f"file://{folder / 'store'}")
    write_model(folder / "source", SMOLLM2_135M | {"max_position_embeddings": 2048}, "cpu")
    chance = random.Random(0)
    ids = [chance.randrange(100, SMOLLM2_135M["vocab_size"]) for _ in range(16)]
    row = {"input_ids": ids, "trainable": [True] * len(ids)}
    rows = {
        "sft": publish(store, fresh(folder / "rows"), "sft", [row] * 2),
        "prompts": publish(store, fresh(folder / "ask"), "prompts", [{"prompt_ids": ids}] * 2),
    }
    count, sent = count_bytes(), {}

    def run(stage: str, job: Job) -> str:
        count["bytes"] = 0
        context = StageContext(store=store, key=job.key(), folder=fresh(folder / stage))
        artifact = importlib.import_module(job.module).run(job, context)
        sent[stage] = count["bytes"]
        return str(artifact.digest)

    resources = Resources(device="cpu")
    training: dict[str, Any] = {"precision": "fp32", "batch_size": 2, "resources": resources}
    model = run("import", ImportModelJob(source=str(folder / "source")))
    model = run("sft", SFTJob(model=model, data=rows["sft"], max_steps=1, **training))
    run(
        "ppo",
        PPOJob(
            model=model, prompts=rows["prompts"], rewards=(LengthReward(target=8, width=8),),
            steps=1, max_new_tokens=8, trainable_layers=TRAINED, **training,
        ),
    )  # fmt: skip
    (folder / "bytes.json").write_text(json.dumps(sent))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--stages"]:
        run_stages(Path(sys.argv[2]))
    else:
        sys.exit(main())
