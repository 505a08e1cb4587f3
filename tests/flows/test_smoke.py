"""The whole pipeline for real: `rlhf run --preset smoke`, its repetition, a change, and a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rlhf_core.store import open_store
from tasks.launchers.usage import rank_of
from tests import forked
from tests.rlhf_core.torchrun import run_ranks

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
BEFORE_PPO = ["model", "data-sft", "data-prompts", "sft", "label", "reward"]
AFTER = ["ppo", "evaluate", "publish"]


class Pipeline:
    """The command in a folder of its own, beside a running server."""

    def __init__(self, folder: Path, server: str) -> None:
        self.folder = folder
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "RLHF_"))},
            "RLHF_HOME": str(folder / ".rlhf"),
            "PYTHONPATH": str(ROOT),
            "PREFECT_API_URL": server,
        }
        self.store = open_store(str(folder / ".rlhf/store"))

    def fork(self, *arguments: str) -> forked.Process:
        """The command in a process that has imported torch, and so has its fork server."""
        return forked.start(
            "-m", "flows.cli.main", *arguments,
            cwd=self.folder, env=self.environment, needs=forked.MODELS,
        )  # fmt: skip

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "flows.cli.main", *arguments],
            env=self.environment, cwd=self.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *overrides: str, timeout: float = 280, fork: bool = False) -> tuple[dict, float]:
        """The newest run's record and the seconds that the command took."""
        began = time.monotonic()
        start = self.fork if fork else self.start
        process = start("run", "--preset", "smoke", *sets(overrides))
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
        assert process.returncode == 0, out + err
        return self.newest(), time.monotonic() - began

    def newest(self) -> dict:
        return max(self.records(), key=lambda record: (record["started"], record["updated"]))

    def records(self) -> list[dict]:
        return [self.store.read_record(path) for path in self.store.list_records("runs/")]


def sets(overrides):
    return [word for override in overrides for word in ("--set", override)]


def reused(record):
    return {name for name, stage in record["stages"].items() if stage["reused"]}


@pytest.fixture(scope="session")
def smoke(prefect_server, tmp_path_factory):
    """A pipeline that has run once."""
    pipeline = Pipeline(tmp_path_factory.mktemp("a smoke run"), prefect_server)
    pipeline.first, pipeline.seconds = pipeline.run(fork=True)
    return pipeline


def test_smoke_runs_every_stage(smoke):
    assert set(smoke.first["stages"]) == {*BEFORE_PPO, *AFTER}
    assert reused(smoke.first) == set()
    folder = Path(smoke.first["folder"])
    report = (folder / "report.md").read_text()
    assert "## Evaluation" in report
    assert "## Held-out prompts in the training data" in report
    for name in ("sft", "preference", "prompts"):  # preference: sampled
        assert f"\n| {name} | " in report
    assert "## Replies before and after" in report
    assert (folder / "curves.png").stat().st_size > 10_000
    assert smoke.seconds < 240  # 30 s on an idle machine
    shown = [json.loads(line) for line in (folder / "ppo/samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in shown] == [1, 2, 3]
    for sample in shown[0]["samples"]:
        assert sample["prompt"].strip()
        assert isinstance(sample["reply"], str)
        assert isinstance(sample["score"], float)


def test_published_folder_opens_without_this_project(smoke):
    code = (
        "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T;"
        "f = sys.argv[1]; t = T.from_pretrained(f); m = M.from_pretrained(f);"
        "x = t.apply_chat_template([{'role': 'user', 'content': 'Hi'}], return_tensors='pt',"
        " add_generation_prompt=True, return_dict=True);"
        "print(m.generate(**x, max_new_tokens=4).shape)"
    )
    folder = smoke.folder / ".rlhf/published/smoke"
    done = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, cwd=smoke.folder,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    card = (folder / "README.md").read_text()
    assert "builtin:chatterbot" in card
    assert smoke.first["stages"]["ppo"]["digest"] in card
    for own in (smoke.first["id"], smoke.first["host"], str(smoke.folder), smoke.first["started"]):
        assert own not in card, "equal runs have equal cards"


def test_what_stages_took_is_kept_beside_their_results(smoke):
    for name, stage in smoke.first["stages"].items():
        if name == "publish":
            continue
        work = smoke.store.stage_work(stage["key"])
        assert 0 < work["seconds"] <= stage["seconds"] < smoke.seconds, name
        assert work["started"] < work["ended"]
        assert (work["gpus"], work["device"]) == (0, "cpu")
        assert work["ranks"] == (1 if name.startswith(("model", "data")) else 2)
        steps = work.pop("steps", None)
        assert work == stage["work"], "the run's record has all but the steps"
        if name in ("sft", "reward", "ppo"):
            assert steps["step"] == [1, 2, 3] and steps["time"] == sorted(steps["time"])
            assert min(work["throughput"].values()) > 0
            assert work["throughput"].keys() | {"step", "time"} == steps.keys()


def test_the_same_jobs_give_the_same_digests_in_an_empty_store(smoke, tmp_path):
    run, store = Path(smoke.first["folder"]), open_store(str(tmp_path / "store"))
    env = {"RLHF_STORE": store.url, "RLHF_HOME": str(tmp_path / "home")}
    for name in (*BEFORE_PPO, "ppo", "evaluate"):
        group, ranks = ("data", 1) if name.startswith("data") else ("", 1 if name == "model" else 2)
        (tmp_path / name).mkdir()
        job = shutil.copy(run / group / name / "job.json", tmp_path / name)
        run_ranks(ranks, "rlhf_core.__main__", str(job), env=env)
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert result["artifact"] == smoke.first["stages"][name]["digest"], name


def test_second_run_trains_nothing(smoke):
    record, seconds = smoke.run(fork=True)
    assert reused(record) == set(record["stages"])
    assert not list(Path(record["folder"]).rglob("job.json"))
    assert seconds < 120  # 10 s on an idle machine


def test_chat_answers_with_the_published_model(smoke):
    process = smoke.fork("chat", "smoke", "--once", "How are you?", "--max-new-tokens", "5")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert out.strip()


def ranks_of(process: forked.Process, count: int) -> list[psutil.Process]:
    family = psutil.Process(process.pid).children(recursive=True)
    found = sorted((p for p in family if rank_of(p) is not None), key=rank_of)
    assert [rank_of(p) for p in found] == list(range(count)), family
    return found


def test_changed_ppo_alone_is_trained_and_goes_on_when_its_ranks_are_killed(smoke):
    """Once the run itself starts them again, and once the same command does."""
    overrides = ("ppo.steps=24", "ppo.kl_coef=0.4", "evaluate.against_champion=false")
    process = smoke.fork("run", "--preset", "smoke", *sets(overrides))
    first = wait_for_ppo(smoke, process, "ppo", steps=4)
    ranks_of(process, 2)[1].kill()
    second = wait_for_ppo(smoke, process, "ppo-2", steps=9)
    assert "going on from the checkpoint after step" in second.with_name("log.txt").read_text()
    for rank in ranks_of(process, 2):
        rank.kill()
    # The run itself would go on after a few seconds; stop it, so that the next command has to.
    log = second.with_name("log.txt")
    wait(lambda: "ChildFailedError" in log.read_text(), process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "rank 1 was killed by SIGKILL" in out
    assert "going on" not in first.with_name("log.txt").read_text()
    assert log.read_text().count("going on") == 1
    assert not second.parent.with_name("ppo-3").exists()

    record, _ = smoke.run(*overrides, fork=True)
    assert reused(record) == set(BEFORE_PPO)
    assert record["stages"]["ppo"]["digest"] != smoke.first["stages"]["ppo"]["digest"]
    log = Path(record["folder"]) / "ppo/log.txt"
    assert "going on from the checkpoint after step" in log.read_text()
    lines = [json.loads(x) for x in (log.with_name("metrics.jsonl")).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 25))


def wait_for_ppo(smoke, process, attempt, steps):
    """The attempt's metrics.jsonl, once it has so many lines."""

    def ready():
        record = smoke.newest()
        path = Path(record["folder"]) / attempt / "metrics.jsonl"
        there = record["pid"] == process.pid and path.exists()
        return path if there and len(path.read_text().splitlines()) >= steps else None

    return wait(ready, process)


def wait(condition, process):
    deadline = time.monotonic() + 150
    while not (found := condition()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found
