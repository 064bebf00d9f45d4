"""`trace`: every place at which a text stands in the training stream of a run."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from castalia.checkpoint import complete_steps
from castalia.core.errors import ConfigError, DataError
from castalia.data.sidecar import recorded_end, require_tokenizer
from castalia.stream.index.building import MANIFEST, index_folder
from castalia.stream.index.search import FileScan, Index, Search
from castalia.stream.opening import Stream, open_stream, steps_of
from castalia.stream.row_scan import Borders, OnTokens, outside, scan
from castalia.stream.served_places import Ints, Occurrences, ServedPlaces, joined
from castalia.stream.text_forms import Form, form_of_ids, forms_of_text

READ_BACK = 64
"""Occurrences whose rows are read and compared."""

FIRST_DOCUMENTS = 256
"""Documents that are asked for their last token, in files without a record."""


@dataclass(frozen=True)
class Trace:
    """Where a text stands in the stream of a run."""

    stream: Stream
    forms: list[Form]
    """The sequences of ids that were looked for."""
    found: Occurrences
    stop: int
    """Steps 0 to stop - 1 were looked at."""
    split: int | None
    """How many more times a row's border cuts the text; None if all rows were read."""
    in_files: int | None
    """How often the token files have the text; None if all rows were read."""
    how: str
    """`index`, `files` or `rows`: what was searched."""
    seconds: float
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return self.found.total

    @cached_property
    def steps(self) -> tuple[Ints, Ints]:
        """The step of each occurrence, and the row within it, (n,) each."""
        return steps_of(self.stream.sizes, self.found.place)

    @cached_property
    def checkpoints(self) -> list[int]:
        """The steps of the run's saved checkpoints, up to the last step looked at."""
        if self.stream.folder is None:
            return []
        saved = complete_steps(self.stream.folder / "checkpoints")
        return sorted(step for step in saved if step <= self.stop)

    def seen_before(self, steps: Sequence[int] | None = None) -> dict[int, int]:
        """How often checkpoints have seen the text: checkpoint C has read steps 0 to C - 1."""
        if steps is None:
            chosen = self.checkpoints
        else:
            chosen = list(steps)
        # Left: checkpoint C has not seen step C, which leads on from it.
        counts = np.searchsorted(self.steps[0], chosen, side="left")
        return dict(zip(chosen, counts.tolist(), strict=True))

    def records(self, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """A dict for each occurrence, in the order in which training read them."""
        step, row = self.steps
        sources = self.stream.sources
        for i in range(self.found.total)[:limit]:
            yield {
                "step": int(step[i]),
                "row": int(row[i]),
                "source": sources[int(self.found.source[i])],
                "document": int(self.found.document[i]),
                "offset": int(self.found.offset[i]),
                "epoch": int(self.found.epoch[i]),
            }


class Tracer:
    """Finds texts in the stream of a run, one after the other: what all of them need is opened
    once.

    stream        an open stream, or the words that name one: a run's folder, a preset, overrides.
    before        look at steps 0 to before - 1; by default at all that are trained, or without a
                  run's folder at all of the config.
    planned       look also at steps that the run has not trained yet.
    index_folder  where indexes are, if not beside the token files.
    Raises        ConfigError for a step not trained yet; DataError for missing or changed data, or
                  an index of other data.
    """

    def __init__(
        self,
        stream: Stream | str | Sequence[str],
        *,
        before: int | None = None,
        planned: bool = False,
        index_folder: str | os.PathLike[str] | None = None,
    ) -> None:
        if isinstance(stream, Stream):
            self.stream = stream
        else:
            self.stream = open_stream(stream)
        self.stop = last_step(self.stream, before, planned)
        self.searches = open_searches(self.stream, index_folder)
        self.places = ServedPlaces(self.stream, self.stop)
        changed = changed_places(self.stream, self.stop)
        self.borders = Borders(end_of_documents(self.stream), changed)

    def __call__(
        self,
        text: str | None = None,
        *,
        ids: Sequence[int] | None = None,
        exact: bool = False,
        rows: bool = False,
        workers: int | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Trace:
        """Every place at which a text stands.

        text, ids  one of the two; ids as they are, a text also as it is written behind a space
                   unless `exact`.
        rows       read the rows, instead of an index or the token files, with so many `workers`;
                   `on_tokens` is called with the tokens that are read.
        Raises     ConfigError for a text without tokens, or too long for a row.
        """
        start = time.perf_counter()
        forms = forms_of(self.stream, text, ids, exact)
        notes: list[str] = []
        read: Sequence[range] = [range(self.places.stop)]
        end = self.borders.end
        if not rows and crosses_documents(self.stream, forms, end):
            notes.append(
                f"the ids go on behind the end-of-document id {end}, and documents follow one"
                " another only in rows: the rows were read"
            )
        elif not rows:
            # Of rows that are changed on their way the files do not know what they hold.
            read = self.borders.changed
            notes += [self.why_read(places) for places in read]
        found = []
        split: int | None = None
        in_files: int | None = None
        how = "rows"
        if sum(map(len, read)) < self.places.stop:
            indexed = all(isinstance(one, Index) for one in self.searches.values())
            how = "files"
            if indexed:
                how = "index"
            occurrences, cut, in_files = search(self.places, self.searches, forms)
            occurrences = occurrences.chosen(outside(occurrences.place, read))
            # Maps and indexes are trusted by their keys: some answers are compared with the rows.
            read_back(self.stream, occurrences, forms)
            found.append(occurrences)
            split = int(outside(cut, read).sum())
        for places in read:
            scanned = scan(
                self.stream, places, forms, self.borders, workers=workers, on_tokens=on_tokens
            )
            found.append(self.places.with_epochs(scanned))
        seconds = time.perf_counter() - start
        whole = joined(found)
        return Trace(self.stream, forms, whole, self.stop, split, in_files, how, seconds, notes)

    def why_read(self, places: range) -> str:
        """Why the rows at some places were read."""
        first = self.stream.step_of(places.start)[0]
        last = self.stream.step_of(places.stop - 1)[0]
        reason = "data.fim_rate"
        if self.stream.config.data.interventions:
            reason = "data.interventions"
        return f"{reason} may change the rows of steps {first} to {last}: they were read"


def changed_places(stream: Stream, stop: int) -> list[range]:
    """The places before step `stop` whose rows may be served otherwise than the files have them."""
    served = stream.rows.train
    if served.fim is None and served.changes is None:
        return []
    # Changes begin and end with a step.
    steps = [step for step in range(stop) if served.changes_row(stream.sizes.first(step))]
    ranges: list[range] = []
    for step in steps:
        places = stream.sizes.places(step)
        if ranges and ranges[-1].stop == places.start:
            places = range(ranges.pop().start, places.stop)
        ranges.append(places)
    return ranges


def trace(
    stream: Stream | str | Sequence[str],
    text: str | None = None,
    *,
    ids: Sequence[int] | None = None,
    before: int | None = None,
    planned: bool = False,
    index_folder: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Trace:
    """Every place at which a text stands in the training stream; `Tracer` explains the arguments.

    Raises  as `Tracer` and its call.
    """
    tracer = Tracer(stream, before=before, planned=planned, index_folder=index_folder)
    return tracer(text, ids=ids, **options)


def forms_of(
    stream: Stream, text: str | None, ids: Sequence[int] | None, exact: bool
) -> list[Form]:
    """The sequences of ids to look for.

    Raises  ConfigError if they are none, or too long for a row.
    """
    if (text is None) == (ids is None):
        raise ConfigError("give a text or --ids, one of the two")
    if text is None:
        assert ids is not None
        known = stream.tokenizer
        forms = [form_of_ids(ids, None if known is None else known.vocab_size)]
    else:
        tokenizer = stream.tokenizer_for("a text")
        # Under other ids the text would be found nowhere, or another one in its place.
        for source in stream.rows.train.row_sources:
            require_tokenizer(source.dataset.prefix, tokenizer, "data.tokenizer")
        forms = forms_of_text(text, tokenizer, exact=exact)
    room = stream.rows.train.seq_length + 1
    shortest = min(len(form.ids) for form in forms)
    if shortest > room:
        raise ConfigError(
            f"the text has {shortest} tokens, but a row of this run holds {room}: no row can have"
            " it; look for a part of it"
        )
    return forms


def last_step(stream: Stream, before: int | None, planned: bool) -> int:
    """The step before which to look.

    Raises  ConfigError for a step that is not trained yet, or a run without one.
    """
    if before is not None:
        if before < 1:
            raise ConfigError(f"--before {before}: no step is before it; give 1 to {stream.steps}")
        if before > stream.steps:
            raise ConfigError(
                f"--before {before}, steps 0 to {before - 1}: the run has steps 0 to"
                f" {stream.steps - 1}; give 1 to {stream.steps}"
            )
        stream.check_steps(0, before, planned=planned)
        return before
    if planned:
        stop = stream.steps
    else:
        stop = stream.known
    if not stop:
        raise ConfigError(f"{stream.folder} has not trained a step yet: no row has been read")
    return stop


def end_of_documents(stream: Stream) -> int | None:
    """The id that ends documents: by the records of the token files, else the last token of each of
    the first documents of a file, where it is the same; None if they end differently."""
    datasets = [source.dataset for source in stream.rows.train.row_sources]
    end = recorded_end(dataset.prefix for dataset in datasets)
    if end is not None:
        return end
    for dataset in datasets:
        documents = [document for document in dataset[:FIRST_DOCUMENTS] if len(document)]
        last = {int(document[-1]) for document in documents}
        # A single document ends with some token, which says nothing.
        if len(last) == 1 and len(documents) > 1:
            return last.pop()
    return None


def crosses_documents(stream: Stream, forms: Sequence[Form], end: int | None) -> bool:
    """Whether a text goes on behind the end of a document, where rows have several."""
    # Ready rows are items of the file themselves, so that the file has their borders too.
    if stream.config.data.order == "file":
        return False
    return any(end in form.ids[:-1] for form in forms)


def open_searches(stream: Stream, folder: str | os.PathLike[str] | None) -> dict[int, Search]:
    """For each source that has rows its index, or a search of its token file.

    Raises  DataError if an index is of other data, or not finished.
    """
    searches: dict[int, Search] = {}
    for number in stream.rows.train.with_rows():
        dataset = stream.rows.train.row_sources[number].dataset
        if (index_folder(dataset.prefix, folder) / MANIFEST).exists():
            known = stream.rows.fingerprint["train"][number]
            searches[number] = Index(dataset, folder, known=known)
        else:
            searches[number] = FileScan(dataset)
    return searches


def search(
    places: ServedPlaces, searches: dict[int, Search], forms: Sequence[Form]
) -> tuple[Occurrences, Ints, int]:
    """The texts in the token files, at the places where rows with them are served; the places of
    rows whose border cuts one; and how often the files have them."""
    found: list[Occurrences] = []
    in_files = 0
    cuts: list[Ints] = [np.empty(0, np.int64)]
    for source, where in searches.items():
        for form in forms:
            positions = where.find(form.ids)
            in_files += len(positions)
            documents, offsets = where.flat.documents_of(positions)
            occurrences, cut = places.occurrences(source, documents, offsets, len(form.ids))
            found.append(occurrences)
            cuts.append(cut)
    return joined(found), np.concatenate(cuts), in_files


def read_back(stream: Stream, found: Occurrences, forms: Sequence[Form]) -> None:
    """Read the rows of some occurrences and compare.

    Raises  DataError if one holds another text.
    """
    count = min(found.total, READ_BACK)
    for i in np.linspace(0, found.total - 1, count).astype(np.int64).tolist():
        if not row_holds(stream, found, i, forms):
            raise DataError(
                f"the row at place {found.place[i]} of the order does not hold the text that the"
                " token files have there: the index maps or an index are damaged; remove the"
                " folders PREFIX.order and PREFIX.index and try again"
            )


def row_holds(stream: Stream, found: Occurrences, i: int, forms: Sequence[Form]) -> bool:
    """Whether the row of occurrence i, as a step reads it, holds one of the texts there."""
    place = int(found.place[i])
    at = int(found.at[i])
    row = stream.block(range(place, place + 1)).tokens[0]
    wanted = [form.ids for form in forms if len(form.ids) == found.length[i]]
    return tuple(row[at : at + int(found.length[i])].tolist()) in wanted
