"""The `optim:` section: what every optimizer has. Needs no torch."""

from typing import Any

from pydantic import NonNegativeFloat, PositiveFloat, model_validator

from castalia.config.base import Config, build
from castalia.core.registry import Registry


class GroupConfig(Config):
    """Parameters that are updated otherwise than the rest."""

    pattern: str
    """Shell pattern of parameter names, such as `layers.*.attn.*`; of several groups the first that
    matches counts."""
    lr_scale: NonNegativeFloat = 1.0
    """Factor on the learning rate of every step."""
    weight_decay: NonNegativeFloat | None = None
    """Weight decay; null takes that of the section, and none where the family has none."""
    kind: str | None = None
    """Another optimizer for these parameters; null takes that of the section."""
    options: dict[str, Any] = {}
    """Options of that other optimizer."""


class OptimConfig(Config):
    """What every optimizer has; a member of OPTIMIZERS adds its own. Only optim/ reads
    these fields."""

    kind: str
    """Name of the optimizer."""
    lr: NonNegativeFloat = 6e-4
    """Peak learning rate, reached at the end of warmup; 0 updates nothing, for a dry run."""
    weight_decay: NonNegativeFloat = 0.1
    """Weight decay of every parameter that the family does not exempt (biases and norms)."""
    clip: PositiveFloat | None = 1.0
    """Largest global gradient L2 norm; null turns clipping off."""
    groups: list[GroupConfig] = []
    """Parameters with another rate, decay or optimizer, by pattern."""

    @model_validator(mode="after")
    def known_kinds(self) -> "OptimConfig":
        """Every group names an optimizer that exists, with options that take effect."""
        kinds = []
        for group in self.groups:
            if group.kind is not None:
                member_config(group.kind, group.options)
            if not group.options:
                continue
            # One torch optimizer a kind has one set of options: others would be ignored.
            if group.kind in (None, self.kind):
                raise ValueError(
                    f"group {group.pattern!r} has options but names no other optimizer; options of"
                    f" {self.kind} stand in the section itself"
                )
            if shared := sorted(group.options.keys() & OptimConfig.model_fields.keys()):
                raise ValueError(
                    f"group {group.pattern!r} has {', '.join(shared)} in its options; the section"
                    " sets these, and lr_scale and weight_decay of the group change them"
                )
            kinds.append(group.kind)
        if len(kinds) != len(set(kinds)):
            raise ValueError(
                "two groups give options to the same optimizer; give them in one of the two"
            )
        return self

    def config_of(self, kind: str) -> "OptimConfig":
        """The config of an optimizer: the section itself, or the options of the group that names
        another.

        Raises  ConfigError for an unknown optimizer or a wrong option.
        """
        if kind == self.kind:
            return self
        options: dict[str, Any] = {}
        for group in self.groups:
            if group.kind == kind:
                options |= group.options
        return member_config(kind, {"lr": self.lr, **options})


OPTIMIZERS: Registry[Any] = Registry("optimizer")
"""Optimizers by the name that `optim.kind` takes; members are subclasses of
`castalia.optim.base.Member`."""


def member_config(kind: str, options: dict[str, Any]) -> OptimConfig:
    """The config of the optimizer `kind` with some options of its own.

    Raises  ConfigError for an unknown optimizer or a wrong option.
    """
    config: OptimConfig = build(
        OPTIMIZERS[kind].Config, {"kind": kind, **options}, f"options of {kind}"
    )
    return config
