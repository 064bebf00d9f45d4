"""Names that a server without a key answers to."""

import pytest

from castalia.serve.hosts import AllowedHosts

SERVER = AllowedHosts(["models.lan", "::"])


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8000",
        "a.localhost:8000",
        "127.0.0.1:8000",
        "[::1]:8000",
        "192.168.1.5:8000",
        "models.lan:80",
    ],
)
def test_own_names_and_addresses_pass(host: str) -> None:
    assert SERVER.fault([(b"Host", host.encode())]) is None
    # The pages of the server itself, such as /docs.
    own = [(b"host", host.encode()), (b"origin", f"http://{host}".encode())]
    assert SERVER.fault(own) is None


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil", ""]
)
def test_a_name_of_another_site_is_refused(host: str) -> None:
    fault = SERVER.fault([(b"host", b"localhost"), (b"host", host.encode())])
    assert fault is not None and fault.startswith(f"Host {host!r} is not a name of this server")
    if host.startswith("evil"):
        assert "--allowed-host evil.example to allow it" in fault
    assert AllowedHosts(["*"]).fault([(b"host", host.encode())]) is None


@pytest.mark.parametrize(
    ("origin", "passes"),
    [
        ("https://evil.example", False),
        # Every site has an address.
        ("http://6.6.6.6", False),
        ("http://localhost:3000", False),
        ("http://[", False),
        # A sandboxed frame of any page.
        ("null", False),
        ("https://models.lan", True),
        ("app://desktop", True),
    ],
)
def test_requests_across_sites(origin: str, passes: bool) -> None:
    fault = SERVER.fault([(b"host", b"localhost:8000"), (b"origin", origin.encode())])
    assert (fault is None) == passes
    if origin == "null":
        assert fault is not None and "a key (--api-key)" in fault


def test_an_error_repeats_no_endless_name() -> None:
    fault = SERVER.fault([(b"host", b"a" * 10_000)])
    assert fault is not None and len(fault) < 400
