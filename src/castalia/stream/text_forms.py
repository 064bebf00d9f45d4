"""The ids under which a text may stand in the stream."""

from collections.abc import Sequence
from dataclasses import dataclass

from castalia.core.errors import ConfigError
from castalia.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class Form:
    """One sequence of ids to look for."""

    ids: tuple[int, ...]
    name: str
    """How it follows from the text."""


def forms_of_text(text: str, tokenizer: Tokenizer, *, exact: bool = False) -> list[Form]:
    """The ids of a text, and unless `exact` those that it has behind a space.

    Tokenizers with words that begin with a space write a text differently at the beginning of a
    line and within it. A form whose ids end with those of another is found with that one.
    Raises  ConfigError if the text has no ids.
    """
    own = tuple(tokenizer.encode(text))
    if not own:
        raise ConfigError(
            f"the text {text!r} has no tokens under {tokenizer.where}; give a text that has, or"
            " --ids"
        )
    forms = [Form(own, "as it is")]
    if not exact and not text[0].isspace():
        spaced = tuple(tokenizer.encode(" " + text))
        if spaced[-len(own) :] != own:
            forms.append(Form(spaced, "with a leading space"))
    return forms


def form_of_ids(ids: Sequence[int], vocab_size: int | None = None) -> Form:
    """Ids as they were given.

    Raises  ConfigError if there are none, or one is not an id of the tokenizer.
    """
    if not ids:
        raise ConfigError("--ids: expected token ids such as 510,2904,13")
    for number in ids:
        if number < 0 or (vocab_size is not None and number >= vocab_size):
            limit = ""
            if vocab_size is not None:
                limit = f" below {vocab_size}"
            raise ConfigError(f"--ids: {number} is not a token id; expected integers >= 0{limit}")
    return Form(tuple(ids), "as given")
