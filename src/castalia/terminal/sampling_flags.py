"""The options of `castalia generate` about the choice of tokens and of texts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from castalia.terminal.flags import panel

if TYPE_CHECKING:
    from castalia.inference import LanguageModel

ESCAPES = {r"\n": "\n", r"\t": "\t"}
SAMPLING = panel("Sampling")
SEARCH = panel("Several texts")
EARLY = {"true": True, "false": False, "never": "never"}


@dataclass(frozen=True)
class SamplingFlags:
    """Options about the choice of tokens."""

    max_new_tokens: Annotated[
        int, SAMPLING(metavar="N", help="Longest continuation, in tokens.")
    ] = 64
    temperature: Annotated[
        float, SAMPLING(metavar="X", help="0 takes the likeliest token; above 0 draws.")
    ] = 0.0
    top_k: Annotated[
        int, SAMPLING(metavar="N", help="Draw from the N likeliest tokens; 0 is off.")
    ] = 0
    top_p: Annotated[
        float,
        SAMPLING(
            metavar="SHARE",
            help="Draw from the likeliest tokens that together have this probability; 0 is off.",
        ),
    ] = 0.0
    min_p: Annotated[
        float,
        SAMPLING(
            metavar="SHARE",
            help="Draw from tokens at least this many times as likely as the likeliest; 0 is off.",
        ),
    ] = 0.0
    typical_p: Annotated[
        float,
        SAMPLING(
            metavar="SHARE",
            help="Draw from the tokens of nearly average information that together have this"
            " probability; 0 is off.",
        ),
    ] = 0.0
    repetition_penalty: Annotated[
        float,
        SAMPLING(metavar="X", help="Above 1 avoids the tokens of prompt and text; 1 is off."),
    ] = 1.0
    presence_penalty: Annotated[
        float, SAMPLING(metavar="X", help="Above 0 avoids the tokens of the text.")
    ] = 0.0
    frequency_penalty: Annotated[
        float,
        SAMPLING(metavar="X", help="Above 0 avoids what the text repeats, once for each time."),
    ] = 0.0
    no_repeat_ngram_size: Annotated[
        int,
        SAMPLING(metavar="N", help="Write no N tokens that prompt and text have already."),
    ] = 0
    logit_bias: Annotated[
        list[str] | None,
        SAMPLING(metavar="ID=X", help="Add X to the logit of a token. May be repeated."),
    ] = None
    min_tokens: Annotated[
        int, SAMPLING(metavar="N", help="Let nothing end a text before it has N tokens.")
    ] = 0
    json_schema: Annotated[
        str | None,
        SAMPLING(metavar="FILE", help="Write JSON of the schema in this file."),
    ] = None
    stop: Annotated[
        list[str] | None,
        SAMPLING(metavar="TEXT", help=r"End before this text; \n is a new line. May be repeated."),
    ] = None
    seed: Annotated[
        int | None,
        SAMPLING(
            metavar="N",
            min=-(2**63),
            max=2**63 - 1,
            help="Repeat the same draws; text i, counted from 0, uses seed N + i.",
        ),
    ] = None

    def options(self, model: "LanguageModel") -> dict[str, Any]:
        """As `complete` and `stream` take them, without the seed.

        Raises  DataError if the file of the schema cannot be read; ConfigError if it is no schema,
                or a bias is not ID=X.
        """
        grammar = None
        if self.json_schema is not None:
            grammar = model.grammars.json(read_schema(self.json_schema))
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "typical_p": self.typical_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "no_repeat_ngram_size": self.no_repeat_ngram_size,
            "logit_bias": dict(biased(word) for word in self.logit_bias or []),
            "min_tokens": self.min_tokens,
            "grammar": grammar,
            "stop": [unescaped(text) for text in self.stop or []],
        }


@dataclass(frozen=True)
class SearchFlags:
    """Options about several texts of a prompt."""

    num_return_sequences: Annotated[
        int,
        SEARCH(metavar="N", help="Texts for each prompt, drawn or the best of the beams."),
    ] = 1
    num_beams: Annotated[
        int, SEARCH(metavar="N", help="Search for the best texts with N beams; 1 is no search.")
    ] = 1
    length_penalty: Annotated[
        float,
        SEARCH(
            metavar="X",
            help="Divide a beam's score by its length to the power X: above 0 favors long texts.",
        ),
    ] = 1.0
    early_stopping: Annotated[
        str,
        SEARCH(
            metavar="WHEN",
            help="End a search when N texts have ended (true), when a better one is unlikely"
            " (false) or impossible (never).",
        ),
    ] = "false"

    def options(self) -> dict[str, Any]:
        """As `complete` takes them.

        Raises  ConfigError for an unknown early_stopping.
        """
        from castalia.core.errors import ConfigError

        if self.early_stopping not in EARLY:
            raise ConfigError(
                f"--early-stopping must be true, false or never, got {self.early_stopping!r}"
            )
        return {
            "num_return_sequences": self.num_return_sequences,
            "num_beams": self.num_beams,
            "length_penalty": self.length_penalty,
            "early_stopping": EARLY[self.early_stopping],
        }


def biased(word: str) -> tuple[int, float]:
    """The token and the bias of ID=X.

    Raises  ConfigError for any other text.
    """
    from castalia.core.errors import ConfigError

    token, _, bias = word.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise ConfigError(f"--logit-bias must be ID=X, such as 50=-2.5, got {word!r}") from None


def read_schema(file: str) -> str:
    """The text of a JSON schema.

    Raises  DataError if the file cannot be read.
    """
    from castalia.core.errors import DataError

    try:
        with open(file, encoding="utf-8") as opened:
            return opened.read()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the JSON schema in {file}: {error}") from None


def unescaped(text: str) -> str:
    r"""The text with `\n` and `\t`, which shells pass as they are, as new lines and tabs."""
    for escape, character in ESCAPES.items():
        text = text.replace(escape, character)
    return text
