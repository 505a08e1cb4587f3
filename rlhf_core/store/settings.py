"""Settings of the store: endpoint, timeouts and the size of the local cache."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from rlhf_core.errors import ConfigError


class StoreSettings(BaseSettings):
    """How to reach a remote store; read from ``RLHF_STORE_*`` environment variables.

    Keys are never settings: they come from the clouds' own variables, such as
    ``AWS_ACCESS_KEY_ID``, ``GOOGLE_APPLICATION_CREDENTIALS`` or ``AZURE_STORAGE_ACCOUNT_KEY``, from
    an AWS profile, or from the machine's role. Endpoint, region, profile and path style are those
    of S3.
    """

    model_config = SettingsConfigDict(
        env_prefix="RLHF_STORE_",
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
    )

    endpoint: str | None = None
    """URL of an S3-compatible server, such as ``http://10.0.0.5:9000``; unset means AWS."""
    region: str | None = None
    """Region of the bucket; unset leaves it to the AWS configuration."""
    profile: str | None = None
    """Name of the AWS profile that holds the keys; unset means the environment's keys, else those
    of ``AWS_PROFILE``."""
    path_style: bool = True
    """Put the bucket in the path (most self-hosted servers) rather than in the host name."""
    tls_verify: bool = True
    """Check the endpoint's TLS certificate; ``AWS_CA_BUNDLE`` names the file with the certificate
    of an authority of one's own."""
    connect_timeout: float = Field(default=10, gt=0)
    """Seconds to wait for a connection."""
    read_timeout: float = Field(default=60, gt=0)
    """Seconds to wait for a reply; below 30 a slow link fails on large parts."""
    retries: int = Field(default=6, ge=0, le=20)
    """How often a request is repeated after a passing failure; six ride out about 25 seconds."""
    cache_gb: float = Field(default=100, ge=0)
    """Gigabytes that the local copies of artifacts in ``$RLHF_HOME/cache`` may take. For a new one
    the least recently used go, but none that a running process uses: those may exceed it."""

    def with_short_timeouts(self) -> StoreSettings:
        """For a preflight: time limits and retries that end within 15 seconds."""
        quick = {
            "connect_timeout": min(self.connect_timeout, 5.0),
            "read_timeout": min(self.read_timeout, 6.0),
            "retries": min(self.retries, 1),
        }
        return self.model_copy(update=quick)

    def endpoint_name(self) -> str:
        """The endpoint without user name and password, for messages."""
        url = (
            self.endpoint
            or os.environ.get("AWS_ENDPOINT_URL_S3")
            or os.environ.get("AWS_ENDPOINT_URL")
        )
        if not url:
            return "AWS S3"
        parts = urlsplit(url)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def read_settings() -> StoreSettings:
    """The settings of the environment. Raises ConfigError, which names the invalid variables."""
    try:
        return StoreSettings()
    except ValidationError as error:
        problems = "; ".join(
            f"RLHF_STORE_{'_'.join(map(str, item['loc'])).upper()}: {item['msg']}"
            for item in error.errors()
        )
        raise ConfigError(f"store settings are not valid: {problems}") from error
