"""The structures of step.cpp, field by field."""

import ctypes

from castalia.native.compiled import CLinear, Long, Pointer


def longs(*names: str) -> list[tuple[str, type[Long]]]:
    """Fields that are int64."""
    return [(name, Long) for name in names]


class CNorm(ctypes.Structure):
    """`Norm` of step.cpp."""

    _fields_ = [("weight", Pointer), ("bias", Pointer), *longs("kind", "part")]


class CLayer(ctypes.Structure):
    """`Layer` of step.cpp."""

    _fields_ = [
        *((name, CNorm) for name in ("norm1", "norm2", "q_norm", "k_norm")),
        *((name, CLinear) for name in ("qkv", "out", "up", "down")),
        ("window", Long),
    ]


class CModel(ctypes.Structure):
    """`Model` of step.cpp."""

    _fields_ = [
        *longs("layers", "width", "heads", "kv_heads", "head_dim", "ffn", "rotary", "vocab"),
        *longs("parallel", "shared_norm", "post_norm", "activation", "gated"),
        *longs("qk_norm", "qk_across", "qk_by_head"),
        *longs("qkv_width", "q_step", "k_step", "k_first", "v_first"),
        ("epsilon", ctypes.c_double),
        ("embed_factor", ctypes.c_double),
        ("layer", Pointer),
        ("norm", CNorm),
        ("head", CLinear),
        ("cos", Pointer),
        ("sin", Pointer),
        ("place", Pointer),
        ("bias", Pointer),
        *longs("bias_by_key", "positions"),
        ("embed", Pointer),
        ("embed_scale", Pointer),
        ("embed_kind", Long),
    ]


class CCache(ctypes.Structure):
    """`Cache` of step.cpp."""

    _fields_ = [
        *((name, Pointer) for name in ("k", "v", "k_scale", "v_scale")),
        *longs("slots", "length", "kind"),
    ]


class CBatch(ctypes.Structure):
    """`Batch` of step.cpp."""

    _fields_ = [
        ("rows", Long),
        *((name, Pointer) for name in ("token", "slot", "position")),
        ("wanted", Long),
        ("pick", Pointer),
        ("logits", Pointer),
        ("best", Pointer),
        ("tokens", Long),
    ]


class CChoice(ctypes.Structure):
    """`Choice` of step.cpp."""

    _fields_ = [
        ("screen", Pointer),
        ("head", Pointer),
        *((name, ctypes.c_double) for name in ("weight_error", "weight_norm", "near")),
        ("tokens", Long),
        *((name, Pointer) for name in ("best", "gap", "label", "loss")),
        ("rounds", Long),
    ]
