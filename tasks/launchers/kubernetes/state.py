"""What JobSet and pods say about a launch. Pure functions of the API's objects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.launchers.kubernetes.manifest import CONTAINER, LAUNCH, RESTART, START

Object = dict[str, Any]

# Reasons of a waiting container that a person has to mend. Kubernetes goes on trying.
STUCK = {
    "ErrImagePull", "ImagePullBackOff", "ImageInspectError", "ErrImageNeverPull",
    "RegistryUnavailable", "InvalidImageName", "CreateContainerConfigError",
    "CreateContainerError", "RunContainerError",
}  # fmt: skip
HOPELESS = {"InvalidImageName", "ErrImageNeverPull"}  # without trying


@dataclass(frozen=True)
class End:
    """How a pod's container ended.

    Attributes:
        node: its rank.
        restarts: of the JobSet before this pod.
        code: exit code.
        reason: Kubernetes' word, such as "OOMKilled" or "Error".
        disruption: why Kubernetes ended the pod, if it did.
    """

    node: int
    restarts: int
    code: int
    reason: str
    disruption: str = ""

    @property
    def category_and_text(self) -> tuple[str, str]:
        """The category of `rlhf_core.errors`, and a sentence."""
        who = f"the pod of node {self.node}"
        if self.reason == "OOMKilled":
            return "oom", (
                f"{who} was killed for lack of memory: raise launcher.limits.memory, or lower what "
                "the stage needs"
            )
        if self.disruption:
            return "preempted", f"{who} was stopped by the cluster: {self.disruption}"
        if self.reason in ("StartError", "ContainerCannotRun") or self.code in (126, 127, 128):
            return "config", f"{who} could not start its program: is launcher.image the trainer's?"
        if self.code in (1, 2):
            return "config", (
                f"{who} ended before its agent had started (exit code {self.code}): is "
                "launcher.image the trainer's, of this version? The log has its words"
            )
        return "lost", f"{who} ended with exit code {self.code} ({self.reason})"


def condition(thing: Object, kind: str) -> Object | None:
    """A condition of an object that is true."""
    found = thing.get("status", {}).get("conditions") or []
    return next((c for c in found if c["type"] == kind and c["status"] == "True"), None)


def ended(jobset: Object) -> bool:
    """Whether it will start no more pods."""
    return any(condition(jobset, kind) for kind in ("Completed", "Failed"))


def deleting(thing: Object) -> bool:
    """Whether it is being deleted."""
    return "deletionTimestamp" in thing["metadata"]


def start_of(jobset: Object, launch: str) -> str | None:
    """The text by which a launch's JobSet is told from earlier ones; None: it is another's."""
    labels = jobset["metadata"].get("labels") or {}
    return str(labels[START]) if labels.get(LAUNCH) == launch and START in labels else None


def restarts(jobset: Object) -> int:
    """How often it has started all its pods again."""
    return int(jobset.get("status", {}).get("restarts") or 0)


def of_attempt(pods: Iterable[Object], attempt: int) -> list[Object]:
    """The pods of the start after this many restarts, by node."""
    return sorted((pod for pod in pods if _restarts(pod) == attempt), key=node_of)


def node_of(pod: Object) -> int:
    """The rank of a pod's node."""
    return int(pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"])


def _restarts(pod: Object) -> int:
    return int(pod["metadata"]["labels"].get(RESTART, 0))


def has_output(pod: Object) -> bool:
    """Whether its container has started, now or before."""
    state = _container(pod)
    return "running" in state or "terminated" in state


def end_of(pod: Object) -> End | None:
    """How a pod ended, if it did so otherwise than well."""
    last = _container(pod).get("terminated")
    if last is None or last.get("exitCode") == 0:
        return None
    disruption = condition(pod, "DisruptionTarget") or {}
    told = disruption.get("message") or disruption.get("reason") or ""
    return End(node_of(pod), _restarts(pod), last["exitCode"], last.get("reason") or "Error", told)


def waits_for(
    jobset: Object, pods: Sequence[Object], nodes: int, workload: Object | None = None
) -> str:
    """What a launch waits for that does not run on all its nodes; "" for one that does.

    Args:
        pods: of the newest attempt.
        workload: Kueue's record of it.
    """
    if jobset["spec"].get("suspend"):
        queue = (jobset["metadata"].get("labels") or {}).get("kueue.x-k8s.io/queue-name")
        why = _not_admitted(workload)
        return f"queue {queue} of Kueue" + (f": {why}" if why else "")
    if sum(has_output(pod) for pod in pods) == nodes:
        return ""
    reasons = [text for pod in pods if not has_output(pod) and (text := _why_pending(pod))]
    there = f"{sum(has_output(pod) for pod in pods)} of {nodes} pods run" if nodes > 1 else ""
    told = reasons[0] if reasons else "its pods to be made" if not pods else "its pods to start"
    return "; ".join(filter(None, (told, there)))


def stuck(pods: Sequence[Object]) -> tuple[str, bool] | None:
    """Why a pod cannot start, and whether waiting is of no use; None if they can."""
    for pod in pods:
        waiting = _container(pod).get("waiting") or {}
        reason = waiting.get("reason")
        if reason in STUCK:
            text = f"{reason}: {waiting.get('message') or 'no message'}"
            return f"the pod of node {node_of(pod)} cannot start: {text}", reason in HOPELESS
        unscheduled = _unscheduled(pod)
        if "persistentvolumeclaim" in unscheduled and "not found" in unscheduled:
            return f"the pod of node {node_of(pod)} cannot start: {unscheduled}", False
    return None


def _container(pod: Object) -> Object:
    """The state of the agent's container."""
    for status in pod.get("status", {}).get("containerStatuses") or []:
        if status["name"] == CONTAINER:
            return dict(status.get("state") or {})
    return {}


def _why_pending(pod: Object) -> str:
    if unscheduled := _unscheduled(pod):
        return f"room: {unscheduled}"
    waiting = _container(pod).get("waiting") or {}
    if not waiting:
        return ""
    told = f"{waiting.get('reason')}: {waiting['message']}" if waiting.get("message") else ""
    return told or f"pod of node {node_of(pod)}: {waiting.get('reason')}"


def _unscheduled(pod: Object) -> str:
    for found in pod.get("status", {}).get("conditions") or []:
        if found["type"] == "PodScheduled" and found["status"] == "False":
            return str(found.get("message") or found.get("reason") or "")
    return ""


def _not_admitted(workload: Object | None) -> str:
    found = (workload or {}).get("status", {}).get("conditions") or []
    waits = [c for c in found if c["type"] == "QuotaReserved" and c["status"] == "False"]
    return str(waits[0].get("message") or waits[0].get("reason") or "") if waits else ""
