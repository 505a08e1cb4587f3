"""Addresses that only this machine reaches, and the names by which it may be asked there."""

from __future__ import annotations

import ipaddress


def is_local(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def allowed_hosts(host: str) -> list[str]:
    """Names that a request may give in its Host header to a server that listens on an address.

    A page whose name was made to point to 127.0.0.1 (DNS rebinding) has the origin of a server
    there, but not its name. Other machines know a server by names that it does not know itself, so
    where they reach it any name will do: its password keeps pages out.
    """
    return ["127.0.0.1", "localhost", "[::1]", host] if is_local(host) else ["*"]
