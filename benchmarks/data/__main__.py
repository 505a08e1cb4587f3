"""The data stage beside TRL's preparation of the same conversations: time, processor time, memory.

    python -m benchmarks.data [--megabytes 20] [--large 100] [--repeats 3]

Ten minutes on two quiet cores. Ours is the whole stage in a process of its own, as the launcher
starts one, from the start of the process to its end: masks, duplicates, split, comparison of the
splits, card, files in the store. Of TRL's time the imports are left out. Writes
benchmarks/results/data.json and the table of docs/performance.md.
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
import time
from pathlib import Path
from typing import Any

from benchmarks.data.conversations import write
from benchmarks.data.measure import measured

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "data.json"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- data -->", "<!-- end data -->"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json")
PEER = ROOT / ".venv-bench" / "bin" / "python"
# Name of a row -> cores, and processes of TRL's `map` (None: ours).
ROWS: dict[str, tuple[int, int | None]] = {
    "ours, one core": (1, None),
    "ours, two cores": (2, None),
    "TRL, one process": (2, 0),
    "TRL, two processes": (2, 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--large", type=float, default=100, help="megabytes, ours only; 0: none")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer", type=Path, default=PEER, help="Python that has TRL")
    parser.add_argument("--out", type=Path, default=ROOT / ".rlhf" / "bench")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_of(arguments.out)
    todo = [(name, arguments.megabytes) for name in ROWS]
    if arguments.large:
        todo += [(name, arguments.large) for name in ROWS if ROWS[name][1] is None]
    found: list[dict[str, Any]] = [{"name": n, "megabytes": mb, "runs": []} for n, mb in todo]
    for _ in range(arguments.repeats):  # in turn: what the machine does meanwhile meets all
        for row in found:
            cores, processes = ROWS[row["name"]]
            file = conversations(arguments.out, row["megabytes"])
            if processes is None:
                result = ours(file, tokenizer, cores)
            else:
                command = [arguments.peer, Path(__file__).with_name("peer.py"), file, tokenizer]
                result = measured([*map(str, command), str(processes)], cores, {})
            row["runs"].append(result)
            print(row["name"], row["megabytes"], json.dumps(result), flush=True)
    values = {
        "load": os.getloadavg()[0], "time": time.strftime("%Y-%m-%d %H:%M"), "rows": found,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(values, indent=1) + "\n")
    text = PAGE.read_text()
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    PAGE.write_text(f"{head}\n{table(values)}{tail}")
    print(table(values))


def conversations(folder: Path, megabytes: float) -> Path:
    """A file with so many megabytes of conversations; written once."""
    file = folder / f"conversations-{megabytes:g}.jsonl"
    if not file.exists():
        part = file.with_suffix(".part")
        write(part, megabytes)
        part.replace(file)
    return file


def tokenizer_of(out: Path) -> Path:
    """SmolLM2's tokenizer, without its weights. Made in a process of its own, which loads torch."""
    folder = out / "tokenizer"
    if not folder.exists():
        code = (
            "import sys; from pathlib import Path; from benchmarks.speed.workload import smollm2; "
            "print(smollm2(Path(sys.argv[1])))"
        )
        made = subprocess.run(
            [sys.executable, "-c", code, str(out / "import")],
            cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        folder.mkdir()
        for name in TOKENIZER:
            shutil.copy(Path(made.stdout.split()[-1]) / name, folder)
    return folder


def ours(file: Path, tokenizer: Path, cores: int) -> dict[str, Any]:
    """The stage, with a store of its own: the card's counts beside what was measured."""
    from rlhf_core.jobs import DataJob
    from rlhf_core.store import open_store

    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        store = open_store(f"file://{scratch}/store")
        model = store.publish(tokenizer, kind="model").digest
        job = DataJob(source=str(file), purpose="sft", model=model, max_length=2048)
        path = Path(scratch, "job.json")
        path.write_text(job.model_dump_json())
        environment = {"RLHF_STORE": f"file://{scratch}/store", "RLHF_HOME": scratch}
        result = measured([sys.executable, "-m", "rlhf_core", str(path)], cores, environment)
        digest = json.loads(Path(scratch, "result.json").read_text())["artifact"]
        card = json.loads((store.fetch(digest) / "card.json").read_text())
        tokens = sum(side["tokens"] for side in card["splits"].values())
        return result | {"rows": card["read"], "tokens": tokens, "digest": card["digest"]}


def table(values: dict[str, Any]) -> str:
    """Markdown: medians of each row."""
    lines = [
        "| | MB | rows | seconds | s per 20 MB | processor s per 20 MB | of it in the first "
        "process | peak MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    medians: dict[tuple[str, float], float] = {}
    for row in values["rows"]:
        name, megabytes, runs = row["name"], row["megabytes"], row["runs"]
        middle = {
            key: statistics.median(run.get(key, run["seconds"]) for run in runs)
            for key in ("preparing", "cpu", "first_cpu", "peak")
        }
        medians[name, megabytes] = middle["preparing"]
        scale = 20 / megabytes
        lines.append(
            f"| {name} | {megabytes:,.0f} | {runs[0]['rows']:,} | "
            f"{middle['preparing']:.1f} | {middle['preparing'] * scale:.1f} | "
            f"{middle['cpu'] * scale:.1f} | {middle['first_cpu'] * scale:.1f} | "
            f"{middle['peak'] / 1e6:,.0f} |"
        )
    sizes = sorted({megabytes for _, megabytes in medians})
    gains = (
        f"{medians['ours, one core', mb] / medians['ours, two cores', mb]:.2f} times as fast as "
        f"one with {mb:,.0f} MB"
        for mb in sizes
    )
    best = min(seconds for (name, _), seconds in medians.items() if name.startswith("TRL"))
    [peer_size] = {mb for name, mb in medians if name.startswith("TRL")}
    lines += [
        "",
        f"TRL's better way takes {best / medians['ours, two cores', peer_size]:.2f} times as long "
        f"as ours. Two cores are {', '.join(gains)}. {values['time']}, load {values['load']:.1f}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
