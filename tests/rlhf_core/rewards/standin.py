"""A service over real HTTP whose answers a test decides."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Any
"""A JSON value (status 200), (status, JSON value or text, headers), or parts that never end."""


class StandIn:
    """Listens on loopback. Attributes: requests, (path, headers, body) of each; at_once, most."""

    def __init__(self, answer: Callable[[str, dict[str, Any]], Reply]) -> None:
        self.answer = answer
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer.handle(self)

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # the client has given up

        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        with self._lock:
            self.requests.append((request.path, dict(request.headers), body))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        answer = self.answer(request.path, body)
        with self._lock:
            self.at_once -= 1
        if isinstance(answer, Iterator):
            send_parts(request, answer)
            return
        status, value, headers = answer if isinstance(answer, tuple) else (200, answer, {})
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        with contextlib.suppress(OSError):  # the client has given up
            request.send_response(status)
            for name, text in headers.items():
                request.send_header(name, text)
            request.send_header("Content-Length", str(len(data)))
            request.end_headers()
            request.wfile.write(data)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def send_parts(request: BaseHTTPRequestHandler, parts: Iterator[bytes]) -> None:
    """An answer whose end never comes."""
    with contextlib.suppress(OSError):  # the client has given up
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        for part in parts:
            request.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            request.wfile.flush()
    request.close_connection = True
