"""Automations that come with the project, made or brought up to date on a server.

`prefect automation create` makes a duplicate each time; these are found again by their names.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from prefect.automations import AutomationCore
from prefect.client.orchestration import get_client
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture

from tasks.watch import FOUND_DEAD

SILENCE_SECONDS = 150
"""A run that says nothing for so long is dead: five heartbeats with
PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30, so that neither a busy run is, nor one whose server was away
for a minute. One that is declared dead after a longer absence revives itself (tasks/watch.py)."""


def lost_runs() -> AutomationCore:
    """A run without heartbeats is marked as crashed, which frees its slot and lets it be retried.

    It only looks at runs that have sent one: a run whose heartbeats are off is never taken for
    dead.
    """
    return AutomationCore(
        name="rlhf: a run without heartbeats has crashed",
        description=f"No heartbeat for {SILENCE_SECONDS} s: its process or its machine has gone.",
        enabled=True,
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={
                "prefect.flow-run.heartbeat",
                "prefect.flow-run.Completed",
                "prefect.flow-run.Failed",
                "prefect.flow-run.Cancelled",
                "prefect.flow-run.Crashed",
                "prefect.flow-run.AwaitingRetry",
                "prefect.flow-run.Scheduled",
                "prefect.flow-run.Paused",
                "prefect.flow-run.Suspended",
            },
            match={"prefect.resource.id": ["prefect.flow-run.*"]},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=SILENCE_SECONDS),
        ),
        actions=[
            ChangeFlowRunState(
                state="CRASHED",
                message=f"{FOUND_DEAD} {SILENCE_SECONDS} s: its process or machine was lost",
            )
        ],
    )


def apply() -> list[str]:
    """Make them, or bring them up to date; returns their names."""
    client: Any = get_client(sync_client=True)
    names = []
    for wanted in (lost_runs(),):
        found = client.read_automations_by_name(wanted.name)
        if found:
            client.update_automation(found[0].id, wanted)
            for extra in found[1:]:
                client.delete_automation(extra.id)
        else:
            client.create_automation(wanted)
        names.append(wanted.name)
    return names
