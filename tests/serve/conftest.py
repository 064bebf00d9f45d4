"""Matrices of these tests are too small for several threads, their objects few."""

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only make threads wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def only_new_objects() -> Iterator[None]:
    """Collections of cycles look at the objects of one file of tests alone, as in a server."""
    gc.freeze()
    yield
    gc.unfreeze()
