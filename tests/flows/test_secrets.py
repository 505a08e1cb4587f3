"""A pipeline with marked secrets, and then a search through everything that it left behind.

The store is a real S3 server with a secret key, Prefect's server a real one whose database is read.
What is not secret is marked too, and must be found in every place: otherwise the search would prove
nothing.
"""

from __future__ import annotations

import base64
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf_core.store import open_store
from tests.rlhf_core.store.seaweed import ACCESS_KEY, BUCKET, SECRET_KEY, SeaweedServer

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SHOWN = "marked-to-be-found"  # the run's name
SECRETS = {
    "HF_TOKEN": "hf_marked/hub+token-1234567",
    "WANDB_API_KEY": "marked0wandb0key0890123456789abcdef",
    "PREFECT_API_AUTH_STRING": "marked-user:marked-password-42",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    server = SeaweedServer(tmp_path_factory.mktemp("secret store"))
    server.start()
    yield server
    server.kill()


class Watched:
    """A finished command: what it said, what it wrote, and every command line meanwhile."""

    def __init__(
        self, folder: Path, server: SeaweedServer, api: str, secret: str, plan: Any = None
    ):
        self.folder = folder
        self.url = f"s3://{BUCKET}/{folder.name}"
        (folder / "plan.json").write_text(json.dumps(plan or {}))
        unwanted = ("PREFECT_", "RLHF_", "AWS_")
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(unwanted)},
            **SECRETS,
            "HOME": str(folder),
            "RLHF_HOME": str(folder / "home"),
            "RLHF_STORE": self.url,
            "RLHF_STORE_ENDPOINT": server.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_EC2_METADATA_DISABLED": "true",
            "PREFECT_API_URL": api,
            "STUB_PLAN": str(folder / "plan.json"),
            "STUB_PIDS": str(folder),
            "STUB_PLAIN": "1",
            "PYTHONPATH": str(ROOT),
        }
        command = ["run", "--preset", "smoke", "--verbose", "--set", f"name={SHOWN}"]
        self.lines: set[str] = set()
        with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.flows.rlhf_with_stub", *command],
                env=environment, cwd=folder, stdout=out, stderr=err,
            )  # fmt: skip
            watcher = threading.Thread(target=self._watch, args=(process,))
            watcher.start()
            self.code = process.wait(timeout=240)
            watcher.join()
        self.out, self.err = (folder / "out").read_text(), (folder / "err").read_text()

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None:
            for each in psutil.process_iter():
                try:
                    self.lines.add("\0".join(each.cmdline()))
                except psutil.Error:
                    continue
            time.sleep(0.15)

    def database(self) -> list[str]:
        """Every value in the database of Prefect's server."""
        from prefect.settings import PREFECT_SERVER_DATABASE_CONNECTION_URL

        path = str(PREFECT_SERVER_DATABASE_CONNECTION_URL.value()).partition("///")[2]
        found = []
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as base:
            tables = [
                row[0] for row in base.execute("SELECT name FROM sqlite_master WHERE type='table'")
            ]
            for table in tables:
                for row in base.execute(f'SELECT * FROM "{table}"'):
                    found += [
                        v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v)
                        for v in row
                    ]
        return found

    def objects(self, monkeypatch: pytest.MonkeyPatch, server: SeaweedServer) -> dict[str, bytes]:
        """Every object in the store."""
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        monkeypatch.setenv("RLHF_STORE_ENDPOINT", server.endpoint)
        backend = open_store(self.url)._backend
        return {key: backend.read(key) or b"" for key in backend.keys("")}

    def files(self) -> dict[str, bytes]:
        """Every file below the run's folder, which is its home too."""
        plan = {"plan.json"}
        return {
            path.relative_to(self.folder).as_posix(): path.read_bytes()
            for path in self.folder.rglob("*")
            if path.is_file() and path.name not in plan
        }


def forms(secret: str) -> list[bytes]:
    """A secret as it stands, in a URL, in JSON, and in base64 at each of its three offsets."""
    plain = secret.encode()
    found = [plain, urllib.parse.quote(secret, safe="").encode(), json.dumps(secret)[1:-1].encode()]
    for pad in range(3):
        text = base64.b64encode(b"x" * pad + plain)
        found.append(text[4 if pad else 0 : len(text) // 4 * 4 - 4])
    return found


def holders(places: dict[str, bytes], secrets: list[str]) -> list[str]:
    wanted = [form for secret in secrets for form in forms(secret)]
    return [name for name, data in places.items() if any(form in data for form in wanted)]


def everything(run: Watched, objects: dict[str, bytes]) -> dict[str, bytes]:
    places = {f"file {name}": data for name, data in run.files().items()}
    places |= {f"object {name}": data for name, data in objects.items()}
    places |= {f"value {n} of the database": v.encode() for n, v in enumerate(run.database())}
    places |= {f"command line {line[:200]!r}": line.encode() for line in run.lines}
    return places


def test_forms_of_a_secret_are_found() -> None:
    secret = "marked/secret+value"
    for pad in range(5):
        hidden = base64.b64encode(b"y" * pad + secret.encode() + b"rest")
        assert holders({"a": hidden}, [secret]) == ["a"]
    assert holders({"a": b"marked%2Fsecret%2Bvalue"}, [secret]) == ["a"]
    assert holders({"a": b"marked"}, [secret]) == []


def test_secrets_are_nowhere_in_what_a_run_leaves(
    tmp_path: Path, server: SeaweedServer, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Watched(tmp_path, server, prefect_server, SECRET_KEY)
    assert run.code == 0, run.out + run.err
    objects = run.objects(monkeypatch, server)
    assert any(name.startswith("blobs/") for name in objects)
    assert any("rlhf_core.runtime.fork_server" in line for line in run.lines)  # the ranks were seen

    shown = holders(everything(run, objects), [SHOWN])
    for place in ("file out", "object runs/", "value ", "command "):
        assert any(name.startswith(place) for name in shown), f"the search does not see {place}"
    assert holders(everything(run, objects), [*SECRETS.values(), SECRET_KEY]) == []


def test_secrets_that_a_rank_prints_and_fails_with_are_hidden(
    tmp_path: Path, server: SeaweedServer, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Watched(tmp_path, server, prefect_server, SECRET_KEY, {"sft": ["leak"]})
    assert run.code == 1
    assert "sft failed: " in run.err and "refused with ***" in run.err
    logs = [data for name, data in run.files().items() if name.endswith("/sft/log.txt")]
    assert logs and b"'HF_TOKEN': '***'" in logs[0]
    objects = run.objects(monkeypatch, server)
    assert holders(everything(run, objects), [*SECRETS.values(), SECRET_KEY]) == []


def test_wrong_key_is_not_told_on(
    tmp_path: Path, server: SeaweedServer, prefect_server: str
) -> None:
    wrong = "marked-wrong-secret/key+0123456789"
    run = Watched(tmp_path, server, prefect_server, wrong)
    assert run.code == 1
    assert server.endpoint in run.err and "AWS_SECRET_ACCESS_KEY" in run.err
    assert "Traceback" not in run.out + run.err
    assert holders(everything(run, {}), [*SECRETS.values(), wrong, SECRET_KEY]) == []
