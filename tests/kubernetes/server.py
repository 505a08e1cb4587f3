"""The API server over HTTP, and the kubeconfig file by which clients find it."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from tests.kubernetes.controllers import Controllers
from tests.kubernetes.pods import Pod, Program, stamp

Object = dict[str, Any]
NAMESPACE = "rlhf"
JOBSETS = f"/apis/jobset.x-k8s.io/v1alpha2/namespaces/{NAMESPACE}/jobsets"
CORE = f"/api/v1/namespaces/{NAMESPACE}/"
KUEUE = f"/apis/kueue.x-k8s.io/v1beta1/namespaces/{NAMESPACE}/"


class FakeCluster(Controllers):
    """A namespace "rlhf" with an API server on 127.0.0.1.

    Attributes:
        token: what clients have to present.
        faults: status codes of the next answers, before any work is done.
        denied: (verb, resource) that the credentials may not.
        groups: API groups that are there.
        unknown: a field that the installed JobSet does not know.
        there: "secrets/NAME", "serviceaccounts/NAME", "localqueues/NAME", ... that exist.
        oldest: a watch from an older version is answered with 410.
        ends_watches: each watch ends after its next look.
        requests: (method, path, query) of all requests.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.token = "first-token"
        self.faults: list[int] = []
        self.denied: set[tuple[str, str]] = set()
        self.groups = {"jobset.x-k8s.io": "v1alpha2", "kueue.x-k8s.io": "v1beta1"}
        self.unknown = ""
        self.there: set[str] = set()
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.oldest, self.ends_watches, self.listening = 0, False, False
        self.streams: list[socket.socket] = []
        self._server: ThreadingHTTPServer | None = None
        self.port = 0
        self.up()

    def up(self) -> None:
        """Start to listen, on the same port as before."""
        handler = type("Handler", (_Handler,), {"cluster": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._server.daemon_threads = True
        self.listening = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def down(self) -> None:
        """Listen no more, and cut all streams."""
        assert self._server is not None
        self.listening = False
        self._server.shutdown()
        self._server.server_close()
        self.cut()

    def cut(self) -> None:
        """Break the streams of logs."""
        for stream in self.streams:
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)
        self.streams.clear()

    def kubeconfig(self, path: Path) -> Path:
        """A file with the context "test", which is current."""
        value = {
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}],
            "users": [{"name": "u", "user": {"token": self.token}}],
            "contexts": [
                {"name": "test", "context": {"cluster": "c", "user": "u", "namespace": NAMESPACE}}
            ],
        }  # fmt: skip
        path.write_text(json.dumps(value))
        return path

    def count(self, method: str, ending: str = "") -> int:
        """Requests of a method whose path ends so."""
        return sum(m == method and path.endswith(ending) for m, path, _ in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cluster: FakeCluster

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self, status: int, value: Object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def refuse(self, status: int, message: str) -> None:
        kind = {"kind": "Status", "apiVersion": "v1", "status": "Failure"}
        self.answer(status, {**kind, "code": status, "message": message})

    def handle_one(self, method: str) -> None:
        parts = urlsplit(self.path)
        query = dict(parse_qsl(parts.query))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        cluster = self.cluster
        with cluster.lock:
            cluster.requests.append((method, parts.path, query))
            fault = cluster.faults.pop(0) if cluster.faults else 0
        if fault:
            self.refuse(fault, f"injected {fault}")
        elif self.headers.get("Authorization") != f"Bearer {cluster.token}":
            self.refuse(401, "Unauthorized")
        elif match := re.fullmatch(re.escape(f"{CORE}pods/") + r"([\w-]+)/log", parts.path):
            self.log(match[1], query)
        elif query.get("watch") == "true":
            self.changes(query)
        else:
            with cluster.lock:
                answer = self.route(method, parts.path, query, json.loads(body or b"{}"))
            if isinstance(answer, int):
                unknown = f'strict decoding error: unknown field "{cluster.unknown}"'
                self.refuse(
                    answer, unknown if answer == 400 else f"{method} {parts.path}: {answer}"
                )
            else:
                self.answer(201 if method == "POST" else 200, answer)

    def route(self, method: str, path: str, query: dict[str, str], body: Object) -> Object | int:
        """The object to answer with, or a status."""
        cluster = self.cluster
        resource = re.sub(r".*/namespaces/rlhf/", "", path).partition("/")[0]
        verb = {"GET": "get", "POST": "create", "DELETE": "delete"}[method]
        if (verb, resource) in cluster.denied:
            return 403
        if path.startswith(JOBSETS):
            return self.jobsets(method, path.removeprefix(JOBSETS).strip("/"), query, body)
        if path == f"{CORE}pods":
            name = query["labelSelector"].partition("=")[2]
            items = [pod.object for pod in cluster.of(name)]
            return {"items": items, "metadata": {"resourceVersion": str(cluster.version)}}
        if path == f"{CORE}events":
            name = query["fieldSelector"].partition(",")[0].partition("=")[2]
            return {"items": cluster.events.get(name, [])}
        if path == f"{KUEUE}workloads":
            uid = query["labelSelector"].partition("=")[2]
            return {"items": [cluster.workloads[uid]] if uid in cluster.workloads else []}
        if path.endswith("/selfsubjectaccessreviews"):
            asked = body["spec"]["resourceAttributes"]
            allowed = (asked["verb"], asked["resource"]) not in cluster.denied
            return {"status": {"allowed": allowed}}
        if match := re.fullmatch(r"/apis/([\w.-]+)", path):
            version = cluster.groups.get(match[1])
            return 404 if version is None else {"preferredVersion": {"version": version}}
        if path == "/apis/jobset.x-k8s.io/v1alpha2" and "jobset.x-k8s.io" in cluster.groups:
            return {"resources": [{"name": "jobsets"}, {"name": "jobsets/status"}]}
        if re.sub(r".*/namespaces/rlhf/", "", path) in cluster.there:
            return {"metadata": {}}
        return 404

    def jobsets(self, method: str, name: str, query: dict[str, str], body: Object) -> Object | int:
        cluster = self.cluster
        if method == "POST":
            if cluster.unknown and query.get("fieldValidation") == "Strict":
                return 400
            return 409 if body["metadata"]["name"] in cluster.jobsets else cluster.create(body)
        if name not in cluster.jobsets:
            return 404
        if method == "DELETE":
            assert body["propagationPolicy"] == "Foreground"
            if body["preconditions"]["uid"] != cluster.jobsets[name]["metadata"]["uid"]:
                return 409
            cluster.delete(name)
            return {}
        return cluster.jobsets[name]

    # ------------------------------------------------------------------ logs

    def log(self, name: str, query: dict[str, str]) -> None:
        pod = self.cluster.pods.get(name)
        if pod is None:
            return self.refuse(404, f"pods {name} not found")
        since = time.time() - float(query["sinceSeconds"]) if "sinceSeconds" in query else 0.0
        self.stream(f"{stamp(when)} {line}\n" for when, line in _lines(pod) if when >= since)
        return None

    # ------------------------------------------------------------------ changes

    def changes(self, query: dict[str, str]) -> None:
        name = query["labelSelector"].partition("=")[2]
        self.stream(self._events(name, int(query["resourceVersion"])))

    def _events(self, name: str, version: int) -> Iterator[str]:
        cluster = self.cluster
        if version < cluster.oldest:
            gone = {"kind": "Status", "code": 410, "message": "too old resource version"}
            yield json.dumps({"type": "ERROR", "object": gone}) + "\n"
            return
        while True:
            with cluster.changed:
                new = [change for change in cluster.history if change[0] > version]
                if not new:
                    cluster.changed.wait(0.5)
            version = new[-1][0] if new else version
            for _, kind, pod in new:
                if pod["metadata"]["labels"]["jobset.sigs.k8s.io/jobset-name"] == name:
                    yield json.dumps({"type": kind, "object": pod}) + "\n"
            if cluster.ends_watches or not cluster.listening:
                return

    def stream(self, lines: Iterable[str]) -> None:
        """Answer with lines as they come."""
        self.cluster.streams.append(self.connection)
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with contextlib.suppress(OSError):
            for line in lines:
                data = line.encode()
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")

    do_GET: Callable[[_Handler], None] = lambda self: self.handle_one("GET")
    do_POST: Callable[[_Handler], None] = lambda self: self.handle_one("POST")
    do_DELETE: Callable[[_Handler], None] = lambda self: self.handle_one("DELETE")


def _lines(pod: Pod) -> Iterator[tuple[float, str]]:
    """The lines of a log as they come, until the pod has ended."""
    sent = 0
    while True:
        with pod.changed:
            while sent == len(pod.log) and not pod.ended:
                pod.changed.wait(0.5)
            new, ended = pod.log[sent:], pod.ended
        yield from new
        sent += len(new)
        if ended and not new:
            return
