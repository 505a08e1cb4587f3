"""A policy that collapses in a real run: what is left of it is a candidate, and the run fails."""

from __future__ import annotations

import json

import pytest

from rlhf_core.errors import JobFailed
from rlhf_core.jobs import BaseJob, parse_job
from rlhf_core.pipeline.presets import build_config
from rlhf_core.runtime import candidates
from rlhf_core.store import open_store, registry
from rlhf_core.store.collect import Limits

from .test_flow import pipeline  # noqa: F401 (fixture)

pytestmark = pytest.mark.slow

COLLAPSING = [
    "stages=[grpo]",
    "resources={ranks: 1, micro_batch_size: 16, checkpoint_every: 1, keep_checkpoints: 20}",
    "grpo={rewards: [{type: length, target: 4, width: 4}], steps: 15, batch_size: 4, "
    "group_size: 4, max_new_tokens: 6, precision: fp32, learning_rate: 0.03, schedule: constant, "
    "warmup_fraction: 0.0, collapse_window: 2, max_kl: 0.5}",
]


@pytest.fixture
def real_run(prefect_server, tmp_path, monkeypatch):
    """Runs the flow with real ranks; returns the failure's text and the store."""
    from flows.rlhf import rlhf_pipeline

    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "home"))
    url = str(tmp_path / "store")

    def run(*overrides):
        config = build_config("smoke", [f"store={url}", *COLLAPSING, *overrides])
        with pytest.raises(JobFailed) as failed:
            rlhf_pipeline(config)
        assert failed.value.category == "collapse"
        return str(failed.value), open_store(url)

    return run


def test_last_good_policy_of_a_collapsed_one_is_a_candidate(real_run):
    said, store = real_run()
    model = registry.read_model(store, "smoke")
    assert model.champion is None
    [version] = model.versions
    assert version.state == "candidate"
    assert version.reason.startswith("collapsed at step ") and "kl " in version.reason
    assert "above max_kl 0.5; weights of step " in version.reason

    published = store.get(version.digest)
    policy = store.get(published.metadata["policy"])
    steps = policy.metadata["metrics"]["steps"]
    assert version.reason.endswith(f"weights of step {steps}")
    assert published.parents == (policy.digest,)
    weights = "model.safetensors"
    assert published.file(weights).sha256 == policy.file(weights).sha256
    card = store.read_bytes(published.digest, "README.md").decode()
    assert f"Not evaluated: {version.reason}." in card and f"model/{policy.digest}" in card

    assert "grpo failed: grpo step" in said and policy.ref in said
    assert "version 1 of smoke, a candidate: `rlhf models show smoke 1`" in said
    assert f"`rlhf chat {version.digest[:12]}`" in said
    [path] = store.list_records("runs/")
    record = store.read_record(path)
    assert (record["state"], record["category"]) == ("failed", "collapse")
    assert "rlhf models show smoke 1" in record["error"]
    assert set(record["stages"]) == {"model", "data-prompts", "candidate"}

    from flows.cli.lookup import find_model

    assert find_model(store, version.digest[:12]) == published
    assert find_model(store, "candidate") == published
    store.collect(lambda: registry.kept_digests(store, 0), Limits(keep=0.0, grace=0.0))
    assert store.verify(version.digest) == [] and store.list_records("candidates/") == []


def test_collapse_before_a_checkpoint_is_one_message_and_no_candidate(real_run):
    said, store = real_run("resources.checkpoint_every=1000")
    assert "No checkpoint from before these rollouts" in said
    assert "candidate" not in said and "rlhf models" not in said
    assert registry.model_names(store) == []
    assert not [a for a in store.list("model") if a.metadata.get("candidate")]


def test_same_collapse_again_is_one_version_and_one_that_left_nothing_none(pipeline, monkeypatch):  # noqa: F811
    monkeypatch.setattr(BaseJob, "torchrun", False)
    pipeline.plan(ppo=["collapse_late"])
    for number in (1, 1):  # the same job leaves the same policy: still one version
        with pytest.raises(JobFailed, match=rf"version {number} of smoke, a candidate"):
            pipeline()
    pipeline.plan(ppo=["collapse"])
    with pytest.raises(JobFailed, match=r"stub ran into collapse\nFull log: \S+$"):
        pipeline("ppo.kl_coef=0.3")
    [version] = registry.read_model(pipeline.store, "smoke").versions
    assert version.reason == "collapsed at step 9"
    policy = pipeline.store.get(pipeline.store.get(version.digest).metadata["policy"])
    job = parse_job(json.dumps(policy.metadata["job"]))
    assert candidates.read(pipeline.store, job.key()) == policy
