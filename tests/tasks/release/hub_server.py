"""A stand-in for the hub's API of model repositories, for the real client of huggingface_hub.

It has repositories, branches, commits, regular and LFS files, and tokens that may read or write.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

LICENSES = {"apache-2.0", "mit", "llama3.1"}  # some of those that the hub knows


@dataclass
class Repository:
    private: bool
    branches: dict[str, list[dict[str, bytes]]] = field(default_factory=lambda: {"main": [{}]})
    messages: list[str] = field(default_factory=list)

    def head(self, branch: str = "main") -> dict[str, bytes]:
        return self.branches[branch][-1]

    def sha(self, branch: str) -> str:
        commits = [sorted((k, v.hex()) for k, v in c.items()) for c in self.branches[branch]]
        return hashlib.sha1(json.dumps(commits).encode()).hexdigest()


@dataclass
class Hub:
    """The server's state, and what its clients asked for."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    may_write: dict[str, bool] = field(default_factory=lambda: {"hf_good": True, "hf_read": False})
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    broken: str = ""  # a request that begins like this is answered with 500
    url: str = ""

    def uploads(self) -> int:
        return sum(line.startswith("PUT ") for line in self.requests)


class Refused(Exception):
    def __init__(self, status: int, text: str, code: str = "") -> None:
        self.status, self.text, self.code = status, text, code


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = urlsplit(self.path).path
            hub.requests.append(f"{self.command} {path}")
            headers: dict[str, str] = {}
            try:
                if hub.broken and hub.requests[-1].startswith(hub.broken):
                    raise Refused(500, "out of order")
                status, value = 200, self.reply(path.strip("/").split("/"), body)
            except Refused as error:
                status, value = error.status, {"error": error.text}
                headers = {"X-Error-Code": error.code, "X-Error-Message": error.text}
            if isinstance(value, dict) and "errors" in value:
                status = 400
            data = json.dumps(value).encode()
            self.send_response(status)
            for name, text in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, text)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = answer

        def reply(self, parts: list[str], body: bytes) -> Any:
            if self.command == "PUT":  # the address that the LFS batch gave
                hub.blobs[parts[-1]] = body
                return {}
            if parts[-4:] == ["info", "lfs", "objects", "batch"]:
                return {"objects": [self.upload(o) for o in json.loads(body)["objects"]]}
            if parts[1] == "validate-yaml":
                return check_card(json.loads(body)["content"])
            if parts[1:3] == ["repos", "create"]:
                return self.create(json.loads(body))
            repository = self.find("/".join(parts[2:4]))
            action = parts[4] if len(parts) > 4 else "revision"
            branch = unquote(parts[5]) if len(parts) > 5 else "main"
            if action == "branch":
                self.writer()
                if branch in repository.branches:
                    raise Refused(409, "the branch exists")
                repository.branches[branch] = list(repository.branches["main"])
                return {}
            if branch not in repository.branches:
                raise Refused(404, "no such revision", "RevisionNotFound")
            files = repository.head(branch)
            if action == "tree":
                return [{"type": "file", "path": p, "size": len(b), "oid": oid(p, b)}
                        for p, b in files.items()]  # fmt: skip
            if action == "preupload":
                asked = [f["path"] for f in json.loads(body)["files"]]
                return {"files": [
                    {"path": p, "uploadMode": "lfs" if is_lfs(p) else "regular",
                     "shouldIgnore": False, **({"oid": oid(p, files[p])} if p in files else {})}
                    for p in asked]}  # fmt: skip
            if action == "commit":
                self.writer()
                self.commit(repository, branch, [json.loads(x) for x in body.splitlines()])
            sha, name = repository.sha(branch), "/".join(parts[2:4])
            return {"id": name, "sha": sha, "private": repository.private,
                    "commitOid": sha, "commitUrl": f"{hub.url}/{name}/commit/{sha}"}  # fmt: skip

        def token(self) -> str:
            return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

        def writer(self) -> None:
            if not hub.may_write.get(self.token()):
                raise Refused(403, "you don't have the rights to write here")

        def find(self, name: str) -> Repository:
            if self.token() not in hub.may_write:
                raise Refused(401, "Invalid username or password.")
            if name not in hub.repositories:
                raise Refused(404, "Repository not found", "RepoNotFound")
            return hub.repositories[name]

        def create(self, asked: dict[str, Any]) -> dict[str, str]:
            self.writer()
            name = f"{asked['organization']}/{asked['name']}"
            url = {"url": f"{hub.url}/{name}"}
            hub.repositories.setdefault(name, Repository(asked.get("visibility") == "private"))
            return url

        def upload(self, item: dict[str, Any]) -> dict[str, Any]:
            if item["oid"] in hub.blobs:
                return item
            href = f"{hub.url}/lfs/{item['oid']}"
            return {**item, "actions": {"upload": {"href": href}}}

        def commit(self, repository: Repository, branch: str, lines: list[dict[str, Any]]) -> None:
            files = dict(repository.head(branch))
            for line in lines:
                value = line["value"]
                if line["key"] == "header":
                    repository.messages.append(value["summary"])
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.blobs[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            repository.branches[branch].append(files)

    return Handler


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", "tokenizer.json"))


def oid(path: str, content: bytes) -> str:
    if is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def check_card(content: str) -> dict[str, Any]:
    """The hub's rules for a model card's header, as far as they concern ours."""
    front = yaml.safe_load(content.split("---")[1])
    errors = []
    if front.get("license", "mit") not in LICENSES:
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    ids = [*front.get("datasets", []), *([front["base_model"]] if "base_model" in front else [])]
    errors += [f"{each!r} is not an id" for each in ids if each.count("/") > 1 or ":" in each]
    return {"errors": [{"message": text} for text in errors]} if errors else {}


@contextlib.contextmanager
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the client of this process uses, logged in with a token that may write."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
