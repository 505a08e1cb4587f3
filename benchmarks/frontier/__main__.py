"""What settings gain, and what they cost: `make bench-frontier`.

    python -m benchmarks.frontier POINTS.yaml --preset demo --seeds 1 2 3 --store FOLDER

POINTS.yaml maps a name to settings, as `--set` takes them:

    kl-0.3: { ppo.kl_coef: 0.3 }

Each point runs with each seed up to its evaluation. Stages that points share (SFT, labels, reward
model) run once, and a repeated command reuses what is there. The table has a row for each point:
the gain of the gold score over the model that the alignment started from, and every price, as means
over the seeds. The gain is also given for each seed, with its standard error over prompts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from flows.cli.lookup import read_runs
from rlhf_core.store import open_store

HEAD = (
    "| setting | gain of the gold score | each seed | KL, nats per reply | distinct-2 | "
    "begin alike | finished | held-out loss | questions right |"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("points", type=Path)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--preset", default="demo")
    source.add_argument("--config", type=Path, help="a file with settings, instead of a preset")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--store", default=".rlhf/frontier")
    arguments = parser.parse_args()
    points: dict[str, dict[str, Any]] = yaml.safe_load(arguments.points.read_text())
    base = ["--preset", arguments.preset]
    if arguments.config:
        base = ["--config", str(arguments.config)]
    rows = []
    for name, settings in points.items():
        found = [run(base, name, settings, seed, arguments.store) for seed in arguments.seeds]
        rows.append(row(name, found))
        print(rows[-1], flush=True)
    print("\n" + table(rows))


def run(
    base: Sequence[str], name: str, settings: Mapping[str, Any], seed: int, store: str
) -> dict[str, Any] | None:
    """The numbers of one evaluation (the schema of evaluation.json); None if the run failed."""
    label = f"{name}-seed-{seed}"
    # A name of its own to publish under, so that no champion is compared with.
    changes = {**settings, "seed": seed, "name": label, "publish.name": label}
    overrides = [f"--set={key}={json.dumps(value)}" for key, value in changes.items()]
    command = [sys.executable, "-m", "flows.cli.main", "stage", "evaluate", *base, *overrides]
    if subprocess.run([*command, "--store", store], stdout=sys.stderr).returncode:
        return None
    opened = open_store(store)
    newest = next(record for record in read_runs(opened) if record["name"] == label)
    numbers: dict[str, Any] = newest["stages"]["evaluate"]["metrics"]
    return numbers


def row(name: str, found: Sequence[dict[str, Any] | None]) -> str:
    """One line of the table: means over the seeds of `found`.

    Before "→" stands the model that the alignment started from. A seed whose run failed (a
    collapse, a gate) makes the point a failure: leaving it out would flatter the rest.
    """
    seeds = [numbers for numbers in found if numbers is not None]
    if len(seeds) < len(found):
        failed = f"failed with {len(found) - len(seeds)} of {len(found)} seeds"
        return f"| {name} | {failed} |" + " |" * (HEAD.count("|") - 3)

    def mean(which: str, *path: str) -> float:
        """Of a number of one model; "start" is the one that the final model started from."""
        total = 0.0
        for seed in seeds:
            start = "sft" if "sft" in seed["models"] else "base"
            value: Any = seed
            for key in (*path[:-1], start if which == "start" else which, path[-1]):
                value = value[key]
            total += value
        return total / len(seeds)

    def pair(shape: str, *path: str) -> str:
        return " → ".join(format(mean(which, *path), shape) for which in ("start", "policy"))

    gains = [seed["gold_gain"] for seed in seeds]
    cells = [
        name,
        f"{sum(gain['mean'] for gain in gains) / len(seeds):+.3f}",
        ", ".join(f"{gain['mean']:+.3f} ± {gain['se']:.3f}" for gain in gains),
        f"{mean('policy', 'models', 'kl_mean'):.1f}",
        pair(".2f", "models", "distinct_2"),
        pair(".1%", "models", "top_opening"),
        pair(".0%", "models", "finished"),
        pair(".2f", "heldout", "loss"),
        pair(".0%", "questions", "models", "rate"),
    ]
    return "| " + " | ".join(cells) + " |"


def table(rows: Sequence[str]) -> str:
    """The whole table."""
    return "\n".join([HEAD, "|" + " --- |" * (HEAD.count("|") - 1), *rows])


if __name__ == "__main__":
    main()
