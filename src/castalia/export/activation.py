"""The model that an export computes where it differs from the checkpoint's, and what differs.

For instance another form of GELU.
"""

from dataclasses import replace

from castalia.core.errors import ConfigError
from castalia.export.format import Format
from castalia.formats.folded import folded
from castalia.formats.saved_model import SavedModel

ACTIVATIONS = ("gelu", "gelu_tanh")
"""The forms of GELU: with the error function, and its approximation with tanh."""
GELU_DIFFERENCE = 0.00048
"""Largest difference of the two forms, at x = ±2.70; computed in float64."""


def expressed(
    trained: SavedModel, kind: type[Format], activation: str | None
) -> tuple[SavedModel, list[str]]:
    """The checkpoint as an export of `kind` computes it, and what differs, in sentences.

    Raises  ConfigError if the family has no such activation.
    """
    source = folded(with_activation(trained, activation))
    config, notes = kind.expressed(source.config)
    notes = [*activation_notes(trained, source), *width_notes(trained, source), *notes]
    return replace(source, config=config), notes


def width_notes(trained: SavedModel, source: SavedModel) -> list[str]:
    """That the factors of μP are in the weights, in one sentence."""
    if trained.config.mup == source.config.mup:
        return []
    return [
        "the factors of μP (model.mup) are multiplied into the weights; to train on under μP,"
        " start from the checkpoint"
    ]


def with_activation(source: SavedModel, activation: str | None) -> SavedModel:
    """The same weights with another form of GELU; `source` itself where nothing changes.

    Raises  ConfigError if the family has no such option.
    """
    if activation is None:
        return source
    if getattr(source.config, "activation", None) not in ACTIVATIONS:
        raise ConfigError(
            f"activation={activation}: model family {source.config.family!r} has no GELU to choose"
        )
    return replace(source, config=source.config.model_copy(update={"activation": activation}))


def activation_notes(trained: SavedModel, source: SavedModel) -> list[str]:
    """What another form of GELU changes, in one sentence; nothing where it is the same."""
    before = getattr(trained.config, "activation", None)
    after = getattr(source.config, "activation", None)
    if before == after:
        return []
    note = (
        f"activation={before} of the checkpoint is computed as {after}: the two differ by at most"
        f" {GELU_DIFFERENCE:g} for each activation"
    )
    if trained.config.family == "neox":
        note += (
            ". Published Pythia folders say gelu, though their models were trained with gelu_tanh"
        )
    return [note]


def other_activation(source: SavedModel, kind: type[Format], numbers: str) -> str:
    """The hint that the format takes the model with another form of GELU, if it does."""
    own = getattr(source.config, "activation", None)
    if own not in ACTIVATIONS:
        return ""
    (other,) = (form for form in ACTIVATIONS if form != own)
    if kind.refuses(with_activation(source, other).config, numbers) is not None:
        return ""
    return (
        f"; --activation {other} exports it in that form, which changes each activation by at most"
        f" {GELU_DIFFERENCE:g}"
    )
