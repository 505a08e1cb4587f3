"""All problems of a cluster in one list, before anything is started."""

import pytest
import yaml

from rlhf_core.jobs import PipelineConfig
from rlhf_core.jobs.launchers import KubernetesLauncher
from tasks.launchers import check_launcher
from tasks.launchers.kubernetes import preflight
from tests.rlhf_core.torchrun import ROOT

NAMED = {
    "pull_secrets": ("registry",),
    "secrets": ("store-keys",),
    "secret_env": {"HF_TOKEN": "hub/token"},
    "volumes": {"/cache": "cache"},
    "service_account": "trainer",
    "queue": "train",
}
THERE = {
    "secrets/registry", "secrets/store-keys", "secrets/hub", "persistentvolumeclaims/cache",
    "serviceaccounts/trainer", "localqueues/train",
}  # fmt: skip


@pytest.fixture
def problems(cluster, monkeypatch):
    monkeypatch.setattr(preflight, "ANSWER_SECONDS", 0.2)

    def check(store="s3://bucket/rlhf", **settings):
        launcher = KubernetesLauncher(image="rlhf:1", **settings)
        return check_launcher(PipelineConfig(launcher=launcher, store=store), [])

    return check


def test_sound_cluster_has_no_problems(problems, cluster):
    cluster.there = set(THERE)
    assert problems(**NAMED) == []


def test_everything_that_is_missing_is_told_at_once(problems, cluster):
    cluster.denied = {("create", "jobsets"), ("get", "pods")}
    found = problems(**NAMED)
    assert found[0].startswith("these credentials may not create jobsets, get pods/log in")
    assert {text.split()[0] for text in found[1:]} == {f"launcher.{name}" for name in NAMED}


def test_objects_that_may_not_be_read_are_no_problem(problems, cluster):
    cluster.there = THERE - {"secrets/store-keys"}
    cluster.denied = {("get", "secrets")}
    assert problems(**NAMED) == []


def test_cluster_without_jobset_or_kueue_is_told(problems, cluster):
    del cluster.groups["kueue.x-k8s.io"]
    assert "names train" in problems(queue="train")[0]
    del cluster.groups["jobset.x-k8s.io"]
    assert "install JobSet 0.10" in problems()[0]


def test_unreachable_cluster_and_missing_context_are_told(problems, cluster, monkeypatch):
    assert "context nowhere" in problems(context="nowhere")[0]
    cluster.down()
    assert "did not answer" in problems()[0]
    cluster.up()
    monkeypatch.setenv("KUBECONFIG", "/nowhere/config")
    assert "no credentials" in problems()[0]


def test_secret_in_the_open_and_store_without_pods_are_told(problems):
    found = problems(env={"AWS_SECRET_ACCESS_KEY": "x", "NCCL_DEBUG": "WARN"}, store="/data/store")
    assert len(found) == 2
    assert found[0].startswith("launcher.env has AWS_SECRET_ACCESS_KEY")
    assert "store is the folder /data/store" in found[1]


def test_store_on_a_claim_is_sound(problems, cluster):
    cluster.there = {"persistentvolumeclaims/share"}
    assert problems(store="/data/store", volumes={"/data": "share"}) == []


def test_role_of_the_documentation_allows_what_the_launcher_does():
    parts = yaml.safe_load_all((ROOT / "deployments/kubernetes/role.yaml").read_text())
    [role] = [part for part in parts if part["kind"] == "Role"]
    allowed = {
        (verb, resource, group)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert set(preflight.RIGHTS) <= allowed
