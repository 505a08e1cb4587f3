"""The project's automations on a Prefect server: lost runs, and notifications.

`prefect automation create` makes a duplicate each time; `apply` updates those of the same name, and
leaves alone those that have not changed: an update forgets for which runs an automation waits.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

from prefect.automations import Automation, AutomationCore
from prefect.client.orchestration import get_client
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import EventTrigger, Posture

from flows.approval import WAITING
from flows.notify import PREFIX
from tasks.assets import PUBLISHED
from tasks.launchers.failures import STATE_NAMES
from tasks.waiters import DECLARED_DEAD, SILENCE_SECONDS

FAILED = {
    f"prefect.flow-run.{name}" for name in ("Failed", "Crashed", "TimedOut", *STATE_NAMES.values())
}
"""The server's events of runs that have failed: it calls them by the state's name."""


def lost_runs() -> AutomationCore:
    """Mark a run without heartbeats as crashed, which frees its slot and allows a retry.

    It applies only to runs that have sent a heartbeat, so not to runs whose heartbeats are off.
    """
    return AutomationCore(
        name="rlhf: a run without heartbeats has crashed",
        description=f"No heartbeat for {SILENCE_SECONDS} s: the process or machine was lost.",
        enabled=True,
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={
                "prefect.flow-run.heartbeat",
                "prefect.flow-run.Completed",
                "prefect.flow-run.Cancelled",
                "prefect.flow-run.AwaitingRetry",
                "prefect.flow-run.Scheduled",
                "prefect.flow-run.Paused",
                "prefect.flow-run.Suspended",
                f"prefect.flow-run.{WAITING}",
                *FAILED,
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
                message=f"{DECLARED_DEAD} {SILENCE_SECONDS} s: its process or machine was lost",
            )
        ],
    )


def failed_runs(blocks: list[UUID]) -> AutomationCore:
    """Notify of a pipeline or retraining that failed or crashed; not of attempts of its stages."""
    return AutomationCore(
        name="rlhf: tell that a run has failed",
        description="Sends to every notification block whose name begins with rlhf-notify.",
        trigger=EventTrigger(
            expect=FAILED,
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related={
                "prefect.resource.role": "tag",
                "prefect.resource.id": ["prefect.tag.pipeline", "prefect.tag.retrain"],
            },
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[
            SendNotification(
                block_document_id=block,
                subject=(
                    "{{ flow.name }}: {{ flow_run.name }} {{ flow_run.state.type.value | lower }}"
                ),
                body=(
                    "{{ flow_run.state.name }}: {{ flow_run.state.message }}\n"
                    "{{ flow_run | ui_url }}"
                ),
            )
            for block in blocks
        ],
    )


def published_models(blocks: list[UUID]) -> AutomationCore:
    """Notify of a new version of a published model."""
    return AutomationCore(
        name="rlhf: tell that a model was published",
        description="Sends to every notification block whose name begins with rlhf-notify.",
        trigger=EventTrigger(
            expect={PUBLISHED},
            match={"prefect.resource.id": "rlhf.model.*"},
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[
            SendNotification(
                block_document_id=block,
                subject="{{ event.payload.name }} has a new version",
                body="{{ event.payload.artifact }}, made by run {{ event.payload.run }}",
            )
            for block in blocks
        ],
    )


def apply() -> list[str]:
    """Create or update the automations; returns their names. Notifications exist only while there
    is a notification block."""
    client: Any = get_client(sync_client=True)
    blocks = _notification_blocks(client)
    notifications = [failed_runs(blocks), published_models(blocks)]
    automations = [lost_runs(), *(notifications if blocks else [])]
    for automation in automations:
        found = client.read_automations_by_name(automation.name)
        if found:
            automation.enabled = found[0].enabled  # it may have been switched off in the UI
            if _differ(found[0], automation):
                client.update_automation(found[0].id, automation)
        else:
            client.create_automation(automation)
        for extra in found[1:]:
            client.delete_automation(extra.id)
    for automation in [] if blocks else notifications:
        for found in client.read_automations_by_name(automation.name):
            client.delete_automation(found.id)
    return [automation.name for automation in automations]


def _differ(found: Automation, wanted: AutomationCore) -> bool:
    fields = set(AutomationCore.model_fields)
    return found.model_dump(include=fields) != wanted.model_dump(include=fields)


def _notification_blocks(client: Any) -> list[UUID]:
    documents = client.read_block_documents(include_secrets=False, limit=200)
    return [d.id for d in documents if (d.name or "").startswith(PREFIX)]
