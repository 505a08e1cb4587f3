"""What the preflight asks a cluster: whether stages can be started there. Changes nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from rlhf_core.errors import ConfigError, JobFailed, RLHFError
from rlhf_core.jobs import PipelineConfig
from rlhf_core.jobs.launchers import KubernetesLauncher
from rlhf_core.store import open_store
from rlhf_core.system.secrets import names_a_secret
from tasks.launchers.kubernetes.api import GROUP, KUEUE, PLURAL, VERSION, Cluster, Missing

ANSWER_SECONDS = 10.0  # within which the API has to answer
# What the launcher does in the namespace; the Role of docs/cluster.md allows it.
RIGHTS = (
    ("create", PLURAL, GROUP),
    ("get", PLURAL, GROUP),
    ("delete", PLURAL, GROUP),
    ("list", "pods", ""),
    ("watch", "pods", ""),
    ("get", "pods/log", ""),
)


def check(config: PipelineConfig) -> list[str]:
    """All problems that the cluster would have with a pipeline, one text each: what was found, what
    is needed, what to do."""
    settings = config.launcher
    assert isinstance(settings, KubernetesLauncher)
    found = _settings(settings)
    with contextlib.suppress(RLHFError):  # reported by `rlhf_core.preflight.check`
        found += _store(settings, open_store(config.store).url)
    try:
        cluster = Cluster(settings.context, settings.namespace)
        cluster.timeout = ANSWER_SECONDS
        return [*found, *_cluster(cluster, settings)]
    except (ConfigError, JobFailed) as error:
        return [*found, str(error)]


def _settings(settings: KubernetesLauncher) -> list[str]:
    return [
        f"launcher.env has {name}, which is a secret by its name, and anybody who may read the "
        "JobSet could read it: put it into a Secret, and name that in launcher.secrets or "
        "launcher.secret_env"
        for name in settings.env
        if names_a_secret(name)
    ]


def _store(settings: KubernetesLauncher, url: str) -> list[str]:
    """A store that is a folder has to be on a claim."""
    folder = url.removeprefix("file://")
    mounted = any(f"{folder}/".startswith(f"{path.rstrip('/')}/") for path in settings.volumes)
    if not url.startswith("file://") or mounted:
        return []
    return [
        f"store is the folder {folder}, which pods do not have: use an object store "
        "(s3://bucket/prefix), or mount a claim there, launcher.volumes"
    ]


def _cluster(cluster: Cluster, settings: KubernetesLauncher) -> list[str]:
    if not _serves_jobsets(cluster):
        return [
            f"the cluster {cluster.host} does not have {GROUP}/{VERSION}: install JobSet 0.10 or "
            "newer (https://jobset.sigs.k8s.io/docs/installation), or set launcher.context to "
            "another cluster"
        ]
    denied = [
        f"{verb} {resource}"
        for verb, resource, group in RIGHTS
        if not cluster.allowed(verb, resource, group)
    ]
    found = []
    if denied:
        found.append(
            f"these credentials may not {', '.join(denied)} in the namespace {cluster.namespace} "
            "of Kubernetes: apply the Role of docs/cluster.md, or set launcher.namespace"
        )
    return [*found, *_missing(cluster, settings)]


def _serves_jobsets(cluster: Cluster) -> bool:
    try:
        path = f"/apis/{GROUP}/{VERSION}"
        resources = cluster.request("look for JobSet", "GET", path)["resources"]
    except Missing:
        return False
    return any(resource["name"] == PLURAL for resource in resources)


def _missing(cluster: Cluster, settings: KubernetesLauncher) -> list[str]:
    """What the settings name and the namespace does not have. What these credentials may not read
    is left to the start of the first stage, which tells it too."""
    found = []
    for setting, path in _names(cluster, settings):
        try:
            cluster.request(f"read {path}", "GET", path)
        except ConfigError:  # not readable for us
            continue
        except Missing:
            kind, name = path.split("/")[-2:]
            found.append(
                f"launcher.{setting} names {name}, and the namespace {cluster.namespace} has no "
                f"such object (kubectl get {kind} --namespace {cluster.namespace}): make it, or "
                "change the setting"
            )
    return found


def _names(cluster: Cluster, settings: KubernetesLauncher) -> Iterable[tuple[str, str]]:
    """(setting, path of the object that it names)."""
    for name in settings.pull_secrets:
        yield "pull_secrets", cluster.core(f"secrets/{name}")
    for name in settings.secrets:
        yield "secrets", cluster.core(f"secrets/{name}")
    for name in dict.fromkeys(text.partition("/")[0] for text in settings.secret_env.values()):
        yield "secret_env", cluster.core(f"secrets/{name}")
    for name in dict.fromkeys(settings.volumes.values()):
        yield "volumes", cluster.core(f"persistentvolumeclaims/{name}")
    if settings.service_account is not None:
        yield "service_account", cluster.core(f"serviceaccounts/{settings.service_account}")
    if settings.priority_class is not None:
        classes = "/apis/scheduling.k8s.io/v1/priorityclasses"
        yield "priority_class", f"{classes}/{settings.priority_class}"
    if settings.queue is not None:
        try:
            version = cluster.preferred(KUEUE)
        except Missing:  # then there is no such path either
            version = "v1beta1"
        yield "queue", cluster.custom(KUEUE, version, f"localqueues/{settings.queue}")
