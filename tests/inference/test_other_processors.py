"""The compiled step for ARM, run by qemu, against the step of this machine."""

import ctypes
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from torch import Tensor

from castalia.core import compilers
from castalia.core.levels import DOTPROD, NEON, Level
from castalia.distributed import initialize
from castalia.models import Decoder
from castalia.models.families.llama import LlamaConfig
from castalia.models.init import start_weights
from castalia.native import compiled
from castalia.native.cache import FusedCache
from castalia.native.fused import FusedForward
from castalia.native.structs import CBatch, CCache, CModel
from castalia.native.weights import packed_weights

COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64")
NUMBERS = {"fp32": "fp32", "bf16": "bf16", "int8": "int8", "int4": "fp32"}
"""Weights, and keys and values."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="no aarch64-linux-gnu-g++ here"),
    pytest.mark.skipif(EMULATOR is None, reason="no qemu-aarch64 here"),
    pytest.mark.skipif(compiled.library() is None, reason="no compiled step to compare with"),
]


class Image:
    """Memory that another process gets, with the addresses in it as offsets."""

    def __init__(self) -> None:
        self.memory = bytearray()
        self.places: dict[int, int] = {}
        self.structures: list[tuple[int, int]] = []

    def add(self, address: int, size: int) -> None:
        """Copy `size` bytes from an address."""
        self.memory += bytes(-len(self.memory) % 64)
        self.places[address] = len(self.memory)
        self.memory += ctypes.string_at(address, size)

    def add_structure(self, structure: ctypes.Structure | ctypes.Array) -> int:  # type: ignore[type-arg]
        """Copy what has addresses in it; returns its offset."""
        self.add(ctypes.addressof(structure), ctypes.sizeof(structure))
        offset = self.places[ctypes.addressof(structure)]
        self.structures.append((offset, ctypes.sizeof(structure)))
        return offset

    def relocations(self) -> list[int]:
        """Replace every known address in the structures by an offset; where they stand."""
        found = []
        for offset, size in self.structures:
            for at in range(offset, offset + size, 8):
                (value,) = struct.unpack_from("<q", self.memory, at)
                if value in self.places:
                    struct.pack_into("<q", self.memory, at, self.places[value])
                    found.append(at)
        return found


class Emulated:
    """castalia_forward of a program for another processor, run by the emulator."""

    def __init__(self, program: Path, processor: str) -> None:
        self.command = [str(EMULATOR), "-cpu", processor, str(program)]
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


@pytest.fixture(scope="module", params=[NEON, DOTPROD], ids=lambda level: level.name)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """emulated.cpp for one level."""
    level: Level = request.param
    path = tmp_path_factory.mktemp("arm") / level.name
    left_out = ("-shared", "-Wno-pass-failed")
    flags = [flag for flag in compilers.FLAGS if flag not in left_out]
    source = Path(__file__).with_name("emulated.cpp")
    define = f'-DCASTALIA_LEVEL="{level.name}"'
    command = [str(COMPILER), *flags, *level.flags, define, "-static", str(source)]
    subprocess.run([*command, "-o", str(path)], check=True)
    return path


@pytest.mark.parametrize("numbers", NUMBERS)
def test_arm_computes_what_this_machine_computes(program: Path, numbers: str) -> None:
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 128}
    model = Decoder(LlamaConfig(**sizes, num_kv_heads=2, max_position_embeddings=64))
    initialize(model, start_weights(model.config, 1))
    weights = packed_weights(model.state_dict(), model.config, numbers)
    ids = [5, 9, 2, 7] * 5 + [1]

    def logits(native: object) -> Tensor:
        forward = FusedForward(weights, native, NUMBERS[numbers])  # type: ignore[arg-type]
        cache = forward.new_cache(1, 32)
        if isinstance(native, Emulated):
            native.forward = forward
            native.tensors = tensors_of(forward, cache)
        return forward.run(cache, ids, [0] * 21, range(21), [3, 20]).clone()

    want = logits(compiled.library())
    # A Cortex-A72 has no dot product, so a program for NEON alone must run on it.
    got = logits(Emulated(program, "max" if program.name == "dotprod" else "cortex-a72"))
    assert (got - want).norm() < 1e-5 * want.norm()


def tensors_of(forward: FusedForward, cache: FusedCache) -> list[Tensor]:
    """All that the structures point to."""
    products = forward.weights.products.values()
    found = [t for p in products for t in (p.weight, p.scale, p.bias) if t is not None]
    found += [*forward.kept, forward.weights.embed, cache.k, cache.v, cache.k_scale, cache.v_scale]
    if forward.weights.embed_scale is not None:
        found.append(forward.weights.embed_scale)
    return [tensor for tensor in found if tensor.numel()]
