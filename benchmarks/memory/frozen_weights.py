"""Memory of frozen weights: LoRA on bf16 weights beside QLoRA, on SmolLM2-135M.

    python -m benchmarks.memory.frozen_weights     (`make bench-nf4`; two minutes)

Each side loads the model in a process of its own, as a stage does, and trains one step on a batch.
Bytes are those of the frozen parameters, with the scales of the quantised ones. The process's
memory is what is no file's (RssAnon): what loading added to it, and its peaks. Linux only.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

MIB = 2**20
SIDES = ("bf16", "nf4")
LLAMA_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000,
}  # fmt: skip


def measure(side: str, folder: Path) -> dict[str, float]:
    """MiB of one side, in this process."""
    import torch

    from rlhf_core.jobs import LoRA, SFTSettings
    from rlhf_core.models.loading import load_causal_lm
    from rlhf_core.models.nf4 import NF4
    from rlhf_core.nn.layers import choose_trainable
    from rlhf_core.nn.modules import Policy

    torch.set_num_threads(2)
    nf4 = NF4(torch.device("cpu"), torch.bfloat16) if side == "nf4" else None
    load_causal_lm(_tiny(folder), torch.bfloat16, nf4)  # its imports are not what is measured
    before = _settled()
    with Sampler() as loading:
        model = load_causal_lm(folder, torch.bfloat16, nf4)
        for param in model.parameters():
            if param.dtype.is_floating_point:  # else it is a page of the file that no one has read
                param.data = param.data.clone()
    found = {"process, loaded": _settled() - before, "process, peak while loading": loading.peak}
    found["process, peak while loading"] -= before
    model = choose_trainable(model, SFTSettings(lora=LoRA(rank=8)), 0)
    found |= frozen_bytes(model)
    policy = Policy(model)
    ids = torch.randint(0, 49152, (2, 256), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    loss_mask = mask.clone()
    loss_mask[:, 0] = False
    with Sampler() as step, torch.autocast("cpu", dtype=torch.bfloat16):
        loss = -policy(ids, mask, loss_mask).mean()
        with torch.autocast("cpu", enabled=False):
            loss.backward()  # type: ignore[no-untyped-call]
    found["process, peak of a step"] = step.peak - before
    return {name: size / MIB for name, size in found.items()}


def frozen_bytes(model: Any) -> dict[str, int]:
    """Bytes of the frozen parameters: of the linear layers that QLoRA quantises, and of all."""
    from torch import nn

    linear = whole = 0
    head = model.get_output_embeddings()
    for module in model.modules():
        for param in module.parameters(recurse=False):
            if param.requires_grad:
                continue
            size = param.numel() * param.element_size()
            if state := getattr(param, "quant_state", None):
                size += state.absmax.numel() * state.absmax.element_size()
                size += state.state2.absmax.numel() * 4
            tied = module is head and param is model.get_input_embeddings().weight
            whole += 0 if tied else size
            linear += size if isinstance(module, nn.Linear) and module is not head else 0
    return {"frozen linear layers": linear, "all frozen weights": whole}


class Sampler:
    """The peak of the process's own memory inside the block, looked at every 2 ms; bytes."""

    def __enter__(self) -> Sampler:
        self.peak, self._done = _own(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, _own())

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()


def _own() -> int:
    """Bytes of the process's memory that is no file's."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split("RssAnon:")[1].split()[0])


def _settled() -> int:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _own()


def _tiny(folder: Path) -> Path:
    """A model of a few weights, of the same architecture."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    place = folder.parent / f"tiny-{os.getpid()}"
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64,
             "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64}  # fmt: skip
    config = AutoConfig.from_pretrained(folder, **sizes, pad_token_id=0, eos_token_id=1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(place)
    return place


def llama_7b() -> dict[str, tuple[int, int]]:
    """MiB in bf16 and in NF4 of LLaMA 7B's frozen weights, counted on a model without storage."""
    import torch
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_7B))
    total = sum(p.numel() for p in model.parameters())
    linear = (
        sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
        - model.lm_head.weight.numel()
    )
    # 4 bits; a scale of 8 bits for 64 weights; a scale of 32 bits for 256 of those.
    quantised = linear * (4 + 8 / 64 + 32 / (64 * 256)) / 8
    rest = 2 * (total - linear)
    return {
        "frozen linear layers": (2 * linear // MIB, int(quantised) // MIB),
        "all frozen weights": (2 * total // MIB, int(quantised + rest) // MIB),
    }


def main() -> None:
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
        return
    from benchmarks.speed.workload import smollm2

    with tempfile.TemporaryDirectory() as place:
        folder = smollm2(Path(place))
        sides = {}
        for side in SIDES:
            command = [sys.executable, "-m", "benchmarks.memory.frozen_weights", side, str(folder)]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            sides[side] = json.loads(text.splitlines()[-1])
    print("| SmolLM2-135M, MiB | LoRA on bf16 | QLoRA | ratio |\n| --- | ---: | ---: | ---: |")
    for name, value in sides["bf16"].items():
        other = sides["nf4"][name]
        print(f"| {name} | {value:,.0f} | {other:,.0f} | {other / value:.2f} |")
    print(
        "\n| LLaMA 7B, MiB, counted | LoRA on bf16 | QLoRA | ratio |\n| --- | ---: | ---: | ---: |"
    )
    for name, (value, other) in llama_7b().items():
        print(f"| {name} | {value:,} | {other:,} | {other / value:.2f} |")


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    main()
