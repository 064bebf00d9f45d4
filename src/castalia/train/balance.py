"""The balance of experts in a run: statistics of a step, and the biases that follow them."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from castalia.data import Batch
from castalia.data.step_reader import PADDING_ROW
from castalia.distributed import World
from castalia.distributed.boxes import local_boxes
from castalia.experts.ledger import LayerLoad, Ledger, read_loads
from castalia.models.model_config import ModelConfig
from castalia.optim import Rules
from castalia.optim.layout import local

BIAS = ".mlp.router.bias"
"""End of the name of the biases of loss-free balancing."""


class Balance:
    """The ledgers of the stages on this rank, as one.

    Without experts there are none, and the vector has no numbers.
    """

    def __init__(self, model: nn.Module, config: ModelConfig, world: World) -> None:
        self.world = world
        self.model = model
        self.ledgers = list(ledgers_of(model))
        moe = getattr(config, "moe", None)
        self.size = self.ledgers[0].size if self.ledgers else 0
        self.rate = 0.0 if moe is None else moe.bias_rate
        # Ranks of tp that split experts see the same tokens, others a part of them each.
        self.apart = world.degrees.tp > 1 and moe is not None and not moe.split_over_tp

    def set_scale(self, scale: float) -> None:
        """What the auxiliary losses of a row are multiplied with."""
        for ledger in self.ledgers:
            ledger.scale = scale

    def set_padding(self, batch: Batch) -> None:
        """Tell experts whether the micro-batch is what a rank without a row runs."""
        if self.ledgers:
            # Such a micro-batch has no other row.
            padding = bool((batch.index == PADDING_ROW).all())
            for ledger in self.ledgers:
                ledger.padding = padding

    def take(self) -> Tensor:
        """The sums of this rank since the last call, float64 (size,); of all ranks of tp that share
        its rows."""
        sums = torch.zeros(self.size, dtype=torch.float64, device=self.world.device)
        for ledger in self.ledgers:
            sums += ledger.take(sums.device)
        if self.size and self.apart:
            assert self.world.mesh is not None
            dist.all_reduce(sums, group=self.world.mesh["tp"].get_group())
        return sums

    def loads(self, vector: Sequence[float]) -> list[LayerLoad]:
        """The layers of all ranks' sums."""
        return read_loads(self.ledgers[0], vector) if self.ledgers else []

    @torch.no_grad()
    def follow(self, rules: Rules, vector: Sequence[float]) -> None:
        """After an update, move the bias of each expert against the load of the step.

        Source  Wang et al. 2024, arXiv:2408.15664, algorithm 1: by one rate, up where an expert got
                less than an equal share and down where it got more.
        """
        if not self.rate:
            return
        by_layer = {load.layer: load.counts for load in self.loads(vector)}
        for name, bias in self.model.named_parameters():
            # An adapter, or train.frozen, leaves them as they are.
            if not name.endswith(BIAS) or not rules.trains(name):
                continue
            counts_E = torch.tensor(by_layer[int(name.split(".")[1])], dtype=torch.float64)
            move_E = self.rate * (counts_E.mean() - counts_E).sign()
            values = local(bias)
            for box, place in local_boxes(bias):
                values[place.slices] += move_E[box.slices].to(values)


def ledgers_of(model: nn.Module) -> Iterable[Ledger]:
    """The ledger of a model, or of each stage of a pipeline."""
    stages: Iterable[Any] = model if isinstance(model, nn.ModuleList) else [model]
    for stage in stages:
        ledger = getattr(stage, "ledger", None)
        if ledger is not None:
            yield ledger
