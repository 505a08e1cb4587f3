"""Experiment tracking: where runs are shown beside those of other programs."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from rlhf_core.jobs.base import Settings


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
