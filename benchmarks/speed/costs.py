"""What comes on top of training, and how it grows: start-up, the pipeline's own cost, samples,
sequence length, ranks, vocabulary.

    python -m benchmarks.speed.costs [--parts startup,pipeline,demo,samples,length,ranks,vocabulary]

Results are added to costs.json in the benchmark's folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.speed import workload
from benchmarks.speed.__main__ import ROOT, make, run
from flows.server import QUIET, TemporaryServer
from rlhf_core.jobs import parse_job
from rlhf_core.system.cpus import cpu_cores
from tasks.launchers import fork_client
from tasks.launchers.command import OPENMP_WAIT, torchrun_command
from tasks.launchers.local import MODULE, start

BIN = Path(sys.executable).parent
PARTS = ("startup", "pipeline", "demo", "samples", "length", "ranks", "vocabulary")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / ".rlhf" / "bench")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "costs.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for part in arguments.parts.split(","):
        results[part] = globals()[part](arguments)
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{part}: {json.dumps(results[part])}", flush=True)


def tiny(arguments: argparse.Namespace, name: str = "tiny") -> tuple[Path, dict[str, Any]]:
    folder = arguments.out / name
    make(name, folder, arguments.out)
    return folder, workload.load(folder)


def sft_job(values: dict[str, Any], **settings: Any) -> Any:
    """An SFT stage on the tiny model, one thread a core."""
    from rlhf_core.jobs import Resources, SFTJob

    ranks = settings.pop("ranks", 1)
    return SFTJob(
        model=values["digests"]["model"], data=values["digests"]["sft"],
        learning_rate=workload.LEARNING_RATE, precision="fp32", schedule="constant",
        batch_size=values["sizes"].batch, epochs=10**6,
        resources=Resources(micro_batch_size=values["sizes"].micro, ranks=ranks, device="cpu",
                            checkpoint_every=10**6),
        **settings,
    )  # fmt: skip


def launch(job: Any, store: Path, wait_for: int) -> list[float]:
    """Run a job as the launcher does; seconds from its launch to the end of each step."""
    # Another seed each time: the stage is to start, not to go on from a checkpoint.
    job = job.model_copy(update={"seed": time.time_ns() % 2**31})
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        (folder / "job.json").write_text(job.model_dump_json())
        os.environ["RLHF_HOME"] = work
        began = time.time()
        process = start([job], [folder / "job.json"], f"file://{store}")
        assert process.stdout is not None
        threading.Thread(target=process.stdout.read, daemon=True).start()
        try:
            while True:
                path = folder / "metrics.jsonl"
                lines = path.read_text().splitlines() if path.exists() else []
                if len(lines) >= wait_for or process.poll() is not None:
                    break
                time.sleep(0.05)
        finally:
            process.terminate()
            process.wait()
        if len(lines) < wait_for:
            raise SystemExit(f"the stage ended after {len(lines)} of {wait_for} steps")
        return [json.loads(line)["time"] - began for line in lines]


def startup(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time from the launch of a stage to the end of its first step, beside that of the imports.

    A stage without a fork server, one with it, and the first training stage of a real run: with
    data to prepare, and with data that are in the store.
    """
    folder, values = tiny(arguments)
    job = sft_job(values, max_steps=1000).model_copy(update={"batch_size": 1})
    others = {
        "import": "import torch, transformers",
        # transformers imports what it offers only when it is asked for
        "import of a model class": "import torch; from transformers import LlamaForCausalLM",
        "torchrun's own imports": "import torch.distributed.run",
    }
    launched = ("first stage", "later stage")
    runs = ("first training stage of a run", "the same, data reused")
    found: dict[str, list[float]] = {name: [] for name in (*launched, *runs, *others)}
    with prefect_server() as url, tempfile.TemporaryDirectory() as home:
        for number in range(arguments.repeats + 1):
            fork_client.close()
            seconds = {name: launch(job, folder / "store", 1)[0] for name in launched}
            fork_client.close()
            shutil.rmtree(Path(home) / "store", ignore_errors=True)
            for name in runs:
                seconds[name] = first_step_of_a_run(Path(home), url, number, name == runs[1])
            for name, code in others.items():
                began = time.time()
                subprocess.run([sys.executable, "-c", code], check=True)
                seconds[name] = time.time() - began
            if number:
                for name, value in seconds.items():
                    found[name].append(value)
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {**medians, **{f"{name}, ratio": medians[name] / medians["import"]
                          for name in (*launched, *runs)}}  # fmt: skip


def first_step_of_a_run(home: Path, url: str, number: int, again: bool) -> float:
    """Run the preset smoke to the end of SFT, twice for each number, the second time with its data;
    seconds from the launch of SFT to the end of its first step."""
    name = f"start-{number}-{again}"
    rate = 0.0002 if again else 0.0001
    settings = {"name": name, "stages": "[sft]", "resources.ranks": 1, "sft.learning_rate": rate}
    options = [option for key, value in settings.items() for option in ("--set", f"{key}={value}")]
    before = set((home / "runs").glob("*"))
    run_preset("smoke", home, base_environment(home, url), *options)
    (run_folder,) = set((home / "runs").glob("*")) - before
    (metrics,) = run_folder.glob("**/sft/metrics.jsonl")
    first = json.loads(metrics.read_text().splitlines()[0])["time"]
    return float(first - (metrics.parent / "job.json").stat().st_mtime)


def base_environment(home: Path, url: str) -> dict[str, str]:
    """The environment of a run whose home is a folder of its own."""
    environment = {**os.environ, **OPENMP_WAIT, "RLHF_HOME": str(home), "PREFECT_API_URL": url}
    environment.pop("RLHF_STORE", None)
    return environment


def run_preset(preset: str, home: Path, environment: dict[str, str], *options: str) -> None:
    """`rlhf run`, to its end."""
    subprocess.run(
        [str(BIN / "rlhf"), "run", "--preset", preset, *options],
        check=True, cwd=home, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


@contextlib.contextmanager
def prefect_server() -> Iterator[str]:
    """A Prefect server of its own; the address of its API."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as home:
        os.environ.update(QUIET, PREFECT_HOME=home, RLHF_HOME=home)
        server = TemporaryServer()
        try:
            server.wait()
            yield server.url
        finally:
            server.stop()
            os.environ.clear()
            os.environ.update(before)


def pipeline(arguments: argparse.Namespace) -> dict[str, Any]:
    """`rlhf run --preset smoke` with a server that runs, beside its stages started by hand one
    after another."""
    with prefect_server() as url:
        return beside_stages("smoke", url, min(arguments.repeats, 3))


def demo(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same for the preset demo, once. In the minutes that it takes the machine drifts by more
    than the pipeline costs, so that is also added up within the run: the time in which no stage
    runs, and what flow and server take from the stages' processors."""
    with prefect_server() as url:
        return beside_stages("demo", url, 1, Watch())


class Watch:
    """What the processes that this one started do, looked at twice a second.

    Attributes:
        idle: seconds in which no stage ran.
        cpu: processor seconds of all others than stages and their fork_client.
    """

    STAGES = ("rlhf stage", "rlhf rank", "rlhf torchrun")

    def __init__(self) -> None:
        self.idle = 0.0
        self._spent: dict[int, list[float]] = {}  # process -> first and last count
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    @property
    def cpu(self) -> float:
        return sum(last - first for first, last in self._spent.values())

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        before = time.time()
        while not self._ended.wait(0.5):
            names = self._descendants()
            now = time.time()
            if not any(name.startswith(self.STAGES) for name, _ in names.values()):
                self.idle += now - before
            before = now
            for pid, (name, seconds) in names.items():
                if not name.startswith((*self.STAGES, "rlhf forkserver")):
                    self._spent.setdefault(pid, [seconds, seconds])[1] = seconds

    def _descendants(self) -> dict[int, tuple[str, float]]:
        """Process -> name and processor seconds, of all below this one."""
        found = {}
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                spent = process.cpu_times()
                found[process.pid] = process.name(), spent.user + spent.system
        return found


def beside_stages(
    preset: str, url: str, repeats: int, watch: Watch | None = None
) -> dict[str, float]:
    """Seconds of a preset's run, of its stages by hand, and the median difference."""
    whole, by_hand = [], []
    for number in range(repeats + 1 if repeats > 1 else 1):
        with tempfile.TemporaryDirectory() as work:
            home = Path(work)
            environment = base_environment(home, url)
            began = time.time()
            with watch or contextlib.nullcontext():
                run_preset(preset, home, environment)
            together = time.time() - began
            apart = stages_by_hand(home, environment)
        if number or repeats == 1:
            whole.append(together)
            by_hand.append(apart)
    costs = [a - b for a, b in zip(whole, by_hand, strict=True)]
    within = {} if watch is None else {"idle": watch.idle, "cpu": watch.cpu}
    return {
        "pipeline": statistics.median(whole), "by_hand": statistics.median(by_hand),
        "cost": statistics.median(costs), "share": statistics.median(costs) / min(by_hand),
        **within,
    }  # fmt: skip


def stages_by_hand(home: Path, environment: dict[str, str]) -> float:
    """The jobs of the run that is in this home, again, in a store that knows no stage."""
    (run_folder,) = (home / "runs").iterdir()
    for name in ("stages", "refs"):
        shutil.rmtree(home / "store" / name, ignore_errors=True)
    jobs = sorted(run_folder.rglob("job.json"), key=lambda p: p.stat().st_mtime)
    environment = {**environment, "RLHF_STORE": f"file://{home / 'store'}"}
    began = time.time()
    for number, path in enumerate(jobs):
        folder = home / "again" / str(number)
        folder.mkdir(parents=True)
        shutil.copy(path, folder / "job.json")
        subprocess.run(
            torchrun_command(MODULE, [parse_job(path.read_bytes())], [folder / "job.json"]),
            check=True, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
    return time.time() - began


def samples(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds for 1, 4 and 16 epochs over the same few rows, so that samples and tokens are exactly
    as many times as much. A ratio is of runs that took turns. Four epochs before them do not count:
    processors are fastest in the first seconds after a rest."""
    folder, values = tiny(arguments, "tiny-samples")
    epoch = len(values["sft"]) // values["sizes"].batch  # steps
    before = 4 * epoch
    rounds = []
    for _ in range(arguments.repeats):
        found: dict[int, list[float]] = {1: [], 4: [], 16: []}
        for epochs in (1, 4, 1, 16, 1, 4, 1):
            steps = before + epochs * epoch
            marks = launch(sft_job(values, max_steps=steps), folder / "store", steps)
            found[epochs].append(marks[-1] - marks[before - 1])
        rounds.append({f"x{epochs}": statistics.mean(times) for epochs, times in found.items()})
    medians = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    over = {f"x{n} over linear": statistics.median(r[f"x{n}"] / (n * r["x1"]) for r in rounds)
            for n in (4, 16)}  # fmt: skip
    return {**medians, **over, "rounds": rounds}


def length(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second and memory by sequence length, at the same number of tokens a step."""
    found = {}
    for limit in (64, 256, 1024):
        name = f"tiny-length-{limit}"
        batch = 8192 // limit
        workload.SIZES[name] = workload.Sizes(
            "tiny", "fp32", batch, max(1, batch // 4), limit, 2, 4, 64, 64, 4, 1, shortest=1.0
        )
        folder = arguments.out / name
        workload.make(name, folder)
        results = [run("sft", "ours", folder, cpu_cores()) for _ in range(3)]
        found[str(limit)] = {"rate": statistics.median(r["rate"] for r in results),
                             "rss": max(r["rss"] for r in results)}  # fmt: skip
    return found


def ranks(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds a step on one rank with two threads, and on two ranks with one each."""
    folder, values = tiny(arguments)
    found: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(arguments.repeats):
        for count, seconds in found.items():
            marks = launch(sft_job(values, max_steps=9, ranks=count), folder / "store", 9)
            seconds.append((marks[-1] - marks[0]) / 8)
    one, two = (statistics.median(found[n]) for n in (1, 2))
    return {"1 rank": one, "2 ranks": two, "ratio": one / two}


def vocabulary(arguments: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of an SFT step by vocabulary, on both sides."""
    found = {}
    for name in ("tiny-50k", "tiny-250k"):
        folder, _ = tiny(arguments, name)
        sides = {s: run("sft", s, folder, cpu_cores()) for s in ("ours", "theirs")}
        found[name] = {s: r["rss"] for s, r in sides.items()}
        found[name]["ratio"] = sides["ours"]["rss"] / sides["theirs"]["rss"]
    return found


if __name__ == "__main__":
    main()
