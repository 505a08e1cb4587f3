"""The controllers of JobSet and Job, and what people and the cluster do to their pods."""

from __future__ import annotations

import copy
import re
import threading
import time
import uuid
from functools import partial
from typing import Any

from tests.kubernetes.pods import Pod, Program, stamp

Object = dict[str, Any]


class Controllers:
    """All objects of a namespace.

    Attributes:
        program: of every pod.
        before: called with a pod that was made; what it returns, if anything, keeps the pod from
            starting (it has told the pod why).
        events: warnings, by the name of their object.
        workloads: Kueue's, by the uid of their JobSet.
        made: every manifest that was posted.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.before = lambda pod: False
        self.lock = threading.RLock()
        self.jobsets: dict[str, Object] = {}
        self.pods: dict[str, Pod] = {}
        self.events: dict[str, list[Object]] = {}
        self.workloads: dict[str, Object] = {}
        self.made: list[Object] = []
        self.history: list[tuple[int, str, Object]] = []  # version, kind and pod of each change
        self.version = 100
        self.changed = threading.Condition(self.lock)
        self.problem = ""  # why no pods can be made

    # ------------------------------------------------------------------ the API's part

    def create(self, jobset: Object) -> Object:
        with self.lock:
            self.made.append(copy.deepcopy(jobset))
            name = jobset["metadata"]["name"]
            jobset["metadata"] |= {
                "uid": str(uuid.uuid4()),
                "creationTimestamp": stamp(time.time()),
            }
            jobset["status"] = {"restarts": 0, "restartsCountTowardsMax": 0, "conditions": []}
            self.jobsets[name] = jobset
            if not jobset["spec"]["suspend"]:
                self._start(jobset)
            return jobset

    def delete(self, name: str) -> None:
        """In the foreground: the JobSet is there until its pods have ended."""
        with self.lock:
            jobset = self.jobsets[name]
            jobset["metadata"]["deletionTimestamp"] = stamp(time.time())
            for pod in self.of(name):
                pod.stop.set()
            self._sweep(name)

    def of(self, name: str) -> list[Pod]:
        """The pods of a JobSet."""
        key = "jobset.sigs.k8s.io/jobset-name"
        return [p for p in self.pods.values() if p.object["metadata"]["labels"][key] == name]

    def note(self, kind: str, pod: Pod) -> None:
        """A change, for those who watch."""
        with self.lock:
            self.version += 1
            self.history.append((self.version, kind, copy.deepcopy(pod.object)))
            self.changed.notify_all()

    # ------------------------------------------------------------------ others' part

    def admit(self, name: str) -> None:
        """Kueue lets a JobSet start."""
        with self.lock:
            self.jobsets[name]["spec"]["suspend"] = False
            self._start(self.jobsets[name])

    def evict(self, pod: Pod, why: str = "Preempted by a pod of higher priority") -> None:
        found = {"type": "DisruptionTarget", "status": "True", "message": why}
        pod.object["status"]["conditions"] = [{**found, "reason": "PreemptionByScheduler"}]
        pod.tell()
        pod.stop.set()

    def kill(self, pod: Pod) -> None:
        pod.killed.set()

    # ------------------------------------------------------------------ the controllers

    def _start(self, jobset: Object) -> None:
        name = jobset["metadata"]["name"]
        if self.problem:
            self.events[f"{name}-node-0"] = [{"reason": "FailedCreate", "message": self.problem}]
            return
        [group] = jobset["spec"]["replicatedJobs"]
        job = group["template"]["spec"]
        labels = {
            "jobset.sigs.k8s.io/jobset-name": name,
            "jobset.sigs.k8s.io/restart-attempt": str(jobset["status"]["restarts"]),
        }
        for index in range(job["completions"]):
            suffix = uuid.uuid4().hex[:5]
            pod = Pod(job["template"], f"{name}-{group['name']}-0-{index}-{suffix}", labels, index)
            assert len(pod.name) <= 63
            self.pods[pod.name] = pod
            self.note("ADDED", pod)
            pod.tell = partial(self.note, "MODIFIED", pod)
            if not self.before(pod):
                threading.Thread(target=self._run, args=(pod, name), daemon=True).start()

    def _run(self, pod: Pod, name: str) -> None:
        pod.runs()
        code = self.program(pod)
        pod.ends(code, "OOMKilled" if code == -9 else "")
        with self.lock:
            if name in self.jobsets:
                self._judge(self.jobsets[name])

    def _judge(self, jobset: Object) -> None:
        """What follows from the ends of pods: the controllers of Job and JobSet."""
        name = jobset["metadata"]["name"]
        if "deletionTimestamp" in jobset["metadata"]:
            self._sweep(name)
            return
        pods = self.of(name)
        job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
        failed = [pod for pod in pods if pod.object["status"]["phase"] == "Failed"]
        if failed:
            jobset.setdefault("_why", _why_job_fails(job, failed))
            for pod in pods:
                pod.stop.set()
            if all(pod.ended for pod in pods):
                self._job_failed(jobset, *jobset.pop("_why"))
        elif all(pod.ended for pod in pods):
            _condition(jobset, "Completed", "AllJobsCompleted", "jobset completed successfully")

    def _job_failed(self, jobset: Object, reason: str, message: str) -> None:
        status, policy = jobset["status"], jobset["spec"]["failurePolicy"]
        action = next(
            (r["action"] for r in policy["rules"] if _fits(r, reason, message)), "RestartJobSet"
        )
        if action == "FailJobSet":
            _condition(jobset, "Failed", "FailJobSetFailurePolicyAction", message)
            return
        if action == "RestartJobSet":
            if status["restartsCountTowardsMax"] >= policy["maxRestarts"]:
                _condition(jobset, "Failed", "ReachedMaxRestarts", "reached max number of restarts")
                return
            status["restartsCountTowardsMax"] += 1
        status["restarts"] += 1
        for pod in self.of(jobset["metadata"]["name"]):
            self._remove(pod)
        self._start(jobset)

    def _remove(self, pod: Pod) -> None:
        del self.pods[pod.name]
        pod.tell = lambda: None
        self.note("DELETED", pod)

    def _sweep(self, name: str) -> None:
        if all(pod.ended or pod.object["status"]["phase"] == "Pending" for pod in self.of(name)):
            for pod in self.of(name):
                self._remove(pod)
            del self.jobsets[name]


def _why_job_fails(job: Object, failed: list[Pod]) -> tuple[str, str]:
    """Reason and message, as Kubernetes' controller of jobs writes them (pod_failure_policy.go)."""
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        for pod in failed:
            status = pod.object["status"]
            code = status["containerStatuses"][0]["state"]["terminated"]["exitCode"]
            if code in rule.get("onExitCodes", {}).get("values", []):
                return "PodFailurePolicy", (
                    f"Container agent for pod rlhf/{pod.name} failed with exit code {code} "
                    f"matching FailJob rule at index {index}"
                )
            kinds = {c["type"] for c in status["conditions"] if c["status"] == "True"}
            for wanted in rule.get("onPodConditions", []):
                if wanted["type"] in kinds:
                    return "PodFailurePolicy", (
                        f"Pod rlhf/{pod.name} has condition {wanted['type']} matching FailJob "
                        f"rule at index {index}"
                    )
    return "BackoffLimitExceeded", "Job has reached the specified backoff limit"


def _fits(rule: Object, reason: str, message: str) -> bool:
    patterns = rule.get("onJobFailureMessagePatterns")
    fits = patterns is None or any(re.search(pattern, message) for pattern in patterns)
    return reason in rule["onJobFailureReasons"] and fits


def _condition(jobset: Object, kind: str, reason: str, message: str) -> None:
    found = {"type": kind, "status": "True", "reason": reason, "message": message}
    jobset["status"] |= {"conditions": [found], "terminalState": kind}
