"""The equivalence grid: every layout against one process, as a table of the largest differences.

    python tests/distributed/grid.py [--all | --sabotage] [--only WORDS] [--json FILE]

Each row trains three steps on 2 to 8 gloo processes and on one, in fp32, and compares the start
weights, which must be the same bits, the rows, the loss and the gradient norm after clipping of
every step, and every parameter at the end. One launch serves all rows of a world size. The exit
status is 1 when a difference is above 1e-5. With `--sabotage` each row applies a wrong plan in its
ranks, not in the one process: all rows must fail then.

The core has each mechanism once, several of them in a row where they do not meet; the schedules of
plain pipelines are those of test_pipeline.py.

AdamW has eps 1e-6: with 1e-8 a number whose gradient is 1e-9 takes whole steps out of rounding
noise.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as processes
from torch.distributed.tensor import DTensor

# As a script, this file has its own folder alone on the path.
sys.path.append(str(Path(__file__).resolve().parents[2]))
from tests.fixtures.ports import held_port
from variants import CHAT, START, VARIANTS

import castalia.train.trainer as loop
from castalia.checkpoint import read
from castalia.checkpoint.names import step_name
from castalia.data import IndexedDatasetWriter
from castalia.distributed import World
from castalia.distributed.gradients import gradient_norm
from castalia.distributed.join import leave
from castalia.recipes import load_config
from castalia.train.hooks import Hook, Metrics, Save, Step

LIMIT = 1e-5
STEPS = 3
"""A fault of the forward pass shows in the first, of the update in the second, of moments in the
third."""
BASE = (
    "debug",
    "model.num_layers=2",
    "model.hidden_size=32",
    "data.seq_length=16",
    "train.batch_size=12",
    f"train.steps={STEPS}",
    "optim.clip=0.5",
    "optim.eps=1e-6",
    "checkpoint.steps=[0]",
    "checkpoint.every=null",
    "checkpoint.asynchronous=false",
)
HEAD_DIM = 8
SAME = (
    "train.micro_batch_size",
    "loss.answers_at_once",
    "train.recompute",
    "train.compile",
    "parallel.",
)
"""Options that change no number: one process is trained without them."""


@dataclass(frozen=True)
class Row:
    """One row of the grid: a layout, what varies besides, whether it belongs to the core, and the
    wrong plan of `SABOTAGE` that its ranks apply."""

    layout: str
    degrees: str
    variant: str = ""
    core: bool = False
    wrong: str = ""

    @property
    def name(self) -> str:
        """As the table shows it."""
        if self.wrong:
            return self.wrong
        return f"{self.layout}, {self.variant}" if self.variant else self.layout

    @property
    def parallel(self) -> dict[str, int]:
        """Degrees by axis; dp_shard is 1 unless it is given."""
        named = (pair.split("=") for pair in self.degrees.split())
        return {"dp_shard": 1} | {axis: int(degree) for axis, degree in named}

    @property
    def processes(self) -> int:
        """How many this row needs."""
        # The ranks of ep are taken from those of dp_shard and cp.
        return int(np.prod([self.parallel[axis] for axis in self.parallel if axis != "ep"]))

    @property
    def overrides(self) -> tuple[str, ...]:
        """All options of the row."""
        return (
            *(f"parallel.{axis}={degree}" for axis, degree in self.parallel.items()),
            *VARIANTS[self.variant],
        )

    @property
    def alone(self) -> tuple[str, ...]:
        """The options that one process is trained with."""
        return tuple(text for text in VARIANTS[self.variant] if not text.startswith(SAME))


GRID = [
    Row("dp", "dp_replicate=2", core=True),
    Row("fsdp", "dp_shard=2", "unequal counts", core=True),
    Row("fsdp", "dp_shard=2", "ZeRO 2"),
    Row("hsdp", "dp_replicate=2 dp_shard=2", core=True),
    Row("hsdp", "dp_replicate=2 dp_shard=2", "tied"),
    Row("tp", "tp=2"),
    Row("tp", "tp=2", "accumulated"),
    Row("tp", "tp=2", "tied", core=True),
    Row("tp", "tp=2", "no biases, serial", core=True),
    Row("fsdp", "dp_shard=2", "selective"),
    Row("tp", "tp=2", "recompute"),
    Row("tp", "tp=2", "selective"),
    Row("tp", "tp=2", "compiled"),
    Row("tp", "tp=4"),
    Row("dp x tp", "dp_replicate=2 tp=2"),
    Row("dp x tp", "dp_replicate=2 tp=2", "accumulated"),
    Row("fsdp x tp", "dp_shard=2 tp=2", "unequal counts"),
    Row("fsdp x tp", "dp_shard=2 tp=2", "tied"),
    Row("fsdp x tp", "dp_shard=2 tp=2", "recompute"),
    Row("fsdp x tp", "dp_shard=2 tp=2", "every second"),
    Row("fsdp x tp", "dp_shard=2 tp=2", "compiled, selective"),
    Row("fsdp x tp", "dp_shard=2 tp=2", "uneven"),
    Row("fsdp x tp", "dp_shard=2 tp=2", "selective"),
    Row("fsdp x tp", "dp_shard=2 tp=2", "tied, selective", core=True),
    Row("hsdp x tp", "dp_replicate=2 dp_shard=2 tp=2"),
    Row("cp", "cp=2"),
    Row("cp", "cp=2", "unequal counts", core=True),
    Row("cp", "cp=2", "tied"),
    Row("cp", "cp=2", "recompute"),
    Row("cp", "cp=2", "selective"),
    Row("cp", "cp=2", "compiled"),
    Row("cp", "cp=4"),
    Row("dp x cp", "dp_replicate=2 cp=2", "accumulated"),
    Row("fsdp x cp", "dp_shard=2 cp=2", "unequal counts", core=True),
    Row("fsdp x cp", "dp_shard=2 cp=2", "uneven"),
    Row("hsdp x cp", "dp_replicate=2 dp_shard=2 cp=2"),
    Row("tp x cp", "cp=2 tp=2", "unequal counts"),
    Row("tp x cp", "cp=2 tp=2", "tied"),
    Row("fsdp x tp x cp", "dp_shard=2 cp=2 tp=2", "unequal counts"),
    Row("pp", "pp=2", "1f1b"),
    Row("pp", "pp=2", "1f1b, compiled"),
    Row("pp", "pp=2", "gpipe"),
    Row("pp", "pp=2", "interleaved, tied"),
    Row("pp", "pp=2", "zero bubble, tied"),
    Row("pp", "pp=2", "zero bubble in a V"),
    Row("pp", "pp=2", "zero bubble, recompute"),
    Row("pp", "pp=4", "four layers"),
    Row("dp", "dp_replicate=2", "conversations"),
    Row("tp", "tp=2", "conversations"),
    Row("pp", "pp=2", "conversations"),
    Row("fsdp x cp", "dp_shard=2 cp=2", "conversations", core=True),
    Row("fsdp", "dp_shard=2", "answers, two updates", core=True),
    Row("tp", "tp=2", "answers"),
    Row("pp", "pp=2", "answers, 1f1b"),
    Row("fsdp", "dp_shard=2", "answers"),
    Row("pp", "pp=2", "answers, interleaved"),
    Row("pp x tp", "pp=2 tp=2", "answers, 1f1b"),
    Row("pp x tp", "pp=2 tp=2", "answers, 1f1b, tied", core=True),
    Row("pp x fsdp", "pp=2 dp_shard=2", "answers, 1f1b"),
    Row("pp x dp", "pp=2 dp_replicate=2", "1f1b, tied", core=True),
    Row("pp x fsdp", "pp=2 dp_shard=2", "1f1b"),
    Row("pp x fsdp", "pp=2 dp_shard=2", "ZeRO 2"),
    Row("pp x fsdp", "pp=2 dp_shard=2", "zero bubble"),
    Row("pp x hsdp", "pp=2 dp_replicate=2 dp_shard=2", "one row at a time"),
    Row("pp x tp", "pp=2 tp=2", "1f1b"),
    Row("pp x tp", "pp=2 tp=2", "1f1b, tied"),
    Row("pp x tp", "pp=2 tp=2", "interleaved, tied"),
    Row("pp x tp", "pp=2 tp=2", "zero bubble"),
    Row("pp x cp", "pp=2 cp=2", "1f1b"),
    Row("pp x cp", "pp=2 cp=2", "curriculum and ramp", core=True),
    Row("pp x cp", "pp=2 cp=2", "zero bubble, tied"),
    Row("pp x tp x cp", "pp=2 cp=2 tp=2", "1f1b"),
    Row("pp x dp x tp", "pp=2 dp_replicate=2 tp=2", "1f1b, tied"),
    Row("pp x fsdp x tp", "pp=2 dp_shard=2 tp=2", "1f1b"),
    Row("tp", "tp=4", "llama"),
    Row("tp", "tp=2", "llama, recompute"),
    Row("tp", "tp=4", "llama, compiled, selective"),
    Row("fsdp", "dp_shard=2", "llama"),
    Row("cp", "cp=2", "llama"),
    Row("fsdp x tp", "dp_shard=2 tp=2", "llama, compiled"),
    Row("fsdp x tp", "dp_shard=2 tp=4", "llama, selective"),
    Row("tp x cp", "cp=2 tp=2", "llama, selective"),
    Row("pp x tp", "pp=2 tp=2", "llama, 1f1b"),
    Row("pp x tp", "pp=2 tp=4", "llama, zero bubble"),
    Row("pp x fsdp x tp", "pp=2 dp_shard=2 tp=2", "llama, 1f1b"),
    Row("pp x cp", "pp=2 cp=2", "llama, 1f1b"),
    Row("tp", "tp=2", "falcon"),
    Row("tp", "tp=4", "falcon, compiled"),
    Row("cp", "cp=2", "falcon, recompute"),
    Row("fsdp", "dp_shard=2", "falcon, selective"),
    Row("fsdp x tp", "dp_shard=2 tp=2", "falcon, recompute"),
    Row("tp x cp", "cp=2 tp=2", "falcon", core=True),
    Row("pp", "pp=2", "falcon, 1f1b"),
    Row("pp x tp", "pp=2 tp=2", "falcon, 1f1b"),
    Row("fsdp x tp x cp", "dp_shard=2 cp=2 tp=2", "falcon, selective"),
    Row("tp", "tp=2", "falcon with alibi"),
    Row("tp x cp", "cp=2 tp=2", "falcon with alibi"),
    Row("pp x tp", "pp=2 tp=2", "falcon with alibi, 1f1b"),
    Row("tp", "tp=4", "mistral"),
    Row("tp x cp", "cp=2 tp=2", "mistral, recompute"),
    Row("pp", "pp=2", "mistral, zero bubble"),
    Row("tp", "tp=2", "olmo2, compiled"),
    Row("tp", "tp=4", "olmo2", core=True),
    Row("tp", "tp=4", "olmo2, recompute"),
    Row("fsdp x tp", "dp_shard=2 tp=2", "olmo2, selective"),
    Row("tp x cp", "cp=2 tp=2", "olmo2"),
    Row("pp x tp", "pp=2 tp=2", "olmo2, 1f1b"),
    Row("tp", "tp=2", "qwen, selective"),
    Row("tp", "tp=4", "qwen"),
    Row("tp", "tp=4", "qwen, compiled"),
    Row("pp x fsdp", "pp=2 dp_shard=2", "qwen, 1f1b"),
    Row("tp", "tp=2", "gpt2", core=True),
    Row("cp", "cp=2", "gpt2"),
    Row("fsdp x tp", "dp_shard=2 tp=2", "gpt2, recompute"),
    Row("pp", "pp=2", "gpt2, 1f1b"),
    Row("pp x tp", "pp=2 tp=2", "gpt2, 1f1b"),
    Row("tp", "tp=2", "neox norm"),
    Row("tp x cp", "cp=2 tp=2", "neox norm, compiled"),
    Row("fsdp", "dp_shard=2", "rpe"),
    Row("tp", "tp=2", "rpe, selective"),
    Row("tp x cp", "cp=2 tp=2", "rpe"),
    Row("tp", "tp=2", "sinusoidal"),
    Row("pp x tp", "pp=2 tp=2", "sinusoidal, 1f1b"),
    Row("fsdp x tp", "dp_shard=2 tp=2", "partial"),
    Row("tp", "tp=2", "no norm weights"),
    Row("dp", "dp_replicate=2", "dropout, accumulated"),
    Row("tp", "tp=2", "dropout, recompute"),
    Row("tp", "tp=2", "dropout, compiled, selective"),
    Row("pp x fsdp", "pp=2 dp_shard=2", "dropout, 1f1b", core=True),
    Row("tp", "tp=4", "llama with dropout"),
    Row("tp x cp", "cp=2 tp=2", "llama with dropout"),
    Row("tp x cp", "cp=2 tp=2", "llama with dropout, unequal counts", core=True),
    Row("pp x tp", "pp=2 tp=2", "llama with dropout, zero bubble"),
    Row("tp", "tp=2", "sparse, compiled"),
    Row("tp x cp", "cp=2 tp=2", "sparse", core=True),
    Row("pp x fsdp", "pp=2 dp_shard=2", "sparse, 1f1b"),
    Row("dp", "dp_replicate=2", "lora, accumulated"),
    Row("tp", "tp=2", "lora, recompute"),
    Row("tp", "tp=2", "lora, compiled, selective"),
    Row("pp x fsdp", "pp=2 dp_shard=2", "lora, 1f1b", core=True),
    Row("pp x tp", "pp=2 tp=2", "dora, zero bubble"),
    Row("fsdp x tp", "dp_shard=2 tp=2", "dora", core=True),
    Row("tp", "tp=4", "llama with lora"),
    Row("tp x cp", "cp=2 tp=2", "llama with lora"),
    Row("tp", "tp=4", "llama with dora"),
    Row("cp", "cp=2", "llama with dora, recompute"),
    Row("pp x fsdp", "pp=2 dp_shard=2", "bitfit, 1f1b"),
    Row("tp", "tp=2", "bitfit"),
    Row("ep", "dp_shard=2 ep=2", "experts with a bias, accumulated", core=True),
    Row("ep x fsdp", "dp_shard=4 ep=2", "experts"),
    Row("fsdp", "dp_shard=2", "experts"),
    Row("dp", "dp_replicate=2", "experts with a bias"),
    Row("fsdp", "dp_shard=4", "experts of odd number"),
    Row("ep x hsdp", "dp_replicate=2 dp_shard=2 ep=2", "experts"),
    Row("ep x hsdp x cp", "dp_replicate=2 dp_shard=2 cp=2 ep=2", "experts"),
    Row("ep", "dp_shard=2 ep=2", "uneven experts"),
    Row("ep", "dp_shard=2 ep=2", "experts beside an MLP, recompute"),
    Row("ep", "dp_shard=2 ep=2", "experts, compiled, selective"),
    Row("ep", "dp_shard=2 ep=2", "experts with room"),
    Row("ep", "dp_shard=2 ep=2", "experts by Sinkhorn"),
    Row("tp", "tp=2", "experts"),
    Row("tp", "tp=2", "experts with room"),
    Row("tp", "tp=2", "split experts, selective"),
    Row("tp", "tp=2", "split experts with room"),
    Row("tp", "tp=2", "experts beside an MLP"),
    Row("ep x tp", "dp_shard=2 tp=2 ep=2", "experts with a bias"),
    Row("ep x tp", "dp_shard=2 tp=2 ep=2", "experts, compiled"),
    Row("ep x tp", "dp_shard=2 tp=2 ep=2", "split experts", core=True),
    Row("ep x tp", "dp_shard=2 tp=2 ep=2", "split experts, compiled"),
    Row("ep x cp", "cp=2 ep=2", "experts by Sinkhorn", core=True),
    Row("ep x cp", "dp_shard=2 cp=2 ep=4", "experts with room, recompute"),
    Row("tp x cp", "cp=2 tp=2", "experts with room"),
    Row("ep x tp x cp", "cp=2 tp=2 ep=2", "split experts"),
    Row("ep x tp x cp", "cp=2 tp=2 ep=2", "experts beside an MLP"),
    Row("pp", "pp=2", "experts with a bias, zero bubble"),
    Row("pp x ep", "pp=2 dp_shard=2 ep=2", "experts with room, 1f1b"),
    Row("pp x ep", "pp=2 dp_shard=2 ep=2", "experts by Sinkhorn, zero bubble"),
    Row("pp x ep", "pp=2 dp_shard=2 ep=2", "experts, interleaved"),
    Row("pp x ep", "pp=2 dp_shard=2 ep=2", "experts, zero bubble, recompute"),
    Row("pp x ep", "pp=2 dp_shard=2 ep=2", "experts, zero bubble in a V"),
    Row("pp x ep x tp", "pp=2 dp_shard=2 tp=2 ep=2", "split experts, 1f1b"),
    Row("pp x ep x tp", "pp=2 dp_shard=2 tp=2 ep=2", "experts with a bias, 1f1b"),
    Row("pp x ep x cp", "pp=2 cp=2 ep=2", "experts with a bias, zero bubble"),
    Row("tp x cp", "cp=2 tp=2", "soft prompt", core=True),
    Row("pp x fsdp", "pp=2 dp_shard=2", "soft prompt, 1f1b"),
    Row("tp", "tp=2", "mamba"),
    Row("tp", "tp=2", "mamba, compiled, selective"),
    Row("tp", "tp=4", "mamba, recompute"),
    Row("fsdp", "dp_shard=2", "mamba, selective"),
    Row("fsdp x tp", "dp_shard=2 tp=2", "mamba, accumulated"),
    Row("pp x tp", "pp=2 tp=2", "mamba, 1f1b"),
    Row("pp", "pp=2", "mamba, zero bubble"),
    Row("tp", "tp=2", "mamba2, compiled"),
    Row("tp", "tp=4", "mamba2"),
    Row("fsdp", "dp_shard=2", "mamba2"),
    Row("fsdp x tp", "dp_shard=2 tp=2", "mamba2, selective"),
    Row("pp x tp", "pp=2 tp=2", "mamba2, zero bubble"),
    Row("tp", "tp=2", "hybrid", core=True),
    Row("tp", "tp=2", "hybrid, compiled"),
    Row("fsdp x tp", "dp_shard=2 tp=2", "hybrid, selective"),
    Row("pp x tp", "pp=2 tp=2", "hybrid, 1f1b"),
    Row("pp", "pp=2", "hybrid, interleaved"),
    Row("fsdp", "dp_shard=2", "gmlp"),
    Row("tp", "tp=4", "gmlp, recompute"),
    Row("tp", "tp=2", "amlp"),
    Row("pp", "pp=2", "amlp, 1f1b", core=True),
    Row("fsdp x tp", "dp_shard=2 tp=2", "amlp, accumulated"),
    Row("pp", "pp=2", "rwkv7, interleaved", core=True),
    Row("pp", "pp=2", "rwkv6, 1f1b"),
    Row("pp", "pp=2", "rwkv7, 1f1b"),
    Row("pp", "pp=2", "rwkv7, zero bubble"),
    Row("pp", "pp=2", "rwkv7, 1f1b, recompute"),
    Row("pp", "pp=2", "rwkv6, interleaved"),
    Row("pp", "pp=2", "attention before rwkv7, interleaved"),
    Row("fsdp", "dp_shard=2", "rwkv6"),
    Row("fsdp", "dp_shard=2", "rwkv7"),
    Row("fsdp", "dp_shard=2", "rwkv7, recompute"),
    Row("fsdp", "dp_shard=2", "rwkv7, compiled"),
    Row("pp x fsdp", "pp=2 dp_shard=2", "rwkv7, 1f1b"),
    Row("hsdp", "dp_replicate=2 dp_shard=2", "rwkv6, selective"),
]


def off_head_boundaries() -> None:
    """The fused QKV split as if it were q, k, v in sequence: ranks take halves of other heads."""
    from castalia.distributed import layout

    right = layout.fill

    def wrong(parameter: torch.Tensor, whole: torch.Tensor) -> None:
        # The reference on one rank keeps its order: both permuted would be equal again.
        if isinstance(parameter, DTensor) and whole.shape[0] == 3 * 32:
            whole = torch.cat(
                [whole.view(2, 3, -1, *whole.shape[1:])[:, c].flatten(0, 1) for c in range(3)]
            )
        right(parameter, whole)

    layout.fill = wrong


def bias_on_every_process() -> None:
    """The bias of row-split matrices added by each process before the sum: GPT-NeoX's old fault."""
    from torch.distributed.tensor.parallel import RowwiseParallel

    right = RowwiseParallel._prepare_output_fn

    def wrong(layouts: Any, local: bool, module: Any, output: Any, mesh: Any) -> Any:
        result = right(layouts, local, module, output, mesh)
        bias = getattr(module, "bias", None)
        return result if bias is None else result + (mesh.size() - 1) * bias.to_local()

    RowwiseParallel._prepare_output_fn = staticmethod(wrong)


def loss_of_own_tokens() -> None:
    """The softmax of each process over its own part of the vocabulary alone."""
    from castalia.distributed.tensor_parallel import VocabPart

    VocabPart.max = lambda self, values: values


def places_of_the_part() -> None:
    """Each process counts the places of the tokens that it holds from 0."""
    from castalia.distributed.context_parallel import SequencePart

    SequencePart.positions = lambda self, T: torch.arange(T)[None]


def keys_out_of_order() -> None:
    """Gathered keys left in the order of the processes."""
    from castalia.distributed import context_parallel

    context_parallel.SequencePart.gather = lambda self, part, dim: context_parallel.gather(
        part, dim, self.group
    )


def first_key_head() -> None:
    """Each process takes the first head of keys where there are fewer of them than processes."""
    from castalia.models.parts.attention import Attention

    # One process alone has all heads.
    Attention.own_keys = lambda self, x, share: x if share.size == 1 else x[:, :1]


def gradient_of_own_heads() -> None:
    """The gradient of a whole parameter is that of this process's heads or tokens alone."""
    from castalia.models.parts import norms, positions

    def wrong(parameter: torch.Tensor) -> torch.Tensor:
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter

    norms.local = wrong
    positions.local = wrong


def draws_of_the_part() -> None:
    """Each process drops by the places of the tokens that it holds, counted from 0."""
    from castalia.models import decoder

    right = decoder.row_positions

    def wrong(context: Any, past: Any) -> Any:
        places, keys = right(context, past)
        return torch.arange(places.shape[1])[None], keys

    decoder.row_positions = wrong


def rows_in_order_of_arrival() -> None:
    """Rows that came from several ranks left in their order, not sorted by expert."""
    from castalia.distributed import expert_parallel

    expert_parallel.order_of_experts = lambda received, rows: torch.arange(rows)


SABOTAGE = {
    "qkv split off head boundaries": off_head_boundaries,
    "row bias on every process": bias_on_every_process,
    "maximum of the own tokens": loss_of_own_tokens,
    "places counted on each process": places_of_the_part,
    "keys in the order of the processes": keys_out_of_order,
    "the first head of keys": first_key_head,
    "gradients of the own heads": gradient_of_own_heads,
    "dropout counted on each process": draws_of_the_part,
    "rows of experts as they arrive": rows_in_order_of_arrival,
}
"""Wrong plans that train without an error."""
SABOTAGED = [
    Row("tp", "tp=2", "accumulated", wrong="qkv split off head boundaries"),
    Row("tp", "tp=2", "accumulated", wrong="row bias on every process"),
    Row("tp", "tp=2", "accumulated", wrong="maximum of the own tokens"),
    Row("cp", "cp=2", "recompute", wrong="places counted on each process"),
    Row("cp", "cp=2", "recompute", wrong="keys in the order of the processes"),
    Row("tp", "tp=4", "llama", wrong="the first head of keys"),
    Row("tp", "tp=2", "gpt2", wrong="gradients of the own heads"),
    Row("tp x cp", "cp=2 tp=2", "llama with dropout", wrong="dropout counted on each process"),
    Row("ep", "dp_shard=2 ep=2", "experts", wrong="rows of experts as they arrive"),
]
"""Each wrong plan in a layout that it breaks; the grid has these rows without it too."""


class ClippedNorm(Hook):
    """`clipped_norm` of each step: the norm of the gradients that the update used."""

    def __init__(self) -> None:
        self.norm = 0.0
        clip = loop.clip_gradients

        def measured(*arguments: Any) -> None:
            clip(*arguments)
            model = self.model
            self.norm = float(gradient_norm(model, without=getattr(model, "copies", ())))

        loop.clip_gradients = measured

    def start(self, *, model: Any) -> None:
        """Remember whose gradients are measured."""
        self.model = model

    def after_step(self, step: Step) -> None:
        """Write it with the metrics, which come later in the list."""
        step.metrics["clipped_norm"] = self.norm


def train(overrides: tuple[str, ...], hooks: list[Hook]) -> None:
    """One run in this process and those of its world."""
    # Compiled code has the names of the process groups of the run that compiled it.
    torch.compiler.reset()
    # An option without a value is the preset of another family.
    presets = [text for text in overrides if "=" not in text]
    options = [text for text in overrides if "=" in text]
    config = load_config([*(presets or BASE[:1]), *BASE[1:], *options])
    with contextlib.redirect_stdout(io.StringIO()):
        loop.Trainer(
            config, World.start(config.parallel, "cpu"), hooks=[*hooks, Metrics(), Save()]
        ).fit()


def serve(
    rank: int,
    size: int,
    port: int,
    runs: list[tuple[str, ...]],
    hooks: tuple[type[Hook], ...],
    wrong: str,
) -> None:
    """All runs of one world size and wrong plan, one after the other, in one of its processes."""
    if wrong:
        SABOTAGE[wrong]()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    clipped = ClippedNorm()
    for overrides in runs:
        train(overrides, [clipped, *(hook() for hook in hooks)])
    leave()


def launch(
    size: int,
    runs: list[tuple[str, ...]],
    hooks: tuple[type[Hook], ...] = (),
    wrong: str = "",
) -> None:
    """Train `runs` on `size` forked ranks, with further hooks and a wrong plan; the first error
    ends all."""
    # Imports what takes seconds in each rank otherwise.
    torch.compiler.reset()
    with held_port() as port:
        processes.start_processes(
            serve, (size, port, runs, hooks, wrong), nprocs=size, start_method="fork"
        )


def write_tokens(folder: Path) -> Path:
    """Documents that end in the end-of-document id at irregular places."""
    random = np.random.default_rng(1)
    with IndexedDatasetWriter(folder / "text", "uint16") as writer:
        for size in random.integers(3, 60, 200):
            writer.add([*random.integers(97, 123, size), 256])
    return folder / "text"


def write_chat(folder: Path) -> Path:
    """Conversations of unequal length, whose answers count more or less."""
    random = np.random.default_rng(2)
    path = folder / "chat.jsonl"
    with path.open("w") as file:
        for number in range(60):
            words = ["ab " * int(count) for count in random.integers(1, 7, 2)]
            answer = {"role": "assistant", "content": words[1], "weight": 0.5 + number % 3}
            messages = [{"role": "user", "content": words[0]}, answer]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def largest_difference(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Of one parameter. A key bias has a noise gradient, which Adam turns into steps of size lr."""
    difference = (ours - theirs).abs()
    if name.endswith(("attn.k.bias", "k_norm.bias")):
        return 0.0
    if name.endswith("qkv.bias"):
        difference = difference.view(-1, 3, HEAD_DIM)[:, [0, 2]]
    return float(difference.max())


def loads_apart(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """How far the statistics of experts of two steps are apart; infinite where their counts, and
    with them loads and drops, are not the same."""
    exact = ("moe/load_max", "moe/dropped")
    loads = [[layer["load"] for layer in line.get("moe/layers", ())] for line in (ours, theirs)]
    if loads[0] != loads[1] or any(ours.get(key) != theirs.get(key) for key in exact):
        return np.inf
    sums = [key for key in theirs if key.startswith("moe/") and key != "moe/layers"]
    return max((abs(ours[key] - theirs[key]) for key in sums), default=0.0)


def compare(ours: Path, theirs: Path, last: int = STEPS) -> dict[str, Any]:
    """Largest differences of two runs of `last` steps, and whether they read the same rows."""
    a, b = lines_of(ours), lines_of(theirs)
    at_start, expected_start = (
        read(path / "checkpoints" / "step-00000000") for path in (ours, theirs)
    )
    weights, expected = (read(path / "checkpoints" / step_name(last)) for path in (ours, theirs))
    assert weights.keys() == expected.keys(), weights.keys() ^ expected.keys()
    of_lines = {
        key: max(abs(x[key] - y[key]) for x, y in zip(a, b, strict=True))
        for key in ("loss", "clipped_norm", "tokens")
    }
    of_lines["experts"] = max(loads_apart(x, y) for x, y in zip(a, b, strict=True))
    return of_lines | {
        "weights": max(
            largest_difference(name, weights[name], expected[name]) for name in expected
        ),
        "same start": all(
            torch.equal(at_start[name], expected_start[name]) for name in expected_start
        ),
        "same rows": [line["rows_hash"] for line in a] == [line["rows_hash"] for line in b],
    }


def passes(found: dict[str, Any]) -> bool:
    """Whether a row of the grid is equal to one process."""
    close = all(found[key] <= LIMIT for key in ("loss", "clipped_norm", "weights", "experts"))
    return close and found["same start"] and found["same rows"] and found["tokens"] == 0


def base_of(options: tuple[str, ...]) -> tuple[str, ...]:
    """The options of the run whose weights an adapter is trained over."""
    return tuple(text for text in options if text.startswith("model.") and text != START)


def run_grid(rows: list[Row], folder: Path) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Train everything, then compare row by row."""
    base = f"data.train={write_tokens(folder)}"
    alone = {row.alone: folder / f"alone-{number}" for number, row in enumerate(rows)}
    bases = {base_of(options): folder / f"base-{number}" for number, options in enumerate(alone)}

    chat = f"data.chat={write_chat(folder)}"

    def begun(options: tuple[str, ...]) -> tuple[str, ...]:
        places = {START: f"model.start={bases[base_of(options)]}", CHAT: chat}
        return tuple(places.get(text, text) for text in options)

    used = {base_of(options) for options in alone if START in options}
    launch(
        1,
        [
            *((base, f"output={bases[options]}", *options, "train.steps=1") for options in used),
            *(
                (base, f"output={path}", "parallel.dp_shard=1", *begun(options))
                for options, path in alone.items()
            ),
        ],
    )
    places = {row: folder / f"row-{number}" for number, row in enumerate(rows)}
    for size, wrong in sorted({(row.processes, row.wrong) for row in rows}):
        ours = [row for row in rows if (row.processes, row.wrong) == (size, wrong)]
        runs = [(base, f"output={places[row]}", *begun(row.overrides)) for row in ours]
        launch(size, runs, wrong=wrong)
    for row in rows:
        yield row, compare(places[row], alone[row.alone])


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="every row, not only the core")
    parser.add_argument("--only", help="the rows whose name or degrees hold these words")
    parser.add_argument("--json", type=Path, help="write the differences there too")
    parser.add_argument("--sabotage", action="store_true", help="the rows of each wrong plan")
    options = parser.parse_args()
    rows = [row for row in GRID if options.all or options.only or row.core]
    rows = SABOTAGED if options.sabotage else rows
    rows = [row for row in rows if not options.only or options.only in f"{row.name} {row.degrees}"]
    torch.set_num_threads(1)
    found = {}
    print(f"{'layout':34} {'degrees':32} {'loss':>9} {'grad norm':>9} {'weights':>9}  rows   start")
    with tempfile.TemporaryDirectory() as folder:
        for row, result in run_grid(rows, Path(folder)):
            numbers = " ".join(f"{result[key]:9.1e}" for key in ("loss", "clipped_norm", "weights"))
            rows_are = "same" if result["same rows"] and result["tokens"] == 0 else "DIFFER"
            start = "same" if result["same start"] else "DIFFERS"
            verdict = "" if passes(result) else "  FAILS"
            print(
                f"{row.name:34} {row.degrees:32} {numbers}  {rows_are:6} {start}{verdict}",
                flush=True,
            )
            found[f"{row.name} ({row.degrees})"] = result | {"passes": passes(result)}
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    failed = sum(not result["passes"] for result in found.values())
    print(f"{len(found) - failed} of {len(found)} layouts equal one process within {LIMIT:g}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
