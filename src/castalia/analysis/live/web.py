"""What a server on a user's machine owes: who may ask, and what an answer may do."""

import json
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from castalia.core.hosts import host_of, is_address

LOCAL = ("localhost", "127.0.0.1", "::1")
"""Names of this machine that no other one can have."""
MOST_BODY = 1 << 16
"""Bytes of a request's body."""
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
"""Of every answer."""


class RefusalError(Exception):
    """A request that is not answered: its status and the reason."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass
class Answer:
    """Status, type and bytes, with headers of its own."""

    status: int
    kind: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


def as_json(value: Any, status: int = 200) -> Answer:
    """An answer of JSON; NaN and infinity, which JSON lacks, are a fault of ours."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Answer(status, "application/json; charset=utf-8", text.encode("utf-8", "replace"))


def problem(status: int, text: str) -> Answer:
    """An answer that says what went wrong."""
    return as_json({"error": text}, status)


def new_nonce() -> str:
    """The word by which a page's policy knows its own scripts."""
    return secrets.token_urlsafe(16)


def policy(nonce: str) -> str:
    """The Content-Security-Policy of the page: its own scripts, and no connection but to us.

    Plotly writes styles into the page, and shows a chart as an image of the kind blob: before it
    saves it.
    """
    return (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline';"
        " img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    )


def require_host(header: str | None, host: str) -> None:
    """Refuse a request whose Host is the name of another site that leads here (DNS rebinding).

    A page of such a site could read every answer: to the browser they have one origin. An address
    of digits cannot be such a name. On loopback only names of this machine pass; the port may be
    another one, as behind a tunnel.

    host    the address that the server listens on.
    Raises  RefusalError.
    """
    name = host_of(header)
    allowed = {*LOCAL, host.lower()}
    if host not in LOCAL:
        allowed |= {socket.gethostname().lower(), socket.getfqdn().lower()}
    if name in allowed or (host not in LOCAL and is_address(name)):
        return
    raise RefusalError(403, f"the Host header {header!r} does not name this server")


def require_same_origin(headers: Mapping[str, str | None], method: str) -> None:
    """Refuse what a page of another site sends.

    Raises  RefusalError.
    """
    site = headers.get("Sec-Fetch-Site")
    # `none` is a reader who typed the address.
    if site not in (None, "same-origin", "none") and not opens_page(headers):
        raise RefusalError(403, f"a page of another site asked (Sec-Fetch-Site: {site})")
    if method == "GET":
        return
    origin = headers.get("Origin")
    # Text, and not parsed: an Origin of another form is another origin.
    if origin not in {f"{scheme}://{headers.get('Host')}" for scheme in ("http", "https")}:
        raise RefusalError(403, f"POST needs the Origin of this server, got {origin!r}")
    # A form cannot send this type, so that a browser asks first, and gets no for an answer.
    if (headers.get("Content-Type") or "").partition(";")[0] != "application/json":
        raise RefusalError(415, "POST needs Content-Type: application/json")


def opens_page(headers: Mapping[str, str | None]) -> bool:
    """Whether a link on another site was followed: the reader sees our page, the site does not."""
    return headers.get("Sec-Fetch-Mode") == "navigate"
