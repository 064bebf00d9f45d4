"""The engines of benchmarks/training.py: each a process that answers a word with one line of JSON.

Words: `step` (seconds of one step), `parts` (Castalia: seconds of head, optimizer, attention and
MLP), `memory`, `stop`.
"""

import json
import statistics
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from machine import resident_bytes, seconds
from torch import Tensor
from worker import serve

# AdamW as in Pythia (Biderman et al. 2023, arXiv:2304.01373); the values do not affect the speed.
LR = 6e-4
BETAS = (0.9, 0.95)
EPS = 1e-8
DECAY = 0.1


def main(case: dict[str, Any]) -> None:
    """Answer the words of this benchmark with the engine of `case`."""
    words = {
        "ready": lambda engine: [engine.step() for _ in range(case["warmup"])],
        "step": lambda engine: engine.step(),
        "parts": lambda engine: engine.parts(),
        "memory": lambda engine: engine.memory(),
    }
    serve(lambda: ENGINES[case["engine"]](case), words)


class Engine(ABC):
    """Base of both sides: the batch, the clock and the memory."""

    optimizer: torch.optim.Optimizer

    def __init__(self, case: dict[str, Any]) -> None:
        self.case = case
        self.device = case["device"]
        self.imported = resident_bytes()
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(
            0, case["vocab_size"], (case["rows"], case["seq"] + 1), generator=generator
        )
        self.tokens = rows[:, :-1].to(self.device)
        self.labels = rows[:, 1:].contiguous().to(self.device)

    @abstractmethod
    def loss(self) -> Tensor:
        """Mean loss of the batch."""

    def step(self) -> float:
        """Seconds of forward, backward and update."""

        def work() -> None:
            with torch.autocast(self.device, torch.bfloat16):
                loss = self.loss()
            loss.backward()
            del loss
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        return seconds(work, self.device)

    def memory(self) -> dict[str, int]:
        """Bytes: peak resident size, and that after the imports; on a GPU the allocator's peak."""
        if self.device == "cuda":
            return {"peak": torch.cuda.max_memory_allocated(), "imported": 0}
        return {"peak": resident_bytes("VmHWM"), "imported": self.imported}


class Castalia(Engine):
    """The parts of `castalia train`: allocator, Decoder, NextToken, AdamW with decay groups."""

    def __init__(self, case: dict[str, Any]) -> None:
        from castalia.core.memory import keep_freed_memory

        keep_freed_memory()
        from castalia.data import Batch
        from castalia.distributed import initialize
        from castalia.losses import NextToken, Scored
        from castalia.models import Decoder
        from castalia.models.families import build_model_config, family_of
        from castalia.models.init import start_weights
        from castalia.optim import AdamWConfig, Rules
        from castalia.optim.updater import Updater

        super().__init__(case)
        with torch.device(self.device):
            self.model = Decoder(build_model_config(case["model"], "a benchmark"))
        initialize(self.model, start_weights(self.model.config, 0))
        if case["compiled"]:
            for layer in self.model.layers:
                layer.compile()
        config = AdamWConfig(lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, clip=None)
        (self.optimizer,) = Updater(
            self.model, Rules(config, family_of(self.model.config).no_decay)
        ).optimizers.values()
        self.next_token = NextToken()
        self.scored = partial(Scored.by, self.model, compiled=case["compiled"])
        place = torch.zeros(case["rows"], dtype=torch.int64, device=self.device)
        self.batch = Batch(tokens=self.tokens, labels=self.labels, source=place.int(), index=place)

    def loss(self) -> Tensor:
        """Sum over the targets divided by their number."""
        return self.next_token(self.scored(self.batch), self.batch).total / self.labels.numel()

    def parts(self) -> dict[str, float]:
        """Seconds of each part of one step, forward and backward, at the shapes of the step.

        Head, update and the stack of blocks are timed separately, the blocks as the step runs them.
        Attention and MLP, each with its norm, are then timed uncompiled, which divides the time of
        the blocks in proportion.
        """
        from castalia.losses.cross_entropy import fused_cross_entropy

        context = self.model.context(self.tokens, None, None, None)
        layers = self.model.layers
        block = layers[0]
        with torch.autocast(self.device, torch.bfloat16):
            hidden_BTC = self.model(self.tokens).detach().requires_grad_()
        hidden = hidden_BTC.detach().flatten(0, 1).requires_grad_()
        labels = self.labels.flatten()

        def head() -> Tensor:
            compiled = self.case["compiled"]
            return fused_cross_entropy(
                hidden, self.model.head_weight, labels, compiled=compiled
            ).total

        def stack() -> Tensor:
            x = hidden_BTC
            for layer in layers:
                x = layer(x, context)
            return x

        seconds_of = {"head": self.both_ways(head)}
        blocks = self.both_ways(stack)
        attention = self.both_ways(lambda: block.attn(block.norm1(hidden_BTC), context))
        mlp = self.both_ways(lambda: block.mlp(block.norm2(hidden_BTC)))
        seconds_of["attention"] = blocks * attention / (attention + mlp)
        seconds_of["mlp"] = blocks - seconds_of["attention"]
        return seconds_of | {"optimizer": self.update_seconds()}

    def both_ways(self, forward: Callable[[], Tensor], rounds: int = 4) -> float:
        """Median seconds of `forward` and its backward pass from ones, without the first round."""

        def work() -> None:
            with torch.autocast(self.device, torch.bfloat16):
                y = forward()
            y.backward(torch.ones_like(y))

        times = []
        for _ in range(rounds):
            times.append(seconds(work, self.device))
            self.optimizer.zero_grad(set_to_none=True)
        return statistics.median(times[1:])

    def update_seconds(self, rounds: int = 4) -> float:
        """Median seconds of the update after a real backward pass, without the first round."""

        def update() -> None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        times = []
        for _ in range(rounds):
            with torch.autocast(self.device, torch.bfloat16):
                loss = self.loss()
            loss.backward()
            del loss
            times.append(seconds(update, self.device))
        return statistics.median(times[1:])


class Transformers(Engine):
    """transformers' model as users train it: its own loss, fused AdamW, compiled as a whole."""

    def __init__(self, case: dict[str, Any]) -> None:
        if case["keeps_memory"]:
            from castalia.core.memory import keep_freed_memory

            keep_freed_memory()
        from transformers import AutoConfig, AutoModelForCausalLM

        from castalia.checkpoint.hf import hf_config
        from castalia.models.families import build_model_config

        super().__init__(case)
        values = hf_config(build_model_config(case["model"], "a benchmark"), end_ids=(0,))
        values |= {"use_cache": False, "torch_dtype": "float32"}
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        self.model = model.to(self.device).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True
        )
        self.forward = self.model
        if case["compiled"]:
            self.forward = torch.compile(self.model, dynamic=False)

    def loss(self) -> Tensor:
        """Its own mean loss, which shifts the labels itself and so has one target per row less."""
        return self.forward(input_ids=self.tokens, labels=self.tokens).loss


ENGINES: dict[str, Callable[[dict[str, Any]], Engine]] = {
    "castalia": Castalia,
    "transformers": Transformers,
}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
