"""Which redirections of a server may be followed: those to the same server, and those to a public https address.

A server that is not trusted could otherwise make this machine read its own services or those of its local network.
"""

from __future__ import annotations

import ipaddress
import socket
import urllib.parse
from functools import cache
from typing import Any


def explain_refusal(url: str, target: str, *, same_server: bool) -> str:
    """Return why a redirection must not be followed, after "which is"; empty if it may be followed.

    Parameters
    ----------
    url
        Address that was requested.
    target
        Where the server sends on, an address or a path relative to `url`.
    same_server
        Whether the server may send on to another of its own files: true for a server that the user named.
    """
    try:
        place = urllib.parse.urlsplit(urllib.parse.urljoin(url, target))
        start = urllib.parse.urlsplit(url)
        if same_server and (place.scheme, place.hostname, place.port) == (
            start.scheme,
            start.hostname,
            start.port,
        ):
            return ""
        host = place.hostname or ""
        # A name that cannot be resolved here is left to a proxy, or is an error when it is opened.
        addresses = find_addresses(host)
    except ValueError:
        return "not an address"
    if place.scheme != "https":
        return "not https"
    if host == "localhost" or not all(address.is_global for address in addresses):
        return "on this machine or in its local network"
    return ""


def is_loopback(url: str, target: str) -> bool:
    """Return whether a redirection leads to this machine."""
    try:
        addresses = find_addresses(urllib.parse.urlsplit(urllib.parse.urljoin(url, target)).hostname or "")
    except ValueError:
        return False
    return bool(addresses) and all(address.is_loopback for address in addresses)


def find_addresses(host: str) -> list[Any]:
    """Return the IP addresses of a host; empty if its name cannot be resolved here.

    Raises
    ------
    ValueError
        If what the resolver answers is no address.
    """
    return [ipaddress.ip_address(entry[4][0]) for entry in _look_up(host)]


@cache
def _look_up(host: str) -> list[Any]:
    try:
        return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
