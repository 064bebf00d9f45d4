"""Rules for GPT-NeoX's options of μP."""

from pathlib import Path
from typing import Any

from castalia.config.neox_keys import HONOURED
from castalia.config.neox_reading import NeoxOptions, NeoxReading, OptionRule, note, wrong
from castalia.config.values import read_yaml
from castalia.core.errors import ConfigError

EMBEDDING = "word_embeddings.weight"
"""End of the name of the parameter whose second dimension is the base width."""
FACTORS = {
    "mup_init_scale": "init_scale",
    "mup_embedding_mult": "embedding_mult",
    "mup_rp_embedding_mult": "rp_embedding_mult",
}
"""Options that GPT-NeoX multiplies with, and their names here."""
TEMPERATURES = {"mup_attn_temp": "attention_mult", "mup_output_temp": "output_mult"}
"""Options that GPT-NeoX declares and never reads, and the factors that divide by them here."""
CHECKS = {
    "coord_check": "coord_check is a command here, `castalia coord-check FILES`; the run trains",
    "save_base_shapes": "save_base_shapes writes no file here, since model.mup.base_width says all"
    " of it; the run trains",
}
"""Options after which GPT-NeoX ends without training -> the note."""
PATH = "model.mup.base_width"


def mup(o: NeoxOptions, out: NeoxReading) -> None:
    """The section model.mup, where use_mup is on.

    Source  GPT-NeoX, megatron/training.py, mup_weights_reinit and save_base_shapes;
            transformer.py, where the scores are divided by the width of a head.
    """
    if not o["use_mup"]:
        idle = [name for name in KEYS if o.has(name) and name != "use_mup"]
        if idle:
            out.ignored.setdefault("belongs to use_mup, which is off", []).extend(idle)
        return
    base = base_width(o, out)
    if base is not None:
        o.put(out, PATH, base, "use_mup")
    # Also without a base width, which an override then gives.
    for option, name in FACTORS.items():
        o.put(out, f"model.mup.{name}", o[option], "use_mup")
    output = 1 / o["mup_output_temp"]
    o.put(out, "model.mup.output_mult", output, "use_mup")
    attention = 1 / o["mup_attn_temp"]
    if o.has("hidden_size") and o.has("num_attention_heads"):
        # Its scores are divided by the width of a head alone, and T5's biases multiplied with its
        # root; ours are the same at this width, and follow it as μP asks.
        head = o["hidden_size"] // o["num_attention_heads"]
        o.put(out, "model.mup.base_head_dim", head, "use_mup")
        attention *= head**-0.5
    o.put(out, "model.mup.attention_mult", attention, "use_mup")
    notes_on(o, out)


def notes_on(o: NeoxOptions, out: NeoxReading) -> None:
    """What differs from GPT-NeoX, one note each."""
    if o["init_method"] in ("small_init", "wang_init"):
        note(
            out,
            f"init_method {o['init_method']} under use_mup: GPT-NeoX divides by the root of the"
            " width twice, here the deviation follows table 8 of arXiv:2203.03466",
            PATH,
        )
    for name, factor in TEMPERATURES.items():
        if o[name] != 1:
            note(
                out,
                f"{name} {o[name]:g}: GPT-NeoX never reads it; here it divides, as"
                f" model.mup.{factor}",
                f"model.mup.{factor}",
            )
    for name, text in CHECKS.items():
        if o.has(name) and o[name]:
            note(out, text, PATH)


def base_width(o: NeoxOptions, out: NeoxReading) -> int | None:
    """The width in base_shapes_file, or that of the file itself where the shapes are to be saved;
    None with a problem."""
    named = o["base_shapes_file"]
    if o["save_base_shapes"] and o.has("hidden_size"):
        return int(o["hidden_size"])
    # One file a rank, all with the same widths.
    places = [] if named is None else [Path(named), Path(f"{named}.0")]
    for place in places:
        if place.is_file():
            return width_in(place, out)
    missing = "there is no base_shapes_file"
    if named is not None:
        missing = f"base_shapes_file {named} does not exist"
    wrong(
        out,
        f"use_mup: {missing}, which names the width that learning rates were tuned at; set"
        f" {PATH}=N in its place",
        PATH,
    )
    return None


def width_in(file: Path, out: NeoxReading) -> int | None:
    """The base width in a file of the mup package: name -> base sizes, null where one does not
    grow."""
    try:
        shapes: dict[str, Any] = read_yaml(file)
    except ConfigError as error:
        wrong(out, str(error), PATH)
        return None
    for name, sizes in shapes.items():
        wide = isinstance(sizes, list) and len(sizes) == 2 and isinstance(sizes[1], int)
        if name.endswith(EMBEDDING) and wide:
            return int(sizes[1])
    wrong(out, f"{file} has no width of {EMBEDDING}; set {PATH}=N in its place", PATH)
    return None


KEYS = ("use_mup", "base_shapes_file", *FACTORS, *TEMPERATURES, *CHECKS)
assert set(KEYS) <= set(HONOURED)
MUP_RULES: list[tuple[tuple[str, ...], OptionRule]] = [(KEYS, mup)]
