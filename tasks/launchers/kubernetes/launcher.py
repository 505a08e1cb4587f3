"""The `kubernetes` launcher: it runs a launch as a JobSet, one pod per node.

The name of the JobSet follows from the stage keys. A pipeline that was killed and is started again
joins the JobSet that it left, and so does a second pipeline that needs the same result. Therefore
no JobSet is owned by the pod of its pipeline. It is deleted when its pipeline ends, for whatever
reason; where the pipeline itself was killed, by the cluster some time after its end.
"""

from __future__ import annotations

import queue
import secrets
import time
from functools import partial

from rlhf_core.errors import ConfigError, JobFailed
from rlhf_core.jobs.launchers import KubernetesLauncher
from rlhf_core.runtime.launches import forget, launch_id, write_jobs
from rlhf_core.store import Store, open_store
from rlhf_core.system.secrets import redact
from tasks.launchers.base import Launch, LineSink, Outcome, ProgressSink
from tasks.launchers.kubernetes import manifest, state
from tasks.launchers.kubernetes.api import Cluster, Conflict, Missing, Object
from tasks.launchers.kubernetes.logs import Logs
from tasks.launchers.kubernetes.pods import Pods
from tasks.launchers.kubernetes.starting import Starting
from tasks.launchers.outcome import failure, results
from tasks.launchers.remote_output import RemoteOutput

MAX_STARTS = 3  # JobSets that others may delete, one after another, before giving up
DELETE_TIMEOUT = 60.0  # seconds without the API before a JobSet is left to the cluster
DELETE_POLL_SECONDS = 0.5
LOG_SECONDS = 10.0  # that the end of the output may take after that of the pods


class Kubernetes:
    """Runs a launch on the pods of a JobSet."""

    def __init__(self, settings: KubernetesLauncher) -> None:
        self.settings = settings

    def prepare(self) -> None:
        """See `Launcher.prepare`. Nothing to do: imports happen in the pods."""

    def run(self, launch: Launch, on_output: LineSink, on_progress: ProgressSink) -> list[Outcome]:
        """See `Launcher.run`. If the caller is interrupted, the JobSet is deleted; its ranks store
        a checkpoint. A pipeline that had joined it starts another."""
        cluster = Cluster(self.settings.context, self.settings.namespace)
        store = open_store(launch.store)
        found = launch_id(launch.jobs.values())
        launch.log.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(MAX_STARTS):
            jobset, start = self._join_or_start(cluster, launch, store, found, on_output)
            name = jobset["metadata"]["name"]
            where = f"JobSet: {name} in namespace {cluster.namespace}\nFull log: {launch.log}"
            followed = _Followed(self, cluster, launch, jobset, on_output, on_progress)
            try:
                said = followed.until_its_end()
            except BaseException as stop:
                if not isinstance(stop, Exception):  # a cancelled run, Ctrl-C
                    on_output("stopping the pods of this stage")
                raise
            finally:
                self._delete(cluster, jobset, launch, on_output)
            if (outcomes := results(launch)) is not None:
                forget(store, found)
                return outcomes
            if not followed.deleted:
                attempt = manifest.attempt_of(start, followed.attempt)
                raise failure(
                    store, launch.name, found, attempt, followed.nodes, where=where, scheduler=said
                )
            on_output("somebody else deleted it; starting anew (to stop, cancel this pipeline)")
        raise JobFailed(
            f"{launch.name} failed: its JobSet was deleted {MAX_STARTS} times, not by this pipeline"
            f"\n{where}",
            "cancelled",
        )

    # ------------------------------------------------------------------ start and end

    def _join_or_start(
        self, cluster: Cluster, launch: Launch, store: Store, found: str, report: LineSink
    ) -> tuple[Object, str]:
        """The launch's JobSet that runs, or a new one; and its own mark in the attempts' names."""
        name = manifest.name_of(launch.name, found)
        jobs = list(launch.jobs.values())
        while True:
            try:
                there = cluster.jobset(name)
            except Missing:
                pass
            else:
                start = state.start_of(there, found)
                if start is None:
                    raise ConfigError(
                        f"the namespace {cluster.namespace} has a JobSet {name} that is not of "
                        "this pipeline: delete it, or set launcher.namespace to another."
                    )
                if not state.ended(there) and not state.deleting(there):
                    report(f"JobSet {name}, started earlier")
                    return there, start
                self._delete(cluster, there, launch, report)
            write_jobs(store, launch.name, jobs)
            start = secrets.token_hex(4)
            made = manifest.jobset(self.settings, launch.name, jobs, store.url, found, start)
            try:
                created = cluster.create(made)
            except Conflict:  # another pipeline was faster, or the old one is not gone
                time.sleep(DELETE_POLL_SECONDS)
                continue
            report(f"JobSet {name} in namespace {cluster.namespace}")
            return created, start

    def _delete(self, cluster: Cluster, jobset: Object, launch: Launch, report: LineSink) -> None:
        """Delete a JobSet, and wait until its pods have ended."""
        name, uid = jobset["metadata"]["name"], jobset["metadata"]["uid"]
        stop = max(job.placement().stop_timeout for job in launch.jobs.values())
        began, asked = time.monotonic(), False
        cluster.timeout = DELETE_TIMEOUT
        try:
            while time.monotonic() - began < stop + manifest.STOP_MARGIN + DELETE_TIMEOUT:
                if not asked:
                    cluster.delete(name, uid)
                    asked = True
                elif cluster.jobset(name)["metadata"]["uid"] != uid:
                    return
                time.sleep(DELETE_POLL_SECONDS)
            problem = "its pods have not ended"
        except (Missing, Conflict):  # it is gone, or gone and made anew
            return
        except (ConfigError, JobFailed) as error:
            problem = str(error)
        finally:
            cluster.timeout = type(cluster).timeout
        report(
            f"WARNING: the JobSet {name} could not be deleted ({problem}). The cluster deletes it "
            f"{self.settings.keep_finished} s after its end; now: kubectl delete jobset {name} "
            f"--namespace {cluster.namespace}"
        )


class _Followed:
    """A JobSet while it runs.

    Attributes:
        attempt: how often it had restarted when last seen.
        deleted: somebody else has deleted it.
    """

    def __init__(
        self,
        launcher: Kubernetes,
        cluster: Cluster,
        launch: Launch,
        jobset: Object,
        on_output: LineSink,
        on_progress: ProgressSink,
    ) -> None:
        self.settings, self.cluster, self.launch = launcher.settings, cluster, launch
        self.name, self.uid = jobset["metadata"]["name"], jobset["metadata"]["uid"]
        [group] = jobset["spec"]["replicatedJobs"]
        self.nodes = int(group["template"]["spec"]["completions"])
        self.on_output = on_output
        self.attempt, self.deleted = state.restarts(jobset), False
        self._restarted: int | None = None  # the attempt before a restart that is not told yet
        self._output = RemoteOutput(on_output, on_progress)
        self._starting = Starting(self.settings, cluster, jobset, on_output, on_progress)
        self._logs = Logs(cluster)
        self._pods = Pods(cluster, self.name, self._logs)

    def until_its_end(self) -> tuple[str, str] | None:
        """Pass on output and progress until the JobSet has ended.

        Returns:
            Category and text of what the cluster says about a failure.

        Raises:
            JobFailed: it cannot start, or waits for too long.
        """
        try:
            while True:
                jobset = self._look()
                if jobset is None:
                    self.deleted = True
                    return None
                if state.ended(jobset) or self._out_of_memory():
                    self._pods.refresh()
                    self._tell_of_restart()
                    self._logs.finish(LOG_SECONDS)
                    return self._failure(jobset)
                self._pass_on(self.settings.poll_seconds)
        finally:
            self._starting.over()
            self._pods.close()
            self._logs.close()
            self._pass_on(0.0)

    def _look(self) -> Object | None:
        """The JobSet as it is now; None: it is being deleted, or gone."""
        try:
            jobset = self.cluster.jobset(self.name)
        except Missing:
            return None
        if jobset["metadata"]["uid"] != self.uid or state.deleting(jobset):
            return None
        self._tell_of_restart()
        if (now := state.restarts(jobset)) != self.attempt:
            self._restarted, self.attempt = self.attempt, now
        if not state.ended(jobset):
            self._starting.look(jobset, state.of_attempt(self._pods.now(), now), self.nodes)
        return jobset

    def _tell_of_restart(self) -> None:
        """Say that it started again, one look after that: how its pods ended is then known."""
        if self._restarted is not None:
            why = next((f": {text}" for _, text in self._said(self._restarted)), "")
            self.on_output(f"the pods start again, restart {self.attempt}{why}")
            self._restarted = None

    def _said(self, attempt: int) -> list[tuple[str, str]]:
        """What the ends of an attempt's pods say, what explains most first."""
        ends = [end for end in list(self._pods.ends.values()) if end.restarts == attempt]
        told = [end.category_and_text for end in ends]
        return sorted(told, key=lambda each: ("oom", "config", "preempted", "lost").index(each[0]))

    def _out_of_memory(self) -> bool:
        """Whether a pod was killed for its memory. Another start would end like this one, since
        only the orchestrator makes the micro-batch smaller; so this attempt was the last."""
        for end in list(self._pods.ends.values()):
            if end.category_and_text[0] == "oom":
                self.attempt, self._restarted = end.restarts, None
                return True
        return False

    def _failure(self, jobset: Object) -> tuple[str, str] | None:
        if said := self._said(self.attempt):
            return said[0]
        failed = state.condition(jobset, "Failed")
        return None if failed is None else ("lost", f"its JobSet failed: {failed.get('message')}")

    def _pass_on(self, seconds: float) -> None:
        """Pass on lines as they come, for this long."""
        end = time.monotonic() + seconds
        with self.launch.log.open("a", encoding="utf-8") as log:
            while True:
                try:
                    left = end - time.monotonic()
                    take = partial(self._logs.lines.get, timeout=left)
                    node, line = take() if left > 0 else self._logs.lines.get_nowait()
                except queue.Empty:
                    return
                line = redact(line)
                log.write(f"node {node}: {line}\n" if self.nodes > 1 else f"{line}\n")
                log.flush()
                self._output(line)
