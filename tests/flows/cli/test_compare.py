"""`rlhf runs --metrics` and `rlhf compare`, on runs made by hand."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli.main import app
from rlhf_core.errors import ConfigError
from rlhf_core.pipeline.presets import build_config
from rlhf_core.store import open_store
from tasks.run import Run, StageResult

STUB = Path(__file__).parents[2] / "tasks/stubs/rlhf_stub"
NUMBERS = json.loads((STUB / "evaluation.json").read_text())
PROMPTS = ["How are you?", "What is 2+2?", "Who | are <b>you</b>?"]


def made(store, name, gold, kl_coef, *more, seconds=60.0, waited=0.0, prompts="prompts"):
    """A run with an evaluation, curves and replies, as flows leave it."""
    config = build_config("smoke", [f"name={name}", f"ppo.kl_coef={kl_coef}", *more])
    run = Run(config, f"run-{name}", store)
    run.begin()

    def stage(title, kind, files, metrics=None, reused=False, gpus=4):
        artifact = store.publish_derived(kind=kind, files=files)
        work = {"seconds": seconds, "gpus": gpus, "started": f"2026-01-0{len(run.stages) + 1}"}
        result = StageResult(
            stage=title, digest=artifact.digest, kind=kind, key="", reused=reused,
            seconds=seconds + waited, work=work, metrics=metrics or {},
        )  # fmt: skip
        run.add(result)

    stage("data-prompts", "dataset", {"x": prompts.encode()}, gpus=0, reused=True)
    lines = [{"step": n, "total": 4, "kl": kl_coef * n, "score": gold * n} for n in range(1, 5)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    stage("ppo", "model", {"metrics.jsonl": text.encode()}, {"score": gold})
    policy = {**NUMBERS["models"]["policy"], "gold_mean": gold}
    numbers = {**NUMBERS, "models": {**NUMBERS["models"], "policy": policy}}
    samples = [
        {"prompt": prompt, "policy": f"{name} answers {n}", "reward": {"policy": 1.0},
         "gold": {"policy": gold + 0.01 * n}, "greedy": {"policy": f"{name} surely {n}"}}
        for n, prompt in enumerate(PROMPTS)
    ]  # fmt: skip
    files = {
        "evaluation.json": json.dumps(numbers).encode(),
        "samples.jsonl": "".join(json.dumps(line) + "\n" for line in samples).encode(),
    }
    stage("evaluate", "evaluation", files, numbers)
    run.verdict = {"state": "better"}
    run.finish("completed")
    return run


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RLHF_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("RLHF_AUTHOR", "ada")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    store = open_store()
    made(store, "low", 0.2, 0.05, "gpu_hour_price=3", waited=147.0)
    made(store, "high", 0.5, 0.1, "gpu_hour_price=3")
    return store


@pytest.fixture
def command(store):
    """Runs a command here; returns what it prints."""

    def run(*arguments):
        done = CliRunner().invoke(app, arguments)
        if done.exception is not None:
            raise done.exception
        return done.stdout

    return run


def rows(text):
    """The lines of a table in a terminal, as cells."""
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines() if line.strip()]


def test_leaderboard_is_sorted_best_first_and_runs_without_the_number_are_last(command, store):
    Run(build_config("smoke", ["name=empty"]), "run-empty", store).begin()
    found = rows(command("runs", "--metrics", "--sort", "gold"))
    heads = found[0]
    assert [row[0] for row in found[1:]] == ["run-high", "run-low", "run-empty"]
    high = dict(zip(heads, found[1], strict=True))
    assert high["GOLD"] == "0.500 ± 0.030" and high["VERDICT"] == "better"
    assert (high["GPU-HOURS"], high["COST"], high["WORK"]) == ("0.133", "0.40", "2 min 0 s")
    assert "EVAL" not in heads, "all were measured alike"
    assert len(rows(command("runs", "--sort", "cost", "-n", "1"))) == 2
    with pytest.raises(ConfigError, match="--sort is 'golf'; expected one of gain, gold, reward"):
        command("runs", "--sort", "golf")
    lines = command("runs", "--sort", "gold", "--json").splitlines()
    assert [json.loads(line)["run"] for line in lines] == ["run-high", "run-low", "run-empty"]


def test_runs_that_were_measured_on_other_prompts_are_told_apart(command, store):
    made(store, "other", 0.9, 0.1, prompts="others")
    text = command("runs", "--sort", "gold")
    assert [row[-1] for row in rows(text)[:4]] == ["EVAL", "A", "B", "B"]
    assert "Numbers can be compared where EVAL has the same letter" in text


def test_comparison_has_settings_numbers_differences_and_cost(command):
    text = command("compare", "run-low", "run-high")
    sections = dict(re.findall(r"^(\S[^\n]*)\n\n(.*?)\n(?:\n|\Z)", text, re.S | re.M))
    found = {title: {row[0]: row[1:] for row in rows(body)} for title, body in sections.items()}
    assert found["Settings that differ"] == {
        "run-low": ["run-high"], "ppo.kl_coef": ["0.05", "0.1"]
    }  # fmt: skip
    assert found["Runs"]["author"] == ["ada", "ada"]
    assert found["Evaluation"]["gold score"] == ["0.200 ± 0.030", "0.500 ± 0.030"]
    # every reply of the second run scores 0.3 more, so the interval of a resample is a point
    assert found["Differences to run-low on the same prompts"]["gold score"] == [
        "-", "+0.300 (+0.300 to +0.300, 3 prompts)",
    ]  # fmt: skip
    costs = found["Time and cost"]
    assert costs["data-prompts"] == ["reused (60 s)"] * 2
    assert costs["ppo"] == ["60 s, waited 2 min 27 s", "60 s"]
    assert costs["GPU-hours"] == ["0.133"] * 2 and costs["cost"] == ["0.40"] * 2


def test_scores_of_different_judges_or_rules_are_not_subtracted(command, store):
    made(store, "judge", 0.9, 0.1, "evaluate.judge=textblob")
    made(store, "rule", 0.4, 0.1, "ppo.rewards=[{type: length, target: 5, width: 2}]")
    text = command("compare", "run-low", "run-judge", "run-rule")
    section = text.partition("Differences to run-low")[2].partition("Time and cost")[0]
    found = {row[0]: row[1:] for row in rows(section)}
    assert found["gold score"] == ["-", "-", "+0.200 (+0.200 to +0.200, 3 prompts)"]
    assert found["reward"] == ["-", "+0.000 (+0.000 to +0.000, 3 prompts)", "-"]
    assert "Rewards are those of different reward models or rules" in text
    assert "Held-out prompts, sampling or judge differ" in text
    assert "EVAL" not in text, "a column of the leaderboard alone"


def test_page_has_curves_and_replies_and_needs_nothing_else(command, tmp_path):
    page = tmp_path / "compare.html"
    assert f"page: {page}" in command("compare", "run-low", "run-high", "--page", str(page))
    html = page.read_text()
    assert html.count("data:image/png;base64,") == 1
    assert "low answers 0" in html and "high answers 2" in html and "high surely 1" in html
    assert "&lt;b&gt;you" in html and "<b>you" not in html
    assert not re.search(r'(src|href)="(?!data:)', html) and len(html) < 400_000

    board = tmp_path / "runs.html"
    command("runs", "--sort", "gold", "--page", str(board))
    assert "<td>run-high</td>" in board.read_text()
    with pytest.raises(ConfigError, match="Cannot write"):
        command("runs", "--page", str(tmp_path))


def test_one_run_is_nothing_to_compare(command):
    with pytest.raises(ConfigError, match="Found one run, run-low; expected two or more"):
        command("compare", "run-low", "run-l")
