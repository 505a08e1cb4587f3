"""A JobSet that has not started: what it waits for is said, and what will not come is given up."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rlhf_core.errors import ConfigError, JobFailed
from rlhf_core.jobs.launchers import KubernetesLauncher
from tasks.launchers.base import LineSink, ProgressSink
from tasks.launchers.kubernetes import state
from tasks.launchers.kubernetes.api import Cluster, Missing, Object
from tasks.launchers.kubernetes.manifest import JOB
from tasks.launchers.waits import Waits

NO_PODS_SECONDS = 5.0  # after which the reason for missing pods is looked for


class Starting:
    """Call `look` with what is seen, and `over` at the end."""

    def __init__(
        self,
        settings: KubernetesLauncher,
        cluster: Cluster,
        jobset: Object,
        on_output: LineSink,
        on_progress: ProgressSink,
    ) -> None:
        self.settings, self.cluster = settings, cluster
        self.name, self.uid = jobset["metadata"]["name"], jobset["metadata"]["uid"]
        advice = (
            f"the pods of {self.name} did not all start within launcher.queue_timeout, "
            f"{settings.queue_timeout} s: ask for less, wait for room, or raise it."
        )
        self._waits = Waits(settings.queue_timeout, advice, on_output, on_progress)
        self._no_pods_since: float | None = None
        self._stuck_since: float | None = None

    def look(self, jobset: Object, pods: Sequence[Object], nodes: int) -> None:
        """Say what it waits for, if it does.

        Args:
            pods: of the newest attempt.

        Raises:
            JobFailed: it has waited for too long, or for what does not come.
        """
        if not state.waits_for(jobset, pods, nodes):
            self.over()
            return
        why = self._stuck(jobset, pods)
        self._waits.report(lambda: why or state.waits_for(jobset, pods, nodes, self._kueue(jobset)))

    def over(self) -> None:
        """It runs, or has ended."""
        self._no_pods_since = self._stuck_since = None
        self._waits.over()

    def _stuck(self, jobset: Object, pods: Sequence[Object]) -> str:
        """Why it cannot start, until it is time to give up; "" if it can."""
        now = time.monotonic()
        found = state.stuck(pods) or self._not_made(jobset, pods, now)
        if found is None:
            self._stuck_since = None
            return ""
        text, hopeless = found
        self._stuck_since = now if self._stuck_since is None else self._stuck_since
        if hopeless or now - self._stuck_since > self.settings.start_timeout:
            raise JobFailed(
                f"{text}\nSee launcher.image, pull_secrets, secrets, secret_env, volumes and "
                f"service_account. It was tried for {now - self._stuck_since:.0f} s "
                f"(launcher.start_timeout: {self.settings.start_timeout}).",
                "config",
            )
        return text

    def _not_made(
        self, jobset: Object, pods: Sequence[Object], now: float
    ) -> tuple[str, bool] | None:
        """Why there are no pods, such as a quota or a missing service account."""
        if pods or jobset["spec"].get("suspend"):
            self._no_pods_since = None
            return None
        self._no_pods_since = now if self._no_pods_since is None else self._no_pods_since
        if now - self._no_pods_since < NO_PODS_SECONDS:
            return None
        try:
            for name in (f"{self.name}-{JOB}-0", self.name):
                if failed := [text for text in self.cluster.warnings(name) if "Failed" in text]:
                    return f"its pods cannot be made: {failed[-1]}", False
        except (Missing, ConfigError):  # events are hidden from us
            pass
        return None

    def _kueue(self, jobset: Object) -> Object | None:
        """Kueue's record of a JobSet that waits there, if we may read it."""
        if not jobset["spec"].get("suspend"):
            return None
        try:
            return next(iter(self.cluster.workloads(self.uid)), None)
        except (Missing, ConfigError):
            return None
