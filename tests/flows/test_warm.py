"""Flow runs that are forked: the client stands for the engine. With workers: tests/system."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows.warm import client

ENGINE = """
import os, runpy, signal, sys, time
from pathlib import Path
from flows.warm import server

def engine(name, **how):
    print(name, os.environ["SAID"], os.getcwd(), flush=True)
    Path("pid").write_text(str(os.getpid()))
    what = os.environ["WHAT"]
    if what == "stop":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    while what != "end":
        time.sleep(0.01)
    sys.exit(3)

def pidfd_open(pid, really=os.pidfd_open):
    if Path("full").exists():
        raise OSError("too many open files")
    return really(pid)

os.pidfd_open = pidfd_open
server.PRELOADED = ()
runpy.run_module = engine
server.main(Path(sys.argv[1]))
"""


@pytest.fixture
def server(tmp_path):
    path = tmp_path / "socket"
    process = subprocess.Popen(
        [sys.executable, "-c", ENGINE, str(path)], stdin=subprocess.PIPE, cwd=tmp_path
    )
    while not path.exists():
        time.sleep(0.01)
    yield process
    process.stdin.close()
    assert process.wait(10) == 0
    assert not path.exists()


def ask(folder: Path, what: str, **more: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", client.__file__, str(folder / "socket")],
        env={**os.environ, "SAID": "hello", "WHAT": what, "PREFECT__FLOW_RUN_ID": "-", **more},
        cwd=folder,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def engine(folder: Path) -> psutil.Process:
    file = folder / "pid"
    while not (file.exists() and file.read_text()):
        time.sleep(0.01)
    return psutil.Process(int(file.read_text()))


def test_engine_has_its_clients_environment_folder_output_and_exit_code(server, tmp_path):
    asked = ask(tmp_path, "end")
    output, _ = asked.communicate(timeout=20)
    assert output.decode().split() == ["prefect.engine", "hello", str(tmp_path)]
    assert asked.returncode == 3
    killed = ask(tmp_path, "killed")
    killed.communicate(timeout=20)
    assert killed.returncode == -signal.SIGKILL


def test_signals_reach_the_engine_and_a_killed_client_takes_it_along(server, tmp_path):
    asked = ask(tmp_path, "stop")
    engine(tmp_path)
    asked.terminate()
    asked.communicate(timeout=20)
    assert asked.returncode == 7
    (tmp_path / "pid").unlink()
    asked = ask(tmp_path, "stop")
    found = engine(tmp_path)
    asked.kill()
    psutil.wait_procs([found], timeout=10)
    assert not found.is_running()


def test_engine_goes_on_when_the_worker_is_gone(server, tmp_path):
    asked = ask(tmp_path, "stop")
    found = engine(tmp_path)
    server.stdin.close()
    time.sleep(0.1)
    assert found.is_running() and server.poll() is None
    asked.terminate()
    asked.communicate(timeout=20)
    assert asked.returncode == 7


def test_client_that_is_killed_or_comes_as_the_worker_ends_leaves_other_engines_alone(
    server, tmp_path
):
    asked = ask(tmp_path, "stop")
    found = engine(tmp_path)
    server.send_signal(signal.SIGSTOP)
    killed, late = (socket.socket(socket.AF_UNIX) for _ in range(2))
    killed.connect(str(tmp_path / "socket"))
    request = os.memfd_create("request")
    os.write(request, b'{"environment": {"RLHF_OTHER": "1"}, "folder": "/"}')
    os.lseek(request, 0, os.SEEK_SET)
    socket.send_fds(killed, [b"."], [request, 0, 1, 2])
    os.close(request)
    killed.close()
    server.send_signal(signal.SIGCONT)
    time.sleep(0.3)
    server.send_signal(signal.SIGSTOP)
    server.stdin.close()
    late.connect(str(tmp_path / "socket"))
    late.settimeout(20)
    server.send_signal(signal.SIGCONT)
    with pytest.raises(ConnectionResetError):  # it starts an engine of its own
        late.recv(1)
    late.close()
    assert server.poll() is None and found.is_running()
    asked.terminate()
    asked.communicate(timeout=20)
    assert asked.returncode == 7


def test_server_that_can_have_no_more_files_refuses_and_goes_on(server, tmp_path):
    asked = ask(tmp_path, "stop")
    found = engine(tmp_path)
    (tmp_path / "full").touch()
    with socket.socket(socket.AF_UNIX) as refused, (tmp_path / "request").open("w+") as file:
        refused.connect(str(tmp_path / "socket"))
        environment = {**os.environ, "SAID": "hello", "WHAT": "end"}
        json.dump({"environment": environment, "folder": str(tmp_path)}, file)
        file.flush()
        file.seek(0)
        socket.send_fds(refused, [b"."], [file.fileno(), 0, 1, 2])
        refused.settimeout(20)
        assert refused.recv(10) == b"0\n"
    assert server.poll() is None and found.is_running()
    asked.terminate()
    asked.communicate(timeout=20)
    assert asked.returncode == 7


def test_other_settings_and_a_server_that_is_gone_start_an_engine_of_its_own(server, tmp_path):
    """Prefect's engine, which says that this is no flow run."""
    (tmp_path / "x").mkdir()
    asked = [ask(tmp_path, "end", PREFECT_LOGGING_LEVEL="INFO"), ask(tmp_path / "x", "end")]
    for each in asked:
        output, _ = each.communicate(timeout=60)
        assert each.returncode == 1
        assert b"Invalid flow run id" in output
