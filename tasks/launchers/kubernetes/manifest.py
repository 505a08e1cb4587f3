"""The JobSet of a launch: one job, of which each pod runs the agent of one node.

    node 0 is pod 0; its name in the JobSet's own service is the rendezvous of all
    exit codes of the agents (rlhf_core.runtime.launches) decide about a restart:

    what ends a pod                        its job fails by          the JobSet then
    eviction, preemption, drained node     PodFailurePolicy, rule 0  starts all again, uncounted
    75  SIGTERM, with a checkpoint         PodFailurePolicy, rule 1  the same
    64  another attempt would fail again   PodFailurePolicy, rule 2  fails
    1, 2, 126-128  there is no agent       the same                  fails
    69, 137, ... lost process or node      BackoffLimitExceeded      starts all again, counted
    the deadline of an attempt             DeadlineExceeded          the same

Of a job that has failed, a JobSet sees the reason and a message, in which Kubernetes names the
condition or the exit code. All pods start again together, since ranks cannot join a running group.
No values of secrets are in here, only their names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_core.jobs import Job
from rlhf_core.jobs.launchers import KubernetesLauncher
from rlhf_core.runtime.launches import ENDED, STOPPED
from tasks.launchers.command import agent_command

JOB = "node"  # of the JobSet's only group of jobs
CONTAINER = "agent"
# Exit codes without an agent: an error of Python or of its command line, and of a container whose
# program is not there.
NO_AGENT = (1, 2, 126, 127, 128)
PORT = 29400  # of the rendezvous; each pod has an address of its own
SCRATCH = "/scratch"
SHARED_MEMORY = "/dev/shm"
STOP_MARGIN = 30  # seconds that a pod has after its ranks' stop_timeout, until SIGKILL
RESTART = "jobset.sigs.k8s.io/restart-attempt"  # label of pods: how often the JobSet has restarted

# Labels of our own. A value has at most 63 characters.
LAUNCH, START, STAGE = "rlhf-launch", "rlhf-start", "rlhf-stage"


def name_of(stage: str, launch: str) -> str:
    """Name of a launch's JobSet. It follows from the stage keys, so that there is one at a time.

    It is the beginning of its pods' and its service's names, which have at most 63 characters.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", stage.lower()).strip("-")[:16].rstrip("-")
    return f"rlhf-{slug}-{launch[:12]}" if slug else f"rlhf-{launch[:12]}"


def attempt_of(start: str, restarts: int | str) -> str:
    """Name of one start of all pods, under which their agents report."""
    return f"{start}-{restarts}"


def nodes_of(jobs: Sequence[Job]) -> int:
    """Number of pods of a launch."""
    return jobs[0].placement().nodes if jobs[0].torchrun else 1


def jobset(
    settings: KubernetesLauncher,
    stage: str,
    jobs: Sequence[Job],
    store: str,
    launch: str,
    start: str,
) -> dict[str, Any]:
    """The manifest.

    Args:
        stage: name of the launch.
        store: URL of the artifact store.
        launch: id of the launch, see `rlhf_core.runtime.launches`.
        start: a random text that no other JobSet of this name has had.
    """
    name = name_of(stage, launch)
    labels = {
        **settings.labels,
        "app.kubernetes.io/name": "rlhf",
        LAUNCH: launch,
        START: start,
        STAGE: re.sub(r"[^A-Za-z0-9_.-]", "-", stage)[:63].strip("-_."),
    }
    queue = {} if settings.queue is None else {"kueue.x-k8s.io/queue-name": settings.queue}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            "labels": labels | queue,
            "annotations": dict(settings.annotations),
        },
        "spec": {
            "suspend": settings.queue is not None,  # Kueue resumes it
            "ttlSecondsAfterFinished": settings.keep_finished,
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": _failure_policy(settings),
            "replicatedJobs": [
                {
                    "name": JOB,
                    "replicas": 1,
                    "template": {
                        "spec": _job(
                            settings, jobs, labels, _agent(name, jobs, store, launch, start)
                        )
                    },
                }
            ],
        },
    }


def _failure_policy(settings: KubernetesLauncher) -> dict[str, Any]:
    by_pod = ["PodFailurePolicy"]
    stopped = ["has condition DisruptionTarget", f"failed with exit code {STOPPED} "]
    return {
        "maxRestarts": settings.max_restarts,
        "restartStrategy": "BlockingRecreate",  # the old pods are gone before the new ones start
        "rules": [
            {
                "name": "stopped",
                "action": "RestartJobSetAndIgnoreMaxRestarts",
                "onJobFailureReasons": by_pod,
                "onJobFailureMessagePatterns": stopped,
            },
            {"name": "ended", "action": "FailJobSet", "onJobFailureReasons": by_pod},
        ],
    }


def _job(
    settings: KubernetesLauncher, jobs: Sequence[Job], labels: Mapping[str, str], command: list[str]
) -> dict[str, Any]:
    disrupted = {"type": "DisruptionTarget", "status": "True"}
    job: dict[str, Any] = {
        "parallelism": nodes_of(jobs),
        "completions": nodes_of(jobs),
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onPodConditions": [disrupted]},
                _on_exit([STOPPED]),
                _on_exit(sorted([ENDED, *NO_AGENT])),
            ]
        },
        "template": {
            "metadata": {"labels": dict(labels), "annotations": dict(settings.annotations)},
            "spec": _pod(settings, jobs, command),
        },
    }
    if settings.deadline is not None:
        job["activeDeadlineSeconds"] = settings.deadline
    return job


def _on_exit(codes: list[int]) -> dict[str, Any]:
    exits = {"containerName": CONTAINER, "operator": "In", "values": codes}
    return {"action": "FailJob", "onExitCodes": exits}


def _pod(settings: KubernetesLauncher, jobs: Sequence[Job], command: list[str]) -> dict[str, Any]:
    stop = max(job.placement().stop_timeout for job in jobs)
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": stop + STOP_MARGIN,
        "containers": [_container(settings, jobs[0], command)],
        "volumes": _volumes(settings),
    }
    if settings.service_account is None:
        pod["automountServiceAccountToken"] = False  # the pods do not talk to Kubernetes
    optional = {
        "serviceAccountName": settings.service_account,
        "priorityClassName": settings.priority_class,
        "nodeSelector": dict(settings.node_selector),
        "tolerations": [_toleration(text) for text in settings.tolerations],
        "imagePullSecrets": [{"name": name} for name in settings.pull_secrets],
    }
    return pod | {field: value for field, value in optional.items() if value}


def _container(settings: KubernetesLauncher, job: Job, command: list[str]) -> dict[str, Any]:
    mounts = {SHARED_MEMORY: "shm", SCRATCH: "scratch"} | _claims(settings)
    limits = dict(settings.limits)
    if gpus := _gpus(settings, job):
        limits[settings.gpu_resource] = str(gpus)
    resources = {"limits": limits, "requests": dict(settings.requests)}
    return {
        "name": CONTAINER,
        "image": settings.image,
        "args": command,  # behind the image's entrypoint, which reaps the ranks' children
        "env": _environment(settings),
        "envFrom": [{"secretRef": {"name": name}} for name in settings.secrets],
        "resources": {name: value for name, value in resources.items() if value},
        "volumeMounts": [{"name": volume, "mountPath": path} for path, volume in mounts.items()],
    }


def _agent(name: str, jobs: Sequence[Job], store: str, launch: str, start: str) -> list[str]:
    """The agent's command. Kubernetes fills in $(NAME) from the container's environment."""
    rendezvous = f"{name}-{JOB}-0-0.{name}:{PORT}"
    return agent_command(
        store, launch, attempt_of(start, "$(RLHF_RESTART)"), nodes_of(jobs),
        "$(JOB_COMPLETION_INDEX)", rendezvous, scratch=SCRATCH, python="python",
    )  # fmt: skip


def _gpus(settings: KubernetesLauncher, job: Job) -> int:
    if not job.torchrun or job.placement().device == "cpu":
        return 0
    if settings.gpus_per_node is not None:
        return settings.gpus_per_node
    return job.placement().ranks + job.samplers  # all pods are alike


def _environment(settings: KubernetesLauncher) -> list[dict[str, Any]]:
    """Our own come last: of two with one name the last counts."""
    given: list[dict[str, Any]] = [{"name": k, "value": v} for k, v in settings.env.items()]
    for variable, text in settings.secret_env.items():
        secret, _, key = text.partition("/")
        source = {"secretKeyRef": {"name": secret, "key": key}}
        given.append({"name": variable, "valueFrom": source})
    source = {"fieldRef": {"fieldPath": f"metadata.labels['{RESTART}']"}}
    return [*given, {"name": "RLHF_RESTART", "valueFrom": source}]


def _volumes(settings: KubernetesLauncher) -> list[dict[str, Any]]:
    memory = {"medium": "Memory", "sizeLimit": settings.shared_memory}
    claims = dict(zip(_claims(settings).values(), settings.volumes.values(), strict=True))
    return [
        {"name": "shm", "emptyDir": memory},
        {"name": "scratch", "emptyDir": {}},
        *(
            {"name": volume, "persistentVolumeClaim": {"claimName": claim}}
            for volume, claim in claims.items()
        ),
    ]


def _claims(settings: KubernetesLauncher) -> dict[str, str]:
    """Folder -> name of its volume in the pod."""
    return {path: f"claim-{number}" for number, path in enumerate(settings.volumes)}


def _toleration(text: str) -> dict[str, str]:
    rest, _, effect = text.partition(":")
    key, equal, value = rest.partition("=")
    found = {"key": key, "operator": "Equal" if equal else "Exists"}
    if equal:
        found["value"] = value
    return found | ({"effect": effect} if effect else {})
