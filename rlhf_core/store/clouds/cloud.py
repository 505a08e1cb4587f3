"""What differs between the clouds: their names, addresses, and where credentials come from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from rlhf_core.errors import StoreUnavailable


@dataclass(frozen=True)
class Cloud:
    """A provider of object storage, reached through obstore.

    Attributes:
        place: its word for a bucket.
        endpoints: environment variables with another address, such as that of an emulator.
        credentials: what to do without any.
        copy_command: of the cloud's own program, to copy a folder from there.
        secrets: environment variables whose values no message may show.
    """

    scheme: str
    name: str
    place: str
    endpoints: tuple[str, ...]
    credentials: str
    copy_command: str
    secrets: tuple[str, ...]

    @property
    def endpoint(self) -> str:
        """The address of the service.

        Raises:
            StoreUnavailable: an Azure account is not named.
        """
        for variable in self.endpoints:
            if url := os.environ.get(variable):
                return url
        if self.scheme == "gs":
            return "https://storage.googleapis.com"
        account = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME")
        if not account:
            raise StoreUnavailable(
                "an az:// store needs the name of its storage account: set "
                "AZURE_STORAGE_ACCOUNT_NAME"
            )
        return f"https://{account}.blob.core.windows.net"

    @property
    def endpoint_name(self) -> str:
        """The address for messages, without user name and password."""
        parts = urlsplit(self.endpoint)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()


CLOUDS = {
    "gs": Cloud(
        scheme="gs",
        name="Google Cloud Storage",
        place="bucket",
        endpoints=("GOOGLE_BASE_URL",),
        credentials=(
            "set GOOGLE_APPLICATION_CREDENTIALS to the key file of a service account, run `gcloud "
            "auth application-default login`, or use the machine's service account (workload "
            "identity)"
        ),
        copy_command="gcloud storage cp -r",
        secrets=("GOOGLE_BEARER_TOKEN", "GOOGLE_SERVICE_ACCOUNT_KEY"),
    ),
    "az": Cloud(
        scheme="az",
        name="Azure Blob Storage",
        place="container",
        endpoints=("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
        credentials=(
            "set AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or AZURE_CLIENT_ID, "
            "AZURE_TENANT_ID and AZURE_CLIENT_SECRET, or use the machine's managed or workload "
            "identity"
        ),
        copy_command="azcopy copy --recursive",
        secrets=(
            "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_MASTER_KEY",
            "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_SAS_KEY", "AZURE_STORAGE_TOKEN",
            "AZURE_CLIENT_SECRET", "AZURE_STORAGE_CLIENT_SECRET",
        ),
    ),
}  # fmt: skip
