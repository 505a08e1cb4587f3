"""The pods of a JobSet, as they change. A pod that ends may be deleted within a second, when its
JobSet starts again; so changes are watched, and how each pod ended is kept."""

from __future__ import annotations

import threading
import time

from rlhf_core.errors import RLHFError
from tasks.launchers.kubernetes import state
from tasks.launchers.kubernetes.api import Cluster, Object
from tasks.launchers.kubernetes.logs import Logs

REOPEN_SECONDS = 1.0


class Pods:
    """Follows pods in a thread of its own, and their logs.

    Attributes:
        ends: uid -> how the pod ended, of all that failed.
    """

    def __init__(self, cluster: Cluster, jobset: str, logs: Logs) -> None:
        self.ends: dict[str, state.End] = {}
        self._cluster, self._jobset, self._logs = cluster, jobset, logs
        self._now: dict[str, Object] = {}
        self._problem: RLHFError | None = None
        self._closed = False
        threading.Thread(target=self._run, name=f"pods of {jobset}", daemon=True).start()

    def now(self) -> list[Object]:
        """The pods that are there.

        Raises:
            RLHFError: they cannot be read.
        """
        if self._problem is not None:
            raise self._problem
        return list(self._now.values())

    def refresh(self) -> None:
        """Look once, in the caller's thread: what has happened may not have been told yet."""
        for pod in self._cluster.pods(self._jobset)[0]:
            self._note(pod)
            self._logs.follow(pod)

    def close(self) -> None:
        """Follow no longer."""
        self._closed = True

    def _run(self) -> None:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        while not self._closed:
            try:
                pods, version = self._cluster.pods(self._jobset)
                there = {pod["metadata"]["uid"] for pod in pods}
                for uid in set(self._now) - there:
                    self._gone(self._now.pop(uid))
                for pod in pods:
                    self._see(pod)
                for kind, pod in self._cluster.changes(self._jobset, version):
                    if kind == "DELETED":
                        self._now.pop(pod["metadata"]["uid"], None)
                        self._gone(pod)
                    else:
                        self._see(pod)
                    if self._closed:
                        return
            except RLHFError as error:
                self._problem = error
                return
            except (ApiException, HTTPError, OSError, ValueError):
                time.sleep(REOPEN_SECONDS)  # the list that follows waits for the API

    def _see(self, pod: Object) -> None:
        self._now[pod["metadata"]["uid"]] = pod
        self._note(pod)
        self._logs.follow(pod)

    def _gone(self, pod: Object) -> None:
        self._note(pod)
        self._logs.follow(pod, gone=True)

    def _note(self, pod: Object) -> None:
        if (end := state.end_of(pod)) is not None:
            self.ends[pod["metadata"]["uid"]] = end
