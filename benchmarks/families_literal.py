"""RWKV 6 and 7 as their papers write them: one token after another, in PyTorch with autograd.

The slow path that benchmarks/families.py compares with. Everything beside the recurrence is
computed for whole rows, as training code does whose kernel is replaced by a loop. Weights have the
names of RWKV-LM's files.

Shapes: B batch, T tokens, C width, H heads of N channels.

Source  Peng et al. 2024, arXiv:2404.05892, section 4 (RWKV 6); Peng et al. 2025, arXiv:2503.14456,
        section 4 (RWKV 7).
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from castalia.formats.rwkv import NORMS, OWN

State = dict[str, Tensor]
"""What a layer remembers: `att` and `ffn`, the last token before each mixing, and `wkv`."""


PLACES = {"embed": "emb", "norm": "ln_out", "unembed": "head"}


def renamed(tensors: Mapping[str, Tensor], version: int) -> dict[str, Tensor]:
    """Castalia's weights under the names of RWKV-LM."""
    out = {}
    for name, tensor in tensors.items():
        if not name.startswith("layers."):
            module, _, kind = name.partition(".")
            out[f"{PLACES[module]}.{kind}"] = tensor
            continue
        _, layer, own = name.split(".", 2)
        module, _, kind = own.rpartition(".")
        own = OWN[f"rwkv{version}"].get(own) or f"{NORMS.get(module, module)}.{kind}"
        if own == "att.time_maa_w2":
            tensor = tensor.unflatten(0, (5, -1))
        out[f"blocks.{layer}.{own}"] = tensor
    return out


class LiteralRwkv(nn.Module):
    """Logits of a row, and of one more token from a state."""

    def __init__(self, weights: Mapping[str, Tensor], version: int, head_size: int) -> None:
        super().__init__()
        self.names = list(weights)
        self.weights = nn.ParameterList([nn.Parameter(weights[name]) for name in self.names])
        self.version = version
        self.head_size = head_size
        self.layers = 1 + max(int(n.split(".")[1]) for n in self.names if n.startswith("blocks."))

    def forward(self, tokens: Tensor, states: list[State] | None = None) -> Tensor:
        """(B, T) int64 -> logits (B, T, V); `states`, one a layer, are read and replaced."""
        w = dict(zip(self.names, self.weights, strict=True))
        x = norm(F.embedding(tokens, w["emb.weight"]), w, "blocks.0.ln0")
        time_mixing = mix_6 if self.version == 6 else mix_7
        first: Tensor | None = None
        for layer in range(self.layers):
            place = f"blocks.{layer}."
            own = {n.removeprefix(place): p for n, p in w.items() if n.startswith(place)}
            state = {} if states is None else states[layer]
            att, first = time_mixing(norm(x, own, "ln1"), own, state, self.head_size, first)
            x = x + att
            x = x + channel_mixing(norm(x, own, "ln2"), own, state, self.version)
            if states is not None:
                states[layer] = state
        return F.linear(norm(x, w, "ln_out"), w["head.weight"])


def norm(x: Tensor, w: Mapping[str, Tensor], name: str) -> Tensor:
    """LayerNorm."""
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)


def shifted(x: Tensor, state: State, name: str) -> Tensor:
    """The token before each, (B, T, C); the state's before the first."""
    last = state.get(name)
    if last is None:
        last = torch.zeros_like(x[:, 0])
    state[name] = x[:, -1]
    return torch.cat([last[:, None], x[:, :-1]], 1)


def channel_mixing(x: Tensor, w: Mapping[str, Tensor], state: State, version: int) -> Tensor:
    """Squared ReLU of a mix with the token before; version 6 has a gate."""
    delta = shifted(x, state, "ffn") - x
    mix = w["ffn.time_maa_k"] if version == 6 else w["ffn.x_k"]
    inner = F.linear(torch.relu(F.linear(x + delta * mix, w["ffn.key.weight"])).square(),
                     w["ffn.value.weight"])  # fmt: skip
    if version == 7:
        return inner
    gate = F.linear(x + delta * w["ffn.time_maa_r"], w["ffn.receptance.weight"])
    return torch.sigmoid(gate) * inner


def mix_6(
    x: Tensor, w: Mapping[str, Tensor], state: State, size: int, first: Any
) -> tuple[Tensor, Any]:
    """Time mixing of RWKV 6: the decay of each channel is a function of the token."""
    B, T, C = x.shape
    delta = shifted(x, state, "att") - x
    base = torch.tanh((x + delta * w["att.time_maa_x"]) @ w["att.time_maa_w1"])
    low = base.view(B, T, 5, -1).permute(2, 0, 1, 3).flatten(1, 2)
    changes = torch.bmm(low, w["att.time_maa_w2"]).view(5, B, T, C)
    mixed = {
        name: x + delta * (w[f"att.time_maa_{name}"] + change)
        for name, change in zip("wkvrg", changes, strict=True)
    }
    heads = (B, T, -1, size)
    r = F.linear(mixed["r"], w["att.receptance.weight"]).view(heads)
    k = F.linear(mixed["k"], w["att.key.weight"]).view(heads)
    v = F.linear(mixed["v"], w["att.value.weight"]).view(heads)
    g = F.silu(F.linear(mixed["g"], w["att.gate.weight"]))
    low_decay = torch.tanh(mixed["w"] @ w["att.time_decay_w1"]) @ w["att.time_decay_w2"]
    decay = torch.exp(-torch.exp((w["att.time_decay"] + low_decay).float())).view(heads)
    u = w["att.time_faaaa"].view(-1, size)
    S = state.get("wkv")
    if S is None:
        S = torch.zeros(B, r.shape[2], size, size)
    outputs = []
    for t in range(T):
        now = k[:, t, :, :, None].float() * v[:, t, :, None, :].float()
        seen = S + u[..., None] * now
        outputs.append((r[:, t, :, None].float() @ seen)[:, :, 0])
        S = decay[:, t, ..., None] * S + now
    state["wkv"] = S
    y = torch.stack(outputs, 1).flatten(0, 1).flatten(1)
    # One norm for each head, whose epsilon grows with the square of RWKV-LM's divisor, 8.
    y = F.group_norm(y, r.shape[2], w["att.ln_x.weight"], w["att.ln_x.bias"], 64e-5).view(B, T, -1)
    return F.linear(y.to(x.dtype) * g, w["att.output.weight"]), first


def mix_7(
    x: Tensor, w: Mapping[str, Tensor], state: State, size: int, first: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Time mixing of RWKV 7: a delta rule with a decay and a learning rate of each channel.

    Returns  the output, and the values of the first layer, which the others mix theirs with.
    """
    B, T, C = x.shape
    heads = (B, T, -1, size)
    delta = shifted(x, state, "att") - x
    xr, xw, xk, xv, xa, xg = (x + delta * w[f"att.x_{name}"] for name in "rwkvag")
    r = F.linear(xr, w["att.receptance.weight"])
    low_decay = torch.tanh(xw @ w["att.w1"]) @ w["att.w2"]
    log_decay = -0.6065306597 * torch.sigmoid((w["att.w0"] + low_decay).float())
    k = F.linear(xk, w["att.key.weight"])
    v = F.linear(xv, w["att.value.weight"])
    if first is None:
        first = v
    else:
        v = v + (first - v) * torch.sigmoid(w["att.v0"] + (xv @ w["att.v1"]) @ w["att.v2"])
    a = torch.sigmoid(w["att.a0"] + (xa @ w["att.a1"]) @ w["att.a2"])
    g = torch.sigmoid(xg @ w["att.g1"]) @ w["att.g2"]
    removed = F.normalize((k * w["att.k_k"]).view(heads), dim=-1)
    k = k * (1 + (a - 1) * w["att.k_a"])
    r, k, v, a = (y.view(heads).float() for y in (r, k, v, a))
    y = delta_rule(r, k, v, removed.float(), a, torch.exp(log_decay).view(heads), state)
    y = y.flatten(0, 1).flatten(1)
    y = F.group_norm(y, r.shape[2], w["att.ln_x.weight"], w["att.ln_x.bias"], 64e-5).view(B, T, C)
    bonus = (r * k * w["att.r_k"].view(-1, size)).sum(-1, keepdim=True) * v
    return F.linear((y + bonus.view(B, T, C)).to(x.dtype) * g, w["att.output.weight"]), first


def delta_rule(
    r: Tensor, k: Tensor, v: Tensor, removed: Tensor, a: Tensor, decay: Tensor, state: State
) -> Tensor:
    """S_t = S_{t-1} (diag(decay) - removed^T (a removed)) + v^T k, y_t = S_t r."""
    B, T, H, N = r.shape
    S = state.get("wkv")
    if S is None:
        S = torch.zeros(B, H, N, N)
    outputs = []
    for t in range(T):
        read = S @ removed[:, t, ..., None]
        S = S * decay[:, t, :, None]
        S = S - read * (a[:, t] * removed[:, t])[:, :, None]
        S = S + v[:, t, ..., None] * k[:, t, :, None]
        outputs.append((S @ r[:, t, ..., None])[..., 0])
    state["wkv"] = S
    return torch.stack(outputs, 1)
