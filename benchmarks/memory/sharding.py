"""Peak memory of training SmolLM2-135M on four CPU ranks, under ddp and fsdp2 side by side.

    python benchmarks/memory/sharding.py [RANKS]

The model has SmolLM2-135M's shape and random weights. Each rank takes two SFT steps on one row of
16 tokens, so that activations hardly count, and reports for the second the most bytes of live
tensors at any operation, with what they are, and the peak of its resident memory above what it was
before there was a model. The rank with the most counts. Prints a table; exits with 1 if fsdp2 takes
more than 0.35 of ddp's live tensors in bf16.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

from rlhf_core.jobs import Resources, SFTJob
from rlhf_core.losses.supervised import sft_loss
from rlhf_core.training.policy import prepare_policy
from rlhf_core.training.strategy import Strategy

ALLOWED = 0.35
TOKENS = 16
# Tensors are mapped one by one, so that a freed one no longer counts as resident.
QUIET = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONWARNINGS": "ignore"}
SMOLLM2_135M: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip


def main() -> int:
    ranks = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    found = {}
    for precision in ("bf16", "fp32"):
        for kind in ("ddp", "fsdp2"):
            found[kind, precision] = measure(ranks, kind, precision)
    print(f"\n| {ranks} ranks, MiB per rank | weights | gradients | AdamW | other | live tensors | "
          "of ddp's | resident |\n" + "| --- " * 8 + "|")  # fmt: skip
    for (kind, precision), at in found.items():
        share = at["total"] / found["ddp", precision]["total"]
        parts = " | ".join(f"{at[part]:,.0f}" for part in PARTS)
        print(f"| {kind}, {precision} | {parts} | {at['total']:,.0f} | {share:.2f} | "
              f"{at['resident']:,.0f} |")  # fmt: skip
    return int(found["fsdp2", "bf16"]["total"] > ALLOWED * found["ddp", "bf16"]["total"])


PARTS = ("weights", "gradients", "adamw", "other")


def measure(ranks: int, kind: str, precision: str) -> dict[str, float]:
    """What the rank with the most live tensors found, MiB."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}",
             __file__, "--rank", kind, precision, folder],
            check=True, env={**os.environ, **QUIET},
        )  # fmt: skip
        lines = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    return max(lines, key=lambda line: line["total"])


def rank_main(kind: str, precision: str, folder: str) -> None:
    before = resident("VmRSS")
    strategy = Strategy(
        Resources(strategy=kind, device="cpu", threads=1),
        precision,
        1.0,  # type: ignore[arg-type]
    )
    job = SFTJob(
        model="0" * 64, data="0" * 64, precision=precision, resources=Resources(strategy=kind)
    )  # type: ignore[arg-type]
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMOLLM2_135M), dtype=torch.float32)
    model.config.use_cache = False
    module = prepare_policy(job, model, strategy)
    live = LiveBytes(lambda: parts_of(module, strategy))
    train(strategy, 0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    with live:
        train(strategy, 1)
    line = {part: size / 2**20 for part, size in live.at_peak.items()}
    line["other"] = live.peak / 2**20 - sum(line.values())
    line["total"] = live.peak / 2**20
    line["resident"] = (resident("VmHWM") - before) / 2**20
    Path(folder, f"{strategy.rank}.json").write_text(json.dumps(line))
    strategy.group.barrier()
    torch.distributed.destroy_process_group()


def train(strategy: Strategy, step: int) -> None:
    """One SFT step on one row."""
    assert strategy.module is not None
    generator = torch.Generator().manual_seed(8 * step + strategy.rank)
    ids = torch.randint(0, 1000, (1, TOKENS), generator=generator)
    marked = torch.arange(TOKENS).unsqueeze(0) > 0
    with strategy.micro_batch(last=True):
        logprobs = strategy.module(ids, torch.ones_like(marked), marked)
        loss, _ = sft_loss(logprobs, marked, denominator=strategy.world_size * (TOKENS - 1))
        strategy.backward(loss)
    strategy.step()


def parts_of(module: nn.Module, strategy: Strategy) -> Iterator[tuple[str, Tensor]]:
    """The tensors of weights (gathered ones too), gradients and AdamW's states."""
    backend = strategy._backend
    params = [*module.parameters(), *backend.params.values()]
    for param in params:
        yield "weights", param
        if param.grad is not None:
            yield "gradients", param.grad
    for entry in backend._optimizer.state.values():  # type: ignore[attr-defined]
        yield from (("adamw", value) for value in entry.values())


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live storages after each operation, and keeps the peak."""

    def __init__(self, parts: Any) -> None:
        super().__init__()
        self._parts = parts
        self._sizes: dict[int, int] = {}
        self._now = self.peak = 0
        self.at_peak: dict[str, int] = {}

    def _add(self, tensor: Any) -> None:
        tensor = getattr(tensor, "_local_tensor", tensor)
        if not isinstance(tensor, Tensor) or isinstance(tensor, FakeTensor):
            return  # DTensor finds out shapes with fake tensors of the whole size
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            weakref.finalize(storage, self._gone, key)
            self._sizes[key] = 0
        # FSDP frees what it gathered by resizing a storage.
        self._now += storage.nbytes() - self._sizes[key]
        self._sizes[key] = storage.nbytes()

    def _gone(self, key: int) -> None:
        self._now -= self._sizes.pop(key, 0)

    def __enter__(self) -> LiveBytes:
        self._resize, mode = torch.UntypedStorage.resize_, self

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = mode._resize(storage, size)
            if storage._cdata in mode._sizes:
                mode._now += size - mode._sizes[storage._cdata]
                mode._sizes[storage._cdata] = size
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        for _, tensor in self._parts():
            self._add(tensor)
        return super().__enter__()  # type: ignore[return-value]

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its operations on the parts come here again
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self._add(tensor)
        if self._now > self.peak + 2**18:
            self._keep_peak()
        return result

    def _keep_peak(self) -> None:
        self.peak, self.at_peak = self._now, dict.fromkeys(PARTS[:3], 0)
        seen: set[int] = set()
        for part, tensor in self._parts():
            storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                self.at_peak[part] += storage.nbytes()


def resident(field: str) -> int:
    """Of this process, bytes."""
    text = Path("/proc/self/status").read_text()
    match = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank_main(*sys.argv[2:])
    else:
        sys.exit(main())
