"""Creates work pools, deployments and automations on a Prefect server. Idempotent."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.resources import as_file, files
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectAlreadyExists

from flows import automations
from tasks.launchers.queue import QUEUES

POOLS = {
    "control": "Pipelines: they wait for jobs and use no GPU.",
    "gpu": "Stages' jobs: torchrun on a machine with GPUs.",
}


def apply(slots: int | None = None) -> None:
    """Create what is missing, and update the rest. What was switched on or off in the UI stays so.

    Args:
        slots: jobs that the gpu pool runs at once; None does not change it.
    """
    client: Any = get_client(sync_client=True)
    template = json.loads((files("deployments") / "work_pools/process.json").read_text())
    for name, description in POOLS.items():
        limit = slots if name == "gpu" else None
        try:
            client.create_work_pool(
                WorkPoolCreate(
                    name=name, description=description, type="process",
                    base_job_template=template, concurrency_limit=limit,
                )
            )  # fmt: skip
        except ObjectAlreadyExists:
            if limit is not None:
                client.update_work_pool(name, WorkPoolUpdate(concurrency_limit=limit))
    _apply_queues(client)
    switches = _keep_schedules(client)
    enabled = {a["name"]: a["enabled"] for a in _automations(client)}
    with as_file(files("deployments") / "prefect.yaml") as path:
        subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all",
             "--prefect-file", str(path)],
            check=True,
        )  # fmt: skip
    for (deployment, schedule), active in switches.items():
        client.update_deployment_schedule(deployment, schedule, active=active)
    for automation in _automations(client):  # those of deployments were made anew, as in the file
        if (was := enabled.get(automation["name"])) not in (None, automation["enabled"]):
            page = f"/automations/{automation['id']}"
            client.request("PATCH", page, json={"enabled": was}).raise_for_status()
    for name in automations.apply():
        print(f"automation: {name}")


def _apply_queues(client: Any) -> None:
    """The queues of the gpu pool: a run's priority chooses one."""
    there = {queue.name: queue for queue in client.read_work_queues(work_pool_name="gpu")}
    for name, priority in QUEUES.items():
        if name not in there:
            client.create_work_queue(name, work_pool_name="gpu", priority=priority)
        elif there[name].priority != priority:
            client.update_work_queue(there[name].id, priority=priority)


def _keep_schedules(client: Any) -> dict[tuple[UUID, UUID], bool]:
    """Prepare the schedules for `prefect deploy`, which would switch those of prefect.yaml off
    again, and delete all others as soon as one has no slug, as those made in the UI.

    Returns:
        Deployment and schedule -> whether it is on, to be set again.
    """
    found = {}
    for deployment in client.read_deployments():
        for each in deployment.schedules:
            found[(deployment.id, each.id)] = each.active
            if not each.slug:
                name = f"schedule-{str(each.id)[:8]}"
                client.update_deployment_schedule(deployment.id, each.id, slug=name)
    return found


def _automations(client: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.request("POST", "/automations/filter", json={}).json()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m flows.deploy", description=__doc__)
    parser.add_argument("slots", type=int, nargs="?", help="jobs that the gpu pool runs at once")
    apply(parser.parse_args().slots)
