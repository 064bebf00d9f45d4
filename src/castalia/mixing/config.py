"""The `mixing:` section of the config."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from numpy.typing import ArrayLike
from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from castalia.config.base import Config
from castalia.config.changes import AT_RESUME
from castalia.core.errors import ConfigError
from castalia.mixing.exhaustion import rows_allowed
from castalia.mixing.make import check_options, make_mixer
from castalia.mixing.mixer import MIXERS, Mixer

OWN = (
    "smoothing", "eps", "scale", "reward", "power", "guard", "temperature", "max_epochs", "rate",
    "least", "clamp", "past", "refit_every", "memory", "recent", "caution", "enough", "target",
    "reference", "record",
)  # fmt: skip
"""Options of particular mixers; null keeps the mixer's default."""


def read_losses(value: Any) -> Any:
    """Replace a path by the losses in that JSON file: a mapping by source, or its "losses"."""
    if not isinstance(value, str):
        return value
    try:
        content = json.loads(Path(value).read_text(encoding="utf-8"))
        return content.get("losses", content)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"cannot read the losses in {value}: {error}; `castalia mixing reference` writes"
            " such a file"
        ) from None


Losses = Annotated[dict[str, float], BeforeValidator(read_losses)]


class MixingConfig(Config):
    """How sources are mixed. `castalia train` reads these fields in train/mixture.py alone."""

    kind: str = "static"
    """Mixer: static, natural, uniform, temperature, unimax, odm, odm-repo, odm-paper, exp3,
    naive-validation, dbl, doremi, ado, progress or replay. In `castalia train`, static is
    GPT-NeoX's blend by data.weights, made without a planner."""
    planned: bool = False
    """Make the rows with the planner under static too; every other kind always uses it."""
    warmup_steps: NonNegativeInt = 0
    """Steps at the prior before the mixer takes over."""
    update_every: PositiveInt = 1
    """Steps between updates of the shares."""
    weight_smoothing: float = Field(0.0, ge=0, lt=1)
    """Weight of the past in a running mean of the shares."""
    floor: float = Field(0.0, ge=0, le=1)
    """Mass spread evenly over all sources regardless of what was learned; in total, not each."""
    max_share: float | None = Field(None, gt=0, le=1)
    """Largest share of a source; null is 0.5 for odm with four sources or more, else 1."""
    epoch_cap: PositiveFloat | None = None
    """Maximum passes over a source in the whole run."""
    freeze_after: NonNegativeInt | None = None
    """Step after which the shares stay fixed."""
    lag: NonNegativeInt = 1
    """Steps that may be planned ahead: step t follows the losses up to step t - 1 - lag."""
    grain: NonNegativeFloat = 2**-6
    """Resolution in nats a token to which losses are rounded before the mixer observes them, so
    that float sums over another world size give the same shares; 0 turns rounding off."""
    exhaustion: str | dict[str, str] = "repeat"
    """Policy when a source is exhausted: repeat, stop, drop or cap:N epochs; for all sources or by
    name."""
    allow_empty: bool = False
    """Give a source without rows weight 0; otherwise it is an error."""
    on_new: Annotated[Literal["error", "prior", "mean"], AT_RESUME] = "error"
    """On resume, a source missing from the checkpoint: an error, its prior share, or the mean of
    the others."""
    on_removed: Annotated[Literal["error", "drop"], AT_RESUME] = "error"
    """On resume, a source that only the checkpoint has: an error, or dropped."""
    log_every: Annotated[PositiveInt, AT_RESUME] = 1
    """Steps between lines of mixture.jsonl; a change of the shares is always written."""
    smoothing: float | None = Field(None, ge=0, lt=1)
    """odm, odm-repo, odm-paper, ado: weight of the past in the running mean of the reward; null is
    0.9."""
    eps: NonNegativeFloat | None = None
    """odm, odm-repo, odm-paper, exp3, naive-validation: guaranteed share of every source; null
    decays as in the paper."""
    scale: PositiveFloat | None = None
    """exp3: factor of the reward; null is 0.1."""
    reward: Literal["ppl", "loss"] | None = None
    """odm: the averaged quantity; null is ppl."""
    power: NonNegativeFloat | None = None
    """odm: exponent of the averaged reward; null is 1."""
    guard: float | None = Field(None, gt=1)
    """odm: largest factor by which one step changes a share; null is 2."""
    temperature: PositiveFloat | None = None
    """temperature: 1 is natural, larger is more uniform; null is 2."""
    max_epochs: PositiveFloat | None = None
    """unimax: maximum passes over a source; null is 4."""
    rate: PositiveFloat | None = None
    """dbl, doremi: step size of the multiplicative update; null is 1."""
    least: float | None = Field(None, ge=0, le=1)
    """dbl, doremi: mass spread evenly; null is 1e-4 for dbl and 1e-3 for doremi. progress: mass
    that follows the prior; null is 0.1."""
    clamp: bool | None = None
    """dbl: treat a loss below its target as being at the target; null is false."""
    past: float | None = Field(None, ge=0, lt=1)
    """ado: weight of the average in the shares; null is 0.9."""
    refit_every: PositiveInt | None = None
    """ado: steps between fits of the scaling laws; null is 1000."""
    memory: NonNegativeFloat | None = None
    """progress: power of the step with which old losses fade; null is 3."""
    recent: NonNegativeFloat | None = None
    """progress: the same power for the share read recently; null is 10."""
    caution: NonNegativeFloat | None = None
    """progress: standard errors by which a slope is shrunk towards the mean slope; null is 2."""
    enough: PositiveFloat | None = None
    """progress: fraction of the mean slope at which a source keeps its prior share; null is
    0.75."""
    target: Losses | None = None
    """dbl: held-out loss that each source should reach, in nats a token; by name, or a file from
    `castalia mixing reference`."""
    reference: Losses | None = None
    """doremi, odm: a reference model's loss on each source, in nats a token; by name, or such a
    file."""
    record: str | None = None
    """replay: the mixture.jsonl of the run to repeat."""

    @model_validator(mode="after")
    def check(self) -> "MixingConfig":
        """Check the kind, its options and the exhaustion policies."""
        if isinstance(self.exhaustion, dict):
            policies = self.exhaustion
        else:
            policies = {"(all)": self.exhaustion}
        try:
            check_options(self.kind, MIXERS[self.kind], self.own())
            for name, policy in policies.items():
                rows_allowed(policy, 1, name)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def plans(self) -> bool:
        """Whether a planner makes the rows of `castalia train`."""
        return self.planned or self.kind != "static"

    def idle(self) -> list[str]:
        """Names of the fields that were set but have no effect without a planner."""
        if self.plans:
            return []
        fields = type(self).model_fields
        return [name for name, field in fields.items() if getattr(self, name) != field.default]

    def own(self) -> dict[str, Any]:
        """The mixer's own options that were set."""
        return {name: getattr(self, name) for name in OWN if getattr(self, name) is not None}

    def make(
        self,
        sources: Sequence[str],
        *,
        tokens: float,
        sizes: ArrayLike | Mapping[str, float] | None = None,
        prior: ArrayLike | Mapping[str, float] | None = None,
        allow_empty: bool = False,
    ) -> Mixer:
        """Build the mixer of a run.

        tokens       length of the run. sizes: tokens of each source. prior: initial shares.
        allow_empty  accept a source of size 0 even where the config does not.
        Raises       ConfigError for an option out of range.
        """
        options = self.own()
        if self.kind == "unimax":
            options["budget"] = tokens
        return make_mixer(
            self.kind,
            sources=sources,
            prior=prior,
            sizes=sizes,
            warmup_steps=self.warmup_steps,
            update_every=self.update_every,
            weight_smoothing=self.weight_smoothing,
            floor=self.floor,
            max_share=self.max_share,
            epoch_cap=self.epoch_cap,
            horizon=tokens,
            freeze_after=self.freeze_after,
            allow_empty=self.allow_empty or allow_empty,
            **options,
        )
