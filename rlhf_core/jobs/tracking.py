"""Where runs are shown beside those of other programs: experiment tracking, lineage."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from rlhf_core.jobs.base import Settings


class OpenLineage(Settings):
    """OpenLineage's events of the run and of each stage (extra openlineage), for a lineage server
    such as Marquez. Where they go is set by OpenLineage's own variables, such as OPENLINEAGE_URL
    and OPENLINEAGE_API_KEY, or its file openlineage.yml, where the pipeline runs. A server that is
    away is mentioned once and changes nothing."""

    namespace: Annotated[str, Field(min_length=1)] = "rlhf"
    """Namespace of the jobs. That of the artifacts is the URL of the store."""


class MlflowTracking(Settings):
    """Mirrors runs to MLflow (extra mlflow): settings, metrics of each step, report, evaluation,
    and versions of the published model. The store stays the only source of results; a server that
    is away is mentioned once and changes nothing."""

    type: Literal["mlflow"] = "mlflow"
    """Type of the tracking."""
    uri: Annotated[str, Field(min_length=1)]
    """Tracking server (http://host:5000) or database (sqlite:////data/mlflow.db). Credentials come
    from MLflow's own variables, such as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""
    experiment: Annotated[str, Field(min_length=1)] = "rlhf"
    """Name of the experiment; it is made if there is none."""
    registry: bool = True
    """Also keep the versions of publish.name in MLflow's model registry; the champion has the alias
    champion."""

    @field_validator("uri")
    @classmethod
    def _no_credentials(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.username or parts.password:
            raise ValueError(
                "the URI holds credentials, which would be written to the run's record; leave them "
                "out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return value
