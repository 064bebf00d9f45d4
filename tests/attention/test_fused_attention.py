"""The compiled attention against the definition in float64: results, gradients, masks, chunks,
levels of instructions; and bits that follow from a row alone.
"""

import ctypes
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tests.fixtures.emulation import PROCESSORS, Image, build_program, emulated, needs_emulation
from torch import Tensor

from castalia.attention import fused_attention as module
from castalia.attention.fused_attention import (
    Arguments,
    call,
    fused_attention,
    fused_attention_backward,
)
from castalia.attention.library import SOURCE, attention_library, fuses, typed
from castalia.core.compilers import chosen_compiler
from castalia.core.levels import levels_here
from castalia.core.native_code import load, machine_code
from castalia.models import NeoxConfig
from castalia.models.parts.causal_attention import causal_attention
from castalia.models.parts.rotary import Rope, rope_tables, rotate_heads

pytestmark = pytest.mark.skipif(attention_library() is None, reason="no compiled attention here")
LIMITS = {torch.float32: 3e-6, torch.bfloat16: 6e-3}
"""Root mean square of an error, against that of the exact result."""


class Shape(NamedTuple):
    """Rows, heads, key heads, queries, width; chunks of a row; the rest as it says."""

    B: int
    H: int
    K: int
    T: int
    D: int
    starts: tuple[int, ...] = (0,)
    keys: int = 0
    turned: bool = False
    masked: bool = False

    @property
    def positions(self) -> Tensor:
        """Of the queries, (T,)."""
        size = self.T // len(self.starts)
        return torch.cat([torch.arange(start, start + size) for start in self.starts])


SHAPES = [
    Shape(1, 1, 1, 1, 32, turned=True),
    Shape(2, 4, 4, 130, 32, turned=True),
    Shape(1, 2, 1, 700, 64, turned=True),
    Shape(2, 6, 2, 300, 24, turned=True, masked=True),
    Shape(1, 3, 3, 257, 80, turned=True),
    Shape(1, 4, 2, 600, 128),
    Shape(1, 1, 1, 70, 256),
    Shape(2, 6, 3, 600, 16, masked=True),
    Shape(2, 4, 2, 560, 32, starts=(140, 700), keys=1120),
    Shape(2, 4, 1, 560, 32, starts=(0, 840), keys=1120, masked=True),
    Shape(1, 2, 2, 12, 4, starts=(3, 6), keys=12),
]


class Inputs(NamedTuple):
    """Of one shape, in one dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    dy: Tensor
    rope: Rope | None
    mask: Tensor | None


def draw(shape: Shape, dtype: torch.dtype) -> Inputs:
    """Heads as views of wider activations, tables of a rotation of half a head, documents."""
    generator = torch.Generator().manual_seed(shape.T)
    keys = shape.keys or shape.T
    sizes = [(shape.T, shape.H), (keys, shape.K), (keys, shape.K)]
    heads = [
        torch.randn(shape.B, T, heads, shape.D, generator=generator).to(dtype).transpose(1, 2)
        for T, heads in sizes
    ]
    dy = torch.randn(shape.B, shape.T, shape.H * shape.D, generator=generator).to(dtype)
    rope = mask = None
    if shape.turned:
        config = NeoxConfig(
            num_layers=1,
            hidden_size=shape.H * shape.D,
            num_attention_heads=shape.H,
            vocab_size=8,
            rotary_pct=0.5,
        )
        rope = rope_tables(config, torch.arange(shape.T) + torch.arange(shape.B)[:, None])
    if shape.masked:
        documents = torch.randint(0, 4, (shape.B, keys), generator=generator).sort()[0]
        mask = documents[:, shape.positions, None] == documents[:, None]
        mask = (mask & (torch.arange(keys) <= shape.positions[:, None]))[:, None]
    return Inputs(*heads, dy, rope, mask)


def definition(shape: Shape, inputs: Inputs) -> Callable[..., Tensor]:
    """y of q, k, v by a softmax over all keys."""

    def y_of(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if inputs.rope is not None:
            q, k = rotate_heads(q, inputs.rope), rotate_heads(k, inputs.rope)
        k, v = (x.repeat_interleave(shape.H // shape.K, 1) for x in (k, v))
        hidden = torch.arange(k.shape[2]) > shape.positions[:, None]
        if inputs.mask is not None:
            hidden = hidden | ~inputs.mask
        scores = (q @ k.transpose(2, 3) * shape.D**-0.5).masked_fill(hidden, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    return y_of


def results(function: Callable[..., Tensor], inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """y and the gradients of q, k and v."""
    heads = [x.detach().to(dtype).requires_grad_() for x in inputs[:3]]
    y = function(*heads)
    return [y.detach(), *torch.autograd.grad(y, heads, inputs.dy.to(dtype))]


def fused(shape: Shape, inputs: Inputs) -> Callable[..., Tensor]:
    """y by the compiled code."""
    cos, sin = inputs.rope or (None, None)
    return lambda q, k, v: fused_attention(q, k, v, cos, sin, inputs.mask, list(shape.starts))[0]


def require_near(shape: Shape, dtype: torch.dtype, inputs: Inputs | None = None) -> None:
    """Within the rounding of a dtype."""
    inputs = inputs or draw(shape, dtype)
    exact = results(definition(shape, inputs), inputs, torch.float64)
    ours = results(fused(shape, inputs), inputs, dtype)
    for one, true in zip(ours, exact, strict=True):
        error = (one.double() - true).square().mean().sqrt()
        # The gradient of the score of a single key is 0.
        size = max(float(true.square().mean().sqrt()), 0.1)
        assert error <= LIMITS[dtype] * size


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("shape", SHAPES)
def test_results_and_gradients_are_those_of_the_definition(
    shape: Shape, dtype: torch.dtype
) -> None:
    require_near(shape, dtype)


@pytest.fixture(scope="module")
def level_below() -> Any:
    """The library for the level that has neither AVX-512 nor products of bfloat16."""
    levels = {level.name: level for level in levels_here()}
    compiler = chosen_compiler()
    if "x86-64-v3" not in levels or compiler is None:
        pytest.skip("needs a compiler for x86-64-v3")
    return typed(load(machine_code(SOURCE, compiler, levels["x86-64-v3"]), SOURCE.stem))


@pytest.mark.parametrize("dtype", list(LIMITS))
def test_a_lower_level_of_instructions_has_the_same_results(
    dtype: torch.dtype, level_below: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "attention_library", lambda: level_below)
    for shape in SHAPES[1::2]:
        require_near(shape, dtype)


class EmulatedAttention:
    """`call` of a program for another processor."""

    def __init__(self, program: Path) -> None:
        self.command = emulated(program, PROCESSORS[program.name])

    def __call__(self, name: str, arguments: Arguments, *tensors: Tensor) -> None:
        """As the library's call."""
        image = Image()
        places = [image.add_tensor(tensor) for tensor in tensors]
        pointed = [*arguments.heads, *getattr(arguments, "tables", ())]
        if arguments.problem.mask is not None:
            pointed.append(arguments.mask)
        for tensor in pointed:
            image.add_tensor(tensor)
        image.add(ctypes.addressof(arguments.starts), ctypes.sizeof(arguments.starts))
        problem = image.add_structure(arguments.problem)
        found = image.relocations()
        is_bf16 = arguments.heads[0].dtype == torch.bfloat16
        options = (name == "castalia_attention_backward", is_bf16, problem)
        header = struct.pack("<5q", len(image.memory), len(found), *options)
        header += struct.pack("<9q", *places, *[0] * (9 - len(places)))
        sent = header + image.memory + struct.pack(f"<{len(found)}q", *found)
        done = subprocess.run(self.command, input=sent, capture_output=True, check=True)
        assert len(done.stdout) == len(image.memory)
        for tensor in tensors:
            storage = tensor.untyped_storage()
            start = image.places[storage.data_ptr()]
            content = done.stdout[start : start + storage.nbytes()]
            ctypes.memmove(storage.data_ptr(), content, len(content))


@pytest.fixture(scope="module", params=PROCESSORS)
def arm_program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """emulated_attention.cpp for one level of ARM."""
    source = Path(__file__).with_name("emulated_attention.cpp")
    return build_program(source, request.param, tmp_path_factory.mktemp("arm"))


@needs_emulation[0]
@needs_emulation[1]
@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(LIMITS))
def test_arm_has_the_same_results(
    dtype: torch.dtype, arm_program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "call", EmulatedAttention(arm_program))
    for shape in SHAPES:
        require_near(shape, dtype)


@pytest.mark.parametrize("dtype", list(LIMITS))
def test_bits_follow_from_a_row_alone(dtype: torch.dtype) -> None:
    """A row has the same results beside other rows and on any number of threads."""
    shape = Shape(3, 4, 2, 1300, 32, turned=True)
    inputs = draw(shape, dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        together = results(fused(shape, inputs), inputs, dtype)
        torch.set_num_threads(1)
        for row in range(shape.B):
            part = slice(row, row + 1)
            rope = Rope(*(x[part] for x in inputs.rope or ()))
            own = Inputs(*(x[part] for x in inputs[:4]), rope, None)
            alone = results(fused(shape, own), own, dtype)
            for one, other in zip(together, alone, strict=True):
                assert torch.equal(one[part], other)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", list(LIMITS))
def test_scores_that_grow_along_the_row_do_not_overflow(dtype: torch.dtype) -> None:
    """Earlier keys score hundreds higher than those of the block that is computed first."""
    shape = Shape(1, 1, 1, 600, 16)
    inputs = draw(shape, dtype)
    heights = torch.linspace(60, -60, 600).to(dtype)[:, None]
    q = torch.ones_like(inputs.q)
    k = (heights + inputs.k * 0.01).to(dtype)
    steep = inputs._replace(q=q, k=k)
    exact = results(definition(shape, steep), steep, torch.float64)
    ours = results(fused(shape, steep), steep, dtype)
    # The first key wins nearly everywhere.
    assert exact[0].std(1).max() < 1
    # In bf16 the gradients are sums of large numbers that cancel out.
    for one, true in list(zip(ours, exact, strict=True))[: 4 if dtype == torch.float32 else 1]:
        assert (one.double() - true).abs().max() <= 0.02 * true.abs().max()
    assert all(one.isfinite().all() for one in ours)


def test_nan_is_seen_by_later_queries_alone() -> None:
    shape = Shape(1, 1, 1, 300, 16)
    inputs = draw(shape, torch.float32)
    k = inputs.k.clone()
    k[0, 0, 200, 3] = torch.nan
    y = fused(shape, inputs)(inputs.q, k, inputs.v)
    assert y[:, :200].isfinite().all() and y[:, 200:].isnan().all()


@pytest.mark.parametrize("dtype", list(LIMITS))
def test_a_window_of_keys_is_one_mask_for_all_rows(dtype: torch.dtype) -> None:
    """Blocks that lie behind the window of all queries are not computed."""
    shape = Shape(2, 2, 1, 500, 32)
    distance = torch.arange(500)[:, None] - torch.arange(500)
    windowed = draw(shape, dtype)._replace(mask=((distance >= 0) & (distance < 90))[None, None])
    require_near(shape, dtype, windowed)


@pytest.mark.parametrize("dtype", list(LIMITS))
def test_a_query_that_sees_nothing_gets_and_gives_nothing(dtype: torch.dtype) -> None:
    """A mask that hides a whole document of padding, and what is between two documents."""
    shape = Shape(1, 2, 2, 400, 32)
    inputs = draw(shape, dtype)
    mask = torch.ones(400, 400, dtype=torch.bool).tril()
    mask[130:290] = False
    mask[:, 130:290] = False
    y, dq, dk, dv = results(
        lambda q, k, v: fused_attention(q, k, v, None, None, mask[None, None], [0])[0],
        inputs,
        dtype,
    )
    seen = torch.cat([torch.arange(130), torch.arange(290, 400)])
    without = Shape(1, 2, 2, 240, 32)
    less = Inputs(*(x[:, :, seen] for x in inputs[:3]), inputs.dy[:, seen], None, None)
    exact = results(definition(without, less), less, torch.float64)
    for one, true in zip((y, *(x.transpose(1, 2) for x in (dq, dk, dv))), exact, strict=True):
        assert (one[:, 130:290] == 0).all()
        own = true if true.ndim == 3 else true.transpose(1, 2)
        assert (one[:, seen].double() - own).abs().max() <= 30 * LIMITS[dtype]


def test_the_operator_is_registered_as_pytorch_wants() -> None:
    shape = Shape(2, 4, 2, 20, 16, turned=True, masked=True)
    inputs = draw(shape, torch.float32)
    heads = [x.requires_grad_() for x in inputs[:3]]
    cos, sin = inputs.rope or (None, None)
    torch.library.opcheck(fused_attention, (*heads, cos, sin, inputs.mask, [0]))


def test_bf16_is_nearer_than_products_of_blocks() -> None:
    shape = Shape(1, 2, 2, 700, 64, turned=True)
    inputs = draw(shape, torch.bfloat16)
    exact = results(definition(shape, inputs), inputs, torch.float64)
    ours = results(fused(shape, inputs), inputs, torch.bfloat16)
    theirs = results(
        lambda q, k, v: causal_attention(q, k, v, *inputs.rope, None, [0], True)[0],
        inputs,
        torch.bfloat16,
    )
    for one, other, true in zip(ours, theirs, exact, strict=True):
        assert (one - true).square().mean() < (other - true).square().mean()


def test_what_it_does_not_compute_is_left_to_torch() -> None:
    assert fuses("bfloat16", 64) and fuses("float32", 256)
    assert not fuses("float16", 64) and not fuses("float64", 64)
    assert not fuses("float32", 66) and not fuses("float32", 260)


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    q = torch.zeros(1, 2, 8, 16)
    with pytest.raises(ValueError, match=r"attention got v of shape \(1, 2, 7, 16\)"):
        fused_attention(q, q, q[:, :, 1:], None, None, None, [0])
    with pytest.raises(ValueError, match="attention got 2 query heads, 2 key heads, 8 keys"):
        fused_attention(q, q, q, None, None, None, [4])
    with pytest.raises(ValueError, match="attention got mask of shape"):
        fused_attention(q, q, q, None, None, torch.ones(8, 8, dtype=torch.bool), [0])
    with pytest.raises(ValueError, match="attention of 1 rows got masks of 2"):
        fused_attention(q, q, q, None, None, torch.ones(2, 1, 8, 8, dtype=torch.bool), [0])
    with pytest.raises(ValueError, match="got a rotation of shape"):
        fused_attention(q, q, q, *torch.zeros(2, 1, 1, 8, 20), None, [0])


def test_gradients_of_views_lie_as_the_library_writes_them() -> None:
    shape = Shape(2, 3, 3, 40, 16)
    inputs = draw(shape, torch.float32)
    heads = [x.contiguous() for x in inputs[:3]]
    y, q, k, v, sums = fused_attention(*heads, None, None, None, [0])
    wanted = fused_attention_backward(inputs.dy, y, q, k, v, sums, None, None, None, [0])
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    found = fused_attention_backward(inputs.dy, y, *views, sums, None, None, None, [0])
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def test_keys_without_a_query_have_no_gradient() -> None:
    q = torch.zeros(1, 2, 0, 16, requires_grad=True)
    k, v = (torch.ones(1, 2, 256, 16, requires_grad=True) for _ in range(2))
    # What was freed here may come again as the memory of a gradient.
    spare = torch.full_like(k, 7.0)
    del spare
    y = fused_attention(q, k, v, None, None, None, [0])[0]
    for gradient in torch.autograd.grad(y.sum(), (q, k, v)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("name", ["castalia_attention", "castalia_attention_backward"])
def test_memory_that_is_not_there_is_an_error_of_python(name: str) -> None:
    x = torch.zeros(1, 1, 1, 16)
    # 2^40 times the same row: packed they would take petabytes.
    rows = x.expand(1 << 40, 1, 1, 16)
    arguments = Arguments(rows, rows, rows, None, None, None, [0])
    count = 8 if name == "castalia_attention" else 9
    with pytest.raises(MemoryError, match="no memory for attention of 1099511627776 rows of 1 t"):
        call(name, arguments, *[x] * count)
