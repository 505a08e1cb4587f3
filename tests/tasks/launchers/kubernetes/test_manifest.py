"""JobSets, checked against models that are made of the published schemas."""

import json
import re

import pytest
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet
from pydantic import ValidationError

from rlhf_core.jobs import DataJob, Resources, SFTJob
from rlhf_core.jobs.launchers import KubernetesLauncher
from rlhf_core.runtime import launches
from rlhf_core.runtime.launches import launch_id
from tasks.launchers.kubernetes import manifest

D = "0" * 64
EVERYTHING = KubernetesLauncher(
    image="registry.example.com/rlhf:1",
    namespace="rlhf",
    pull_secrets=("registry",),
    service_account="trainer",
    requests={"cpu": "16", "memory": "128Gi"},
    limits={"memory": "256Gi", "rdma/hca": "1"},
    shared_memory="64Gi",
    env={"NCCL_DEBUG": "WARN"},
    secrets=("store-keys",),
    secret_env={"HF_TOKEN": "hub/token"},
    volumes={"/cache": "cache"},
    node_selector={"gpu": "h100"},
    tolerations=("nvidia.com/gpu:NoSchedule", "team=rlhf:NoExecute", "spot"),
    priority_class="research",
    queue="train",
    labels={"team": "alignment"},
    annotations={"owner": "somebody"},
    deadline=86_400,
)


def job(**resources):
    return SFTJob(model=D, data=D, resources=Resources(**{"nodes": 2, "ranks": 8, **resources}))


def made(settings, *jobs, stage="sft"):
    return manifest.jobset(settings, stage, jobs, "s3://bucket/rlhf", launch_id(jobs), "0a1b2c3d")


def pod_of(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("settings", [EVERYTHING, KubernetesLauncher(image="rlhf:1")])
def test_jobset_has_the_fields_and_types_of_the_published_schema(settings):
    jobset = made(settings, job())
    model = JobsetV1alpha2JobSet.from_dict(jobset)
    assert json.loads(model.to_json()) == jobset, "a field that the schema does not have is dropped"


def test_schema_tells_a_wrong_type():
    jobset = made(EVERYTHING, job())
    jobset["spec"]["failurePolicy"]["maxRestarts"] = "many"
    with pytest.raises(ValidationError, match="maxRestarts"):
        JobsetV1alpha2JobSet.from_dict(jobset)


def test_pods_run_the_agents_of_the_nodes():
    jobset = made(EVERYTHING, job())
    [group] = jobset["spec"]["replicatedJobs"]
    spec = group["template"]["spec"]
    assert (spec["parallelism"], spec["completions"], spec["completionMode"]) == (2, 2, "Indexed")
    [container] = pod_of(jobset)["containers"]
    name = jobset["metadata"]["name"]
    assert container["args"] == [
        "python", "-m", "tasks.launchers.node_agent", "--store", "s3://bucket/rlhf",
        "--launch", launch_id([job()]), "--attempt", "0a1b2c3d-$(RLHF_RESTART)", "--nodes", "2",
        "--node-rank", "$(JOB_COMPLETION_INDEX)", "--rendezvous", f"{name}-node-0-0.{name}:29400",
        "--scratch", "/scratch",
    ]  # fmt: skip
    assert container["resources"]["limits"] == {
        "memory": "256Gi", "rdma/hca": "1", "nvidia.com/gpu": "8",
    }  # fmt: skip


def test_pods_get_names_of_secrets_and_no_values():
    [container] = pod_of(made(EVERYTHING, job()))["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": "store-keys"}}]
    token = {"secretKeyRef": {"name": "hub", "key": "token"}}
    assert {"name": "HF_TOKEN", "valueFrom": token} in container["env"]


def test_pods_have_time_to_store_a_checkpoint():
    pod = pod_of(made(EVERYTHING, job(stop_timeout=27)))
    assert pod["terminationGracePeriodSeconds"] == 27 + manifest.STOP_MARGIN


def test_pods_have_shared_memory_scratch_and_the_claims():
    pod = pod_of(made(EVERYTHING, job()))
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    places = {m["mountPath"]: volumes[m["name"]] for m in pod["containers"][0]["volumeMounts"]}
    assert places["/dev/shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}
    assert places["/scratch"]["emptyDir"] == {}
    assert places["/cache"]["persistentVolumeClaim"] == {"claimName": "cache"}


def test_tolerations_are_those_of_kubectl_taint():
    assert pod_of(made(EVERYTHING, job()))["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "team", "operator": "Equal", "value": "rlhf", "effect": "NoExecute"},
        {"key": "spot", "operator": "Exists"},
    ]


def test_jobset_of_a_queue_waits_for_kueue():
    queued, free = made(EVERYTHING, job()), made(KubernetesLauncher(image="rlhf:1"), job())
    assert queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "train"
    assert (queued["spec"]["suspend"], free["spec"]["suspend"]) == (True, False)


@pytest.mark.parametrize(
    ("given", "gpus"),
    [
        (job(), "8"),
        (job(device="cpu"), None),
        (DataJob(model=D, purpose="sft"), None),  # one process, no ranks
    ],
)
def test_pod_has_one_gpu_per_rank(given, gpus):
    [container] = pod_of(made(KubernetesLauncher(image="rlhf:1"), given))["containers"]
    assert container["resources"].get("limits", {}).get("nvidia.com/gpu") == gpus


def test_exit_codes_of_agents_are_told_apart():
    jobset = made(EVERYTHING, job())
    rules = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rules[0]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    by_code = [rule["onExitCodes"]["values"] for rule in rules[1:]]
    assert by_code[0] == [launches.STOPPED]
    assert launches.ENDED in by_code[1]
    assert all(codes == sorted(set(codes)) for codes in by_code), "the API refuses others"
    assert not {launches.DONE, launches.LOST} & {*by_code[0], *by_code[1]}


@pytest.mark.parametrize("stage", ["sft", "Reward Model #2 of the long name", "___", "ppo_2"])
def test_names_are_valid_and_follow_from_the_launch(stage):
    jobset = made(EVERYTHING, job(nodes=8), stage=stage)
    name = jobset["metadata"]["name"]
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name)
    assert len(f"{name}-node-0-1000-abcde") <= 63, "pods' names are host names"
    for value in jobset["metadata"]["labels"].values():
        assert re.fullmatch(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?", value)
    assert name == made(EVERYTHING, job(nodes=4), stage=stage)["metadata"]["name"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("limits", {"memory": "12 GB"}),
        ("secret_env", {"HF_TOKEN": "token"}),
        ("tolerations", ("a=b=c",)),
        ("volumes", {"/dev/shm": "fast"}),
        ("volumes", {"cache": "claim"}),
        ("namespace", "Team_1"),
    ],
)
def test_settings_that_cannot_be_are_refused(field, value):
    with pytest.raises(ValidationError, match=field):
        KubernetesLauncher(image="rlhf:1", **{field: value})
