"""The pretended GPU refuses what CUDA refuses, and a tensor made on the CPU by mistake fails."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.gpu.pretended import MixedDevicesError, PretendedGpu
from tests.gpu.test_models import built, tokens

from castalia.checkpoint import Store, read
from castalia.models.parts import masks

ON, OFF = torch.device("cuda", 0), torch.device("cpu")
REFUSED: dict[str, Callable[[], object]] = {
    "a sum of two devices": lambda: torch.ones(3, device=ON) + torch.ones(3),
    "a product of two devices": lambda: torch.ones(3, 3, device=ON) @ torch.ones(3, 3),
    "a number of the GPU added on the CPU": lambda: torch.ones(3) + torch.ones((), device=ON),
    "added in place on the CPU": lambda: torch.ones(()).add_(torch.ones(3, device=ON)),
    "a list of two devices": lambda: torch.stack([torch.ones((), device=ON), torch.ones(())]),
    "an embedding of tokens on the CPU": lambda: F.embedding(
        torch.arange(2), torch.ones(3, 3, device=ON)
    ),
    "a place on the GPU in a tensor on the CPU": lambda: torch.ones(3)[torch.arange(2, device=ON)],
    "values of the CPU written": lambda: torch.ones(3, device=ON).index_put_(
        (torch.arange(2, device=ON),), torch.ones(2)
    ),
    "numpy": lambda: torch.ones(3, device=ON).numpy(),
    "a generator of the CPU": lambda: torch.rand(3, device=ON, generator=torch.Generator()),
}
ALLOWED: dict[str, Callable[[], torch.Tensor]] = {
    "a number of the CPU": lambda: torch.ones(3, device=ON) * torch.ones(()),
    "a place on the CPU": lambda: torch.ones(3, device=ON)[torch.arange(2)],
    "a list of places": lambda: torch.ones(3, device=ON)[[0, 1]],
    "numbers of Python": lambda: torch.tensor([1.0, 2.0], device="cuda"),
    "moved": lambda: torch.ones(3).to("cuda"),
    "a generator": lambda: torch.rand(3, device=ON, generator=torch.Generator("cuda")),
    "as another": lambda: torch.ones(3).to(torch.ones(1, device=ON)),
    "of the operation's own": lambda: F.one_hot(torch.arange(3, device=ON)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cuda_refuses(what: str) -> None:
    with PretendedGpu(), pytest.raises(MixedDevicesError):
        REFUSED[what]()


@pytest.mark.parametrize("what", ALLOWED)
def test_what_cuda_does(what: str) -> None:
    with PretendedGpu() as gpu:
        made = ALLOWED[what]()
        assert made.device == ON and made.is_cuda and made.cpu().device == OFF
        assert gpu.operations.total() > 0


def test_a_tensor_made_on_the_cpu_by_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_device(segments: torch.Tensor, share: object = None) -> torch.Tensor:
        T = segments.shape[1]
        same = segments[:, :, None] == segments[:, None, :]
        return (same & (torch.arange(T)[None] <= torch.arange(T)[:, None]))[:, None]

    segments = torch.tensor([[0] * 5 + [1] * 7] * 2)
    monkeypatch.setattr(masks, "segment_mask", without_device)
    model = built({})
    model(tokens(), segments=segments)
    with PretendedGpu(), pytest.raises(MixedDevicesError, match=r"same device, cuda:0.*\(12, 12\)"):
        model.to(ON)(tokens().to(ON), segments=segments.to(ON))


def test_a_save_that_does_not_wait_for_its_copies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    value = torch.arange(40.0)
    for waits in (True, False):
        with PretendedGpu(), monkeypatch.context() as patch:
            if not waits:
                patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
            store = Store(tmp_path / str(waits))
            store.save(1, {"model.w": value.to(ON)}, {"step": 1}, {}, asynchronous=True)
            store.wait()
        assert torch.equal(read(tmp_path / str(waits) / "step-00000001")["w"], value) is waits
