"""One server of S3 for all tests of this folder, and a bucket of its own for each."""

import itertools

import pytest
from tests.storage.server import Link, S3Server, environment

from castalia.storage.urls import file_system

NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def s3_server():
    """The server."""
    server = S3Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def link(s3_server):
    """The link to the server; its environment is that of the module."""
    link = Link(s3_server.port)
    with environment(link.environment):
        yield link


@pytest.fixture(scope="module")
def new_bucket(link):
    """Callable that makes an empty bucket; its URL."""

    def make() -> str:
        name = f"bucket-{next(NUMBERS)}"
        file_system("s3").mkdir(name)
        return f"s3://{name}"

    return make
