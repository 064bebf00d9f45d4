"""Names in the Host and Origin headers of requests."""

import ipaddress
from urllib.parse import urlsplit


def host_of(header: str | None) -> str:
    """The name in a Host header, in lower case and without its port; "" if it is none."""
    try:
        return (urlsplit(f"//{header or ''}").hostname or "").lower()
    except ValueError:
        return ""


def is_address(name: str) -> bool:
    """Whether a host is written in digits and is no name."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
