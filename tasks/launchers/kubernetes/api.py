"""The Kubernetes API of one namespace, through the official client, which has the credentials, TLS
and proxies. Objects are plain dicts, as in a manifest.

A request is repeated while the API is unavailable: connections that fail, 429 and 5xx, and for a
short while 401, since a token may just have expired. Other refusals are told in the API's words.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_core.errors import ConfigError, JobFailed
from rlhf_core.system.secrets import redact

GROUP, VERSION, PLURAL = "jobset.x-k8s.io", "v1alpha2", "jobsets"
KUEUE = "kueue.x-k8s.io"
JOBSET_NAME = "jobset.sigs.k8s.io/jobset-name"  # label of pods
TIMEOUT = (10, 30)  # seconds to connect, and between two packets
SILENCE = 330  # seconds without a line before a stream is opened again
WATCH_SECONDS = 300  # after which the API ends a stream of changes
RETRY_SECONDS = 2.0
SERVER_TIMEOUT = 900.0  # seconds without the API before a stage gives up, as with Prefect's server
LOGIN_TIMEOUT = 30.0  # seconds of refused credentials before a stage gives up
OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
NEEDED = (
    "launcher.type kubernetes needs the package kubernetes where the pipeline runs, and it is not "
    'installed; run: pip install "rlhf-pipeline[kubernetes]", or build the orchestrator\'s image '
    "with --build-arg KUBERNETES=1"
)

Object = dict[str, Any]


class Missing(Exception):
    """The API has no such object."""


class Conflict(Exception):
    """The object exists already, or is another one than was meant."""


class Cluster:
    """One namespace of a cluster.

    Attributes:
        namespace: its name.
        host: URL of the API.
        timeout: seconds without the API before a request gives up.
    """

    timeout = SERVER_TIMEOUT

    def __init__(self, context: str | None = None, namespace: str | None = None) -> None:
        """Read the credentials; contacts no server.

        Args:
            context: of the kubeconfig file; None: see `KubernetesLauncher.context`.
            namespace: None: that of the context or of this pod.

        Raises:
            ConfigError: the client's package is missing, or there are no usable credentials.
        """
        self.context = context
        self.namespace = self._login() if namespace is None else namespace
        if namespace is not None:
            self._login()

    def _login(self) -> str:
        """Read the credentials, which may have changed; returns their namespace."""
        try:
            from kubernetes import client, config
            from kubernetes.config.config_exception import ConfigException
        except ImportError:
            raise ConfigError(NEEDED) from None
        settings, namespace = client.Configuration(), None
        settings.retries = 0  # `request` repeats
        try:
            if in_cluster(self.context):
                config.load_incluster_config(client_configuration=settings)
                with contextlib.suppress(OSError):
                    namespace = OWN_NAMESPACE.read_text().strip()
            else:
                # Named here: the client looks at $KUBECONFIG once, at its import.
                file = os.environ.get("KUBECONFIG", "~/.kube/config")
                config.load_kube_config(file, self.context, settings)
                contexts, current = config.list_kube_config_contexts(file)
                used = next((c for c in contexts if c["name"] == self.context), current)
                namespace = used["context"].get("namespace")
        except (ConfigException, OSError, TypeError, ValueError) as error:
            wanted = f"the context {self.context}" if self.context else "a current context"
            raise ConfigError(
                f"launcher.context: no credentials for Kubernetes: {redact(str(error))}. Needed is "
                f"a kubeconfig file ($KUBECONFIG, else ~/.kube/config) with {wanted}, or a pod "
                "with a service account."
            ) from None
        self.host = str(settings.host)
        self._client = client.ApiClient(settings)
        return namespace or "default"

    # ------------------------------------------------------------------ JobSets

    def create(self, jobset: Object) -> Object:
        """Make a JobSet.

        Raises:
            Conflict: there is one of this name.
            ConfigError: the API refuses it. It does so too where it does not know a field: without
                it the failure policy would mean something else.
        """
        return self.request(
            "make a JobSet", "POST", self._jobsets(), {"fieldValidation": "Strict"}, jobset
        )

    def jobset(self, name: str) -> Object:
        """A JobSet. Raises Missing."""
        return self.request(f"read the JobSet {name}", "GET", self._jobsets(name))

    def delete(self, name: str, uid: str) -> None:
        """Delete a JobSet with its jobs and pods; it is there until they have ended.

        Raises:
            Missing: it is gone.
            Conflict: another one has its name.
        """
        options = {"propagationPolicy": "Foreground", "preconditions": {"uid": uid}}
        self.request(f"delete the JobSet {name}", "DELETE", self._jobsets(name), body=options)

    def _jobsets(self, name: str = "") -> str:
        return self.custom(GROUP, VERSION, PLURAL) + (f"/{name}" if name else "")

    # ------------------------------------------------------------------ what belongs to one

    def pods(self, jobset: str) -> tuple[list[Object], str]:
        """The pods of a JobSet, and the version of the list, after which `changes` come."""
        query = {"labelSelector": f"{JOBSET_NAME}={jobset}"}
        found = self.request(f"list the pods of {jobset}", "GET", self.core("pods"), query)
        return list(found["items"]), str(found["metadata"]["resourceVersion"])

    def changes(self, jobset: str, version: str) -> Iterator[tuple[str, Object]]:
        """Changes of a JobSet's pods as they come: ADDED, MODIFIED or DELETED, and the pod. It ends
        where the API ends it: after some minutes, or when the version is too old (410).
        A request that fails is not repeated."""
        query = {
            "labelSelector": f"{JOBSET_NAME}={jobset}",
            "watch": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        for line in self._lines(self.core("pods"), query):
            event = json.loads(line)
            if event["type"] == "ERROR":
                return
            yield event["type"], event["object"]

    def warnings(self, name: str) -> list[str]:
        """Warnings about an object, the newest last."""
        fields = {"fieldSelector": f"involvedObject.name={name},type=Warning"}
        events = self._items(f"read the events of {name}", self.core("events"), fields)
        events.sort(key=lambda event: str(event.get("lastTimestamp") or ""))
        return [f"{event.get('reason')}: {event.get('message')}" for event in events]

    def workloads(self, uid: str) -> list[Object]:
        """Kueue's records of the JobSet with this uid. Raises Missing."""
        path = self.custom(KUEUE, self.preferred(KUEUE), "workloads")
        labels = {"labelSelector": f"kueue.x-k8s.io/job-uid={uid}"}
        return self._items("read Kueue's workload", path, labels)

    def logs(self, pod: str, container: str, since: float | None) -> Iterator[bytes]:
        """The lines of a container, each after its time, until it ends or the connection does.
        A request that fails is not repeated.

        Args:
            since: seconds ago of the first line; None: from the beginning.
        """
        query = {"container": container, "follow": "true", "timestamps": "true"}
        if since is not None:
            query["sinceSeconds"] = str(max(1, int(since + 1)))
        return self._lines(self.core(f"pods/{pod}/log"), query)

    def _lines(self, path: str, query: dict[str, str]) -> Iterator[bytes]:
        """The lines of an answer that goes on."""
        response = self._send("GET", path, query, None, (TIMEOUT[0], SILENCE))
        rest = b""
        try:
            for part in response.stream(amt=None, decode_content=False):
                *lines, rest = (rest + part).split(b"\n")
                yield from lines
            if rest:
                yield rest
        finally:
            response.close()

    # ------------------------------------------------------------------ anything

    def core(self, path: str) -> str:
        """Path of an object of Kubernetes' own in the namespace, such as "secrets/NAME"."""
        return f"/api/v1/namespaces/{self.namespace}/{path}"

    def custom(self, group: str, version: str, path: str) -> str:
        """Path of an object of another API group in the namespace."""
        return f"/apis/{group}/{version}/namespaces/{self.namespace}/{path}"

    def preferred(self, group: str) -> str:
        """Version of an API group. Raises Missing: the cluster does not have the group."""
        found = self.request(f"look for the API {group}", "GET", f"/apis/{group}")
        return str(found["preferredVersion"]["version"])

    def allowed(self, verb: str, resource: str, group: str = "") -> bool:
        """Whether these credentials may do this in the namespace.

        Args:
            resource: such as "pods", or "pods/log".
        """
        resource, _, subresource = resource.partition("/")
        attributes = {
            "namespace": self.namespace, "verb": verb, "group": group,
            "resource": resource, "subresource": subresource,
        }  # fmt: skip
        kind = "SelfSubjectAccessReview"
        found = self.request(
            "ask what these credentials may do",
            "POST",
            f"/apis/authorization.k8s.io/v1/{kind.lower()}s",
            body={
                "apiVersion": "authorization.k8s.io/v1",
                "kind": kind,
                "spec": {"resourceAttributes": attributes},
            },
        )
        return bool(found["status"]["allowed"])

    def _items(self, what: str, path: str, query: dict[str, str]) -> list[Object]:
        return list(self.request(what, "GET", path, query)["items"])

    def request(
        self,
        what: str,
        method: str,
        path: str,
        query: dict[str, str] | None = None,
        body: Object | None = None,
    ) -> Object:
        """The answer to a request, which is repeated while the API is unavailable.

        Args:
            what: what the request is for; for messages.

        Raises:
            Missing, Conflict: 404, 409.
            ConfigError: another refusal, which a repetition would not change.
            JobFailed: the API was unavailable for too long.
        """
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        began = time.monotonic()
        while True:
            try:
                return dict(json.loads(self._send(method, path, query, body, TIMEOUT).data))
            except ApiException as error:
                status, text = error.status or 0, _message(error)
                if status == 404:
                    raise Missing(text) from None
                if status == 409:
                    raise Conflict(text) from None
                final = status == 401 and time.monotonic() - began > LOGIN_TIMEOUT
                if final or (0 < status < 500 and status not in (401, 408, 429)):
                    raise ConfigError(self._refusal(what, status, text)) from None
                if status == 401:
                    self._login()  # a new token, if there is one
            except (HTTPError, OSError, ValueError) as error:
                text = redact(str(error))
            if time.monotonic() - began > self.timeout:
                raise JobFailed(
                    f"the Kubernetes API at {self.host} did not answer for {self.timeout:.0f} s, "
                    f"to {what}: {text}",
                    "lost",
                )
            time.sleep(min(RETRY_SECONDS, self.timeout))

    def _send(
        self,
        method: str,
        path: str,
        query: dict[str, str] | None,
        body: Object | None,
        timeout: tuple[int, int],
    ) -> Any:
        """urllib3's response; its body is read on demand."""
        return self._client.call_api(
            path,
            method,
            query_params=list((query or {}).items()),
            header_params={"Accept": "application/json", "Content-Type": "application/json"},
            body=body,
            auth_settings=["BearerToken"],
            _return_http_data_only=True,
            _preload_content=False,
            _request_timeout=timeout,
        )

    def _refusal(self, what: str, status: int, text: str) -> str:
        told = f"Kubernetes ({self.host}, namespace {self.namespace}) refused to {what}: {text}"
        if status == 401:
            return f"{told}. The credentials are not valid, or have expired: log in again."
        if status == 403:
            return f"{told}. docs/cluster.md has the Role that the pipeline needs."
        if "unknown field" in text:
            return f"{told}. The launcher needs JobSet 0.10 or newer: update it."
        return told


def in_cluster(context: str | None) -> bool:
    """Whether the credentials are those of the pod that this process runs in."""
    outside = context is not None or "KUBECONFIG" in os.environ
    return not outside and "KUBERNETES_SERVICE_HOST" in os.environ


def _message(error: Any) -> str:
    """What the API says, in its own words."""
    body = error.body.decode("utf-8", "replace") if isinstance(error.body, bytes) else error.body
    with contextlib.suppress(TypeError, ValueError, KeyError):
        return redact(str(json.loads(body)["message"]))
    return redact(str(body or error.reason or error))[:1000]
