"""OpenVINO as an engine: the NeoX decoder as a graph, built straight from the weights; its state
is the KV cache."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from castalia.checkpoint.saved_model import SavedModel
from castalia.core.extras import require
from castalia.inference.engine import HEAD_ROWS, Engine, Package, Slots
from castalia.inference.implements import NEOX
from castalia.inference.native.packing import quantize_channels
from castalia.inference.native.weights import rope_angles
from castalia.models.config import require_transformer
from castalia.models.parts.qkv import heads_apart


class Graph:
    """The decoder as a graph of OpenVINO.

    Inputs   ids, positions (B, T) int64; mask (B, 1, T, keys) float32, 0 or -inf; pick (B, n)
             int64, the places in T whose logits are wanted; rows (B,) int32, the row of the state
             that each row of the batch goes on with.
    Output   logits (B, n, padded vocabulary).
    """

    def __init__(self, ov: Any, source: SavedModel, numbers: str) -> None:
        self.ov, self.ops = ov, ov.opset13
        self.config = require_transformer(source.config, "OpenVINO")
        self.tensors, self.numbers = source.tensors, numbers
        self.inputs = {
            "ids": self.ops.parameter([-1, -1], np.int64, "ids"),
            "positions": self.ops.parameter([-1, -1], np.int64, "positions"),
            "mask": self.ops.parameter([-1, 1, -1, -1], np.float32, "mask"),
            "pick": self.ops.parameter([-1, -1], np.int64, "pick"),
            "rows": self.ops.parameter([-1], np.int32, "rows"),
        }
        for name, place in self.inputs.items():
            place.output(0).set_names({name})
        self.kept: list[Any] = []

    def model(self) -> Any:
        """The whole graph."""
        ops, x = self.ops, self.ops.gather(self.matrix("embed.weight"), self.inputs["ids"], 0)
        if self.config.rotary_dim:
            self.angles = [
                ops.unsqueeze(ops.gather(table.numpy(), self.inputs["positions"], 0), 1)
                for table in rope_angles(self.config)
            ]
        for i in range(self.config.num_layers):
            x = self.block(i, x)
        picked = ops.gather(self.norm("norm", x), self.inputs["pick"], 1, batch_dims=1)
        head = "embed.weight" if self.config.tie_word_embeddings else "unembed.weight"
        logits = ops.matmul(picked, self.matrix(head), False, True)
        return self.ov.Model([ops.result(logits)], self.kept, list(self.inputs.values()), "decoder")

    def matrix(self, name: str) -> Any:
        """A weight (N, K); in int8 the plugin sees the multiplication and computes with the small
        one."""
        weight = self.tensors[name].float()
        if name.endswith("attn.qkv.weight"):
            weight = heads_apart(weight, self.config.num_attention_heads)
        if self.numbers == "fp32":
            return self.ops.constant(weight.contiguous().numpy())
        q, scale = quantize_channels(weight)
        return self.ops.multiply(
            self.ops.convert(self.ops.constant(q.numpy()), "f32"), scale[:, None].numpy()
        )

    def linear(self, name: str, x: Any) -> Any:
        """One linear layer."""
        y, bias = (
            self.ops.matmul(x, self.matrix(f"{name}.weight"), False, True),
            self.tensors.get(f"{name}.bias"),
        )
        if bias is None:
            return y
        if name.endswith("attn.qkv"):
            bias = heads_apart(bias, self.config.num_attention_heads)
        return self.ops.add(y, bias.float().contiguous().numpy())

    def norm(self, name: str, x: Any) -> Any:
        """One LayerNorm."""
        ops, epsilon = self.ops, self.config.layernorm_epsilon
        y = ops.mvn(x, np.array([-1]), True, epsilon, "inside_sqrt")
        weight, bias = (
            self.tensors[f"{name}.{kind}"].float().numpy() for kind in ("weight", "bias")
        )
        return ops.add(ops.multiply(y, weight), bias)

    def block(self, i: int, x: Any) -> Any:
        """One layer."""
        ops, place = self.ops, f"layers.{i}"
        attended = self.attention(i, self.norm(f"{place}.norm1", x))
        if not self.config.parallel_residual:
            x = ops.add(x, attended)
        inner = self.linear(f"{place}.mlp.up", self.norm(f"{place}.norm2", x))
        inner = ops.gelu(inner, "tanh" if self.config.activation == "gelu_tanh" else "erf")
        x = ops.add(x, self.linear(f"{place}.mlp.down", inner))
        return ops.add(x, attended) if self.config.parallel_residual else x

    def attention(self, i: int, x: Any) -> Any:
        """Attention over the state and what is new."""
        ops, heads, D = self.ops, self.config.num_attention_heads, self.config.head_dim
        parts = ops.split(self.linear(f"layers.{i}.attn.qkv", x), -1, 3).outputs()
        q, k, v = (
            ops.transpose(
                ops.reshape(part, np.array([0, 0, heads, D]), True), np.array([0, 2, 1, 3])
            )
            for part in parts
        )
        q, k = self.turn(q), self.turn(k)
        k, v = self.remember(f"k{i}", k), self.remember(f"v{i}", v)
        y = ops.scaled_dot_product_attention(q, k, v, self.inputs["mask"])
        y = ops.reshape(ops.transpose(y, np.array([0, 2, 1, 3])), np.array([0, 0, heads * D]), True)
        return self.linear(f"layers.{i}.attn.out", y)

    def turn(self, x: Any) -> Any:
        """Rotary embedding of (B, H, T, D)."""
        ops, R, D = self.ops, self.config.rotary_dim, self.config.head_dim
        if not R:
            return x
        a, b, rest = ops.variadic_split(x, -1, np.array([R // 2, R // 2, D - R])).outputs()
        cos, sin = self.angles
        first = ops.subtract(ops.multiply(a, cos), ops.multiply(b, sin))
        second = ops.add(ops.multiply(b, cos), ops.multiply(a, sin))
        return ops.concat([first, second, rest] if R < D else [first, second], -1)

    def remember(self, name: str, new: Any) -> Any:
        """The state with `new` (B, H, T, D) behind it; empty at first."""
        ops, heads, D = self.ops, self.config.num_attention_heads, self.config.head_dim
        batch = ops.gather(ops.shape_of(self.inputs["ids"]), np.array([0]), 0)
        empty = ops.broadcast(np.float32(0), ops.concat([batch, np.array([heads, 0, D])], 0))
        info = self.ov.op.util.VariableInfo()
        info.data_shape, info.data_type = self.ov.PartialShape([-1, heads, -1, D]), self.ov.Type.f32
        info.variable_id = name
        variable = self.ov.op.util.Variable(info)
        past = ops.gather(ops.read_value(empty, variable), self.inputs["rows"], 0)
        whole = ops.concat([past, new], 2)
        self.kept.append(ops.assign(whole, variable))
        return whole


class OpenVinoSlots(Slots):
    """One request, with a state of its own, for each slot; they are computed one after the
    other."""

    def __init__(self, engine: "OpenVinoEngine", count: int, length: int) -> None:
        super().__init__(count, length)
        self.engine = engine
        self.requests = [engine.compiled.create_infer_request() for _ in range(count)]

    def feed(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """See `Slots`."""
        parts = []
        for slot, ids in zip(slots, tokens, strict=True):
            parts.append(read(self.requests[slot], [ids], self.lengths[slot], [len(ids) - 1])[:, 0])
            self.lengths[slot] += len(ids)
        return torch.cat(parts)

    def copy(self, origin: int, target: int, tokens: int) -> None:
        """See `Slots`."""
        for ours, theirs in zip(
            self.requests[target].query_state(), self.requests[origin].query_state(), strict=True
        ):
            if tokens:
                ours.state = self.engine.ov.Tensor(
                    np.ascontiguousarray(theirs.state.data[:, :, :tokens])
                )
            else:
                ours.reset()
        self.lengths[target] = tokens


def read(request: Any, rows: Sequence[Sequence[int]], known: int, pick: Sequence[int]) -> Tensor:
    """Rows of T tokens after `known` ones in the request's state -> logits (B, len(pick), V) at
    places `pick` of T."""
    B, T = len(rows), len(rows[0])
    positions = np.arange(known, known + T)
    seen = np.arange(known + T) <= positions[:, None]
    mask = np.where(seen, np.float32(0), np.float32(-np.inf))
    request.infer(
        {
            "ids": np.array(rows, np.int64),
            "positions": np.broadcast_to(positions, (B, T)).copy(),
            "mask": np.broadcast_to(mask, (B, 1, *mask.shape)).copy(),
            "pick": np.broadcast_to(np.array(pick, np.int64), (B, len(pick))).copy(),
            "rows": np.arange(B, dtype=np.int32),
        }
    )
    return torch.from_numpy(request.get_output_tensor(0).data.copy())


class OpenVinoEngine(Engine):
    """A checkpoint compiled by OpenVINO for the CPU.

    Takes   dtype: fp32, or int8 with a scale for each output channel; auto is int8.
    Raises  ConfigError if openvino is not installed.
    """

    name = "openvino"
    implements = NEOX
    reads_checkpoints = True
    dtypes = ("auto", "fp32", "int8")
    batching = "one after the other"
    scores = "as it decodes"
    package = Package("openvino", "openvino")

    def __init__(self, source: SavedModel, dtype: str = "auto") -> None:
        super().__init__(source.config)
        self.ov: Any = require("openvino", "openvino", "engine=openvino")
        self.dtype = "int8" if dtype == "auto" else dtype
        # OpenVINO's defaults round activations and the cache, which changes texts: everything but
        # weights is float32.
        options = {
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
            "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
        }
        graph = Graph(self.ov, source, self.dtype).model()
        self.compiled = self.ov.Core().compile_model(graph, "CPU", options)

    @classmethod
    def from_checkpoint(cls, source: SavedModel, dtype: str, device: str) -> "OpenVinoEngine":
        """See `Engine`."""
        return cls(source, dtype)

    @property
    def numbers(self) -> str:
        """The dtype of the weights."""
        return self.dtype

    def slots(self, count: int, length: int) -> OpenVinoSlots:
        """See `Engine`."""
        return OpenVinoSlots(self, count, length)

    def logits_in_parts(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """See `Engine`."""
        request = self.compiled.create_infer_request()
        for start in range(0, len(ids), HEAD_ROWS):
            part = ids[start : start + HEAD_ROWS]
            yield read(request, [part], start, range(len(part)))[0]
