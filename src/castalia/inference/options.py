"""The options of a generation: what callers give, and the parts that it is split into."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, NamedTuple, TypedDict

from castalia.core.errors import ConfigError
from castalia.inference.beams import Search
from castalia.inference.decoding import Ending
from castalia.inference.grammar import Grammar
from castalia.inference.sampling import Sampling


class Drawing(TypedDict, total=False):
    """Options of `generate` and its kin besides max_new_tokens and num_return_sequences.

    See `Sampling`, `Ending` and `Search`.
    """

    temperature: float
    """Divides the logits; 0, the default, is greedy."""
    top_k: int
    """Draw from the k largest logits; 0 and -1 are off."""
    top_p: float
    """Then draw from the nucleus of this probability; 0 is off."""
    min_p: float
    """Then draw from tokens at least this many times as likely as the likeliest; 0 is off."""
    typical_p: float
    """Then draw from the tokens of nearly average information, of this probability; 0 is off."""
    repetition_penalty: float
    """Above 1 avoids the tokens of prompt and text; 1 is off."""
    presence_penalty: float
    """Above 0 avoids the tokens of the text."""
    frequency_penalty: float
    """Above 0 avoids the tokens of the text, the more the more often they occur."""
    no_repeat_ngram_size: int
    """No sequence of this many tokens occurs twice in prompt and text; 0 is off."""
    logit_bias: Mapping[int, float]
    """Added to the logits, by token id."""
    allowed_token_ids: Sequence[int] | None
    """The only ids that may be drawn."""
    grammar: Grammar | None
    """The form of the text, such as `model.grammars.json(schema)`."""
    stop: str | Sequence[str] | None
    """Strings that end the text; they are not part of it."""
    stop_token_ids: Sequence[int]
    """Token ids that end the text; they are not part of it."""
    keep_stop: bool
    """The stop string or token is part of the text after all."""
    ignore_eos: bool
    """The model's own `end_ids` do not end the text."""
    min_tokens: int
    """Nothing ends the text before it has this many tokens."""
    skip_special: bool
    """The names of special tokens are left out of the text."""
    seed: int | None
    """Makes the draws repeatable; an int64."""
    num_beams: int
    """Above 1, a beam search of this width."""
    length_penalty: float
    """Power of the length that divides the score of a beam; above 0 favors long texts."""
    early_stopping: bool | Literal["never"]
    """When a beam search ends, see `Search`."""


class Options(NamedTuple):
    """The options of a generation, by what reads them."""

    sampling: Sampling
    ending: Ending
    search: Search


def split(options: Drawing, num_return_sequences: int = 1) -> Options:
    """How tokens are drawn, what ends a text, and how many texts a prompt gets.

    Raises  ConfigError if an option is out of range or two contradict each other.
    """
    # One TypedDict for callers, three classes within. An unknown name is Sampling's TypeError.
    given: dict[str, Any] = dict(options)
    ends = taken(given, Ending)
    stop = ends.get("stop")
    ends["stop"] = [stop] if isinstance(stop, str) else list(stop or ())
    search = Search(num_return_sequences, **taken(given, Search))
    ending = Ending(**ends)
    sampling = Sampling(**given)
    require_possible(sampling, ending)
    search.require_several(sampling)
    return Options(sampling, ending, search)


def taken(options: dict[str, Any], part: type) -> dict[str, Any]:
    """The options that are fields of a dataclass, taken out of `options`."""
    return {field.name: options.pop(field.name) for field in fields(part) if field.name in options}


def require_possible(sampling: Sampling, ending: Ending) -> None:
    """Raises  ConfigError if the options could leave no token to draw."""
    if sampling.allowed_token_ids is not None and not sampling.allowed_token_ids:
        raise ConfigError("allowed_token_ids is empty: no token could be drawn; leave it out")
    if sampling.grammar is None:
        if ending.min_tokens and sampling.allowed_token_ids is not None:
            raise ConfigError(
                "allowed_token_ids and min_tokens together may leave no token to draw; give one"
            )
        return
    # A grammar ends a text itself, and asks for certain tokens on the way.
    others = {
        "allowed_token_ids": sampling.allowed_token_ids,
        "min_tokens": ending.min_tokens,
        "ignore_eos": ending.ignore_eos,
    }
    for name, value in others.items():
        if value:
            raise ConfigError(
                f"{name} does not go with a text of a given form (JSON, a choice, a regular"
                " expression, a grammar), which decides itself where it ends; give one of them"
            )
