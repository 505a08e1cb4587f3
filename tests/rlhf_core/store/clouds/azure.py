"""Azure Blob Storage for tests: Microsoft's emulator Azurite, from npm."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import shutil
import subprocess
import time
import urllib.request
from email.utils import formatdate
from pathlib import Path

import pytest

from rlhf_core.system.ports import free_ports

ACCOUNT = "devstoreaccount1"
KEY = base64.b64encode(b"test-secret-that-must-not-be-shown").decode()
CONTAINER = "artifacts"


def azurite_program() -> str | None:
    """`make test-clouds` installs it and names its folder."""
    return shutil.which("azurite-blob", path=os.environ.get("RLHF_TEST_AZURITE", ""))


class Azurite:
    """One server with a container."""

    def __init__(self, folder: Path) -> None:
        program = azurite_program()
        if program is None:
            pytest.skip("Azurite is not installed: `make test-clouds` does it, and needs npm")
        (port,) = free_ports(1)
        self.endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
        self.environment = {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            "AZURE_STORAGE_ENDPOINT": self.endpoint,
        }
        self._process = subprocess.Popen(
            [program, "--silent", "--location", str(folder), "--blobHost", "127.0.0.1",
             "--blobPort", str(port), "--skipApiVersionCheck", "--disableTelemetry"],
            env={**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for _ in range(300):
            try:
                self._create_container()
                return
            except OSError:
                time.sleep(0.1)
        raise TimeoutError("Azurite did not start")

    def _create_container(self) -> None:
        date, version = formatdate(usegmt=True), "2021-08-06"
        text = (
            "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:{version}\n"
            f"/{ACCOUNT}/{ACCOUNT}/{CONTAINER}\nrestype:container"
        )
        signature = hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()
        headers = {
            "x-ms-date": date,
            "x-ms-version": version,
            "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(signature).decode()}",
        }
        url = f"{self.endpoint}/{CONTAINER}?restype=container"
        urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=headers)).close()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
