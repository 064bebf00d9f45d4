"""The compiled step for ARM, run by qemu, against the step of this machine."""

import ctypes
import signal
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from tests.fixtures.emulation import (
    LEVELS,
    PROCESSORS,
    Image,
    build_program,
    emulated,
    needs_emulation,
)
from torch import Tensor

from castalia.core.levels import AUXV, instructions_of_auxv
from castalia.distributed import initialize
from castalia.models import Decoder
from castalia.models.families.llama import LlamaConfig
from castalia.models.init import start_weights
from castalia.native import compiled
from castalia.native.cache import FusedCache
from castalia.native.fused import FusedForward
from castalia.native.structs import CBatch, CCache, CModel
from castalia.native.weights import packed_weights

NUMBERS = {"fp32": "bf16", "bf16": "fp32", "int8": "int8", "int4": "fp32"}
"""Weights, and keys and values. Rounded ones differ by a whole step where sums differ in the 17th
bit, as those of bf16 weights do on i8mm."""
SIZES = {"fp32": (64, 4), "bf16": (54, 3), "int8": (60, 5), "int4": (64, 4)}
"""Width and heads. i8mm multiplies 4 bfloat16 numbers or 8 bytes, so some are left over."""
MISSING = {
    ("dotprod", "int8"): "cortex-a72",
    ("i8mm", "bf16"): "neoverse-n1",
    ("i8mm", "int8"): "neoverse-n1",
    ("i8mm", "int4"): "neoverse-n1",
}
"""A processor that lacks what a level needs for weights of a kind."""

pytestmark = [
    pytest.mark.slow,
    *needs_emulation,
    pytest.mark.skipif(compiled.library() is None, reason="no compiled step to compare with"),
]


class Emulated:
    """castalia_forward of a program for another processor, run by the emulator."""

    def __init__(self, program: Path, processor: str) -> None:
        self.command = emulated(program, processor)
        self.tensors: list[Tensor] = []
        self.forward: FusedForward | None = None

    def castalia_forward(self, model: int, cache: int, batch: int, threads: int) -> int:
        """As the library's."""
        assert self.forward is not None
        image = Image()
        for tensor in self.tensors:
            image.add(tensor.data_ptr(), tensor.nbytes)
        image.add_structure(self.forward.layers)
        wanted = CBatch.from_address(batch)
        for name, count in (("token", wanted.rows), ("slot", wanted.rows), ("pick", wanted.wanted)):
            image.add(getattr(wanted, name), 8 * count)
        image.add(wanted.position, 8 * wanted.rows)
        size = 4 * wanted.wanted * CModel.from_address(model).vocab
        image.add(wanted.logits, size)
        types = ((CModel, model), (CCache, cache), (CBatch, batch))
        offsets = [image.add_structure(kind.from_address(at)) for kind, at in types]
        found = image.relocations()
        header = struct.pack("<6q", len(image.memory), len(found), *offsets, threads)
        sent = header + image.memory + struct.pack(f"<{len(found)}q", *found)
        done = subprocess.run(self.command, input=sent, capture_output=True, check=True)
        assert len(done.stdout) == size
        ctypes.memmove(wanted.logits, done.stdout, size)
        return 0


@pytest.fixture(scope="module", params=PROCESSORS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """emulated.cpp for one level."""
    source = Path(__file__).with_name("emulated.cpp")
    return build_program(source, request.param, tmp_path_factory.mktemp("arm"))


def logits(numbers: str, native: object) -> Tensor:
    """Of one token, then of 23 after five of them, by a library or a program."""
    width, heads = SIZES[numbers]
    sizes = {"num_layers": 2, "hidden_size": width, "num_attention_heads": heads}
    config = LlamaConfig(**sizes, vocab_size=128, num_kv_heads=1, max_position_embeddings=64)
    model = Decoder(config)
    initialize(model, start_weights(config, 1))
    weights = packed_weights(model.state_dict(), config, numbers)
    forward = FusedForward(weights, native, NUMBERS[numbers])  # type: ignore[arg-type]
    cache = forward.new_cache(1, 32)
    if isinstance(native, Emulated):
        native.forward = forward
        native.tensors = tensors_of(forward, cache)
    # One row has kernels of its own.
    one = forward.run(cache, [5], [0], [0], [0]).clone()
    # Four rows share a pass: three are left of 23, and one of those that are picked.
    ids = [5, 9, 2, 7] * 5 + [1, 3, 8]
    return torch.cat([one, forward.run(cache, ids, [0] * 23, range(23), [3, 9, 10, 20, 22])])


@pytest.mark.parametrize("numbers", NUMBERS)
def test_arm_computes_what_this_machine_computes(program: Path, numbers: str) -> None:
    want = logits(numbers, compiled.library())
    got = logits(numbers, Emulated(program, PROCESSORS[program.name]))
    assert (got - want).norm() < 1e-5 * want.norm()


def test_a_level_needs_its_instructions(program: Path) -> None:
    for (level, numbers), processor in MISSING.items():
        if level != program.name:
            continue
        with pytest.raises(subprocess.CalledProcessError) as caught:
            logits(numbers, Emulated(program, processor))
        assert caught.value.returncode == -signal.SIGILL


def test_a_processor_gets_the_best_level_that_it_runs(program: Path) -> None:
    command = [*emulated(program, PROCESSORS[program.name]), str(AUXV)]
    content = subprocess.run(command, capture_output=True, check=True).stdout
    best = [level for level in LEVELS.values() if level.needs <= instructions_of_auxv(content)]
    assert best[-1].name == program.name


def tensors_of(forward: FusedForward, cache: FusedCache) -> list[Tensor]:
    """All that the structures point to."""
    products = forward.weights.products.values()
    found = [t for p in products for t in (p.weight, p.scale, p.bias) if t is not None]
    found += [*forward.kept, forward.weights.embed, cache.k, cache.v, cache.k_scale, cache.v_scale]
    if forward.weights.embed_scale is not None:
        found.append(forward.weights.embed_scale)
    return [tensor for tensor in found if tensor.numel()]
