"""Google Cloud Storage for tests: its XML API, spoken by a proxy in front of SeaweedFS.

obstore uses the XML API, which is S3's with other headers. The emulators of the registries have
none of it: fake-gcs-server answers 400 to a PUT, gcp-storage-emulator 501 to a HEAD and a list.
The proxy replaces the bearer token by a signature, and ``x-goog-if-generation-match: 0`` by
``If-None-Match: *``. So objects, conditions and races are those of a real server, and whether
Google's server behaves so is what this cannot show.
"""

from __future__ import annotations

import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote, urlsplit

from tests.rlhf_core.store.seaweed import ACCESS_KEY, SECRET_KEY, SeaweedServer

TOKEN = "test-token-that-must-not-be-shown"
_KEPT = ("content-type", "range", "content-length")


class GoogleProxy:
    """Answers as Google does, with the objects of a SeaweedFS."""

    def __init__(self, server: SeaweedServer) -> None:
        handler = type("Handler", (_Handler,), {"server_name": server.endpoint.partition("//")[2]})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.environment = {"GOOGLE_BASE_URL": self.endpoint, "GOOGLE_BEARER_TOKEN": TOKEN}

    def kill(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_name: str

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._reply(401, {}, b"<Error><Code>AuthenticationRequired</Code></Error>")
        parts = urlsplit(self.path)
        path = quote(unquote(parts.path), safe="/-_.~")
        query = f"?{parts.query}" if parts.query else ""
        headers = {k: v for k, v in self.headers.items() if k.lower() in _KEPT}
        if self.headers.get("x-goog-if-generation-match") == "0":
            headers["If-None-Match"] = "*"
        headers = self._signed(f"http://{self.server_name}{path}{query}", headers)
        connection = http.client.HTTPConnection(self.server_name, timeout=60)
        try:
            connection.request(self.command, path + query, body, headers)
            reply = connection.getresponse()
            found = {k: v for k, v in reply.getheaders() if k.lower() not in ("connection", "date")}
            if reply.status < 300:
                found["x-goog-generation"] = "1"
            self._reply(reply.status, found, reply.read())
        finally:
            connection.close()

    def _signed(self, url: str, headers: dict[str, str]) -> dict[str, str]:
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.credentials import Credentials

        request = AWSRequest(self.command, url, headers=headers)
        request.context["payload_signing_enabled"] = False
        request.headers["X-Amz-Content-SHA256"] = "UNSIGNED-PAYLOAD"
        S3SigV4Auth(Credentials(ACCESS_KEY, SECRET_KEY), "s3", "us-east-1").add_auth(request)
        return dict(request.headers.items())

    def _reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        length = headers.pop("Content-Length", str(len(body)))
        for name, value in headers.items():
            if name.lower() != "transfer-encoding":
                self.send_header(name, value)
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the tests' output is enough."""

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _answer
