"""Samplers and trainer beside each other, against taking turns: `make bench-placement`.

    python -m benchmarks.placement [--steps 12] [--repeats 3] [--max-new-tokens 256]

GRPO with a random llama of 10M parameters (fp32) on two cores; replies end at random, most between
a tenth of the limit and the limit. Every way does as many updates on as many replies. Tokens per
second are those of all steps but the first two, by the clock, median of the repeats, which are run
in turn. Ten minutes on two quiet cores. Writes benchmarks/results/placement.json, prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_core.jobs import BuiltinRollout, DataJob, GRPOJob, ImportModelJob, Resources

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "placement.json"
WARM_UP = 2  # steps that are not counted: imports, first passes, a queue that fills
HIDDEN, LAYERS = 256, 8

WAYS: dict[str, tuple[BuiltinRollout, int]] = {  # and threads of a process
    "in turns, two threads": (BuiltinRollout(), 2),
    "separate, in turns, two threads": (BuiltinRollout(placement="separate"), 2),
    "separate, 1 step ahead": (BuiltinRollout(placement="separate", max_staleness=1), 1),
    "separate, 2 steps ahead": (BuiltinRollout(placement="separate", max_staleness=2), 1),
    "the same, in 2 segments": (
        BuiltinRollout(placement="separate", max_staleness=2, segments=2), 1,
    ),
    "4 steps ahead, in 4 segments": (
        BuiltinRollout(placement="separate", max_staleness=4, segments=4), 1,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--prompts", type=int, default=8, help="of a step, with 4 replies each")
    parser.add_argument("--only", nargs="*", default=list(WAYS), help="names of ways")
    options = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in options.only}
    with tempfile.TemporaryDirectory(prefix="placement-") as temporary:
        bench = Bench(Path(temporary), options)
        for repeat in range(options.repeats):
            for name in options.only:
                found[name].append(bench.run(name, repeat))
                print(
                    f"{repeat + 1}/{options.repeats}  {name}: {shown(found[name][-1])}", flush=True
                )
    rows = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in found.items()
    }
    print(table(rows))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps({"options": vars(options), "ways": rows, "runs": found}, indent=1)
    )


class Bench:
    """A store with the inputs, and the runs."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options = folder, options
        self.url = f"file://{folder / 'store'}"
        self.environment = {
            **os.environ, "RLHF_STORE": self.url, "RLHF_HOME": str(folder / "home"),
            "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        source = write_model(folder / "model", options.max_new_tokens)
        self.model = self.result(ImportModelJob(source=str(source)), "import")
        lines = [json.dumps({"prompt": f"Say {i} and {i * 7}"}) + "\n" for i in range(200)]
        (folder / "prompts.jsonl").write_text("".join(lines))
        self.prompts = self.result(
            DataJob(purpose="prompts", source=str(folder / "prompts.jsonl"), model=self.model),
            "data",
        )

    def result(self, job: Any, name: str) -> str:
        """Run a job as the launcher does; the digest of its artifact."""
        folder = self.folder / name
        folder.mkdir()
        (folder / "job.json").write_text(job.model_dump_json())
        run = subprocess.run(
            [sys.executable, "-m", "rlhf_core", str(folder / "job.json")],
            cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if run.returncode:
            raise SystemExit(f"{name} failed:\n{run.stdout[-2000:]}\n{run.stderr[-2000:]}")
        return str(json.loads((folder / "result.json").read_text())["artifact"])

    def run(self, name: str, repeat: int) -> dict[str, float]:
        """One stage: its numbers after the warm-up."""
        rollout, threads = WAYS[name]
        job = GRPOJob(
            model=self.model, prompts=self.prompts, rewards=[{"type": "repetition"}],
            rollout=rollout, seed=repeat, steps=self.options.steps, group_size=4,
            batch_size=self.options.prompts, max_new_tokens=self.options.max_new_tokens,
            learning_rate=1e-6, precision="fp32", min_length=None, max_repetition=None,
            resources=Resources(threads=threads, device="cpu", checkpoint_every=10**6),
        )  # fmt: skip
        place = f"{list(WAYS).index(name)}-{repeat}"
        # A store of its own, in which the result of another way is not found.
        shutil.copytree(self.folder / "store", self.folder / f"store-{place}")
        self.environment["RLHF_STORE"] = f"file://{self.folder / f'store-{place}'}"
        self.result(job, place)
        text = (self.folder / place / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        counted = lines[WARM_UP:]
        tokens = sum(line["length"] for line in counted) * job.replies
        seconds = lines[-1]["time"] - lines[WARM_UP - 1]["time"]
        waits = sum(line["rollout_seconds"] for line in counted)
        return {
            "tokens_per_second": tokens / seconds,
            "seconds_per_step": seconds / len(counted),
            "waiting_or_sampling": waits / seconds,
            "length": tokens / job.replies / len(counted),
            "at_limit": statistics.mean(line["at_limit"] for line in counted),
        }


def write_model(folder: Path, limit: int) -> Path:
    """A random llama, of whose tokens so many end a reply that half are over after a third of the
    limit."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhf_core.models.random_model import VOCABULARY, make_tokenizer

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ending = max(1, round(2 * VOCABULARY / limit))  # the tokens are all about as likely
    eos = [int(tokenizer.eos_token_id)] + [VOCABULARY - 1 - i for i in range(ending - 1)]
    model.generation_config.eos_token_id = eos
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def shown(run: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.3g}" for name, value in run.items())


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown; the ratio is that of tokens per second to the first way's."""
    first = next(iter(rows.values()))["tokens_per_second"]
    lines = [
        "| way | tokens/s | against taking turns | s per step | of it waiting for replies |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['tokens_per_second']:.0f} | "
            f"{row['tokens_per_second'] / first:.2f} | {row['seconds_per_step']:.2f} | "
            f"{row['waiting_or_sampling']:.0%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
