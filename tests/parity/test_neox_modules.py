"""Parts that transformers lacks: against closed forms, and against GPT-NeoX's own modules.

GPT_NEOX names a git directory of github.com/EleutherAI/gpt-neox; without it its modules are
skipped. Of its package only the text of the classes is run: importing it needs a GPU's libraries.
Outputs and every gradient agree to 1e-5.
"""

import ast
import functools
import linecache
import math
import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from castalia.models import FAMILIES, build_model_config
from castalia.models.context import Context, HeadShare
from castalia.models.parts.attention import Attention
from castalia.models.parts.mlp import FUNCTIONS, MLP, GatedMLP
from castalia.models.parts.norms import make_head_norm, make_norm
from castalia.models.parts.positions import RelativeBias, alibi_bias, make_positions

PEER = os.environ.get("GPT_NEOX", "")
peers = pytest.mark.skipif(
    not PEER, reason="GPT_NEOX does not name a git directory of github.com/EleutherAI/gpt-neox"
)
LIMIT = 1e-5
SHAPE = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 61}


def config_of(**values: Any) -> Any:
    return build_model_config(SHAPE | values, "a test")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def filled(module: nn.Module, seed: int = 1) -> nn.Module:
    """The module with drawn parameters."""
    for number, parameter in enumerate(module.parameters()):
        parameter.data = drawn(*parameter.shape, seed=seed + number).detach()
    return module


def gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Of a sum with drawn weights, so that every number of `y` counts differently."""
    weights = drawn(*y.shape, seed=9).detach().to(y.dtype)
    return list(torch.autograd.grad((y * weights).sum(), inputs))


def require_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """To 1e-5 of the largest number, or of 1 if that is larger."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        scale = max(1.0, float(b.detach().abs().max()))
        assert float((a.double() - b.double()).detach().abs().max()) <= LIMIT * scale


# -- closed forms -----------------------------------------------------------------------------


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def gelu_tanh(x: Tensor) -> Tensor:
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": lambda x: (x + x.abs()) / 2,
    "relu2": lambda x: ((x + x.abs()) / 2) ** 2,
    "softsign": lambda x: x / (1 + x.abs()),
    "swish": lambda x: x * sigmoid(x),
    "silu": lambda x: x * sigmoid(x),
    "mish": lambda x: x * torch.tanh((1 + x.exp()).log()),
    "geglu": gelu,
    "geglu_tanh": gelu_tanh,
    "reglu": lambda x: (x + x.abs()) / 2,
    "swiglu": lambda x: x * sigmoid(x),
    "bilinear": lambda x: x,
    "glu": sigmoid,
}
GATED = ("geglu", "geglu_tanh", "reglu", "swiglu", "bilinear", "glu")


def test_every_activation_has_a_formula():
    assert FORMULAS.keys() == FUNCTIONS.keys()


@pytest.mark.parametrize("name", FORMULAS)
def test_an_mlp_is_its_formula(name):
    kind = GatedMLP if name in GATED else MLP
    ours = filled(kind(16, 24, name, True))
    x = drawn(2, 5, 16)
    inputs = [x, *ours.parameters()]
    wide = {key: value.double() for key, value in ours.named_parameters()}
    up = x.double() @ wide["up.weight"].T + wide["up.bias"]
    if name in GATED:
        gate = x.double() @ wide["gate.weight"].T + wide["gate.bias"]
        inner = FORMULAS[name](gate) * up
    else:
        inner = FORMULAS[name](up)
    theirs = inner @ wide["down.weight"].T + wide["down.bias"]
    y = ours(x)
    require_equal([y, *gradients(y, inputs)], [theirs, *gradients(theirs, inputs)])


def rms(x: Tensor, share: float = 1.0, eps: float = 1e-5) -> Tensor:
    read = int(x.shape[-1] * share)
    return x / (x[..., :read].pow(2).sum(-1, keepdim=True) / read + eps).sqrt()


NORMS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "rmsnorm": ({"norm": "rmsnorm"}, rms),
    "partial rmsnorm": (
        {"norm": "rmsnorm", "rmsnorm_partial": 0.3},
        functools.partial(rms, share=0.3),
    ),
    "scalenorm": ({"norm": "scalenorm"}, lambda x: x / x.pow(2).sum(-1, keepdim=True).sqrt()),
    "non_parametric_layernorm": (
        {"norm": "non_parametric_layernorm"},
        lambda x: rms(x - x.mean(-1, keepdim=True)),
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_its_formula(name):
    values, formula = NORMS[name]
    ours = filled(make_norm(config_of(**values)))
    x = drawn(2, 5, 32)
    inputs = [x, *ours.parameters()]
    theirs = formula(x.double())
    for weight in ours.parameters():
        theirs = theirs * weight.double()
    y = ours(x)
    require_equal([y, *gradients(y, inputs)], [theirs, *gradients(theirs, inputs)])


def test_sinusoids_are_their_formula():
    ours = make_positions(config_of(pos_emb="sinusoidal"))(torch.tensor([[0, 1, 7, 500]]))
    for place, position in enumerate((0, 1, 7, 500)):
        for pair in range(16):
            angle = position / 10000 ** (2 * pair / 32)
            assert abs(float(ours[0, place, pair]) - math.sin(angle)) < 5e-5
            assert abs(float(ours[0, place, 16 + pair]) - math.cos(angle)) < 5e-5


def test_learned_positions_are_rows_of_a_table():
    table = filled(make_positions(config_of(pos_emb="learned", learned_offset=2)))
    positions = torch.tensor([[3, 0, 3]])
    y = table(positions)
    assert torch.equal(y[0], table.weight[[5, 2, 5]])
    (gradient,) = gradients(y, [table.weight])
    weights = drawn(1, 3, 32, seed=9).detach()
    assert torch.equal(gradient[5], weights[0, 0] + weights[0, 2])
    assert gradient.abs().sum(1).nonzero().flatten().tolist() == [2, 5]


def bucket_of(distance: int, buckets: int, furthest: int) -> int:
    """Raffel et al. 2019, section 2.1: half of the buckets exact, half in a geometric row."""
    exact = buckets // 2
    if distance < exact:
        return distance
    steps = math.log(distance / exact) / math.log(furthest / exact) * (buckets - exact)
    # A hair up: at a bound of buckets the logarithm of doubles may lie below it.
    return min(buckets - 1, exact + int(steps + 1e-9))


def test_attention_with_relative_biases_is_its_formula():
    config = config_of(pos_emb="rpe", rpe_num_buckets=8, rpe_max_distance=20)
    attention = filled(Attention(config))
    bias = filled(RelativeBias(config), seed=20)
    T = 24
    x = drawn(2, T, 32)
    context = Context(torch.arange(T)[None], heads=HeadShare())
    context = context._replace(bias=bias(context, None))
    y = attention(x, context)
    inputs = [x, bias.weight, *attention.parameters()]

    wide = {key: value.double() for key, value in attention.named_parameters()}
    qkv = (x.double() @ wide["qkv.weight"].T + wide["qkv.bias"]).view(2, T, 4, 3, 8)
    q, k, v = qkv.unbind(3)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(8)
    numbers = torch.tensor([[bucket_of(max(0, i - j), 8, 20) for j in range(T)] for i in range(T)])
    table = bias.weight.double() * math.sqrt(8)
    scores = scores + table[numbers].permute(2, 0, 1)
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    shares = scores.masked_fill(hidden, -math.inf).softmax(-1)
    out = torch.einsum("bhij,bjhd->bihd", shares, v).flatten(2)
    theirs = out @ wide["out.weight"].T + wide["out.bias"]
    ours = [y, *gradients(y, inputs)]
    require_equal(ours, [theirs, *gradients(theirs, inputs)])


# -- GPT-NeoX's modules -----------------------------------------------------------------------


@functools.cache
def text_of(path: str) -> str:
    command = ["git", f"--git-dir={PEER}", "show", f"HEAD:{path}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def module_of(path: str) -> SimpleNamespace:
    """A file of GPT-NeoX that needs torch alone."""
    # TorchScript reads the source of its functions, for which it needs no file but these lines.
    name = f"<{path}>"
    lines = text_of(path).splitlines(keepends=True)
    linecache.cache[name] = (len(lines), None, lines, name)
    names: dict[str, Any] = {"__name__": "peer"}
    exec(compile(text_of(path), name, "exec"), names)
    return SimpleNamespace(**names)


def classes_of(path: str, names: list[str], surroundings: dict[str, Any]) -> SimpleNamespace:
    """Some classes of a file, among names of ours."""
    tree = ast.parse(text_of(path))
    body: list[ast.stmt] = [
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in names
    ]
    space = {"torch": torch, "nn": nn, "F": F, "math": math, "__name__": "peer"} | surroundings
    exec(compile(ast.Module(body, []), path, "exec"), space)
    return SimpleNamespace(**space)


def arguments(**values: Any) -> SimpleNamespace:
    """NeoXArgs with what these classes read."""
    common = {
        "onnx_safe": False,
        "bias_gelu_fusion": False,
        "rmsnorm_fusion": False,
        "layernorm_fusion": False,
        "rms_norm_epsilon": 1e-5,
        "layernorm_epsilon": 1e-5,
        "scalenorm_epsilon": 1e-5,
        "intermediate_size": None,
        "expansion_factor": None,
        "hidden_size": 32,
        "use_bias_in_mlp": True,
        "use_flashattn_swiglu": False,
    }
    return SimpleNamespace(**common | values)


class PeerLinear(nn.Linear):
    """Their parallel layers on one rank: the bias is handed back, not added."""

    def __init__(self, *, input_size: int, output_size: int, bias: bool, **ignored: Any) -> None:
        super().__init__(input_size, output_size, bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return F.linear(x, self.weight), self.bias


def peer_mlp(name: str) -> nn.Module:
    activations = module_of("megatron/model/activations.py")
    transformer = classes_of(
        "megatron/model/transformer.py",
        ["ParallelMLP", "Gated_Activation"],
        {
            "get_activation": activations.get_activation,
            "get_parallel_linear": lambda _: (PeerLinear, PeerLinear),
            "swiglu": None,
        },
    )
    fused = name == "gelu_tanh"
    values = arguments(activation="gelu" if fused else name, bias_gelu_fusion=fused)
    mlp: nn.Module = transformer.ParallelMLP(values, None, None, multiple_of=8)
    return mlp


@peers
@pytest.mark.parametrize("name", [n for n in FORMULAS if n not in ("relu2", "geglu_tanh")])
def test_an_mlp_is_gpt_neoxs(name):
    theirs = filled(peer_mlp(name))
    width = theirs.linear2.in_features
    ours = (GatedMLP if name in GATED else MLP)(32, width, name, True)
    parts = {"up": theirs.linear1, "down": theirs.linear2}
    with torch.no_grad():
        for place, layer in parts.items():
            for kind in ("weight", "bias"):
                rows = getattr(layer, kind)
                # Of a gated layer the first half is the input, the second the gate.
                getattr(getattr(ours, place), kind).copy_(rows[:width] if place == "up" else rows)
                if place == "up" and name in GATED:
                    getattr(ours.gate, kind).copy_(rows[width:])
    x = drawn(5, 2, 32)
    output, bias = theirs(x)
    expected = output + bias
    y = ours(x)
    wanted = gradients(expected, [x, *theirs.parameters()])
    found = gradients(y, [x, *ours.parameters()])
    named = dict(zip([name for name, _ in ours.named_parameters()], found[1:], strict=True))

    def rows(kind: str) -> Tensor:
        if name in GATED:
            return torch.cat([named[f"up.{kind}"], named[f"gate.{kind}"]])
        return named[f"up.{kind}"]

    require_equal(
        [y, found[0], rows("weight"), rows("bias"), named["down.weight"], named["down.bias"]],
        [expected, *wanted],
    )


@peers
@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm", "scalenorm", "non_parametric_layernorm"])
def test_a_norm_is_gpt_neoxs(kind):
    make, eps = module_of("megatron/model/norms.py").get_norm(arguments(norm=kind))
    theirs = filled(make(32, eps=eps))
    ours = filled(make_norm(config_of(norm=kind)))
    x = drawn(3, 5, 32)
    found = ours(x)
    expected = theirs(x)
    require_equal(
        [found, *gradients(found, [x, *ours.parameters()])],
        [expected, *gradients(expected, [x, *theirs.parameters()])],
    )


@peers
@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm", "non_parametric_layernorm"])
def test_norms_of_queries_and_keys_are_gpt_neoxs(kind):
    make, eps = module_of("megatron/model/norms.py").get_norm(arguments(norm=kind))
    theirs = filled(make([4, 8], eps=eps))
    ours = make_head_norm(config_of(norm=kind, qk_norm="neox"), 4)
    assert ours is not None
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.copy_(other.flatten())
    x = drawn(3, 5, 4, 8)
    found = ours(x, HeadShare())
    expected = theirs(x)
    wanted = gradients(expected, [x, *theirs.parameters()])
    flat = [wanted[0], *(gradient.flatten() for gradient in wanted[1:])]
    require_equal(
        [found, *gradients(found, [x, *ours.parameters()])],
        [expected, *flat],
    )


@peers
def test_sinusoids_are_gpt_neoxs():
    module = module_of("megatron/model/positional_embeddings.py")
    theirs = module.SinusoidalPositionalEmbedding(32, precision=torch.float)
    ours = make_positions(config_of(pos_emb="sinusoidal"))
    require_equal([ours(torch.arange(700)[None])], [theirs(torch.zeros(1, 700))])


@peers
@pytest.mark.parametrize("heads", [4, 8, 12])
def test_alibi_is_gpt_neoxs(heads):
    module = module_of("megatron/model/positional_embeddings.py")
    theirs = module.AliBi(heads, 1, 0).bias(50, 50, "cpu", torch.float)
    config = config_of(num_attention_heads=heads, hidden_size=8 * heads, pos_emb="alibi")
    ours = alibi_bias(config, Context(torch.arange(50)[None]), None)[0]
    # Above the diagonal nothing is seen.
    require_equal([ours.tril()], [theirs.tril()])


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Their code asks for the current GPU."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    yield


@peers
@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 20)])
def test_relative_biases_are_gpt_neoxs(no_gpu, buckets, furthest):
    layers = classes_of(
        "megatron/mpu/layers.py",
        ["ParallelRelativePositionBias"],
        {
            "init": nn.init,
            "Parameter": nn.Parameter,
            "get_model_parallel_world_size": lambda: 1,
            "get_model_parallel_rank": lambda: 0,
            "divide": lambda a, b: a // b,
            "_initialize_affine_weight_cpu": lambda *a, **k: None,
        },
    )
    theirs = filled(
        layers.ParallelRelativePositionBias(
            arguments(use_cpu_initialization=True, params_dtype=torch.float),
            scale=math.sqrt(8),
            num_buckets=buckets,
            max_distance=furthest,
            heads=4,
        )
    )
    config = config_of(pos_emb="rpe", rpe_num_buckets=buckets, rpe_max_distance=furthest)
    ours = filled(RelativeBias(config))
    T = 300
    found = ours(Context(torch.arange(T)[None]), None)
    expected = theirs(T, T)
    require_equal(
        [found, *gradients(found, [ours.weight])],
        [expected, *gradients(expected, [theirs.weight])],
    )


class PeerSoftmax(nn.Module):
    """Their fused kernel, with the mask that they give it: True where a key is hidden."""

    def __init__(self, **ignored: Any) -> None:
        super().__init__()

    def forward(self, scores: Tensor, mask: Tensor) -> Tensor:
        return scores.masked_fill(mask, -torch.inf).softmax(-1)


def peer_gmlp(attends: bool, length: int) -> nn.Module:
    norms = module_of("megatron/model/norms.py")
    module = classes_of(
        "megatron/model/gmlp.py",
        ["TinyAttention", "SpatialGatingUnit", "GMLPBlock"],
        {
            "FusedScaleMaskSoftmax": PeerSoftmax,
            "get_activation": module_of("megatron/model/activations.py").get_activation,
            "get_norm": norms.get_norm,
            "get_fusion_type": lambda _: None,
            "mpu": SimpleNamespace(
                ColumnParallelLinear=partial(PeerLinear, bias=True),
                RowParallelLinear=partial(PeerLinear, bias=True),
                divide=lambda a, b: a // b,
                get_model_parallel_world_size=lambda: 1,
            ),
        },
    )
    values = arguments(
        hidden_size=8,
        seq_length=length,
        activation="gelu",
        norm="layernorm",
        precision="fp32",
        attention_softmax_in_fp32=True,
        attention_config=["amlp" if attends else "gmlp"],
        gmlp_attn_dim=4,
    )
    block: nn.Module = module.GMLPBlock(values, None, None, 0, mask_fn=lambda: None)
    return block


@peers
@pytest.mark.parametrize("kind", ["gmlp", "amlp"])
def test_a_layer_of_gmlp_is_gpt_neoxs(kind):
    """Without the residual and with biases of 0: theirs has neither."""
    length = 12
    # As many rows as tokens: theirs takes the one for the other.
    T = 5
    theirs = filled(peer_gmlp(kind == "amlp", length))
    options = {"attention_size": 4, "bias": False, "residual": False}
    config = build_model_config(
        {
            "family": kind,
            "num_layers": 1,
            "hidden_size": 8,
            "vocab_size": 61,
            "max_position_embeddings": length,
            "gmlp": options,
        },
        "a test",
    )
    ours = FAMILIES[kind].block(config, 0)
    unit = theirs.sgu
    # The first half is what the gate multiplies, the second the gate.
    pairs = {"norm": theirs.norm, "gating.norm": unit.norm, "gating.spatial": unit.proj}
    names = {
        f"{place}.{kind}": [getattr(module, kind)]
        for place, module in pairs.items()
        for kind in ("weight", "bias")
    }
    names["gating.down.weight"] = [theirs.output_linear.weight]
    if kind == "amlp":
        for place, module in {"qkv": unit.attn.proj_qkv, "out": unit.attn.proj_ffn}.items():
            names[f"gating.attn.{place}.weight"] = [module.weight]
            names[f"gating.attn.{place}.bias"] = [module.bias]
    fused = theirs.input_linear.weight
    own = dict(ours.named_parameters())
    with torch.no_grad():
        for name, (tensor,) in names.items():
            own[name].copy_(tensor)
        own["gating.up.weight"].copy_(fused[:32])
        own["gating.gate.weight"].copy_(fused[32:])
    x = drawn(T, T, 8)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    found = ours(x, Context(torch.arange(T)[None]))
    expected = theirs((x.transpose(0, 1), mask))[0].transpose(0, 1)
    inputs = [x, fused, *(tensor for (tensor,) in names.values())]
    mine = [x, own["gating.up.weight"], own["gating.gate.weight"], *(own[n] for n in names)]
    x_gradient, up, gate, *rest = gradients(found, mine)
    require_equal(
        [found, x_gradient, torch.cat([up, gate]), *rest],
        [expected, *gradients(expected, inputs)],
    )
