"""Asks a fork server for a flow run's engine, and stands for it towards the worker.

    python -I -S client.py SOCKET

The engine gets this process's environment, folder and standard streams. Signals are passed on; the
exit code is the engine's; if this process is killed, the server kills the engine. Where no server
answers, this process becomes the engine. Only the standard library, so that it starts at once.
"""

import array
import json
import os
import signal
import socket
import sys


def main(path: str) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
        pid = _fork(connection)
    except (OSError, ValueError):
        pid = 0
    if not pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.execv(sys.executable, [sys.executable, "-m", "prefect.engine"])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: connection.sendall(b"%d\n" % number))
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    _exit_as(connection)


def _fork(connection: socket.socket) -> int:
    """Id of the engine's process; 0 if the server refuses."""
    request = {"environment": dict(os.environ), "folder": os.getcwd()}
    file = os.memfd_create("request")
    os.write(file, json.dumps(request).encode())
    os.lseek(file, 0, os.SEEK_SET)
    passed = array.array("i", [file, 0, 1, 2])
    connection.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)])
    return int(_line(connection) or 0)


def _exit_as(connection: socket.socket) -> None:
    code = int(_line(connection) or 1)
    if code < 0:  # the number of a signal
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _line(connection: socket.socket) -> bytes:
    found = b""
    while not found.endswith(b"\n"):
        if not (part := connection.recv(100)):
            return b""
        found += part
    return found


if __name__ == "__main__":
    main(sys.argv[1])
