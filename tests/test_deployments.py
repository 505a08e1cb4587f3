"""prefect.yaml and the work pools' templates, as far as they can be checked without a cluster."""

import importlib
import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from rlhf_core.jobs import PipelineConfig, WorkPoolLauncher

ROOT = Path(__file__).resolve().parent.parent / "deployments"
POOLS = sorted(path.stem for path in (ROOT / "work_pools").glob("*.json"))


def deployments():
    return yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]


def entry_point(deployment):
    module, _, name = deployment["entrypoint"].rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("deployment", deployments(), ids=lambda d: d["name"])
def test_deployment_is_complete_and_its_parameters_fit_its_flow(deployment):
    flow = entry_point(deployment)
    assert deployment["description"]
    assert deployment["tags"]
    assert deployment["version"]
    assert deployment["work_pool"]["name"] in ("control", "gpu")
    known = flow.fn.__annotations__
    assert set(deployment.get("parameters", {})) <= set(known)
    if config := deployment.get("parameters", {}).get("config"):
        PipelineConfig.model_validate(config)


def test_every_deployment_has_a_name_of_its_own():
    names = [d["name"] for d in deployments()]
    assert len(set(names)) == len(names)


def test_launcher_submits_to_a_deployment_that_is_there():
    wanted = WorkPoolLauncher().deployment
    [found] = [d for d in deployments() if f"{entry_point(d).name}/{d['name']}" == wanted]
    assert found["work_pool"]["name"] == "gpu"


def test_schedules_are_off_until_someone_switches_them_on():
    schedules = [s for d in deployments() for s in d.get("schedules", [])]
    assert schedules
    for schedule in schedules:
        assert schedule["active"] is False
        assert schedule["timezone"]


def rendered(pool, **chosen):
    from prefect.utilities.templating import apply_values

    template = json.loads((ROOT / f"work_pools/{pool}.json").read_text())
    properties = template["variables"]["properties"]
    Draft202012Validator.check_schema(template["variables"])
    values = {name: p["default"] for name, p in properties.items() if "default" in p} | chosen
    Draft202012Validator(template["variables"]).validate(values)
    return apply_values(template["job_configuration"], values)


@pytest.mark.parametrize("pool", POOLS)
def test_template_uses_every_variable_and_no_other(pool):
    text = (ROOT / f"work_pools/{pool}.json").read_text()
    template = json.loads(text)
    used = json.dumps(template["job_configuration"])
    for name, schema in template["variables"]["properties"].items():
        assert "{{ " + name + " }}" in used, name
        assert schema.get("title")
        assert schema.get("description")
    for part in used.split("{{ ")[1:]:
        assert part.split(" }}")[0] in template["variables"]["properties"]


def test_kubernetes_job_gets_gpus_shared_memory_and_the_stores_secret():
    job = rendered("kubernetes", gpus=4, node_selector={"pool": "a100"})
    pod = job["job_manifest"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert container["envFrom"] == [{"secretRef": {"name": "rlhf-store"}}]
    assert pod["volumes"][0]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    assert container["volumeMounts"] == [{"name": "shm", "mountPath": "/dev/shm"}]
    assert pod["nodeSelector"] == {"pool": "a100"}
    assert pod["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert pod["terminationGracePeriodSeconds"] == 120
    assert job["pod_watch_timeout_seconds"] == 900


def test_docker_job_gets_gpus_and_shared_memory():
    job = rendered("docker")["container_create_kwargs"]
    assert job["device_requests"][0]["Capabilities"] == [["gpu"]]
    assert job["shm_size"] == "8g"
