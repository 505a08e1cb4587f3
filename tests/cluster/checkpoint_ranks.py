"""Ranks of test_checkpoints, each as on a machine of its own: `main([FOLDER, WHAT, FROM])`.

WHAT is `save`, which trains and saves under every strategy, sharded and (as earlier versions did)
whole; or `load`, which restores what FROM ranks have saved. Both write the sha256 of each state.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from rlhf_core.jobs import SFTJob
from rlhf_core.runtime.context import StageContext
from rlhf_core.store import open_store
from rlhf_core.training.checkpoint import Checkpointer
from rlhf_core.training.strategy import Strategy
from tests.rlhf_core.training.strategy_ranks import train

CASES = [("ddp", "fp32"), ("zero1", "bf16"), ("zero2", "fp32"), ("fsdp2", "fp32")]
FROM_ANOTHER = [("ddp", "fsdp2"), ("zero2", "fsdp2"), ("fsdp2", "zero2"), ("fsdp2", "ddp")]
STEPS = 3


def whole_state(strategy: Strategy) -> dict[str, np.ndarray]:
    """Every tensor of the state, put together by their parts' ranges."""
    mine = {n: (p.values.numpy(), p.start, p.shape) for n, p in strategy.state().items()}
    found: dict[str, np.ndarray] = {}
    for parts in strategy.group.gather(mine):
        for name, (values, start, shape) in parts.items():
            if name not in found:
                found[name] = np.full(math.prod(shape), np.nan, values.dtype).reshape(shape)
            found[name].reshape(-1)[start : start + len(values)] = values
    # Weights as they are gathered for a result, which parts have no share in.
    for name, weight in strategy.weights().items():
        np.testing.assert_array_equal(found[name], weight.numpy())
    assert not any(np.isnan(value).any() for value in found.values())
    return found


def digest(state: dict[str, np.ndarray]) -> str:
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(f"{name} {state[name].shape}".encode() + state[name].tobytes())
    return found.hexdigest()


def checkpointer(strategy: Strategy, folder: Path, key: str) -> Checkpointer:
    place = folder / key / f"machine{strategy.rank}"
    place.mkdir(parents=True, exist_ok=True)
    store = open_store(os.environ["RLHF_STORE"])
    context = StageContext(store, key, place, strategy.rank, strategy.world_size, local_rank=0)
    return Checkpointer(context, strategy, SFTJob(model="0" * 64, data="0" * 64))


def save_all(folder: Path) -> dict[str, str]:
    found = {}
    for kind, precision in CASES:
        strategy, _, _ = train(kind, precision, micro=2, steps=STEPS)
        name = f"{kind}-{strategy.world_size}"
        saver = checkpointer(strategy, folder, name)
        saver.save(STEPS, {"sharded": True})
        assert saver._uploads.wait()
        state = whole_state(strategy)
        found[name] = digest(state)
        if strategy.rank == 0:
            save_whole(folder, f"{name}-whole", state)
    return found


def save_whole(folder: Path, key: str, state: dict[str, np.ndarray]) -> None:
    """As earlier versions did."""
    place = folder / key
    place.mkdir()
    tensors = {name: torch.from_numpy(value) for name, value in state.items()}
    save_file({n: t for n, t in tensors.items() if "|" not in n}, place / "weights.safetensors")
    save_file({n: t for n, t in tensors.items() if "|" in n}, place / "optimizer.safetensors")
    save_file({"rank0": torch.get_rng_state()}, place / "rng.safetensors")
    text = json.dumps({"step": STEPS, "counters": {"sharded": False}, "worked": 0.0})
    (place / "state.json").write_text(text)
    store = open_store(os.environ["RLHF_STORE"]).scoped(f"checkpoints/{key}")
    store.publish(place, kind="checkpoint", metadata={"step": STEPS})


def load_all(folder: Path, size: int) -> dict[str, str]:
    found = {}
    cases = [(kind, kind, precision) for kind, precision in CASES]
    cases += [(saved, kind, "fp32") for saved, kind in FROM_ANOTHER]
    for saved, kind, precision in cases:
        for form in ("", "-whole"):
            strategy, _, _ = train(kind, precision, micro=2, steps=0)
            step, counters = checkpointer(strategy, folder, f"{saved}-{size}{form}").restore()
            assert (step, counters) == (STEPS, {"sharded": not form})
            name = f"{saved}-{size}{form} as {kind}-{strategy.world_size}"
            found[name] = digest(whole_state(strategy))
            if kind.startswith("zero"):  # the weights that the passes use
                for key, param in strategy._backend.params.items():
                    weight = strategy.weights()[key].to(param.dtype)
                    assert torch.equal(param.detach(), weight), key
    return found


def main(arguments: list[str]) -> None:
    folder, what, size = Path(arguments[0]), arguments[1], int(arguments[2])
    found = save_all(folder) if what == "save" else load_all(folder, size)
    if os.environ["RANK"] == "0":
        ranks = os.environ["WORLD_SIZE"]
        (folder / f"{what}-{size}-by-{ranks}.json").write_text(json.dumps(found))
    torch.distributed.barrier()


if __name__ == "__main__":
    main(sys.argv[1:])
