"""Packed weights and every kernel against plain products in float64."""

import ctypes
from typing import Any

import pytest
import torch

from castalia.attention.library import attention_library
from castalia.core import compilers, native_code
from castalia.core.errors import ConfigError
from castalia.core.levels import LEVELS, V3, Level, architecture, levels_here
from castalia.data.compiled_order import order_library
from castalia.distributed import initialize
from castalia.inference.torch_engine import TorchEngine
from castalia.machine.onednn import byte_steps
from castalia.models import Decoder
from castalia.models.families.llama import LlamaConfig
from castalia.models.init import start_weights
from castalia.models.quantizing import GROUP
from castalia.native import compiled
from castalia.native.fused import FusedForward
from castalia.native.kernels import KERNELS, candidates, make, steps_of
from castalia.native.packing import (
    STORAGES,
    dense,
    in_panels,
    in_rows,
    pack,
    quantized_rows,
)
from castalia.native.tuning import chosen
from castalia.native.weights import packed_weights
from castalia.recurrent.compiled_scan import scan_library

ROUNDING = {"fp32": 1e-6, "bf16": 0.01, "fp16": 0.002, "int8": 0.01, "int8 tensor": 0.02}
"""What a kernel's treatment of activations may change, against the largest output."""


@pytest.fixture(scope="module")
def layer() -> tuple[torch.Tensor, torch.Tensor]:
    """W (100, 64), no multiple of a panel, and a bias."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(100, 64, generator=generator), torch.randn(100, generator=generator)


def test_panels_hold_sixteen_channels_side_by_side() -> None:
    rows = torch.arange(32 * 8).view(32, 8)
    panels = in_panels(rows, 4)
    assert panels.shape == (2, 2, 16, 4)
    assert panels[1, 0, 3].tolist() == rows[19, :4].tolist()
    assert torch.equal(in_rows(panels), rows)


def test_int8_is_the_nearest_of_255_steps(layer: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, bias = layer
    packed = pack(weight, bias, "int8")
    step = weight.abs().amax(1, keepdim=True) / 127
    assert torch.equal(quantized_rows(packed)[0][:100], (weight / step).round().to(torch.int8))
    assert ((dense(packed) - weight).abs() <= step / 2 * 1.0001).all()


def test_int4_is_better_than_the_largest_weight_alone_makes_it(
    layer: tuple[torch.Tensor, torch.Tensor],
) -> None:
    weight, _ = layer
    groups = weight.unflatten(1, (-1, GROUP))
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True)) / -8
    plain = ((groups / largest).round().clamp(-8, 7) * largest).flatten(1)
    ours = dense(pack(weight, None, "int4"))
    assert (ours - weight).square().mean() < 0.97 * (plain - weight).square().mean()


def test_zeros_stay_zeros() -> None:
    for storage in STORAGES:
        assert not dense(pack(torch.zeros(16, 32), None, storage)).any()
    assert not steps_of(torch.zeros(2, 8))[0].any()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("rows", [1, 3, 8, 21])
def test_every_kernel_is_the_same_product(
    layer: tuple[torch.Tensor, torch.Tensor], storage: str, rows: int
) -> None:
    packed = pack(*layer, storage)
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1))
    want = x.double() @ dense(packed).double().T + layer[1].double()
    for name in candidates(storage):
        error = (make(name, packed)(x) - want).abs().max() / want.abs().max()
        bound = ROUNDING[KERNELS[name].activations]
        if name == "int8_onednn":
            bound *= 255 / byte_steps()
        assert error < bound, name


@pytest.mark.skipif(compiled.library() is None, reason="no C++ compiler here")
@pytest.mark.parametrize("rows", [1, 2, 5, 9, 16])
@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_whole_numbers_are_summed_exactly(
    layer: tuple[torch.Tensor, torch.Tensor], storage: str, rows: int
) -> None:
    packed = pack(*layer, storage)
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(2))
    q, step = steps_of(x)
    want = (q.double() * step.double()) @ dense(packed).double().T + layer[1].double()
    got = make("compiled", packed)(x)
    assert (got - want).abs().max() < 3e-6 * want.abs().max()
    if storage == "int8":
        assert (got - make("int8_dynamic", packed)(x)).abs().max() < 3e-6 * want.abs().max()


PLAIN = Level("plain", frozenset())
"""What every compiler makes without a flag."""
BUILT = [level for level in LEVELS.get(architecture(), ()) if level.has_code]
USUAL = [V3, *[level for level in levels_here() if level.has_code][:1]]
"""The best of this machine, which other tests need too, and one that nearly all have; a build takes
ten seconds."""


@pytest.mark.skipif(compilers.chosen_compiler() is None, reason="no C++ compiler here")
@pytest.mark.parametrize(
    "level",
    [
        # Plain C++ is slow.
        pytest.param(PLAIN, id="plain", marks=pytest.mark.slow),
        *(
            pytest.param(level, id=level.name, marks=() if level in USUAL else pytest.mark.slow)
            for level in BUILT
        ),
    ],
)
def test_all_levels_sum_the_same(layer: tuple[torch.Tensor, torch.Tensor], level: Level) -> None:
    if level is not PLAIN and level not in levels_here():
        pytest.skip("this processor lacks its instructions")
    compiler = compilers.chosen_compiler()
    assert compiler is not None
    code = native_code.machine_code(compiled.SOURCE, compiler, level)
    native = compiled.declared(native_code.load(code, level.name))
    assert native.castalia_level().decode() == level.name
    x = torch.randn(11, 64, generator=torch.Generator().manual_seed(2))
    q, step = steps_of(x)
    for storage in compiled.KINDS:
        packed = pack(*layer, storage)
        inputs = q.double() * step.double() if storage.startswith("int") else x.double()
        want = inputs @ dense(packed).double().T + layer[1].double()
        got = compiled.multiply(native, compiled.c_linear(packed), x, 100)
        # i8mm and amx have activations for bf16 as the sum of two numbers of 8 bits.
        bound = (2**-17 if storage == "bf16" else 3e-6) * want.abs().max()
        assert (got - want).abs().max() < bound
        # One row has kernels of its own.
        alone = compiled.multiply(native, compiled.c_linear(packed), x[:1], 100)
        assert (alone - want[:1]).abs().max() < bound
    # Without a bias nothing rounds but the product of two scales and an integer.
    packed = pack(layer[0], None, "int8")
    got = compiled.multiply(native, compiled.c_linear(packed), x, 100)
    sums = (q.double() @ quantized_rows(packed)[0][:100].double().T).float()
    scale = packed.scale
    assert scale is not None
    assert torch.equal(got, sums * (scale[:100] * step))
    assert torch.equal(compiled.multiply(native, compiled.c_linear(packed), x[:1], 100), got[:1])
    require_whole_steps(native)


def require_whole_steps(plain: ctypes.CDLL) -> None:
    """Attention has kernels of its own for every cache."""
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 128}
    model = Decoder(LlamaConfig(**sizes, num_kv_heads=2, max_position_embeddings=64))
    initialize(model, start_weights(model.config, 1))
    weights = packed_weights(model.state_dict(), model.config, "fp32")
    ids = list(range(40))
    want = TorchEngine(model).logits(ids)
    for cache, bound in {"fp32": 1e-5, "bf16": 0.004, "int8": 0.008}.items():
        forward = FusedForward(weights, plain, cache)
        got = forward.run(forward.new_cache(1, 40), ids, [0] * 40, range(40), range(40))
        assert (got - want).norm() < bound * want.norm()


def test_without_a_compiler_torch_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASTALIA_CXX", "none")
    assert compilers.chosen_compiler() is None
    assert compiled.library.__wrapped__() is None


@pytest.mark.parametrize(
    ("library", "sentence"),
    [
        (compiled.library, "compiling the native kernels failed, so torch's are used"),
        (scan_library, "compiling the scan of Mamba failed, so the scan in torch is used"),
        (
            attention_library,
            "compiling attention failed, so torch's operators are used",
        ),
        (order_library, "compiling the shuffles of orders failed, so numpy's are used"),
    ],
)
def test_a_compiler_that_fails_is_named_with_what_takes_over(
    monkeypatch: pytest.MonkeyPatch, library: Any, sentence: str
) -> None:
    monkeypatch.setenv("CASTALIA_CXX", "false")
    with pytest.warns(UserWarning, match=sentence):
        assert library.__wrapped__() is None


def test_a_kernel_is_chosen_for_every_shape_and_remembered(
    layer: tuple[torch.Tensor, torch.Tensor],
) -> None:
    packed = pack(*layer, "int8")
    first = chosen([packed], "int8", "torch")
    assert set(first) == {(100, 64)} and first[100, 64] in candidates("int8", "torch")
    assert chosen([packed], "int8", "torch") == first
    assert chosen([packed], "int8", "int8_dynamic") == {(100, 64): "int8_dynamic"}


def test_bad_input_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="int4 packs 32 inputs together, and a layer has 48"):
        pack(torch.zeros(16, 48), None, "int4")
    with pytest.raises(
        ConfigError, match=r"unknown kernel 'cutlass'; choose one of .*int8_dynamic"
    ):
        candidates("int8", "cutlass")
    with pytest.raises(ConfigError, match="'int8_dynamic' does not read int4 weights"):
        candidates("int4", "int8_dynamic")
