"""Tasks of the harness as the orchestrator sees them: names, contents, a missing package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rlhf_core.errors import ConfigError
from rlhf_core.evaluation.harness.shares import distribute
from rlhf_core.evaluation.harness.tasks import check_tasks, fingerprint
from rlhf_core.jobs import LmEvalJob, LmEvalSettings, PipelineConfig, Resources, TrainingData
from rlhf_core.pipeline.presets import build_config
from rlhf_core.preflight.check import check
from rlhf_core.store import open_store
from tests.rlhf_core.evaluation.harness.own_tasks import write_tasks

JOB = {"base": "a" * 64, "policy": "b" * 64}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package lm_eval with two task files, in the place of the real one."""
    folder = tmp_path / "site" / "lm_eval" / "tasks" / "arc"
    folder.mkdir(parents=True)
    (folder.parents[1] / "__init__.py").write_text("")
    (folder / "arc_easy.yaml").write_text("tag:\n  - ai2_arc\ntask: arc_easy\n")
    (folder / "arc.yaml").write_text("include: arc_easy.yaml\ntask: arc_challenge\n")
    monkeypatch.delitem(sys.modules, "lm_eval", raising=False)
    monkeypatch.syspath_prepend(folder.parents[2])
    return folder


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_core.evaluation.harness.tasks.find_spec", lambda name: None)


def test_missing_package_is_found_before_anything_is_trained(
    no_package: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "home"))
    config = build_config("smoke", ["lm_eval.tasks=[arc_easy]", f"store={tmp_path}/store"])
    [problem] = check(config)
    assert problem == (
        "the package lm-eval is not installed, and lm_eval needs it; run: pip install "
        "'rlhf-pipeline[lm-eval]' (or pip install lm-eval)"
    )
    elsewhere = build_config(config.model_dump(), ["launcher={type: work_pool}"])
    assert not [p for p in check(elsewhere) if "lm-eval" in p]


def test_worker_without_the_package_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_core.evaluation.harness import stage
    from rlhf_core.runtime.context import StageContext

    monkeypatch.setattr(stage, "installed", lambda: False)
    job = LmEvalJob(tasks=("arc_easy",), **JOB)
    context = StageContext(open_store(str(tmp_path / "store")), job.key(), tmp_path)
    with pytest.raises(ConfigError, match=r"where the stage runs; run: pip install 'rlhf-pip"):
        stage.run(job, context)


def test_folder_of_tasks_must_be_there_for_a_stage_that_runs_elsewhere_too(
    no_package: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "home"))
    config = build_config(
        "smoke",
        ["lm_eval={tasks: [own], include_path: nowhere}", "launcher={type: work_pool}",
         f"store={tmp_path}/store"],
    )  # fmt: skip
    assert [p for p in check(config) if "include_path is nowhere, but there is no folder" in p]


def test_known_names_pass_and_a_misspelt_one_is_named(package: Path, tmp_path: Path) -> None:
    own = write_tasks(tmp_path / "own")
    known = ("arc_easy", "ai2_arc", "arc_challenge", "own_choice", "own_group")
    assert check_tasks(LmEvalSettings(tasks=known, include_path=str(own))) == []
    [problem] = check_tasks(LmEvalSettings(tasks=("arc_easy", "arc_chalenge")))
    assert "lm_eval.tasks has 'arc_chalenge'" in problem
    assert "did you mean arc_challenge" in problem
    [problem] = check_tasks(LmEvalSettings(tasks=("own_choice",)))
    assert "own_choice" in problem and "no include_path" in problem


def test_folder_without_task_files_is_refused(package: Path, tmp_path: Path) -> None:
    settings = LmEvalSettings(tasks=("arc_easy",), include_path=str(tmp_path / "empty"))
    (tmp_path / "empty").mkdir()
    [problem] = check_tasks(settings)
    assert "contains no .yaml file" in problem


def test_fingerprint_follows_every_file_of_the_folder(tmp_path: Path) -> None:
    own = write_tasks(tmp_path / "own")
    first = fingerprint(str(own))
    assert len(first) == 64 and fingerprint(None) == ""
    (own / "__pycache__").mkdir()
    (own / "__pycache__" / "utils.pyc").write_bytes(b"x")
    (own / ".swp").write_bytes(b"x")
    assert fingerprint(str(own)) == first
    seen = {first}
    for name in ("choice.yaml", "data/words.jsonl", "utils.py"):
        with (own / name).open("a") as file:
            file.write("\n")
        seen.add(fingerprint(str(own)))
    assert len(seen) == 4
    with pytest.raises(ConfigError, match="there is no folder"):
        fingerprint(str(own / "none"))


def test_key_counts_tasks_and_their_contents_but_not_where_they_are_measured() -> None:
    job = LmEvalJob(tasks=("arc_easy",), fingerprint="1", **JOB)
    placed = job.model_copy(update={"resources": Resources(ranks=2, micro_batch_size=1)})
    assert placed.key() == job.key()
    for change in ({"fingerprint": "2"}, {"limit": 3}, {"tasks": ("piqa",)}, {"base": "c" * 64}):
        assert job.model_copy(update=change).key() != job.key()
    assert job.inputs() == JOB
    models, data = {"base": "base", "policy": "model"}, TrainingData.roles()
    assert LmEvalJob.roles() == {**models, **data, "prompts": "prompts"}


@pytest.mark.parametrize("tasks", [(), ("piqa", "piqa"), ("",)])
def test_no_task_an_empty_one_and_one_named_twice_are_refused(tasks: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="tasks"):
        LmEvalSettings(tasks=tasks)


def test_configurations_without_benchmarks_stay_as_they_are() -> None:
    assert PipelineConfig().lm_eval is None


def test_requests_are_distributed_once_each_and_choices_of_a_question_stay_together() -> None:
    texts = [text for text in ("a question", "why", "a long question") for _ in range(3)]
    [piece] = distribute(texts, ranks=2, size=3, batches=32)
    assert piece == [[6, 7, 8, 3, 4, 5], [0, 1, 2]]
    assert list(distribute(texts, 1, 3, 1)) == [[[6, 7, 8]], [[0, 1, 2]], [[3, 4, 5]]]
    assert list(distribute(["x"] * 5, 2, 2, 32)) == [[[0, 1, 4], [2, 3]]]  # one pass at a time
    assert list(distribute(["x"], 3, 8, 32)) == [[[0], [], []]]
    assert list(distribute([], 2, 8, 32)) == []
