"""`castalia serve`: the address."""

import asyncio
import re
import socket

import pytest

from castalia.cli.serve import listening
from castalia.core.errors import ConfigError


def test_answers_do_not_wait_for_acknowledgements():
    """A connection that is used again would stand still for 40 ms at each request."""

    async def connected(listener: socket.socket) -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            own = writer.get_extra_info("socket")
            found.set_result(own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(accept, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            writer.close()
            return await found

    with listening("127.0.0.1", 0) as listener:
        assert asyncio.run(connected(listener)) != 0


def test_an_address_that_cannot_be_served_is_refused():
    with listening("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert port > 0  # a free one, which the first line names
        listener.listen()
        text = f"cannot listen on 127.0.0.1, port {port}: address already in use; choose another"
        with pytest.raises(ConfigError, match=re.escape(text)):
            listening("127.0.0.1", port)
    # An address of the documentation (RFC 5737), which no machine has.
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1, port 0: "):
        listening("192.0.2.1", 0)
