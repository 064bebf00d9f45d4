"""Rotary options of a config.json, both ways.

transformers 5 has one section `rope_parameters`; 4 had `rope_theta`, the rotated share under
several names, and a section `rope_scaling`. Both are read, and both are written.
Source  transformers 5, modeling_rope_utils.py.
"""

from typing import Any

from castalia.checkpoint.hf.keys import Keys
from castalia.core.errors import ConfigError, nearest
from castalia.models.config import TransformerConfig
from castalia.models.parts.frequencies import stretched
from castalia.models.scaling import RopeScaling

OPTIONAL = {
    "linear": (),
    "dynamic": (),
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": (
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
"""Options of each kind beside factor and original_max_position_embeddings."""
SECTIONS = ("rope_scaling", "rope_parameters")


def read_rope(
    keys: Keys,
    longest: int,
    *,
    share: str = "",
    usual_share: float = 1.0,
) -> dict[str, Any]:
    """Our rotary options.

    longest  max_position_embeddings.
    share    name of the key of the rotated share; without it the architecture rotates whole heads.
    usual_share  the share where no key gives it.
    Raises  ConfigError for an unknown kind or option.
    """
    base = keys.take("rope_theta", 10000.0)
    portion = keys.take(share, usual_share) if share else keys.only("partial_rotary_factor", 1.0)
    section = the_section(keys)
    base = section.take("rope_theta", base)
    if share:
        portion = section.take("partial_rotary_factor", portion)
    else:
        section.only("partial_rotary_factor", 1.0)
    kind = section.take("type", "default")
    kind = section.take("rope_type", kind)
    options = {"rotary_emb_base": base, "rotary_pct": portion}
    if kind != "default":
        if kind not in OPTIONAL:
            menu = ", ".join(("default", *OPTIONAL))
            raise section.error(
                "rope_type", kind, f"choose one of {menu}{nearest(str(kind), OPTIONAL)}"
            )
        options["rope_scaling"] = scaling(section, kind, longest)
    section.finish()
    return options


def the_section(keys: Keys) -> Keys:
    """The keys of the section, of whichever name.

    Raises  ConfigError if there are several for different layers.
    """
    sections = [keys.take(name, {}) for name in SECTIONS]
    # As in transformers, the older one replaces the other where a file has both.
    values: Any = next((section for section in sections if section), {})
    if not isinstance(values, dict):
        raise keys.error("rope_parameters", values, "expected a section of keys and values")
    nested = [name for name, value in values.items() if isinstance(value, dict)]
    if nested:
        raise ConfigError(
            f"{keys.where}: rope_parameters differ by layer ({', '.join(nested)}), which Castalia"
            " does not implement"
        )
    return Keys(values, f"{keys.where}: rope_parameters")


def scaling(section: Keys, kind: str, longest: int) -> dict[str, Any]:
    """Our section for the keys of one kind; `longest` is max_position_embeddings.

    Raises  ConfigError if a required key is missing.
    """
    trained = section.take("original_max_position_embeddings")
    factor = section.take("factor")
    if factor is None and kind == "yarn" and trained:
        factor = longest / trained
    if factor is None:
        raise ConfigError(f"{section.where}: factor is missing")
    if kind == "dynamic" and trained not in (None, longest):
        raise section.error(
            "original_max_position_embeddings",
            trained,
            f"transformers scales dynamically from max_position_embeddings, {longest}",
        )
    if kind == "llama3":
        given = {key: section.need(key) for key in OPTIONAL[kind]}
    else:
        given = {key: section.take(key) for key in OPTIONAL[kind]}
    # Left over from the training of published YaRN models; it computes nothing.
    section.ignore({"finetuned"} if kind == "yarn" else ())
    # As there, 0 means the default.
    values = {key: value for key, value in given.items() if value or value is False}
    if kind != "linear":
        # Written out, since a run may set another max_position_embeddings.
        values["original_max_position_embeddings"] = trained or longest
    return {"kind": kind, "factor": factor, **values}


def written_rope(
    config: TransformerConfig, *, theta: str = "rope_theta", share: str = ""
) -> dict[str, Any]:
    """The keys of a config.json for our rotary options.

    theta, share   names of the keys of base and rotated share beside the section.
    """
    base, scaled = written_scaling(config)
    parameters = {"rope_theta": base, **(scaled or {"rope_type": "default"})}
    values: dict[str, Any] = {theta: base}
    if share:
        values[share] = config.rotary_pct
        parameters["partial_rotary_factor"] = config.rotary_pct
    values |= {"rope_parameters": parameters, "rope_scaling": scaled}
    trained = config.rope_scaling and config.rope_scaling.original_max_position_embeddings
    if scaled is not None and scaled["rope_type"] == "dynamic" and trained:
        # transformers reads the length of the first training from this key.
        values["max_position_embeddings"] = trained
    return values


def written_scaling(config: TransformerConfig) -> tuple[float, dict[str, Any] | None]:
    """Base, and section of scaled frequencies if they are scaled by more than the base."""
    base = config.rotary_emb_base
    ours = config.rope_scaling
    if ours is None:
        return base, None
    if ours.kind == "ntk":
        # transformers has no such kind, and needs none: it is another base.
        return stretched(base, config.rotary_dim, ours.factor), None
    fields = RopeScaling.model_fields
    values: dict[str, Any] = {"rope_type": ours.kind, "factor": ours.factor}
    if ours.kind in ("yarn", "llama3"):
        trained = ours.original_max_position_embeddings
        values["original_max_position_embeddings"] = trained or config.max_position_embeddings
    for name in OPTIONAL[ours.kind]:
        value = getattr(ours, name)
        if ours.kind == "llama3" or value != fields[name].default:
            values[name] = value
    return base, values
