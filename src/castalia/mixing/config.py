"""The `mixing:` section of a config."""

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
    "smoothing", "eps", "scale", "reward", "power", "guard", "temperature", "max_epochs", "rate", "least", "clamp",
    "past", "refit_every", "memory", "recent", "caution", "enough", "target", "reference", "record",
)  # fmt: skip
"""Fields that only some mixers have; null leaves the mixer's own default."""


def read_losses(value: Any) -> Any:
    """A path stands for the losses in that file: a mapping by source, or one under "losses"."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(Path(value).read_text(encoding="utf-8"))
        return found.get("losses", found)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"cannot read the losses in {value}: {error}; `castalia mixing reference` writes them"
        ) from None


Losses = Annotated[dict[str, float], BeforeValidator(read_losses)]


class MixingConfig(Config):
    """How sources are mixed. Only train/mixture.py and the loops of others read these fields."""

    kind: str = "static"
    """Mixer: static, natural, uniform, temperature, unimax, odm, odm-repo, odm-paper, exp3, naive-validation, dbl,
    doremi, ado, progress or replay. In `castalia train`, static is GPT-NeoX's blend by data.weights, which no planner
    makes."""
    planned: bool = False
    """Let the planner make the rows under `static` too; under every other kind it does."""
    warmup_steps: NonNegativeInt = 0
    """Steps at the prior before the mixer decides."""
    update_every: PositiveInt = 1
    """Steps between updates of the shares."""
    weight_smoothing: float = Field(0.0, ge=0, lt=1)
    """The past's part in a running mean of the shares."""
    floor: float = Field(0.0, ge=0, le=1)
    """Mass that is spread evenly whatever was learned, over all sources together."""
    max_share: float | None = Field(None, gt=0, le=1)
    """Largest share of a source; null is 0.5 for odm with four sources or more, else 1."""
    epoch_cap: PositiveFloat | None = None
    """Most passes over a source in the whole run."""
    freeze_after: NonNegativeInt | None = None
    """Step after which the shares stand."""
    lag: NonNegativeInt = 1
    """Steps that may be planned ahead: step t follows the losses up to step t - 1 - lag."""
    grain: NonNegativeFloat = 2**-6
    """Nats a token to which a loss is rounded before the mixer sees it, so that the float sums of another number of
    processes give the same shares; 0 does not round."""
    exhaustion: str | dict[str, str] = "repeat"
    """When a source was read through: repeat, stop, drop or cap:N epochs; for all, or by source name."""
    allow_empty: bool = False
    """A source without rows gets weight 0; otherwise it is an error."""
    on_new: Annotated[Literal["error", "prior", "mean"], AT_RESUME] = "error"
    """At a resume, a source that the checkpoint does not know: an error, its prior share, or the mean of the others."""
    on_removed: Annotated[Literal["error", "drop"], AT_RESUME] = "error"
    """At a resume, a source that only the checkpoint has: an error, or forget it."""
    log_every: Annotated[PositiveInt, AT_RESUME] = 1
    """Steps between lines of mixture.jsonl; a change of the shares is always written."""
    smoothing: float | None = Field(None, ge=0, lt=1)
    """odm, odm-repo, odm-paper, ado: the past's part in the running mean of the reward; null is 0.9."""
    eps: NonNegativeFloat | None = None
    """odm, odm-repo, odm-paper, exp3, naive-validation: share that every source has; null falls as the paper says."""
    scale: PositiveFloat | None = None
    """exp3: factor of the reward; null is 0.1."""
    reward: Literal["ppl", "loss"] | None = None
    """odm: what is averaged; null is ppl."""
    power: NonNegativeFloat | None = None
    """odm: exponent of the averaged reward; null is 1."""
    guard: float | None = Field(None, gt=1)
    """odm: most that one step may multiply a share by; null is 2."""
    temperature: PositiveFloat | None = None
    """temperature: 1 is natural, larger more uniform; null is 2."""
    max_epochs: PositiveFloat | None = None
    """unimax: most passes over a source; null is 4."""
    rate: PositiveFloat | None = None
    """dbl, doremi: step size of the multiplicative update; null is 1."""
    least: float | None = Field(None, ge=0, le=1)
    """dbl, doremi: mass spread evenly; null is 1e-4 and 1e-3. progress: mass that follows the prior; null is 0.1."""
    clamp: bool | None = None
    """dbl: distances to the target count from 0 up; null is false."""
    past: float | None = Field(None, ge=0, lt=1)
    """ado: the average's part in the shares; null is 0.9."""
    refit_every: PositiveInt | None = None
    """ado: steps between fits of the scaling laws; null is 1000."""
    memory: NonNegativeFloat | None = None
    """progress: power of the step by which old losses fade; null is 3."""
    recent: NonNegativeFloat | None = None
    """progress: the same for the share that was read lately; null is 10."""
    caution: NonNegativeFloat | None = None
    """progress: factor of the standard error by which a slope is drawn towards the mean slope; null is 2."""
    enough: PositiveFloat | None = None
    """progress: part of the mean slope from which on a source keeps its prior share; null is 0.75."""
    target: Losses | None = None
    """dbl: held-out loss that each source shall reach, nats a token; by name, or a file of `mixing reference`."""
    reference: Losses | None = None
    """doremi, odm: a reference model's loss on each source, nats a token; by name, or such a file."""
    record: str | None = None
    """replay: the mixture.jsonl of the run to repeat."""

    @model_validator(mode="after")
    def check(self) -> "MixingConfig":
        """The kind exists, has the options given, and the policies are policies."""
        policies = (
            self.exhaustion if isinstance(self.exhaustion, dict) else {"(all)": self.exhaustion}
        )
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
        """Fields that are set although no planner would read them."""
        fresh = {name: field.default for name, field in type(self).model_fields.items()}
        return (
            []
            if self.plans
            else [name for name, value in fresh.items() if getattr(self, name) != value]
        )

    def own(self) -> dict[str, Any]:
        """The mixer's own options that are given."""
        return {name: getattr(self, name) for name in OWN if getattr(self, name) is not None}

    def make(
        self,
        sources: Sequence[str],
        *,
        tokens: float,
        sizes: ArrayLike | Mapping[str, float] | None = None,
        prior: ArrayLike | Mapping[str, float] | None = None,
    ) -> Mixer:
        """The mixer of a run of so many tokens over sources of `sizes` tokens, starting at `prior`."""
        budget = {"budget": tokens} if self.kind == "unimax" else {}
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
            allow_empty=self.allow_empty,
            **self.own(),
            **budget,
        )
