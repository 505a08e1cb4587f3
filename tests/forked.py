"""Python programs for tests, forked from a process that has imported what they need.

As `python -m MODULE` and `python -c CODE`, without the start of an interpreter and its imports:
0.6 s for the command line, 7 s for torch and transformers. The processes come from the product's
own fork server, in which this module is what it calls.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rlhf_core.runtime import fork_server
from rlhf_core.runtime.rank import MODEL_MODULES, STRATEGY_MODULES
from rlhf_core.system.processes import name_process
from tasks.launchers import fork_client
from tasks.launchers.fork_client import Forked, ForkServer

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (
    "flows.cli.main", "flows.cli.lookup", "rlhf_core.jobs", "rlhf_core.pipeline.presets",
    "rlhf_core.pipeline.recipe", "rlhf_core.preflight.check", "rlhf_core.store.registry",
)  # fmt: skip
# torch and transformers, and what ranks need.
MODELS = ("rlhf_core.runtime.torchrun", *MODEL_MODULES, *STRATEGY_MODULES, "rlhf_core.chat.model")
READ_AT_IMPORT = ("HF_", "TOKENIZERS_", "TORCH", "TQDM_", "TRANSFORMERS_")
# As the launcher sets them for ranks.
RANKS = {"PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore", "OMP_WAIT_POLICY": "PASSIVE"}
_servers: dict[tuple[str, ...], ForkServer] = {}


class Process:
    """A running program; what tests use of `subprocess.Popen`."""

    def __init__(self, stage: Forked, out: Path, err: Path) -> None:
        self._stage, self._out, self._err = stage, out, err
        self.pid = stage.pid

    @property
    def returncode(self) -> int | None:
        return self._stage.returncode

    def poll(self) -> int | None:
        return self._stage.poll()

    def wait(self, timeout: float | None = None) -> int:
        return self._stage.wait(timeout)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; standard output and standard error."""
        self.wait(timeout)
        return self._out.read_text(), self._err.read_text()

    def send_signal(self, number: int) -> None:
        self._stage.send_signal(number)

    def kill(self) -> None:
        self._stage.kill()


def start(
    *command: str,
    cwd: Path,
    env: Mapping[str, str],
    needs: Sequence[str] = COMMANDS,
    stdin: Path = Path(os.devnull),
    output: Path | None = None,
    cgroup: Path | None = None,
) -> Process:
    """Start a program in a session of its own.

    Args:
        command: "-m", module, arguments; or "-c", code, arguments.
        needs: modules that the process it is forked from has imported.
        stdin: file or terminal that it reads.
        output: file or terminal for all that it prints. Without one, `communicate` has both parts.
        cgroup: folder of a control group for it and its children.
    """
    folder = Path(tempfile.mkdtemp(dir=_folder()))
    out, err = output or folder / "out", output or folder / "err"
    plan = {"command": command, "cwd": str(cwd), "cgroup": cgroup and str(cgroup),
            "standard": [str(stdin), str(out), str(err)]}  # fmt: skip
    stage = server(needs, env).fork(0, "tests.forked", [json.dumps(plan)], dict(env))
    assert stage is not None, "the fork server has ended"
    stage.stdout.close()
    return Process(stage, out, err)


def run(
    *command: str,
    cwd: Path,
    env: Mapping[str, str],
    needs: Sequence[str] = COMMANDS,
    stdin: Path = Path(os.devnull),
    timeout: float = 280,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end (see `start`)."""
    process = start(*command, cwd=cwd, env=env, needs=needs, stdin=stdin)
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(command, process.wait(), out, err)


def _folder() -> str:
    global _made
    if _made is None:
        _made = tempfile.TemporaryDirectory(prefix="rlhf-forked-")
    return _made.name


_made: tempfile.TemporaryDirectory[str] | None = None


def server(needs: Sequence[str], env: Mapping[str, str] | None = None) -> ForkServer:
    """The process that programs with these needs are forked from.

    Args:
        env: variables of the program; what libraries read when they are imported counts.
    """
    given = (env or {}).items() if needs == MODELS else ()
    own = {k: v for k, v in given if k.startswith(READ_AT_IMPORT) and os.environ.get(k) != v}
    key = (*needs, *sorted(f"{name}={value}" for name, value in own.items()))
    if key not in _servers:
        environment = {
            **os.environ, **(RANKS if needs == MODELS else {}), **own,
            "PYTHONPATH": str(ROOT), "RLHF_TEST_NEEDS": ",".join(needs),
        }  # fmt: skip
        _servers[key] = made = ForkServer(environment)
        made.preload("tests.forked")
        atexit.register(made.close)
    return _servers[key]


# ------------------------------------------------------------------ in the forked process


def preload(files: list[str]) -> None:
    """See `rlhf_core.runtime.fork_server`."""
    name_process("tests' server")  # not one of those that the tests look for
    for name in os.environ["RLHF_TEST_NEEDS"].split(","):
        importlib.import_module(name)


class ForkedServer:
    """A fork server that the program starts: as `subprocess.Popen` does it, but forked, since its
    imports are here already."""

    def __init__(
        self, command: list[str], env: dict[str, str], pass_fds: list[int], **_: Any
    ) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            try:
                kept = sorted({0, 1, 2, *pass_fds})
                for before, after in pairwise([*kept, 1 << 16]):
                    os.closerange(before + 1, after)
                os.environ.clear()
                os.environ.update(env)
                sys.argv = command[2:]  # of [python, -m, module, ...]
                fork_server.main()
            finally:
                os._exit(1)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        os.waitpid(self.pid, 0)


def main(files: list[str]) -> int:
    """Run the program; returns its exit code."""
    plan: dict[str, Any] = json.loads(files[0])
    if "torch" in sys.modules:
        popen = {**vars(subprocess), "Popen": ForkedServer}
        fork_client.subprocess = SimpleNamespace(**popen)  # type: ignore[assignment]
    os.setsid()
    if plan["cgroup"]:
        Path(plan["cgroup"], "cgroup.procs").write_text("0")
    os.chdir(plan["cwd"])
    for standard, path in enumerate(plan["standard"]):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, standard)
        os.close(opened)
    kind, what, *arguments = plan["command"]
    sys.argv = [what if kind == "-m" else kind, *arguments]
    code = 0
    try:
        if kind == "-m":
            sys.modules.pop(what, None)  # runpy warns of a module that is imported already
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    finally:
        with contextlib.suppress(Exception):
            threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    return code
