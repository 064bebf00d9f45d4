"""Two ranks: a model with an FSDP2 part and a plain parameter, against the same model on the whole
batch."""

from typing import Any

import torch
from tests.seams.ranks import report
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from castalia.distributed import ParallelConfig, World
from castalia.distributed.gradients import clip_gradients, gradient_norm, sum_plain_gradients
from castalia.distributed.layout import sum_gradients

LIMIT = 0.5


class Scaled(nn.Module):
    """A linear layer whose output is multiplied by a learned vector."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.scale = nn.Parameter(torch.arange(1.0, 7.0) / 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 4) -> (N, 6)."""
        out: Tensor = self.linear(x) * self.scale
        return out


def whole(x: Tensor) -> dict[str, Any]:
    """Norm and clipped gradients by plain torch, of the sum over all rows."""
    torch.manual_seed(0)
    model = Scaled()
    model(x).square().sum().backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
    gradients = {
        name: p.grad.flatten().tolist()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    return {"norm": float(norm), "gradients": gradients}


def split(x: Tensor, world: World) -> dict[str, Any]:
    """The same where each rank has half of the rows, the linear layer is sharded and `scale` is a
    plain tensor."""
    torch.manual_seed(0)
    model = Scaled()
    assert world.mesh is not None
    fully_shard(model.linear, mesh=world.mesh["dp_shard"])
    sum_gradients(model)
    model(x.chunk(2)[world.rank]).square().sum().backward()
    sum_plain_gradients(model, world)
    norm = float(gradient_norm(model))
    clip_gradients(model.parameters(), norm, LIMIT)
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient: Any = parameter.grad
        full = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        gradients[name] = full.flatten().tolist()
    return {"norm": norm, "gradients": gradients}


if __name__ == "__main__":
    ranks = World.start(ParallelConfig(), "cpu")
    rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    report({"whole": whole(rows), "split": split(rows, ranks)})
