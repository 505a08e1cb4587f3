"""The S3 server of the tests: SeaweedFS with keys that a test can look for."""

from __future__ import annotations

from pathlib import Path

from rlhf_core.store.s3.seaweed import Seaweed

ACCESS_KEY = "test-access-key"
SECRET_KEY = "test-secret-that-must-not-be-shown"
BUCKET = "artifacts"
KEYS = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}

__all__ = ["ACCESS_KEY", "BUCKET", "KEYS", "SECRET_KEY", "SeaweedServer"]


class SeaweedServer(Seaweed):
    """One server with a bucket for tests."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, bucket=BUCKET, keys=KEYS)
