"""From the sections of data.interventions to the change of rows that a run attaches."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from castalia.core.errors import ConfigError, nearest
from castalia.core.functions import named_function, source_hash
from castalia.data.batch_sizes import BatchSizes
from castalia.data.intervention_config import (
    DropConfig,
    FunctionConfig,
    InsertConfig,
    InterventionConfig,
    RegexConfig,
    SwapConfig,
)
from castalia.data.row_changes import ServedRow
from castalia.interventions.intervention import Facts, Intervention, Notes, Where
from castalia.interventions.rewriting import Rewriter
from castalia.interventions.whole_documents import Drop, Insert, read_documents, read_numbers
from castalia.interventions.words import (
    Regex,
    Swap,
    SwapTokens,
    TextFunction,
    TokenFunction,
    id_mapping,
    token_id,
)
from castalia.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class Interventions:
    """All interventions of a run, as the change of its rows: each sees what those before it left.

    A pure function of a row and its place, so that ranks, workers and resumes agree.
    """

    items: Sequence[Intervention]
    facts: Facts
    sizes: BatchSizes
    sha256: str = ""
    """Hash of everything that decides what they do."""

    def reaches(self, place: int) -> bool:
        """Whether the step of a place is one whose rows change."""
        step = self.sizes.step_of(place)[0]
        return any(item.first <= step < item.stop for item in self.items)

    def __call__(self, row: ServedRow, source: int, place: int) -> ServedRow:
        """The row of a source served at a place; the very same object where nothing changes."""
        return self.noted(row, source, place)[0]

    def noted(self, row: ServedRow, source: int, place: int) -> tuple[ServedRow, list[Notes]]:
        """The same, with what each intervention did."""
        step, number = self.sizes.step_of(place)
        where = Where(step, number, self.sizes.size(step), source)
        notes = []
        # In the order of the config: each changes what those before it left.
        for item in self.items:
            notes.append(Notes(row))
            if item.applies(where):
                row = item(row, where, self.facts, notes[-1])
        return row, notes

    def of(self, facts: Facts) -> "Interventions":
        """The same for the other side of pairs."""
        return replace(self, facts=facts)


@dataclass
class Maker:
    """Makes interventions for a run of `steps` steps, and gathers what decides what they do."""

    facts: Facts
    steps: int
    decisive: list[dict[str, Any]] = field(default_factory=list)
    """A description of each, for the hash."""

    def make(self, number: int, config: InterventionConfig) -> Intervention:
        """The intervention of one section.

        Raises  ConfigError; DataError if a file that it names cannot be read.
        """
        where = f"data.interventions.{number} ({config.kind})"
        steps = steps_of(config, self.steps, where)
        described = {**config.model_dump(mode="json"), "start": steps[0]}
        if config.stop is not None:
            # Null stays null: a longer run changes no row that is trained already.
            described["stop"] = steps[1]
        self.decisive.append(described)
        args = (where, steps, self.sources_of(config, where))
        match config:
            case SwapConfig(level="tokens"):
                mapping = id_mapping(config.directions, self.facts.tokenizer, self.facts, where)
                described["terms"] = sorted(mapping.items())
                return SwapTokens(config, *args, mapping=mapping)
            case SwapConfig():
                return Swap(config, *args, rewriter=self.rewriter(where))
            case RegexConfig():
                return Regex(config, *args, rewriter=self.rewriter(where))
            case FunctionConfig():
                return self.function(config, args)
            case DropConfig():
                return self.drop(config, args)
            case InsertConfig():
                return self.insert(config, args)
        raise AssertionError(config)

    def sources_of(self, config: InterventionConfig, where: str) -> set[int]:
        """The numbers of the sources that a section names.

        Raises  ConfigError for an unknown one.
        """
        names = list(self.facts.names)
        for name in config.sources:
            if name not in names:
                raise ConfigError(
                    f"{where}: no source {name!r}{nearest(name, names)}; the sources are"
                    f" {', '.join(names)}"
                )
        chosen = config.sources or names
        return {number for number, name in enumerate(names) if name in chosen}

    def tokenizer(self, where: str) -> Tokenizer:
        """The tokenizer, which then decides, too.

        Raises  ConfigError if there is none.
        """
        tokenizer = self.facts.tokenizer
        if tokenizer is None:
            raise ConfigError(
                f"{where} reads text, and data.tokenizer is null; set it to the tokenizer of the"
                " token files, or use level: tokens"
            )
        self.decisive[-1]["tokenizer"] = tokenizer.sha256
        return tokenizer

    def rewriter(self, where: str) -> Rewriter:
        """Texts of the run's tokens."""
        return Rewriter(self.tokenizer(where))

    def function(self, config: FunctionConfig, args: tuple[Any, ...]) -> Intervention:
        """A function of the user's."""
        where = args[0]
        function = named_function(config.function, f"{where}: function", "changes:without_names")
        self.decisive[-1]["source"] = source_hash(function, config.function)
        if config.level == "text":
            return TextFunction(config, *args, rewriter=self.rewriter(where), function=function)
        return TokenFunction(config, *args, vocab_size=self.facts.vocab_size, function=function)

    def drop(self, config: DropConfig, args: tuple[Any, ...]) -> Intervention:
        """Documents to leave out."""
        where, _, sources = args
        numbers = frozenset(config.documents)
        if config.file is not None:
            numbers |= read_numbers(config.file, where)
        if numbers and len(sources) > 1:
            raise ConfigError(
                f"{where}: numbers of documents are those of one token file, but the run has"
                f" {len(sources)}; name one in sources"
            )
        for number in sources:
            count = len(self.facts.datasets[number])
            if max(numbers, default=-1) >= count:
                raise ConfigError(
                    f"{where}: no document {max(numbers)}: {self.facts.names[number]} has {count}"
                )
        if config.pattern:
            self.tokenizer(where)
        if config.fill == "eod" and self.facts.eod_id is None:
            raise ConfigError(
                f"{where}: fill: eod, but no token ends documents; name a token or id"
            )
        fill = self.facts.eod_id
        if fill is None or config.fill != "eod":
            fill = token_id(config.fill, self.facts.tokenizer, self.facts.vocab_size, where)
        # What the file says decides, not where it lies.
        self.decisive[-1] |= {"file": None, "documents": sorted(numbers), "fill": fill}
        return Drop(config, *args, numbers=numbers, fill=fill)

    def insert(self, config: InsertConfig, args: tuple[Any, ...]) -> Intervention:
        """Documents to put in."""
        documents = read_documents(config, self.facts.tokenizer, self.facts, args[0])
        digest = hashlib.sha256()
        for ids in documents:
            digest.update(f"{len(ids)} ".encode() + ids.astype("<i8").tobytes())
        self.decisive[-1]["file"] = digest.hexdigest()
        return Insert(config, *args, documents=documents)


def steps_of(config: InterventionConfig, total: int, where: str) -> tuple[int, int]:
    """The first step that a section changes, and one past the last.

    Raises  ConfigError if the run ends before it begins.
    """
    first, stop = config.steps_of(total)
    if first >= total:
        raise ConfigError(
            f"{where}: start {config.start} is step {first}, but the run has steps 0 to {total - 1}"
        )
    if not first < stop <= total:
        raise ConfigError(
            f"{where}: stop {config.stop} is step {stop}; expected one behind start, step {first},"
            f" up to train.steps {total}"
        )
    return first, stop


def make_interventions(
    sections: Sequence[InterventionConfig], facts: Facts, steps: int, sizes: BatchSizes
) -> Interventions:
    """The interventions of a run of `steps` steps.

    Raises  ConfigError; DataError if a file that one names cannot be read.
    """
    maker = Maker(facts, steps)
    items = [maker.make(number, section) for number, section in enumerate(sections)]
    text = json.dumps(maker.decisive, sort_keys=True)
    return Interventions(items, facts, sizes, hashlib.sha256(text.encode()).hexdigest())
