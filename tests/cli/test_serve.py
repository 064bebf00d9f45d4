"""`castalia serve`: the address."""

import re

import pytest

from castalia.cli.serve import listening
from castalia.core.errors import ConfigError


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
