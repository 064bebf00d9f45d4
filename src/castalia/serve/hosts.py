"""Which names a server without a key answers to, so that a web page cannot use it.

A page of another site reaches a server on this machine in two ways. Its own name may be made to
resolve to 127.0.0.1 (DNS rebinding): then the Host header has that name. Or it sends requests
across sites: then Origin names the page, and the browser sends them even where it hides the
answers. A page does not know the key of a server that has one.
"""

from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

from castalia.core.hosts import host_of, is_address

EVERY = "*"
"""The allowed host that turns the checks off."""
LOCAL = "localhost"
LONGEST_NAME = 100
"""Characters of a foreign name in an error."""


class AllowedHosts:
    """The names of a server: localhost, addresses, and those that its operator gives."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = frozenset(name.lower() for name in names)

    def fault(self, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
        """What is wrong with the Host or the Origin of a request; None if nothing is."""
        if EVERY in self.names:
            return None
        hosts = []
        origins = []
        for header, value in headers:
            if header.lower() == b"host":
                hosts.append(value.decode("latin-1").strip().lower())
            elif header.lower() == b"origin":
                origins.append(value.decode("latin-1").strip().lower())
        for host in hosts:
            name = host_of(host)
            # A page cannot make an address resolve to another machine, so addresses are safe.
            if not (self.given(name) or is_local(name) or is_address(name)):
                return not_allowed("Host", host, name)
        for origin in origins:
            if not self.allows_origin(origin, hosts):
                return not_allowed("Origin", origin, host_of(urlsplit_host(origin)))
        return None

    def given(self, name: str) -> bool:
        """Whether the operator named it."""
        return name in self.names

    def allows_origin(self, origin: str, hosts: Sequence[str]) -> bool:
        """Whether the page of an Origin may send requests: the server's own, or of a given name.

        An address is not enough here: every site has one.
        """
        scheme, colon, _ = origin.partition(":")
        if colon and scheme not in ("http", "https"):
            # An application or an extension of a browser, which no page can pose as.
            return True
        host = urlsplit_host(origin)
        return host != "" and (host in hosts or self.given(host_of(host)))


def urlsplit_host(origin: str) -> str:
    """NAME:PORT of an origin; empty for `null`, which a page without an origin of its own sends."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def is_local(name: str) -> bool:
    """Whether a browser takes the name for this machine without asking DNS (RFC 6761, 6.3)."""
    return name == LOCAL or name.endswith(f".{LOCAL}")


def not_allowed(header: str, value: str, name: str) -> str:
    """The error of a request with a foreign name."""
    shown = value[:LONGEST_NAME]
    remedy = f"--allowed-host {name[:LONGEST_NAME]}"
    if not name or name == "null":
        remedy = "a key (--api-key)"
    return (
        f"{header} {shown!r} is not a name of this server, which has no key; start it with"
        f" {remedy} to allow it"
    )
