"""The precision and the loss scale of GPT-NeoX files: `precision` and the blocks `fp16`, `bf16`."""

from typing import Any

from castalia.config.neox_reading import NeoxOptions, NeoxReading, note, wrong

PRECISIONS = {"fp16": "fp16", "bfloat16": "bf16", "fp32": "fp32"}
"""GPT-NeoX's name of a precision -> ours."""
TYPES = PRECISIONS | {
    "bf16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float32": "fp32",
    "float": "fp32",
}
"""The `type` of a block `fp16` or `bf16` -> our name of the precision."""
COMPRESSING = "onebitadam"
"""The optimizer type of DeepSpeed that exchanges less than whole gradients."""
DEEPSPEED_POWER = 16
"""DeepSpeed's default of initial_scale_power in `fp16`."""


def precision(o: NeoxOptions, out: NeoxReading) -> None:
    """fp32 unless `precision` or one of the blocks asks for another.

    Source  GPT-NeoX v1.0, megatron/neox_arguments/arguments.py, calculate_derived: the type
            bfloat16 of the block `fp16` means bf16. Today's GPT-NeoX ignores the type.
    """
    fp16 = o["fp16"] or {}
    said = asked_by_block("fp16", fp16, out) | asked_by_block("bf16", o["bf16"] or {}, out)
    if (name := o["precision"]) is not None:
        if name not in PRECISIONS:
            menu = ", ".join(PRECISIONS)
            wrong(out, f"unknown precision {name!r}; choose one of {menu}", "precision")
        else:
            said["precision"] = PRECISIONS[name]
    if not said and type_of(fp16) == "bf16":
        said["fp16.type"] = "bf16"
        if "enabled" in fp16:
            wrong(
                out,
                f"fp16.type is {fp16['type']}, but the block is not enabled: GPT-NeoX v1.0 trains"
                " in bf16, today's in fp32; write `precision: bfloat16`, or delete the type",
                "precision",
            )
    kinds = sorted(set(said.values())) or ["fp32"]
    # Nothing in the file says which of two precisions was meant.
    if len(kinds) > 1:
        wrong(
            out,
            f"the file asks for {' and '.join(kinds)} at once ({', '.join(said)}); keep one",
            "precision",
        )
    chosen = next(iter(said.values()), "fp32")
    if o["te_fp8_mha"]:
        chosen = "fp8"
        fp8(o, out)
    o.put(out, "precision", chosen, "precision", "fp16", "bf16", "te_fp8_mha")
    gradients(chosen, o, out)
    if chosen == "fp16" and (o.complete or o.has("fp16")):
        loss_scale(o, out)
    if said == {"fp16.type": "bf16"}:
        note(
            out,
            f"fp16.type {fp16['type']} is read as GPT-NeoX v1.0 read it: the run trains in bf16,"
            " without a loss scale; today's GPT-NeoX ignores the type and trains in fp16",
            "precision",
        )


def fp8(o: NeoxOptions, out: NeoxReading) -> None:
    """The options of Transformer Engine's fp8, which GPT-NeoX turns on with te_fp8_mha alone.

    Source  GPT-NeoX, megatron/model/transformer.py, ParallelTransformerLayer.forward, and
            transformer_engine.py, TEDelayedScaling.
    """
    formats = {"hybrid": "auto", "e4m3": "e4m3"}
    if (name := o["te_fp8_format"]) not in formats:
        wrong(
            out,
            f"unknown te_fp8_format {name!r}; choose one of {', '.join(formats)}",
            "fp8.gradients",
        )
    else:
        o.put(out, "fp8.gradients", formats[name], "te_fp8_format")
    o.put(out, "fp8.weight_gradient", o["te_fp8_wgrad"], "te_fp8_wgrad")
    note(
        out,
        "te_fp8_mha is precision=fp8: the linear layers of blocks multiply in fp8, scaled by the"
        " values of each tensor at that moment; attention itself stays in bf16",
        "precision",
    )


def gradients(chosen: str, o: NeoxOptions, out: NeoxReading) -> None:
    """The dtype of gradients, of `data_types`, fp32_allreduce and an optimizer that compresses
    them."""
    given = (o["data_types"] or {}).get("grad_accum_dtype")
    names = {None: "fp32", "fp32": "fp32", "bf16": "bf16", "fp16": "fp16"}
    if given not in names:
        wrong(
            out,
            f"unknown data_types.grad_accum_dtype {given!r}; choose one of fp32, bf16, fp16",
            "train.gradients",
        )
        return
    wanted = given
    deciding = ["data_types", "fp32_allreduce"]
    if given is None and str((o["optimizer"] or {}).get("type")).lower() == COMPRESSING:
        wanted = "bf16"
        deciding.append("optimizer")
    narrow = wanted == "bf16" and chosen in ("bf16", "fp8") and not o["fp32_allreduce"]
    o.put(
        out,
        "train.gradients",
        "bf16" if narrow else "fp32",
        *deciding,
    )
    if given in ("bf16", "fp16") and not narrow:
        why = f"precision is {chosen}"
        if o["fp32_allreduce"] and given == "bf16":
            why = "fp32_allreduce sums them in fp32, and they add up in the same dtype"
        note(
            out,
            f"data_types.grad_accum_dtype {given}: gradients add up in fp32, since {why}",
            "train.gradients",
        )


def asked_by_block(name: str, block: dict[str, Any], out: NeoxReading) -> dict[str, str]:
    """What the block `fp16` or `bf16` asks for: place -> precision; nothing if it is off."""
    enabled = block.get("enabled", False)
    if not isinstance(enabled, bool):
        wrong(out, f"{name}.enabled: expected true or false, got {enabled!r}", "precision")
        return {}
    kind = type_of(block)
    if kind is None and "type" in block:
        menu = ", ".join(PRECISIONS)
        wrong(out, f"unknown {name}.type {block['type']!r}; choose one of {menu}", "precision")
    if not enabled:
        return {}
    said = {f"{name}.enabled": name}
    if kind is not None:
        said[f"{name}.type"] = kind
    if name == "fp16" and kind == "bf16":
        # v1.0 had no block `bf16`: there `fp16` is the block of both half precisions.
        del said["fp16.enabled"]
    return said


def type_of(block: dict[str, Any]) -> str | None:
    """Our name of the block's type; None without a type, or for an unknown one."""
    return TYPES.get(str(block.get("type")).lower())


def loss_scale(o: NeoxOptions, out: NeoxReading) -> None:
    """The loss scale of `fp16`, with DeepSpeed's defaults; 0 means dynamic."""
    given = o["fp16"] or {}
    o.put(out, "loss_scale.static", given.get("loss_scale") or None, "fp16")
    o.put(
        out, "loss_scale.initial_power", given.get("initial_scale_power", DEEPSPEED_POWER), "fp16"
    )
    o.put(out, "loss_scale.window", given.get("loss_scale_window", 1000), "fp16")
    o.put(out, "loss_scale.hysteresis", given.get("hysteresis", 2), "fp16")
    o.put(out, "loss_scale.minimum", given.get("min_loss_scale", 1), "fp16")
