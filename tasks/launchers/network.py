"""How this machine is reached from the others of a launch."""

from __future__ import annotations

import socket
import time

import psutil

from rlhf_core.errors import ConfigError

POLL_SECONDS = 1.0


def resolved(rendezvous: str, seconds: float) -> tuple[str, int]:
    """Address and port of HOST:PORT. The name of a pod is known only some time after its start.

    Raises:
        ConfigError: it is no HOST:PORT, or the name is still unknown after this many seconds.
    """
    host, _, port = rendezvous.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"the rendezvous is {rendezvous!r}; expected HOST:PORT of node 0")
    end = time.monotonic() + seconds
    while True:
        try:
            found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
            return str(found[0][4][0]), int(port)
        except OSError as error:
            if time.monotonic() > end:
                raise ConfigError(
                    f"the name of node 0, {host}, is not known here ({error}): give its address, "
                    "or a name that all nodes resolve"
                ) from error
        time.sleep(POLL_SECONDS)


def way_to(address: str) -> tuple[str, str]:
    """This machine's own address and interface on the route to an address, which may be its own.

    Raises:
        ConfigError: there is no route.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # sends nothing
        try:
            probe.connect((address, 9))
        except OSError as error:
            raise ConfigError(f"no route from here to node 0, {address}: {error}") from error
        own = str(probe.getsockname()[0])
    for name, addresses in psutil.net_if_addrs().items():
        if own in (each.address.partition("%")[0] for each in addresses):
            return own, name
    raise ConfigError(f"no interface of this machine has the address {own}, its way to {address}")
