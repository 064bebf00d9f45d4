"""A decoder whose rows two or more holders share, each in a thread of its own, against whole
rows."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from castalia.distributed import initialize
from castalia.models import Decoder, NeoxConfig
from castalia.models.init import start_weights

B, T = 2, 16
CONFIG = NeoxConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    vocab_size=50,
    make_vocab_size_divisible_by=1,
)


class Meeting:
    """Tensors exchanged between threads."""

    def __init__(self, holders: int) -> None:
        self.barrier = threading.Barrier(holders, timeout=200)
        self.given: list[Tensor] = [torch.empty(0)] * holders

    def exchange(self, holder: int, tensor: Tensor) -> list[Tensor]:
        """What every holder brought."""
        self.given[holder] = tensor.detach().clone()
        self.barrier.wait()
        found = list(self.given)
        self.barrier.wait()
        return found


class Exchange(torch.autograd.Function):
    """All-gather in the order of the row; the backward sums the holders' gradients."""

    @staticmethod
    def forward(ctx, part, dim, place):
        ctx.dim, ctx.place = dim, place
        whole = torch.cat(place.meeting.exchange(place.number, part), dim)
        return whole.index_select(dim, place.order.argsort())

    @staticmethod
    def backward(ctx, d_whole):
        total = sum(ctx.place.meeting.exchange(ctx.place.number, d_whole))
        return total.index_select(ctx.dim, ctx.place.held), None, None


class Place:
    """Holder `number`: pieces `number` and 2 * holders - 1 - number of the row."""

    def __init__(self, meeting: Meeting, number: int, holders: int) -> None:
        self.meeting, self.number = meeting, number
        size = T // (2 * holders)
        pairs = [(n * size, (2 * holders - 1 - n) * size) for n in range(holders)]
        ranges = [
            torch.cat([torch.arange(start, start + size) for start in pair]) for pair in pairs
        ]
        self.begin, self.held, self.order = list(pairs[number]), ranges[number], torch.cat(ranges)

    def starts(self, T: int) -> list[int]:
        return self.begin

    def positions(self, T: int) -> Tensor:
        return self.held[None]

    def length(self, T: int) -> int:
        return len(self.order)

    def gather(self, part: Tensor, dim: int) -> Tensor:
        return Exchange.apply(part, dim, self)


def make() -> Decoder:
    model = Decoder(CONFIG)
    initialize(model, start_weights(model.config, 1))
    return model


@pytest.mark.parametrize("holders", [2, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_shared_rows_equal_whole_rows(holders: int, packed: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 50, (B, T), generator=generator)
    weights = torch.randn(B, T, CONFIG.hidden_size, generator=generator)
    segments = torch.tensor([[0] * 5 + [1] * 7 + [2] * 4, [0] * 9 + [1] * 7]) if packed else None
    whole = make()
    hidden = whole(tokens, segments=segments)
    (hidden * weights).sum().backward()
    meeting = Meeting(holders)

    def one(number: int) -> tuple[Tensor, Tensor, Decoder]:
        place, model = Place(meeting, number, holders), make()
        model.row_share = place
        held = place.held
        out = model(tokens[:, held], segments=None if segments is None else segments[:, held])
        (out * weights[:, held]).sum().backward()
        return held, out.detach(), model

    with ThreadPoolExecutor(holders) as pool:
        found = list(pool.map(one, range(holders)))
    for held, out, _ in found:
        torch.testing.assert_close(out, hidden[:, held].detach(), rtol=0, atol=1e-5)
    for name, parameter in (
        (n, p) for n, p in whole.named_parameters() if p.grad is not None
    ):  # not the head
        total = sum(dict(model.named_parameters())[name].grad for _, _, model in found)
        torch.testing.assert_close(
            total,
            parameter.grad,
            rtol=1e-5,
            atol=5e-5,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_a_state_holds_whole_rows() -> None:
    model = make()
    model.row_share = Place(Meeting(1), 0, 1)
    with pytest.raises(ValueError, match="without context parallelism"):
        model(torch.zeros(1, 2, dtype=torch.int64), state=model.new_state(1, 4))
