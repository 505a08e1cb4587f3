"""A whole system on one machine: `rlhf up` and `rlhf down`.

A supervisor process in the background starts a Prefect server, an S3 server and two workers, one
per work pool. It restarts a process that exits, and stops them all on `rlhf down`. Other `rlhf`
commands use the running system's server and store.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from flows.api_server import LOGIN
from flows.cli.log_files import open_log
from rlhf_core.errors import ConfigError, StoreUnavailable
from rlhf_core.store import rlhf_home
from rlhf_core.system.private import close_folder

START_SECONDS = 300  # a busy machine
STOP_SECONDS = 75  # the supervisor gives each of four services 15


@dataclass
class System:
    """A running system, as system.json describes it.

    Attributes:
        pid, started: id and start time of the supervisor; together they identify a process.
        phase: starting, ready, or failed.
        options: of `rlhf up`, see `Options`; {} if an older version started it.
    """

    pid: int
    started: float
    phase: str = "starting"
    ui: str = ""
    store: str = ""
    error: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def alive(self) -> bool:
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < 1.0
        except psutil.Error:
            return False


def folder() -> Path:
    return rlhf_home() / "system"  # flows.cli.main looks there for system.json


def login_file() -> Path:
    return folder() / "login"


def read() -> System | None:
    """The system of this folder, if its supervisor is running."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        system = System(**json.loads((folder() / "system.json").read_text()))
        return system if system.alive() else None
    return None


def join() -> None:
    """Use the running system's server and store, unless the environment names others."""
    system = read()
    if system is not None and system.phase == "ready":
        for name, value in system.environment.items():
            if name != LOGIN:
                os.environ.setdefault(name, value)
        use_login(os.environ.get("PREFECT_API_URL", ""))


def use_login(url: str) -> None:
    """Log in to the running system, if it is what has this URL. No other server gets its login."""
    system = read()
    ours = system.environment if system is not None else {}
    if LOGIN in ours and (
        url.replace("//localhost:", "//127.0.0.1:").rstrip("/") == ours.get("PREFECT_API_URL")
    ):
        os.environ[LOGIN] = ours[LOGIN]


# --------------------------------------------------------------------------- up and down


@dataclass(frozen=True)
class Options:
    """Options of `rlhf up`.

    Attributes:
        port: of the Prefect server.
        s3_port: of the S3 server; 0 takes a free one; None keeps artifacts in files.
        slots: jobs that the gpu pool runs at once.
        host: address that the Prefect server listens on.
    """

    port: int = 4200
    s3_port: int | None = 8333
    slots: int = 1
    host: str = "127.0.0.1"


def up(options: Options, given: Collection[str] = ()) -> System:
    """Start the system, unless it is running, and wait until it is ready.

    Args:
        given: names of the options that the user has set.

    Raises:
        ConfigError: a port is in use, or a system is running with other options than given.
        StoreUnavailable: a process did not start; the message names its log.
    """
    system = read()
    if system is None:
        for port, what, option in (
            (options.port, "the Prefect server", "--port"),
            (options.s3_port, "the S3 server", "--s3-port"),
        ):
            if port and _port_in_use(port):
                raise ConfigError(
                    f"Port {port} of 127.0.0.1, for {what}, is in use by another program; stop "
                    f"that program, or choose another port with {option}."
                )
        for name in ("system", "prefect", "jobs", "runs", "cache"):  # also an older version's
            close_folder(rlhf_home() / name)
        (folder() / "system.json").unlink(missing_ok=True)
        with open_log(folder() / "supervisor.log") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "flows.cli.supervisor", json.dumps(asdict(options))],
                env={**os.environ, "RLHF_HOME": str(rlhf_home())},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
    else:
        _refuse_other_options(system, options, given)
        process = None
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        system = read()
        if system is not None and system.phase == "ready":
            return system
        if process is not None and process.poll() is not None:
            break
        time.sleep(0.3)
    failed = _last_error() or "it did not become ready in time"
    down()
    raise StoreUnavailable(f"The system did not start: {failed}\nLogs: {folder()}")


def _refuse_other_options(system: System, options: Options, given: Collection[str]) -> None:
    wanted = {name: value for name, value in asdict(options).items() if name in given}
    other = [name for name, value in wanted.items() if value != system.options.get(name, value)]
    if other:
        raise ConfigError(
            f"A system is running already, with {_as_flags(system.options, other)}; "
            f"{_as_flags(wanted, other)} would change nothing. Stop it first: rlhf down. "
            "Artifacts and the records of runs are kept."
        )


def _as_flags(options: Mapping[str, Any], names: Iterable[str]) -> str:
    """Options as they are typed."""
    texts = []
    for name in names:
        value = options[name]
        files = name == "s3_port" and value is None
        texts.append("--no-s3" if files else f"--{name.replace('_', '-')} {value}")
    return " ".join(texts)


def down() -> bool:
    """Stop what `up` started, and nothing else; False if no system was running."""
    system = read()
    if system is None:
        return False
    supervisor = psutil.Process(system.pid)
    family = [supervisor, *supervisor.children(recursive=True)]
    supervisor.terminate()
    _, left = psutil.wait_procs([supervisor], timeout=STOP_SECONDS)
    for process in left:
        process.kill()
    _, left = psutil.wait_procs(family, timeout=10)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    (folder() / "system.json").unlink(missing_ok=True)
    return True


def _port_in_use(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def _last_error() -> str:
    with contextlib.suppress(OSError, ValueError):
        return str(json.loads((folder() / "system.json").read_text()).get("error", ""))
    return ""
