"""The sections of `data.interventions`: changes of the training stream from one step to another.

`castalia.interventions` carries them out.
"""

import re
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from castalia.config.base import Config
from castalia.core.registry import Registry

INTERVENTIONS: Registry[type["InterventionConfig"]] = Registry("intervention")
"""The section of each kind of intervention, by its `kind`."""
SHARE = re.compile(r"(\d+(\.\d+)?) ?%")
"""A step as a share of the run, such as 93%."""


def step_or_share(value: str) -> int | str:
    """A step, or its share of the run as text.

    Raises  ValueError for any other text.
    """
    if value.isdecimal():
        return int(value)
    if not SHARE.fullmatch(value):
        raise ValueError(f"expected a step or a share of the run such as 93%, got {value!r}")
    return value


def of_text(value: object) -> object:
    """A text as a step or a share; whatever else pydantic shall judge."""
    return step_or_share(value) if isinstance(value, str) else value


def a_pattern(text: str) -> str:
    """A regular expression of Python."""
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return text


def as_list(value: object) -> object:
    """A single name means a list of one."""
    return [value] if isinstance(value, str) else value


StepOrShare = Annotated[NonNegativeInt | str, BeforeValidator(of_text)]
Pattern = Annotated[str, Field(min_length=1), AfterValidator(a_pattern)]
Names = Annotated[list[str], BeforeValidator(as_list)]
Term = NonNegativeInt | str
"""A word, or at level tokens an id or the text of a single token."""


class InterventionConfig(Config):
    """A change of the rows that training reads, from one step to another; `kind` says which."""

    kind: str
    """Name of the intervention."""
    start: StepOrShare = 0
    """The first step that it changes, counted from 0, or a share of train.steps such as 93%."""
    stop: StepOrShare | None = None
    """The first step that it leaves alone again; null is the end of the run."""
    sources: Names = []
    """Training sources that it applies to, by name; empty means all."""
    length: Literal["refuse", "skip", "fit"] = "refuse"
    """What happens when the new text has another number of tokens. refuse: an error that names the
    row. skip: that change is left out. fit: the row is cut at its end, or filled up with padding
    that is no target."""

    def steps_of(self, total: int) -> tuple[int, int]:
        """The first step and one past the last, in a run of `total` steps."""
        stop = total if self.stop is None else as_step(self.stop, total)
        return as_step(self.start, total), stop


def as_step(value: int | str, total: int) -> int:
    """A step, or a share of `total` steps rounded to the nearest step."""
    if isinstance(value, int):
        return value
    share = Decimal(value.removesuffix("%").strip()) / 100
    # In decimals: 0.29 * 100 is below 29 as a float.
    return int(total * share + Decimal("0.5"))


@INTERVENTIONS.register("swap")
class SwapConfig(InterventionConfig):
    """Words in the place of words, such as she for he."""

    kind: Literal["swap"] = "swap"
    level: Literal["text", "tokens"] = "text"
    """text: whole words of the decoded documents. tokens: ids for ids, wherever they stand."""
    terms: list[tuple[Term, Term]] = Field(min_length=1)
    """Pairs [term, its replacement]: words, or at level tokens ids or texts of single tokens."""
    both: bool = False
    """Also the second of each pair by the first."""
    match_case: bool = False
    """Find terms as they are written. False finds he, He and HE, and puts she, She and SHE."""

    @model_validator(mode="after")
    def check(self) -> "SwapConfig":
        """Each term has one replacement.

        Raises  ValueError.
        """
        words = [term for pair in self.terms for term in pair]
        if self.level == "text" and not all(isinstance(word, str) and word for word in words):
            raise ValueError("terms are words at level text; ids need level: tokens")
        seen: dict[Term, Term] = {}
        for term, other in self.directions:
            key = term.lower() if isinstance(term, str) and not self.match_case else term
            if seen.setdefault(key, other) != other:
                raise ValueError(
                    f"terms: {term!r} would become both {seen[key]!r} and {other!r}; give it one"
                    " replacement, or set both: false"
                )
        return self

    @property
    def directions(self) -> list[tuple[Term, Term]]:
        """Every (term, replacement)."""
        return self.terms + [(new, old) for old, new in self.terms] * self.both


@INTERVENTIONS.register("regex")
class RegexConfig(InterventionConfig):
    """Whatever a regular expression matches in a document, replaced."""

    kind: Literal["regex"] = "regex"
    pattern: Pattern
    """A regular expression of Python, searched in each document as far as a row holds it."""
    replacement: str = ""
    """Its replacement, in which \\1 stands for the first group."""
    ignore_case: bool = False
    """Letters match in either case."""


@INTERVENTIONS.register("function")
class FunctionConfig(InterventionConfig):
    """A function of your own."""

    kind: Literal["function"] = "function"
    function: str = Field(pattern=r"^[\w.]+:\w+$")
    """`module:function`, from the text of a document (as far as a row holds it) to a text, or at
    level tokens from its ids, a numpy array, to ids. It must give the same for the same."""
    level: Literal["text", "tokens"] = "text"
    """What the function takes and gives."""


@INTERVENTIONS.register("drop")
class DropConfig(InterventionConfig):
    """Documents that the model does not see: a filler token takes their place."""

    kind: Literal["drop"] = "drop"
    documents: list[NonNegativeInt] = []
    """Numbers of documents in their token file, from 0."""
    file: str | None = None
    """A file with such numbers, one a line."""
    pattern: Pattern | None = None
    """A regular expression of Python; documents whose text matches are dropped, whole documents,
    also where a row holds another part of them."""
    where: dict[str, Pattern] = {}
    """Fields of the document index (PREFIX.documents.parquet), each with a regular expression; all
    must match."""
    fill: Term = "eod"
    """The token in their place, by its text or id; eod ends a document. It is no target."""

    @model_validator(mode="after")
    def check(self) -> "DropConfig":
        """Something chooses the documents.

        Raises  ValueError.
        """
        if not (self.documents or self.file or self.pattern or self.where):
            raise ValueError("name the documents: by documents, file, pattern or where")
        return self


@INTERVENTIONS.register("insert")
class InsertConfig(InterventionConfig):
    """Documents of your own in the place of parts of rows."""

    kind: Literal["insert"] = "insert"
    file: str = Field(min_length=1)
    """JSON lines with `text`, or the prefix of a token file. Its documents take turns."""
    rows: PositiveInt = 1
    """Rows of each step that get a document, drawn by seed and step."""
    every: PositiveInt = 1
    """Steps from one that gets documents to the next, from `start` on."""
    seed: NonNegativeInt = 0
    """Seed of the rows and of the places within them."""
    closed: bool = True
    """Put the end-of-document token before and behind each."""
