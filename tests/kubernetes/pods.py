"""Pods: what a kubelet does. A pod's program is a function, or the real command as a process."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf_core.system.ports import free_ports
from tests import forked

Object = dict[str, Any]
Program = Callable[["Pod"], int]
"""Runs in a thread; returns the exit code."""


class Pod:
    """One pod.

    Attributes:
        object: as the API shows it.
        log: (time, line) of its output.
        stop: set when it gets SIGTERM.
        killed: set when it gets SIGKILL.
    """

    def __init__(self, template: Object, name: str, labels: dict[str, str], index: int) -> None:
        self.log: list[tuple[float, str]] = []
        self.changed = threading.Condition()
        self.tell: Callable[[], None] = lambda: None  # called after each change
        self.stop, self.killed = threading.Event(), threading.Event()
        self.index = index
        self.object: Object = {
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": name, "uid": str(uuid.uuid4()),
                "labels": {**template["metadata"]["labels"], **labels},
                "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
            },
            "spec": template["spec"],
            "status": {"phase": "Pending", "conditions": []},
        }  # fmt: skip

    @property
    def name(self) -> str:
        return str(self.object["metadata"]["name"])

    @property
    def ended(self) -> bool:
        return self.object["status"]["phase"] in ("Succeeded", "Failed")

    @property
    def environment(self) -> dict[str, str]:
        """Of the container, without the values of Secrets."""
        found = {"JOB_COMPLETION_INDEX": str(self.index)}
        for each in self.container["env"]:
            path = each.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
            if "value" in each:
                found[each["name"]] = each["value"]
            elif path is not None:
                found[each["name"]] = self.object["metadata"]["labels"][path.split("'")[1]]
        return found

    @property
    def container(self) -> Object:
        [found] = self.object["spec"]["containers"]
        return dict(found)

    @property
    def command(self) -> list[str]:
        """The container's arguments, with $(NAME) filled in."""
        known = self.environment
        return [
            re.sub(r"\$\((\w+)\)", lambda m: known[m[1]], argument)
            for argument in self.container["args"]
        ]

    def print(self, line: str) -> None:
        with self.changed:
            self.log.append((time.time(), line))
            self.changed.notify_all()

    def waits(self, reason: str, message: str) -> None:
        """Its container cannot start."""
        self._state({"waiting": {"reason": reason, "message": message}})

    def unschedulable(self, message: str) -> None:
        self.object["status"]["conditions"] = [
            {
                "type": "PodScheduled",
                "status": "False",
                "reason": "Unschedulable",
                "message": message,
            }
        ]
        self.tell()

    def runs(self) -> None:
        self.object["status"] |= {"phase": "Running", "conditions": []}
        self._state({"running": {"startedAt": stamp(time.time())}})

    def ends(self, code: int, reason: str = "") -> None:
        word = reason or ("Completed" if code == 0 else "Error")
        with self.changed:
            self.object["status"]["phase"] = "Succeeded" if code == 0 else "Failed"
            self._state({"terminated": {"exitCode": code, "reason": word}})
            self.changed.notify_all()

    def _state(self, state: Object) -> None:
        self.object["status"]["containerStatuses"] = [{"name": "agent", "state": state}]
        self.tell()


def stamp(seconds: float) -> str:
    """As Kubernetes writes a time: nanoseconds, without trailing zeros."""
    text = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")
    return text.rstrip("0").rstrip(".") + "Z"


def process(folder: Path, agent: str = "tasks.launchers.node_agent") -> Program:
    """The program of pods that run their real command here, each in a folder of its own.

    Args:
        agent: module that stands for the agent's.
    """
    forked.server(forked.MODELS)  # one, though pods start at the same time
    ports: dict[str, int] = {}

    def run(pod: Pod) -> int:
        command = pod.command
        assert command[0] == "python"
        own = folder / pod.name
        own.mkdir(parents=True)
        attempt = command[command.index("--attempt") + 1]
        place = command.index("--rendezvous") + 1
        host = command[place].partition(":")[0]
        service = pod.object["metadata"]["labels"]["jobset.sigs.k8s.io/jobset-name"]
        assert host == f"{service}-node-0-0.{service}", "the name of pod 0 in the JobSet's service"
        command[place] = f"127.0.0.1:{ports.setdefault(attempt, free_ports(1)[0])}"
        command[command.index("--scratch") + 1] = str(own / "scratch")
        command[command.index("tasks.launchers.node_agent")] = agent
        output = own / "output"
        os.mkfifo(output)
        started = forked.start(
            *command[1:], cwd=forked.ROOT, needs=forked.MODELS, output=output,
            env={**os.environ, **pod.environment, "RLHF_HOME": str(own / "home")},
        )  # fmt: skip
        threading.Thread(target=_obey, args=(pod, started), daemon=True).start()
        with output.open() as lines:
            for line in lines:
                pod.print(line.rstrip("\n"))
        while (code := started.poll()) is None:  # `wait` would keep `_obey` from a look
            time.sleep(0.02)
        return code if code >= 0 else 128 - code

    return run


def _obey(pod: Pod, started: forked.Process) -> None:
    """SIGTERM, and SIGKILL after the grace period."""
    grace = pod.object["spec"]["terminationGracePeriodSeconds"]
    told = float("inf")
    while started.poll() is None:
        if pod.stop.is_set() and told == float("inf"):
            told = time.monotonic()
            started.send_signal(signal.SIGTERM)
        if pod.killed.is_set() or time.monotonic() - told > grace:
            started.kill()
        time.sleep(0.05)
