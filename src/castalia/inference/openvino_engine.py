"""OpenVINO as an engine: the decoder as a graph over its weights, the KV cache as its state."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from castalia.core.extras import require
from castalia.formats.saved_model import SavedModel
from castalia.inference.engine import HEAD_ROWS, Engine, Package, Slots
from castalia.inference.implements import NEOX
from castalia.models.config import require_transformer
from castalia.models.families import family_of
from castalia.models.families.base import LinearPart
from castalia.models.parts.qkv import heads_apart
from castalia.models.quantizing import quantize_channels
from castalia.native.weights import rope_angles


class Graph:
    """The decoder as a graph of OpenVINO's operators, over the parts that its family declares.

    Inputs   ids, positions (B, T) int64; mask (B, 1, T, keys) float32, 0 or -inf; pick (B, n)
             int64, the places in T whose logits are wanted; rows (B,) int32, the row of the state
             that each row of the batch continues.
    Output   logits (B, n, padded vocabulary).
    """

    def __init__(self, ov: Any, source: SavedModel, dtype: str) -> None:
        parts = family_of(source.config).parts(source.config)
        assert parts is not None, "OpenVinoEngine.refuses was not asked"
        self.ov = ov
        self.ops = ov.opset13
        self.config = require_transformer(source.config, "OpenVINO")
        self.tensors = source.tensors
        self.dtype = dtype
        self.linears = {part.role: part for part in parts.linears}
        self.norms = {part.role: part for part in parts.norms}
        self.inputs = {
            "ids": self.ops.parameter([-1, -1], np.int64, "ids"),
            "positions": self.ops.parameter([-1, -1], np.int64, "positions"),
            "mask": self.ops.parameter([-1, 1, -1, -1], np.float32, "mask"),
            "pick": self.ops.parameter([-1, -1], np.int64, "pick"),
            "rows": self.ops.parameter([-1], np.int32, "rows"),
        }
        for name, parameter in self.inputs.items():
            parameter.output(0).set_names({name})
        self.assigns: list[Any] = []
        """Writes of the state. Nothing depends on them, so the model has to list them."""

    def model(self) -> Any:
        """The whole graph."""
        ops = self.ops
        x = ops.gather(self.matrix(self.tensors["embed.weight"]), self.inputs["ids"], 0)
        self.angles = []
        if self.config.rotary_dim:
            for table in rope_angles(self.config):
                rows = ops.gather(table.numpy(), self.inputs["positions"], 0)
                self.angles.append(ops.unsqueeze(rows, 1))
        for i in range(self.config.num_layers):
            x = self.block(i, x)
        # The head is the largest product, so it is computed at the wanted places alone.
        picked = ops.gather(self.norm("norm", x), self.inputs["pick"], 1, batch_dims=1)
        head = "embed.weight" if self.config.tie_word_embeddings else "unembed.weight"
        logits = ops.matmul(picked, self.matrix(self.tensors[head]), False, True)
        inputs = list(self.inputs.values())
        return self.ov.Model([ops.result(logits)], self.assigns, inputs, "decoder")

    def matrix(self, weight: Tensor) -> Any:
        """A weight (N, K). In int8, OpenVINO recognizes the scaling and computes with integers."""
        if self.dtype == "fp32":
            return self.ops.constant(weight.float().contiguous().numpy())
        q, scale = quantize_channels(weight.float())
        floats = self.ops.convert(self.ops.constant(q.numpy()), "f32")
        return self.ops.multiply(floats, scale[:, None].numpy())

    def linear(self, i: int, role: str, x: Any) -> Any:
        """One linear layer of block `i`."""
        part = self.linears[role]
        name = f"layers.{i}.{part.place}"
        y = self.ops.matmul(x, self.matrix(self.rows(part, f"{name}.weight")), False, True)
        if not part.bias:
            return y
        bias = self.rows(part, f"{name}.bias")
        return self.ops.add(y, bias.float().contiguous().numpy())

    def rows(self, part: LinearPart, name: str) -> Tensor:
        """A parameter of a linear layer; a fused QKV as queries, then keys, then values."""
        tensor = self.tensors[name]
        return heads_apart(tensor, part.fused_heads) if part.fused_heads else tensor

    def norm(self, name: str, x: Any) -> Any:
        """One LayerNorm."""
        ops = self.ops
        # Epsilon inside the square root, as in torch.
        y = ops.mvn(x, np.array([-1]), True, self.config.layernorm_epsilon, "inside_sqrt")
        weight = self.tensors[f"{name}.weight"].float().numpy()
        bias = self.tensors[f"{name}.bias"].float().numpy()
        return ops.add(ops.multiply(y, weight), bias)

    def block_norm(self, i: int, role: str, x: Any) -> Any:
        """One LayerNorm of block `i`."""
        return self.norm(f"layers.{i}.{self.norms[role].place}", x)

    def block(self, i: int, x: Any) -> Any:
        """One layer."""
        ops = self.ops
        attended = self.attention(i, self.block_norm(i, "attention_norm", x))
        if not self.config.parallel_residual:
            x = ops.add(x, attended)
        inner = self.linear(i, "mlp_up", self.block_norm(i, "mlp_norm", x))
        inner = ops.gelu(inner, "tanh" if self.config.activation == "gelu_tanh" else "erf")
        x = ops.add(x, self.linear(i, "mlp_down", inner))
        if self.config.parallel_residual:
            x = ops.add(x, attended)
        return x

    def attention(self, i: int, x: Any) -> Any:
        """Attention over the state and the new tokens."""
        ops = self.ops
        queries, keys, values = ops.split(self.linear(i, "qkv", x), -1, 3).outputs()
        q = self.rotate(self.by_head(queries))
        k = self.extend(f"k{i}", self.rotate(self.by_head(keys)))
        v = self.extend(f"v{i}", self.by_head(values))
        y = ops.scaled_dot_product_attention(q, k, v, self.inputs["mask"])
        y = ops.transpose(y, np.array([0, 2, 1, 3]))
        width = self.config.num_attention_heads * self.config.head_dim
        return self.linear(i, "attention_out", ops.reshape(y, np.array([0, 0, width]), True))

    def by_head(self, x: Any) -> Any:
        """(B, T, H * D) -> (B, H, T, D)."""
        shape = np.array([0, 0, self.config.num_attention_heads, self.config.head_dim])
        return self.ops.transpose(self.ops.reshape(x, shape, True), np.array([0, 2, 1, 3]))

    def rotate(self, x: Any) -> Any:
        """Rotary embedding of (B, H, T, D); the dimensions beyond rotary_dim pass unchanged."""
        ops = self.ops
        R = self.config.rotary_dim
        D = self.config.head_dim
        if not R:
            return x
        a, b, rest = ops.variadic_split(x, -1, np.array([R // 2, R // 2, D - R])).outputs()
        cos, sin = self.angles
        first = ops.subtract(ops.multiply(a, cos), ops.multiply(b, sin))
        second = ops.add(ops.multiply(b, cos), ops.multiply(a, sin))
        return ops.concat([first, second, rest] if R < D else [first, second], -1)

    def extend(self, name: str, new: Any) -> Any:
        """The state `name` with `new` (B, H, T, D) appended; the state is empty at first."""
        ops = self.ops
        heads = self.config.num_attention_heads
        D = self.config.head_dim
        # The batch is known only when the graph runs.
        batch = ops.gather(ops.shape_of(self.inputs["ids"]), np.array([0]), 0)
        empty = ops.broadcast(np.float32(0), ops.concat([batch, np.array([heads, 0, D])], 0))
        info = self.ov.op.util.VariableInfo()
        info.data_shape = self.ov.PartialShape([-1, heads, -1, D])
        info.data_type = self.ov.Type.f32
        info.variable_id = name
        variable = self.ov.op.util.Variable(info)
        # The rows let a caller reorder sequences between steps without copying the state itself.
        past = ops.gather(ops.read_value(empty, variable), self.inputs["rows"], 0)
        whole = ops.concat([past, new], 2)
        self.assigns.append(ops.assign(whole, variable))
        return whole


class OpenVinoSlots(Slots):
    """A request with a state of its own for each slot, computed one after the other."""

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
        ours = self.requests[target].query_state()
        theirs = self.requests[origin].query_state()
        for mine, other in zip(ours, theirs, strict=True):
            if tokens:
                # Positions are the third axis: a prefix is a slice of it.
                prefix = np.ascontiguousarray(other.state.data[:, :, :tokens])
                mine.state = self.engine.ov.Tensor(prefix)
            else:
                mine.reset()
        self.lengths[target] = tokens


def read(request: Any, rows: Sequence[Sequence[int]], known: int, pick: Sequence[int]) -> Tensor:
    """Rows of T tokens after the `known` ones in the request's state.

    Returns  logits (B, len(pick), V) at the places `pick` of T.
    """
    B = len(rows)
    T = len(rows[0])
    positions = np.arange(known, known + T)
    visible = np.arange(known + T) <= positions[:, None]
    mask = np.where(visible, np.float32(0), np.float32(-np.inf))
    request.infer(
        {
            "ids": np.array(rows, np.int64),
            "positions": np.broadcast_to(positions, (B, T)).copy(),
            "mask": np.broadcast_to(mask, (B, 1, *mask.shape)).copy(),
            "pick": np.broadcast_to(np.array(pick, np.int64), (B, len(pick))).copy(),
            "rows": np.arange(B, dtype=np.int32),
        }
    )
    # The request reuses its output at the next call.
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
        # OpenVINO's defaults round activations and the cache, which changes texts. Only weights
        # are rounded here.
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
