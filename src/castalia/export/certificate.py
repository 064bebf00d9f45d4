"""The certificate of a conversion: how far the logits of both ends differ, and what the ends are.

Both ends compute the same fixed prompts, one after the other, so that one model is in memory at a
time: the source in Castalia's torch engine in fp32, the written files in the program that they are
made for. The prompts are a function of the vocabulary's size and the model's longest text alone, so
the number can be measured again anywhere.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import inf, isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from castalia.core.errors import CastaliaError, ConfigError
from castalia.core.files import write_json
from castalia.core.memory import available_bytes
from castalia.formats.saved_model import SavedModel
from castalia.inference.engine import Engine
from castalia.inference.rewards import scores_after_each
from castalia.inference.torch_engine import TorchEngine
from castalia.models import parameter_counts
from castalia.models.model_config import ModelConfig

FILE = "certificate.json"
LENGTHS = (1, 3, 16, 64, 64)
"""Tokens of each prompt. 148 tokens cost seconds for a model of 7B parameters; several lengths,
because positions and masks go wrong at some of them only."""
GOLDEN = 2654435761
"""2^32 divided by the golden ratio: its multiples modulo 2^32 fall evenly into the range.

Source  Knuth, The Art of Computer Programming 3, 6.4: Fibonacci hashing."""
ROOM = 0.9
"""Share of the available memory that one end may take."""

Logits = Callable[[Sequence[int]], Tensor]
"""Token ids T -> logits (T, V) float32 after each, V at least the vocabulary; of a reward model
scores (T, 1)."""


class UnreadableError(CastaliaError):
    """Written files that the program they are for cannot load."""


@dataclass(frozen=True)
class Reader:
    """A program that computes the logits of one end."""

    program: str
    """Its name and version."""
    numbers: str
    """What it computes in: a dtype or a quantization."""
    open: Callable[[], Logits]
    note: str | None = None
    """Why it is not the program that the files are made for; None where it is."""


@dataclass(frozen=True)
class End:
    """One end of a conversion."""

    name: str
    """Name of its folder, without the path on this machine."""
    sha256: Mapping[str, str]
    """Hashes of the files that hold it, by name."""
    reader: Reader


@dataclass(frozen=True)
class Certificate:
    """Both ends of a conversion, compared."""

    source: Mapping[str, Any]
    """Name, program, numbers and file hashes of the source."""
    target: Mapping[str, Any]
    """The same of what was written."""
    vocabulary: int
    """Token ids of the prompts lie below it; logits beyond it, of padding rows, are left out."""
    lengths: Sequence[int]
    """Tokens of each prompt."""
    largest_difference: float | None = None
    """Of any logit, at any position; infinite if an end is not finite, None if not measured."""
    largest_logit: float | None = None
    """Largest magnitude of a logit of the source, which the difference is to be read against."""
    same_greedy: float | None = None
    """Share of positions where both have the same most likely token; None of a reward model."""
    unmeasured: str | None = None
    """Why nothing was measured."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: null stands for a number that is not finite."""
        values = asdict(self)
        for key in ("largest_difference", "largest_logit"):
            value = values[key]
            if value is not None and not isfinite(value):
                values[key] = None
        return values | {"finite": None if self.unmeasured else isfinite(self.difference)}

    @property
    def difference(self) -> float:
        """The largest difference; infinite where it is unknown."""
        if self.largest_difference is None:
            return inf
        return self.largest_difference

    def line(self) -> str:
        """One sentence for the card and for errors."""
        if self.unmeasured is not None:
            return f"not measured: {self.unmeasured}"
        ends = (
            f"{self.source['name']} in {self.source['program']} ({self.source['numbers']}) and"
            f" {self.target['name']} in {self.target['program']} ({self.target['numbers']})"
        )
        if not isfinite(self.difference):
            return f"the logits of {ends} are not finite"
        if self.same_greedy is None:
            return (
                f"the largest difference of a score between {ends} is {self.difference:.3g}, where"
                f" scores reach {self.largest_logit:.3g}"
            )
        return (
            f"the largest difference of a logit between {ends} is {self.difference:.3g}, where"
            f" logits reach {self.largest_logit:.3g}; the most likely token is the same at"
            f" {self.same_greedy:.1%} of positions"
        )


def certify(
    source: End, target: End, config: ModelConfig, longest: int | None = None
) -> Certificate:
    """Compute the fixed prompts on both ends and compare their logits.

    Takes   longest: tokens that both ends read at once; None for the model's longest text.
    The certificate says why, where an end does not fit into memory or its program cannot compute.
    Raises  UnreadableError if the program that the written files are for cannot load them.
    """
    prompts = fixed_prompts(config.vocab_size, longest or config.max_position_embeddings)
    ends: dict[str, Any] = {
        "source": described(source),
        "target": described(target),
        "vocabulary": config.vocab_size,
        "lengths": [len(ids) for ids in prompts],
    }
    if reason := too_large(config):
        return Certificate(**ends, unmeasured=reason)
    try:
        want = logits_of(source.reader.open(), prompts, config.vocab_size)
        got = logits_of(opened(target), prompts, config.vocab_size)
    except UnreadableError:
        raise
    except CastaliaError as error:
        return Certificate(**ends, unmeasured=str(error))
    return Certificate(**ends, **compared(want, got))


def described(end: End) -> dict[str, Any]:
    """One end, for the certificate."""
    values = {
        "name": end.name,
        "program": end.reader.program,
        "numbers": end.reader.numbers,
        "sha256": dict(end.sha256),
    }
    if end.reader.note is None:
        return values
    return values | {"note": end.reader.note}


def fixed_prompts(vocab_size: int, limit: int) -> list[list[int]]:
    """The prompts of every certificate: token ids spread evenly over the vocabulary.

    Id number n, counted through all prompts, is floor(vocab_size * (n * GOLDEN mod 2^32) / 2^32).
    Takes   limit: the model's longest text, which cuts the lengths.
    """
    prompts = []
    count = 0
    for length in LENGTHS:
        numbers = range(count, count + min(length, limit))
        prompts.append([(n * GOLDEN % 2**32) * vocab_size >> 32 for n in numbers])
        count = numbers.stop
    return prompts


def too_large(config: ModelConfig) -> str | None:
    """Why the model cannot be compared on this machine; None if it can."""
    needed = 4 * parameter_counts(config).total
    room = available_bytes()
    if room is None or needed <= ROOM * room:
        return None
    return (
        f"the model takes {needed / 2**30:.1f} GiB in fp32 and {room / 2**30:.1f} GiB of memory"
        " are available"
    )


def opened(written: End) -> Logits:
    """The program with the files that were written for it.

    Raises  UnreadableError if it cannot load them; another program in its place may say so.
    """
    reader = written.reader
    try:
        return reader.open()
    except CastaliaError as error:
        if reader.note is not None:
            raise
        raise UnreadableError(
            f"{written.name} was not written: {reader.program} cannot read it ({error}); choose"
            " another format, or --no-certificate to keep the files"
        ) from None


def logits_of(compute: Logits, prompts: Sequence[Sequence[int]], vocab_size: int) -> Tensor:
    """Logits after every token of all prompts, (tokens, vocab_size) float32."""
    return torch.cat([compute(ids)[:, :vocab_size].float().cpu() for ids in prompts])


def compared(want: Tensor, got: Tensor) -> dict[str, Any]:
    """The numbers of a certificate; both (tokens, V) float32, V 1 of a reward model."""
    if got.shape != want.shape:
        # A program that has fewer logits than the vocabulary has lost rows of the head.
        return {"largest_difference": inf, "largest_logit": largest(want), "same_greedy": 0.0}
    same = None
    if want.shape[1] > 1:
        same = (want.argmax(1) == got.argmax(1)).float().mean().item()
    return {
        "largest_difference": largest(want - got),
        "largest_logit": largest(want),
        "same_greedy": same,
    }


def largest(values: Tensor) -> float:
    """The largest magnitude; infinite if one is not a finite number."""
    if not values.isfinite().all():
        return inf
    return values.abs().max().item()


def require_bound(name: str, bound: float | None, certificate: bool) -> None:
    """Raises  ConfigError if a bound on the difference is negative or NaN, or nothing checks it."""
    if bound is None:
        return
    if not bound >= 0:
        raise ConfigError(f"{name} must be >= 0, got {bound}")
    if not certificate:
        raise ConfigError(f"{name} is checked by the certificate; leave it on")


def require_close(certificate: Certificate, bound: float | None, place: Path) -> None:
    """Raises  CastaliaError with the measured number if it exceeds `bound`, or there is none."""
    # A NaN is no number below the bound, so the comparison is written this way round.
    if bound is None or certificate.difference <= bound:
        return
    raise CastaliaError(
        f"{place} was not written: {certificate.line()}; max_difference is {bound:g}"
    )


def write_certificate(folder: Path, certificate: Certificate) -> None:
    """Write certificate.json."""
    write_json(folder / FILE, certificate.as_dict())


def torch_reader(model: SavedModel, note: str | None = None) -> Reader:
    """Castalia's own engine for every family, in fp32; of a reward model its scores."""

    def opened() -> Logits:
        engine = TorchEngine.from_checkpoint(model, "fp32")
        if model.config.head == "score":
            return partial(scores_after_each, engine.model)
        return engine.logits

    return Reader(own_program("torch"), "fp32", opened, note)


def own_program(engine: str) -> str:
    """An engine of Castalia with its version."""
    from castalia import __version__

    return f"castalia {__version__} engine={engine}"


def program_of(engine: type[Engine]) -> str:
    """An engine, with the version of the package that computes."""
    if engine.package is None:
        return own_program(engine.name)
    module = importlib.import_module(engine.package.module)
    return f"{engine.package.module} {getattr(module, '__version__', 'of unknown version')}"
