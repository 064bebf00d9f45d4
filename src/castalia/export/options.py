"""What an export is asked to be: its options, checked before anything is read or written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from castalia.checkpoint.hf.shards import MAX_SHARD_SIZE, shard_bytes
from castalia.core.errors import ConfigError, nearest
from castalia.core.extras import pip_command
from castalia.export.activation import ACTIVATIONS
from castalia.export.certificate import require_bound
from castalia.export.format import Format, ParallelFormat, ShardedFormat
from castalia.export.formats import EXPORTS
from castalia.export.neox_config import NeoxShape


class ExportOptions(TypedDict, total=False):
    """Options of `export` about the files and their checks; None or left out for the default."""

    dtype: str | None
    """How `hf`, `neox`, `peft` and `rwkv` store weights: fp32, bf16 or fp16."""
    quantization: str | None
    """How the other formats store them; the class of each lists its values."""
    activation: str | None
    """gelu or gelu_tanh in place of the checkpoint's own; the card says what that changes."""
    max_shard_size: str | None
    """Largest file of weights in decimal units, such as 5GB; a format with one file has none."""
    model_parallel_size: int | None
    """For `neox`: shards of each matrix, 1 by default."""
    pipe_parallel_size: int | None
    """For `neox`: stages of the pipeline, 1 by default; 0 for the form without one."""
    heldout: str | Path | None
    """A text file or the prefix of token files on which the export is compared with float32, by
    default the run's data.valid; the card shows the result."""
    max_kl: float | None
    """An export with a larger mean KL from float32, in nats a token, is not written."""
    certificate: bool
    """Whether both ends compute fixed prompts, so that the card has the largest difference of a
    logit. True by default."""
    max_difference: float | None
    """An export whose logits differ by more is not written."""


@dataclass(frozen=True)
class ExportSpec:
    """An export that is asked for."""

    kind: type[Format]
    numbers: str
    activation: str | None = None
    """The form of GELU that the export computes; None for that of the checkpoint."""
    max_shard_size: str | None = None
    model_parallel_size: int | None = None
    pipe_parallel_size: int | None = None
    heldout: str | Path | None = None
    max_kl: float | None = None
    certificate: bool = True
    max_difference: float | None = None

    def sizes(self) -> dict[str, Any]:
        """What divides the weights into files; None where the format is not divided so."""
        sharded = issubclass(self.kind, ShardedFormat)
        parallel = issubclass(self.kind, ParallelFormat)
        shape = self.shape()
        return {
            "max_shard_size": (self.max_shard_size or MAX_SHARD_SIZE) if sharded else None,
            "model_parallel_size": shape.model_parallel_size if parallel else None,
            "pipe_parallel_size": shape.pipe_parallel_size if parallel else None,
        }

    def shape(self) -> NeoxShape:
        """How GPT-NeoX's ranks divide the model."""
        stages = self.pipe_parallel_size
        return NeoxShape(self.model_parallel_size or 1, 1 if stages is None else stages)


def checked_spec(to: str, options: ExportOptions) -> ExportSpec:
    """The export to the format `to`.

    Raises  ConfigError if an option is unknown, out of range or belongs to another format.
    """
    if to not in EXPORTS:
        raise ConfigError(
            f"unknown export format {to!r}; choose one of {', '.join(EXPORTS)}"
            f"{nearest(to, EXPORTS)}"
        )
    kind = EXPORTS[to]
    others: dict[str, Any] = dict(options)
    numbers = checked_numbers(kind, others.pop("dtype", None), others.pop("quantization", None))
    spec = ExportSpec(kind, numbers, **others)
    if spec.activation is not None and spec.activation not in ACTIVATIONS:
        raise ConfigError(
            f"unknown activation {spec.activation!r}; choose one of {', '.join(ACTIVATIONS)}"
            f"{nearest(spec.activation, ACTIVATIONS)}"
        )
    if spec.max_shard_size is not None:
        require_shards(kind, spec.max_shard_size)
    require_ranks(spec)
    if spec.max_kl is not None:
        if not spec.max_kl >= 0:
            raise ConfigError(f"max_kl must be >= 0 nats a token, got {spec.max_kl}")
        require_engine(kind, "max_kl")
    if spec.max_difference is not None:
        require_bound("max_difference", spec.max_difference, spec.certificate)
        require_engine(kind, "max_difference")
    return spec


def checked_numbers(kind: type[Format], dtype: str | None, quantization: str | None) -> str:
    """How the weights will be stored.

    Raises  ConfigError if an option is unknown or belongs to another format.
    """
    given = {"dtype": dtype, "quantization": quantization}
    chosen = given.pop(kind.option)
    ((other, wrong),) = given.items()
    menu = ", ".join(kind.choices)
    if wrong is not None:
        raise ConfigError(f"{kind.name} takes a {kind.option}, not a {other}: {menu}")
    if chosen is not None and chosen not in kind.choices:
        raise ConfigError(
            f"unknown {kind.option} {chosen!r} for {kind.name}; choose one of"
            f" {menu}{nearest(chosen, kind.choices)}"
        )
    return chosen or kind.default


def require_shards(kind: type[Format], size: str) -> None:
    """Raises  ConfigError if `size` is not a size, or the format has one file of weights."""
    shard_bytes(size)
    if not issubclass(kind, ShardedFormat):
        sharded = [name for name in EXPORTS if issubclass(EXPORTS[name], ShardedFormat)]
        raise ConfigError(
            f"{kind.name} has one file of weights; max_shard_size is for {', '.join(sharded)}"
        )


def require_ranks(spec: ExportSpec) -> None:
    """Raises  ConfigError if degrees of parallelism are too small, or the format has no ranks."""
    least = {"model_parallel_size": 1, "pipe_parallel_size": 0}
    for name, bound in least.items():
        size = getattr(spec, name)
        if size is None:
            continue
        if not issubclass(spec.kind, ParallelFormat):
            raise ConfigError(f"{spec.kind.name} is not divided over ranks; {name} is for neox")
        if size < bound:
            raise ConfigError(f"{name} must be >= {bound}, got {size}")


def require_engine(kind: type[Format], name: str) -> None:
    """Raises  ConfigError if the engine that measures a bound is not installed."""
    engine = kind.engine()
    if engine is not None and engine.package is not None and not engine.is_installed():
        raise ConfigError(
            f"{name} runs the export to measure it: {pip_command(engine.package.extra)}"
        )
