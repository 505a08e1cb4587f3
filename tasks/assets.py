"""Prefect's asset events: which artifact was made from which others.

The open-source server has no page for assets; the run's report draws the same lineage.
"""

from __future__ import annotations

from typing import Any

from prefect import runtime
from prefect.events import emit_event
from prefect.settings import PREFECT_API_URL

from rlhf_core.store import Artifact, Store

PUBLISHED = "rlhf.model.published"
"""Event: a published name has a new champion."""


def asset_key(store: Store, artifact: Artifact) -> str:
    """URL of the artifact's manifest."""
    return f"{store.url.rstrip('/')}/artifacts/{artifact.kind}/{artifact.digest}"


def made(store: Store, stage: str, artifact: Artifact, metrics: dict[str, Any]) -> None:
    """Emit that a stage has made an artifact from its parents."""
    parents = [store.get(digest) for digest in artifact.parents]
    _emit(
        event="prefect.asset.materialization.succeeded",
        resource=_asset(store, artifact, stage),
        related=[_related(store, parent) for parent in parents],
        payload={"stage": stage, "metrics": metrics},
    )


def reused(store: Store, stage: str, artifact: Artifact) -> None:
    """Emit that a stage has reused an artifact of the store."""
    _emit(event="prefect.asset.referenced", resource=_asset(store, artifact, stage))


def published(store: Store, name: str, artifact: Artifact, run_id: str) -> None:
    """Emit that an artifact is the new champion of a name."""
    _emit(
        event=PUBLISHED,
        resource={"prefect.resource.id": f"rlhf.model.{name}", "prefect.resource.name": name},
        related=[_related(store, artifact)],
        payload={"name": name, "artifact": artifact.ref, "run": run_id},
    )


def _asset(store: Store, artifact: Artifact, stage: str) -> dict[str, str]:
    return {
        "prefect.resource.id": asset_key(store, artifact),
        "prefect.resource.name": f"{artifact.ref} ({stage})",
    }


def _related(store: Store, artifact: Artifact) -> dict[str, str]:
    return {
        "prefect.resource.id": asset_key(store, artifact),
        "prefect.resource.role": "asset",
    }


def _emit(**event: Any) -> None:
    # Without a flow run or a server, Prefect would start a server for the event.
    if runtime.flow_run.id or PREFECT_API_URL.value():
        emit_event(**event)
