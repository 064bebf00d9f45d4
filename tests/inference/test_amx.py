"""The products of AMX, on a model of its instructions: no emulator has them."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from castalia.core import compilers, levels
from castalia.core.levels import AMX, BF16, levels_here
from castalia.distributed import initialize
from castalia.models import Decoder
from castalia.models.families.llama import LlamaConfig
from castalia.models.init import start_weights
from castalia.native import compiled
from castalia.native.fused import FusedForward
from castalia.native.kernels import steps_of
from castalia.native.packing import dense, pack
from castalia.native.weights import packed_weights

COMPILER = compilers.chosen_compiler()
ROWS = (1, 15, 16, 17, 40, 64, 150)
"""Fewer than a tile has, some tiles, more than share a pass, and a rest that has none."""
INPUTS = {"int8": (64, 192, 96), "bf16": (32, 160, 48), "int4": (64,), "fp32": (64,)}
"""The last of int8 and bf16 do not fill a tile; int4 and fp32 take none."""
BOUNDS = {"int8": 3e-6, "int4": 3e-6, "bf16": 2**-17, "fp32": 1e-6}
"""bf16 has activations as the sum of two numbers of 8 bits."""


@pytest.fixture(scope="module")
def modelled(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The compiled step at this machine's level, with the model's tiles."""
    level = next((level for level in levels_here() if level.has_code), None)
    if level is None or levels.architecture() != "x86_64" or COMPILER is None:
        pytest.skip("no compiler for x86-64 here")
    path = tmp_path_factory.mktemp("amx") / "step.so"
    model = ("-include", str(Path(__file__).with_name("amx_model.h")))
    command = [*COMPILER, *compilers.options(COMPILER, level), *model, str(compiled.SOURCE)]
    subprocess.run([*command, "-o", str(path)], check=True, capture_output=True)
    return compiled.declared(ctypes.CDLL(str(path)))


@pytest.mark.slow
def test_tiles_compute_the_products(modelled: ctypes.CDLL) -> None:
    made = torch.Generator().manual_seed(1)
    for storage, widths in INPUTS.items():
        for inputs in widths:
            weight = torch.randn(90, inputs, generator=made)
            bias = torch.randn(90, generator=made)
            packed = pack(weight, bias, storage)
            for rows in ROWS:
                x = torch.randn(rows, inputs, generator=made)
                q, step = steps_of(x)
                whole = q.double() * step.double() if storage.startswith("int") else x.double()
                want = whole @ dense(packed).double().T + bias.double()
                got = compiled.multiply(modelled, compiled.c_linear(packed), x, 90)
                error = (got - want).abs().max() / want.abs().max()
                assert error < BOUNDS[storage], (storage, inputs, rows)


@pytest.mark.slow
def test_a_step_with_tiles_is_the_step_without(modelled: ctypes.CDLL) -> None:
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 128}
    config = LlamaConfig(**sizes, num_kv_heads=2, max_position_embeddings=64)
    model = Decoder(config)
    initialize(model, start_weights(config, 1))
    ids = list(range(37))
    for storage in ("int8", "bf16"):
        weights = packed_weights(model.state_dict(), config, storage)
        logits = []
        for native in (compiled.library(), modelled):
            forward = FusedForward(weights, native, "fp32")
            cache = forward.new_cache(1, 48)
            logits.append(forward.run(cache, ids, [0] * 37, range(37), range(37)).clone())
        want, got = logits
        assert (got - want).norm() < 1e-5 * want.norm(), storage


def test_amx_is_used_where_it_is_asked_for_and_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "architecture", lambda: "x86_64")
    monkeypatch.setattr(levels, "instructions", lambda: AMX.needs)
    monkeypatch.delenv("CASTALIA_ISA", raising=False)
    monkeypatch.setattr(levels, "tiles_are_allowed", lambda: True)
    assert levels_here()[0] is BF16
    monkeypatch.setenv("CASTALIA_ISA", "amx")
    assert [level.name for level in levels_here()[:2]] == ["amx", "bf16"]
    monkeypatch.setattr(levels, "tiles_are_allowed", lambda: False)
    assert levels_here()[0] is BF16


def test_a_system_without_the_permission_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels.platform, "system", lambda: "Darwin")
    assert not levels.tiles_are_allowed()
    monkeypatch.undo()
    if "amx_tile" not in levels.instructions():
        assert not levels.tiles_are_allowed()
