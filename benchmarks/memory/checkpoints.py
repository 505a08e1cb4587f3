"""What a checkpoint of SmolLM2-135M costs rank 0 of four CPU ranks, beside whole checkpoints.

    make bench-checkpoints, or PYTHONPATH=. python benchmarks/memory/checkpoints.py [RANKS]

Builds: the files here, and those of the commit before checkpoints were sharded, when rank 0
gathered all of it; `git archive` takes them from this repository's history. The model has
SmolLM2-135M's shape and random weights. After each of three SFT steps on a row of 16 tokens the
ranks save a checkpoint into a folder. Of the three saves the medians are taken of

    memory    rank 0's largest resident memory until the checkpoint is in the store, above what it
              was before
    pause     seconds for which rank 0's training loop waits

Prints a table; exits with 1 if a ratio is above `ALLOWED`.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.memory.sharding import QUIET, SMOLLM2_135M, resident, train
from rlhf_core.jobs import Resources, SFTJob
from rlhf_core.runtime.context import StageContext
from rlhf_core.store import open_store
from rlhf_core.training.checkpoint import Checkpointer
from rlhf_core.training.policy import prepare_policy
from rlhf_core.training.strategy import Strategy

WHOLE = "3ac06f7"  # the last commit with whole checkpoints
STRATEGIES = ("fsdp2", "zero1")
SAVES = 3
ALLOWED = {"memory": 0.3, "pause": 0.2}


def main() -> int:
    from benchmarks.earlier_build import ROOT, extract  # which earlier builds do not have

    ranks = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    over = False
    print(f"| {ranks} ranks | memory, MiB: whole | sharded | ratio | pause, s: whole | sharded | "
          "ratio |\n" + "| --- " * 7 + "|", flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        before = extract(WHOLE, Path(folder) / "before")
        for kind in STRATEGIES:
            whole, sharded = (measure(build, ranks, kind) for build in (before, ROOT))
            cells = []
            for name, digits in (("memory", 0), ("pause", 2)):
                ratio = sharded[name] / whole[name]
                over |= ratio > ALLOWED[name]
                cells += [f"{x[name]:,.{digits}f}" for x in (whole, sharded)] + [f"{ratio:.2f}"]
            print(f"| {kind} | {' | '.join(cells)} |", flush=True)
    return int(over)


def measure(build: Path, ranks: int, kind: str) -> dict[str, float]:
    """Medians of rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}",
             __file__, "--rank", kind, folder],
            check=True, env={**os.environ, **QUIET, "PYTHONPATH": str(build)},
        )  # fmt: skip
        saves = json.loads(Path(folder, "saves.json").read_text())
    return {name: median(save[name] for save in saves) for name in ALLOWED}


def rank_main(kind: str, folder: Path) -> None:
    resources = Resources(strategy=kind, device="cpu", threads=1)  # type: ignore[arg-type]
    strategy = Strategy(resources, "fp32", 1.0)
    job = SFTJob(model="0" * 64, data="0" * 64, precision="fp32", resources=resources)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMOLLM2_135M), dtype=torch.float32)
    model.config.use_cache = False
    prepare_policy(job, model, strategy)
    store = open_store(f"file://{folder / 'store'}")
    context = StageContext(
        store, "benchmark", folder, strategy.rank, strategy.world_size, strategy.rank
    )
    checkpointer = Checkpointer(context, strategy, job)
    saves = []
    for step in range(1, SAVES + 1):
        train(strategy, step)
        gc.collect()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        strategy.group.barrier()
        began = time.perf_counter()
        checkpointer.save(step, {})
        pause = time.perf_counter() - began
        checkpointer._uploads.wait()
        saves.append({"memory": (resident("VmHWM") - before) / 2**20, "pause": pause})
        strategy.group.barrier()
    if strategy.rank == 0:
        Path(folder, "saves.json").write_text(json.dumps(saves))
    strategy.group.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank_main(sys.argv[2], Path(sys.argv[3]))
    else:
        sys.exit(main())
