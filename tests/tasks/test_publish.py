"""Publishing without a server: the artifact, its card, its record and its plain folder."""

import pytest
import yaml

from rlhf_core.errors import ModelError
from rlhf_core.jobs import PipelineConfig
from rlhf_core.pipeline.presets import build_config
from rlhf_core.store import registry
from rlhf_core.store.published_folder import materialise
from tasks.publish import champion, make_artifact, publish_key
from tasks.reporting.model_card import model_card
from tasks.run import Run, StageResult


@pytest.fixture
def run(tmp_path, monkeypatch, store):
    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "home"))
    return Run(build_config("smoke"), "run-1", store)


def add(run, stage, kind, files, parents=(), metadata=None):
    artifact = run.store.publish_derived(
        kind=kind, files=files, parents=parents, metadata=metadata or {}
    )
    run.stages[stage] = StageResult(
        stage=stage, digest=artifact.digest, kind=kind, key="", reused=False, seconds=1
    )
    return artifact


@pytest.fixture
def made(run):
    base = add(run, "model", "model", {"config.json": b"{}"}, metadata={"license": "Apache-2.0"})
    card = b'{"read": 10, "kept": 8, "source": "builtin:chatterbot"}'
    job = {"algorithm": "data", "source": "builtin:chatterbot", "purpose": "sft"}
    data = add(run, "data-sft", "dataset", {"card.json": card}, [base.digest], {"job": job})
    files = {"config.json": b"{}", "model.safetensors": b"w", "metrics.jsonl": b"{}\n"}
    job = {"algorithm": "ppo", "kl_coef": 0.05}
    metadata = {"job": job, "metrics": {"kl": 3.5}}
    policy = add(run, "ppo", "model", files, [base.digest, data.digest], metadata)
    numbers = b'{"models": {"policy": {"gold_mean": 0.5, "gold_se": 0.1, "n": 8}}}'
    evaluation = add(run, "evaluate", "evaluation", {"evaluation.json": numbers}, [policy.digest])
    return policy.digest, evaluation.digest


def test_published_model_is_the_policy_with_a_card(run, made):
    artifact = make_artifact(run, "smoke", *made)
    paths = {entry.path: entry.sha256 for entry in artifact.files}
    assert set(paths) == {"config.json", "model.safetensors", "README.md"}
    assert paths["model.safetensors"] == run.store.get(made[0]).file("model.safetensors").sha256
    assert artifact.parents == made


def test_publishing_again_gives_the_same_artifact(run, made):
    assert make_artifact(run, "smoke", *made) == make_artifact(run, "smoke", *made)


def test_artifact_that_is_no_model_is_refused(run, made):
    wrong = add(run, "sft", "model", {"adapter.bin": b"x"})
    with pytest.raises(ModelError, match=r"adapter\.bin"):
        make_artifact(run, "smoke", wrong.digest, made[1])


def test_card_names_lineage_data_settings_and_results(run, made):
    card = model_card(run, "smoke", *made)
    front = yaml.safe_load(card.split("---")[1])
    assert (front["library_name"], front["license"]) == ("transformers", "apache-2.0")
    assert f"| ppo | `model/{made[0]}` | model, data-sft |" in card
    assert '"read": 10' in card
    assert "kl_coef: 0.05" in card
    assert "kl: 3.5" in card
    assert "| gold score | 0.500 ± 0.100 |" in card
    assert str(run.folder) not in card


def test_what_is_left_of_a_failed_stage_has_a_card_without_an_evaluation(run, made):
    del run.stages["ppo"], run.stages["evaluate"]
    left = run.store.publish_derived(
        kind="model", files={"config.json": b"{}", "model.safetensors": b"left"},
        parents=[run.stages["model"].digest],
        metadata={"algorithm": "ppo", "job": {"kl_coef": 0.05}, "reason": "collapsed at step 9"},
    )  # fmt: skip
    artifact = make_artifact(run, "smoke", left.digest, None)
    assert artifact.parents == (left.digest,)
    assert artifact.metadata == {"name": "smoke", "policy": left.digest}
    card = run.store.read_bytes(artifact.digest, "README.md").decode()
    assert "Not evaluated: collapsed at step 9." in card
    assert f"| ppo | `model/{left.digest}` | model |" in card
    registry.promote(run.store, "smoke", artifact.digest)
    assert champion(run) == left.digest


def test_key_depends_on_everything_that_is_published():
    given = [("a", "p", "e"), ("b", "p", "e"), ("a", "q", "e"), ("a", "p", None)]
    assert len({publish_key(*x) for x in given}) == 4


def test_champion_is_the_policy_behind_what_is_published(run, made):
    assert champion(run) is None
    artifact = make_artifact(run, "smoke", *made)
    registry.add_candidate(run.store, "smoke", artifact.digest)
    assert champion(run) is None
    registry.promote(run.store, "smoke", artifact.digest)
    assert champion(run) == made[0]


def test_plain_folder_is_replaced_by_a_newer_model(run, made, tmp_path):
    artifact = make_artifact(run, "smoke", *made)
    folder = tmp_path / "published" / "smoke"
    folder.mkdir(parents=True)
    (folder / "old").touch()
    assert materialise(run.store, artifact, folder) == folder
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    before = folder.stat().st_mtime_ns
    materialise(run.store, artifact, folder)
    assert folder.stat().st_mtime_ns == before
    assert [p.name for p in folder.parent.glob("[!.]*")] == ["smoke"]


def test_hub_model_is_named_as_base_model(store, tmp_path, monkeypatch, run, made):
    config = PipelineConfig.model_validate({"model": {"source": "bigscience/bloom-560m"}})
    run.config = config
    front = yaml.safe_load(model_card(run, "x", *made).split("---")[1])
    assert front["base_model"] == "bigscience/bloom-560m"
