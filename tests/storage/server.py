"""A server of the S3 protocol in a process of its own, and a link to it that can be cut."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time

from tests.fixtures.ports import held_port

KEYS = {
    "AWS_ACCESS_KEY_ID": "an-account",
    "AWS_SECRET_ACCESS_KEY": "its-word",
    "AWS_DEFAULT_REGION": "us-east-1",
}
DENIED = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>InvalidAccessKeyId</Code><Message>The AWS'
    b" Access Key Id you provided does not exist in our records.</Message></Error>"
)


class S3Server:
    """moto's server of S3, which keeps its objects in memory."""

    def __init__(self) -> None:
        with held_port() as self.port:
            command = [sys.executable, "-m", "moto.server", "-p", str(self.port)]
            self.process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            self.wait()

    def wait(self) -> None:
        """Until it answers."""
        end = time.monotonic() + 200
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except OSError:
                assert time.monotonic() < end and self.process.poll() is None
                time.sleep(0.05)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Link:
    """A TCP link to a server. `mode`: open; gone, which closes every connection; hangs, which
    answers nothing; denies, which refuses the credentials. `received` counts the bytes that came
    from the server, `sent` those that went to it."""

    def __init__(self, port: int) -> None:
        self.server = ("127.0.0.1", port)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.mode = "open"
        self.received = 0
        self.sent = 0
        self.open_sockets: set[socket.socket] = set()
        threading.Thread(target=self.accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    @property
    def environment(self) -> dict[str, str]:
        return {**KEYS, "AWS_ENDPOINT_URL": self.url}

    def set(self, mode: str) -> None:
        """Change the mode; connections of the earlier one end."""
        self.mode = mode
        for each in list(self.open_sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def accept(self) -> None:
        while True:
            client, _ = self.listener.accept()
            threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client: socket.socket) -> None:
        self.open_sockets.add(client)
        try:
            with client, contextlib.suppress(OSError):
                if self.mode == "open":
                    self.join(client)
                elif self.mode == "denies":
                    client.recv(1 << 16)
                    head = "HTTP/1.1 403 Forbidden\r\nContent-Type: application/xml\r\n"
                    head += f"Content-Length: {len(DENIED)}\r\nConnection: close\r\n\r\n"
                    client.sendall(head.encode() + DENIED)
                elif self.mode == "hangs":
                    while client.recv(1 << 16):
                        pass
        finally:
            self.open_sockets.discard(client)

    def join(self, client: socket.socket) -> None:
        with socket.create_connection(self.server) as server:
            self.open_sockets.add(server)
            up = threading.Thread(target=self.pump, args=(client, server, "sent"), daemon=True)
            up.start()
            self.pump(server, client, "received")
            self.open_sockets.discard(server)

    def pump(self, source: socket.socket, target: socket.socket, counter: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                setattr(self, counter, getattr(self, counter) + len(data))
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def environment(values: dict[str, str]):
    """Environment variables for the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
