"""A TCP proxy that does to connections what networks do."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable


class Proxy:
    """Forwards to a port of 127.0.0.1; ``edit(connection, offset, data)`` may change what the
    server sends, or return None to cut the connection. ``edit_request`` likewise, for requests.
    With ``tls`` its clients speak TLS."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self._target = port
        self._tls = tls
        self._server = socket.create_server(("127.0.0.1", 0))
        scheme = "https" if tls else "http"
        self.endpoint = f"{scheme}://127.0.0.1:{self._server.getsockname()[1]}"
        self.edit: Callable[[int, int, bytes], bytes | None] = lambda _c, _o, data: data
        self.edit_request: Callable[[int, int, bytes], bytes | None] = lambda _c, _o, data: data
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                self.connections += 1
                if self._tls is not None:
                    try:
                        client = self._tls.wrap_socket(client, server_side=True)
                    except ssl.SSLError:  # a client that does not trust the certificate
                        continue
                server = socket.create_connection(("127.0.0.1", self._target))
                number = self.connections
                for source, sink, edit in (
                    (client, server, lambda c, o, d: self.edit_request(c, o, d)),
                    (server, client, lambda c, o, d: self.edit(c, o, d)),
                ):
                    threading.Thread(
                        target=self._pump, args=(source, sink, edit, number), daemon=True
                    ).start()

    @staticmethod
    def _pump(
        source: socket.socket,
        sink: socket.socket,
        edit: Callable[[int, int, bytes], bytes | None],
        number: int,
    ) -> None:
        offset = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                edited = edit(number, offset, data)
                if edited is None:
                    break
                offset += len(data)
                sink.sendall(edited)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._server.close()
