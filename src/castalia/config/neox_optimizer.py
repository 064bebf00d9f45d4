"""Rules for GPT-NeoX options about the optimizer: its type, its parameters, decay and clipping."""

from typing import Any, NamedTuple

from castalia.config.neox_keys import HONOURED
from castalia.config.neox_reading import NeoxOptions, NeoxReading, note, wrong
from castalia.core.errors import nearest


class Type(NamedTuple):
    """What an optimizer type of GPT-NeoX is here."""

    kind: str
    """The value of optim.kind."""
    defaults: dict[str, Any]
    """Its parameters with the defaults that GPT-NeoX's class has."""
    text: str = ""
    """What is otherwise here, for a note."""


ADAM = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8}
TYPES = {
    # The fused Adam of apex and of DeepSpeed decouples weight decay.
    "adam": Type("adamw", ADAM),
    "adamw": Type("adamw", ADAM),
    "cpu_adam": Type(
        "adamw",
        ADAM,
        "AdamW on the device of the weights; FSDP shards its state over the ranks, and"
        " optim.kind=adamw8bit needs a quarter of it",
    ),
    "cpu_torch_adam": Type(
        "adamw",
        ADAM,
        "AdamW on the device of the weights; GPT-NeoX itself never takes this branch, and runs"
        " cpu_adam",
    ),
    "onebitadam": Type(
        "adamw",
        ADAM,
        "AdamW, whose moments are not frozen after a warmup. In place of one bit, ranks exchange"
        " gradients in bf16 (train.gradients) where the precision is bf16; in fp16 or fp32 they"
        " exchange them whole: set precision=bf16 train.gradients=bf16",
    ),
    "sm3": Type("sm3", {"lr": 0.1, "momentum": 0.0, "beta": 0.0, "eps": 1e-30}),
    "madgrad_wd": Type("madgrad", {"lr": 1e-2, "momentum": 0.9, "eps": 1e-6}),
    "lion": Type("lion", {"lr": 1e-4, "betas": [0.9, 0.99]}),
    "sgd": Type("sgd", {"lr": 1e-3, "momentum": 0.0, "nesterov": False}),
}
"""By optimizer.type in lower case.

Source  GPT-NeoX, megatron/training.py:get_optimizer and megatron/optimizers.py.
"""


def optimizer(o: NeoxOptions, out: NeoxReading) -> None:
    """The type and its parameters; without either it is Adam, which is AdamW."""
    given = o["optimizer"] or {}
    name = str(given.get("type", "adam"))
    found = TYPES.get(name.lower())
    if found is None:
        menu = ", ".join(TYPES)
        wrong(
            out,
            f"unknown optimizer.type {name!r}; choose one of {menu}{nearest(name, TYPES)}",
            "optim.kind",
        )
        return
    params = given.get("params") or {}
    if not isinstance(params, dict):
        wrong(out, f"optimizer.params: expected a mapping, got {params!r}")
        params = {}
    o.put(out, "optim.kind", kind_of(o, out, name, found), "optimizer", "use_bnb_optimizer")
    for key, value in found.defaults.items():
        o.put(out, f"optim.{key}", params.get(key, value), "optimizer")
    every = {key for known in TYPES.values() for key in known.defaults}
    for key in sorted(params.keys() & every - found.defaults.keys()):
        wrong(
            out,
            f"optimizer.params.{key}: type {name} has no such parameter; delete it",
            f"optim.{key}",
        )
    decay_and_clip(o, out, params, found)


def kind_of(o: NeoxOptions, out: NeoxReading, name: str, found: Type) -> str:
    """The value of optim.kind, with notes on what differs."""
    if o["use_bnb_optimizer"] and name.lower() == "adam":
        note(
            out,
            "use_bnb_optimizer: optim.kind adamw8bit keeps the moments of matrices in blocks in 8"
            " bits, with a scale for 64 numbers of a row; bitsandbytes has one for 256, also of"
            " embeddings",
            "optim.kind",
        )
        return "adamw8bit"
    if o["use_bnb_optimizer"]:
        note(out, f"use_bnb_optimizer has no effect on type {name}, as in GPT-NeoX", "optim.kind")
    if found.text:
        note(out, f"optimizer.type {name} is {found.text}", "optim.kind")
    return found.kind


def decay_and_clip(o: NeoxOptions, out: NeoxReading, params: dict[str, Any], found: Type) -> None:
    """Weight decay, which SM3 of GPT-NeoX ignores, and clipping."""
    decay = stated(o, out, "weight_decay", params.get("weight_decay"), "weight_decay")
    # Over a preset silence keeps the preset's value; alone it means GPT-NeoX's default.
    if decay is None and o.complete:
        decay = 0.1
    if found.kind == "sm3":
        if o["weight_decay"]:
            note(
                out,
                "weight_decay has no effect on SM3, as in GPT-NeoX; optim.weight_decay sets it",
                "optim.weight_decay",
            )
        decay = 0.0
    if decay is not None:
        o.put(out, "optim.weight_decay", decay, "weight_decay", "optimizer")
    clip = stated(o, out, "gradient_clipping", params.get("max_grad_norm"), "max_grad_norm")
    if clip is None and o.complete:
        clip = 1.0
    if clip is not None:
        # 0 turns clipping off.
        o.put(out, "optim.clip", clip or None, "gradient_clipping", "optimizer")


def stated(o: NeoxOptions, out: NeoxReading, name: str, inner: Any, label: str) -> Any:
    """The option `name`, or what `optimizer.params` says in its place; None if neither does.

    DeepSpeed documents weight_decay and max_grad_norm among the parameters of its optimizers.
    """
    outer = o[name]
    if None not in (outer, inner) and outer != inner:
        wrong(
            out,
            f"{name} is {outer!r}, but optimizer.params.{label} is {inner!r}; keep one",
            HONOURED[name].path,
        )
    if outer is None:
        return inner
    return outer
