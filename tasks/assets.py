"""Prefect's asset events: what was made, and from what, for whoever listens to the server's events.

The open-source server has no page for assets; the run's report draws the same lineage.
"""

from __future__ import annotations

from typing import Any

from prefect import runtime
from prefect.events import emit_event
from prefect.settings import PREFECT_API_URL

from rlhf_core.store import Artifact, Store

PUBLISHED = "rlhf.model.published"
"""The event of a new champion of a published name."""


def asset_key(store: Store, artifact: Artifact) -> str:
    """The URL under which the artifact's manifest lies."""
    return f"{store.url.rstrip('/')}/artifacts/{artifact.kind}/{artifact.digest}"


def made(store: Store, stage: str, artifact: Artifact, metrics: dict[str, Any]) -> None:
    """A stage has made an artifact out of its parents."""
    parents = [store.get(digest) for digest in artifact.parents]
    _emit(
        event="prefect.asset.materialization.succeeded",
        resource=_asset(store, artifact, stage),
        related=[_related(store, parent) for parent in parents],
        payload={"stage": stage, "metrics": metrics},
    )


def reused(store: Store, stage: str, artifact: Artifact) -> None:
    """A stage has found its artifact in the store."""
    _emit(event="prefect.asset.referenced", resource=_asset(store, artifact, stage))


def published(store: Store, name: str, artifact: Artifact, run_id: str) -> None:
    """An artifact is the champion of a name now."""
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
    # Without either Prefect would start a server to send it to.
    if runtime.flow_run.id or PREFECT_API_URL.value():
        emit_event(**event)
