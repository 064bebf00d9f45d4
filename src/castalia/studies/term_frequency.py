"""The term-frequency study: does a model calculate better with numbers that it has read more often?

Source  Biderman et al. 2023, arXiv:2304.01373, section 4.2; Razeghi et al. 2022, arXiv:2202.07206.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from castalia.core.errors import ConfigError
from castalia.core.files import claimed, write_json
from castalia.eval.places import Checkpoint, checkpoints_of
from castalia.inference import LanguageModel
from castalia.inference.loading import load_exact
from castalia.stream.counting.asked import Pairs, Terms
from castalia.stream.counting.counting import Counts, count
from castalia.stream.opening import Stream, open_stream
from castalia.studies.term_frequency_page import write_pages
from castalia.studies.term_frequency_prompts import (
    MOST_SHOTS,
    QUESTION,
    Questions,
    is_right,
    tasks_named,
)
from castalia.studies.term_frequency_rows import (
    Key,
    Row,
    RowFile,
    gaps,
    means,
    place_of,
    read_counts,
    read_published,
    row_of,
    write_csv,
)

Say = Callable[[str], None]
WINDOW = (1, 3)
"""Words between the two numbers of a window, at least and at most.

Source  run_freq_count.py of Pythia's case studies: ` num (word ){1,3} num`.
"""


@dataclass(frozen=True)
class FrequencyStudy:
    """What the study measures."""

    questions: Questions
    tasks: Sequence[str] = ("multiplication", "addition")
    shots: Sequence[int] = (0, 2, 4, 8, 16)
    checkpoints: str = "all"
    """As `eval.places.Steps` reads it."""
    frequency: str = "alone"
    """What counts as reading a number: `alone`, it is a word, or `windows`, with another near."""
    new_tokens: int = 16
    """Longest answer."""

    def check(self) -> None:
        """Raises  ConfigError for what cannot be measured."""
        self.questions.check()
        tasks_named(self.tasks)
        if not self.shots or min(self.shots) < 0 or max(self.shots) > MOST_SHOTS:
            raise ConfigError(f"--shots: expected numbers from 0 to {MOST_SHOTS}")
        if self.frequency not in ("alone", "windows"):
            raise ConfigError(f"--frequency {self.frequency}: choose alone or windows")

    def options(self) -> dict[str, Any]:
        """What an answer depends on, as JSON."""
        record = asdict(self.questions)
        for name in ("operands", "seconds"):
            numbers = record[name]
            record[name] = f"{numbers.start}:{numbers.stop}"
        return {**record, "new_tokens": self.new_tokens}

    def terms(self) -> Terms:
        """The operands as terms."""
        return Terms(tuple(str(operand) for operand in self.questions.operands))


def study_of_words(
    *,
    template: str | None,
    between: str,
    operands: str,
    seconds: str,
    tasks: str,
    shots: str,
    new_tokens: int,
    seed: int,
    checkpoints: str,
    frequency: str,
) -> FrequencyStudy:
    """The study that the words of a command line ask for.

    Raises  ConfigError.
    """
    questions = Questions(
        span("--operands", operands),
        span("--seconds", seconds),
        QUESTION if template is None else template,
        # A shell passes the two characters \n on as they are.
        between.replace("\\n", "\n"),
        seed,
    )
    numbers = [number("--shots", word.strip()) for word in shots.split(",")]
    named = [word.strip() for word in tasks.split(",")]
    return FrequencyStudy(questions, named, numbers, checkpoints, frequency, new_tokens)


def number(option: str, text: str) -> int:
    """An integer from 0 on.

    Raises  ConfigError.
    """
    # int() also takes signs, spaces, underscores and the digits of other scripts.
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"{option}: expected an integer, got {text!r}")
    return int(text)


def span(option: str, text: str) -> range:
    """The range A:B.

    Raises  ConfigError.
    """
    first, colon, stop = text.partition(":")
    if not colon:
        raise ConfigError(f"{option} {text!r}: expected A:B, numbers A to B - 1, such as 0:100")
    return range(number(option, first), number(option, stop))


def term_frequency(
    paths: Sequence[str],
    study: FrequencyStudy,
    output: Path,
    *,
    jobs: int = 1,
    say: Say = print,
) -> dict[str, Any]:
    """Count the operands in what runs have read, ask their checkpoints, and write the results.

    Takes   paths: runs, suites and whatever `castalia eval` takes; CSV files of the published study
            or of another one, whose rows are added. A model without a run has no frequencies.
    Writes  accuracy.csv, table.json, table.csv, table.md, index.html and an SVG for each task and
            model. Answers are kept after each task, so that the same command continues.
    Returns what table.json holds.
    Raises  ConfigError for options that do not fit the models or those of the folder; DataError and
            CheckpointError for paths that cannot be read.
    """
    study.check()
    files = [path for path in paths if path.endswith(".csv")]
    named = [path for path in paths if not path.endswith(".csv")]
    checkpoints = []
    if named:
        checkpoints = checkpoints_of(named, study.checkpoints)
    # Read before anything is computed: a bad file ends the command at once.
    published = [row for file in files for row in read_published(file)]
    with claimed(output):
        file = RowFile(output)
        rows = file.current(file.begin(study.options()), weights_of(checkpoints))
        counts: dict[tuple[str, int, int], int] = {}
        for path in files:
            counts |= read_counts(Path(path))
        counts |= frequencies(checkpoints, study, jobs, say)
        rows += measured(checkpoints, study, {row.key for row in rows}, file, say)
        wanted = wanted_keys(checkpoints, study)
        rows = [row for row in rows if row.key in wanted] + published
        return write_results(output, study, rows, counts)


def wanted_keys(checkpoints: Iterable[Checkpoint], study: FrequencyStudy) -> set[Key]:
    """What the study asks for: rows of an earlier command with more stay out of the tables."""
    return {
        Key(each.model, step_of(each), task, shots)
        for each in checkpoints
        for task in study.tasks
        for shots in study.shots
    }


def weights_of(checkpoints: Iterable[Checkpoint]) -> dict[str, str]:
    """The hash of each checkpoint's weights, as evaluations know it, where it has one."""
    return {
        place_of(each.model, step_of(each)): each.weights_hash
        for each in checkpoints
        if each.weights_hash
    }


def step_of(checkpoint: Checkpoint) -> int:
    """The step of a checkpoint; 0 if it is unknown."""
    return checkpoint.step or 0


def frequencies(
    checkpoints: Sequence[Checkpoint], study: FrequencyStudy, jobs: int, say: Say
) -> dict[tuple[str, int, int], int]:
    """Occurrences of each operand before each checkpoint, by model, step and operand."""
    found: dict[tuple[str, int, int], int] = {}
    by_run: dict[Path, list[Checkpoint]] = {}
    for checkpoint in checkpoints:
        if checkpoint.run is None:
            say(f"{checkpoint.title}: not in a run's folder, so it has no frequencies")
            continue
        by_run.setdefault(checkpoint.run, []).append(checkpoint)
    # Once for all checkpoints of a run: its rows are read only to the newest of them.
    for run, own in by_run.items():
        steps = sorted({step_of(each) for each in own})
        stream = open_stream(str(run), say)
        table = operand_counts(stream, steps, study, jobs)
        say(f"{own[0].model}: counted {len(study.questions.operands)} numbers to step {steps[-1]}")
        for step in steps:
            for operand, value in table[step].items():
                found[own[0].model, step, operand] = value
    return found


def operand_counts(
    stream: Stream, steps: Sequence[int], study: FrequencyStudy, jobs: int
) -> dict[int, dict[int, int]]:
    """By checkpoint the occurrences of each operand in the steps before it."""
    operands = list(study.questions.operands)
    # Checkpoint 0 has read nothing.
    table = {step: dict.fromkeys(operands, 0) for step in steps}
    if steps[-1] == 0:
        return table
    terms = study.terms()
    asked: Terms | Pairs = terms
    if study.frequency != "alone":
        asked = Pairs(terms, WINDOW[1], WINDOW[0])
    counts = count(stream, asked, stop=steps[-1], at=steps, jobs=jobs)
    for place, step in enumerate(counts.checkpoints):
        if step in table:
            for operand, value in single_counts(counts, place):
                table[step][operand] = table[step].get(operand, 0) + value
    return table


def single_counts(counts: Counts, place: int) -> Iterable[tuple[int, int]]:
    """Operands with counts before a checkpoint: of a pair each of the two."""
    for label, value in zip(counts.labels, counts.counts[:, place].tolist(), strict=True):
        for word in label.split("-"):
            yield int(word), value


def measured(
    checkpoints: Sequence[Checkpoint],
    study: FrequencyStudy,
    known: set[Key],
    file: RowFile,
    say: Say,
) -> list[Row]:
    """Ask every checkpoint what is not known yet; the new rows."""
    added: list[Row] = []
    for number, checkpoint in enumerate(checkpoints, 1):
        keys = [key for key in sorted(wanted_keys([checkpoint], study)) if key not in known]
        # A model without a question left is not loaded.
        if not keys:
            continue
        model = load_exact(checkpoint.path)
        require_room(model, study, checkpoint)
        for key in keys:
            rows = asked(model, key, study)
            # On the disk after each task, so that a kill costs one task.
            file.add(rows)
            added += rows
        right = np.mean([row.right for row in added[-len(keys) * len(study.questions.operands) :]])
        say(f"{checkpoint.title}: {right:.1%} right  {number}/{len(checkpoints)}")
    return added


def require_room(model: LanguageModel, study: FrequencyStudy, checkpoint: Checkpoint) -> None:
    """Raises  ConfigError if the longest question and its answer do not fit in the context."""
    limit = model.config.max_position_embeddings
    if limit is None:
        return
    shots = max(study.shots)
    items = [item for task in study.tasks for item in study.questions.items(task, shots)]
    # The longest in characters stands for the longest in tokens, without encoding them all.
    longest = max((item.prompt for item in items), key=len)
    size = len(model.encode(longest)) + study.new_tokens
    if size > limit:
        raise ConfigError(
            f"{checkpoint.title}: {shots} shots and an answer take {size} tokens, its"
            f" context has {limit}; use fewer --shots, a shorter --template or --new-tokens"
        )


def asked(model: LanguageModel, key: Key, study: FrequencyStudy) -> list[Row]:
    """The accuracy of each operand, by greedy answers up to a line break."""
    items = list(study.questions.items(key.task, key.shots))
    # What follows the answer in the template ends it as well.
    tail = study.questions.template.partition("{answer}")[2]
    if tail.strip():
        stop = ["\n", tail]
    else:
        stop = ["\n"]
    done = model.complete(
        [item.prompt for item in items], study.new_tokens, stop=stop, temperature=0.0
    )
    right = dict.fromkeys(study.questions.operands, 0)
    for item, completion in zip(items, done, strict=True):
        right[item.x1] += is_right(completion.text, item.answer)
    each = len(study.questions.seconds)
    return [row_of(key, operand, number, each) for operand, number in right.items()]


def write_results(
    output: Path,
    study: FrequencyStudy,
    rows: Sequence[Row],
    counts: dict[tuple[str, int, int], int],
) -> dict[str, Any]:
    """Write the tables and the page; returns the table as JSON."""
    average = means(rows)
    gap = gaps(rows, counts)
    table = [
        {**key._asdict(), "accuracy": average[key], "gap": gap.get(key)} for key in sorted(average)
    ]
    record = {"options": {**study.options(), "frequency": study.frequency}, "table": table}
    write_csv(output / "accuracy.csv", rows, counts)
    write_json(output / "table.json", record)
    write_pages(output, rows, counts, average, gap)
    return record
