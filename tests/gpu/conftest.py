"""The GPU that a test runs on: one that is pretended, in every run of the tests, and a real one
under `make gpu`."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from tests.gpu.pretended import GPU, PretendedGpu
from torch import Tensor


@dataclass(frozen=True)
class Gpu:
    """What the bodies of the tests see of either."""

    real: bool
    device: torch.device = GPU

    def same(self, here: Tensor, there: Tensor, rtol: float = 1e-4, atol: float = 1e-5) -> None:
        """Assert that a tensor of the GPU has the values of one of the CPU.

        A real GPU adds in another order: it gets ten times the room.
        """
        assert here.device == self.device, f"on {here.device}"
        room = 10 if self.real else 1
        torch.testing.assert_close(
            here.detach().cpu().float(), there.float(), rtol=rtol * room, atol=atol * room
        )

    def needs(self, *capability: int) -> None:
        """Skip the test on an older GPU."""
        found = torch.cuda.get_device_capability(self.device)
        if found < capability:
            pytest.skip(f"needs a GPU of capability {capability}, found {found}")


@pytest.fixture(params=["pretended", pytest.param("real", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    """A GPU; each body runs on the pretended one always, and on a real one with `-m gpu`."""
    if request.param == "real":
        if not torch.cuda.is_available():
            pytest.skip("torch finds no GPU")
        yield Gpu(real=True)
        return
    with PretendedGpu() as pretended:
        yield Gpu(real=False)
    # A body that computes nothing there would pass with anything.
    assert pretended.operations.total() > 10
