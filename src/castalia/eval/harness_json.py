"""The rows of a checkpoint in the form of the files that lm-evaluation-harness writes."""

import time
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from castalia.core.files import write_json

if TYPE_CHECKING:
    from castalia.eval.sweeps import Outcome, Part

UNKNOWN = "N/A"
"""What the harness writes for an error that it does not know."""


class Document(NamedTuple):
    """A file of results: one checkpoint with one number of examples."""

    name: str
    """Model, step and number of examples, as far as several files need them."""
    content: dict[str, Any]


def documents_of(outcomes: Sequence["Outcome"]) -> list[Document]:
    """The files of a sweep. The harness's form has one number of examples for each task."""
    documents = []
    for outcome in outcomes:
        checkpoint = outcome.checkpoint
        asked = list(dict.fromkeys(part.shots for part in outcome.parts if part.rows))
        for shots in asked:
            parts = [part for part in outcome.parts if part.shots == shots]
            words = [checkpoint.model] if len(outcomes) > 1 else []
            if len(outcomes) > 1 and checkpoint.step is not None:
                words.append(f"step{checkpoint.step}")
            if len(asked) > 1:
                words.append("text" if shots is None else f"{shots}shot")
            documents.append(Document("-".join(words), as_harness_json(parts)))
    return documents


def as_harness_json(parts: Sequence["Part"]) -> dict[str, Any]:
    """Tasks of one checkpoint in the harness's form.

    Of a task that was found in the table there are the numbers alone, without its config.
    """
    tables: dict[str, dict[str, Any]] = {
        "results": {},
        "versions": {},
        "n-shot": {},
        "higher_is_better": {},
        "n-samples": {},
        "task_hashes": {},
    }
    document: dict[str, Any] = dict(tables)
    for row in (row for part in parts for row in part.rows):
        numbers = tables["results"].setdefault(row.task, {"alias": row.task})
        numbers[f"{row.metric},{row.filter}"] = row.value
        numbers[f"{row.metric}_stderr,{row.filter}"] = UNKNOWN if row.stderr is None else row.stderr
        tables["higher_is_better"].setdefault(row.task, {})[row.metric] = row.higher_is_better
        tables["versions"][row.task] = row.task_version
        tables["n-shot"][row.task] = row.shots
        tables["n-samples"][row.task] = {"original": None, "effective": row.documents}
        tables["task_hashes"][row.task] = row.task_hash
        document["config"] = {
            "model": f"castalia:{row.engine}",
            "model_args": {"dtype": row.dtype, "pretrained": row.checkpoint},
            "batch_size": row.batch,
        }
    for part in parts:
        document = merged(document, part.json)
    return document


def merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Two documents as one: tables by task grow, of other values the second's stand."""
    joined = dict(one)
    for name, value in other.items():
        mine = joined.get(name)
        both = isinstance(mine, dict) and isinstance(value, dict)
        joined[name] = {**mine, **value} if both else value  # type: ignore[dict-item]
    return joined


def file_of(output: str, document: Document) -> Path:
    """`output` itself, or beside it a file with what tells the document from the others."""
    path = Path(output)
    if not document.name:
        return path
    return path.with_name(f"{path.stem}-{document.name}{path.suffix or '.json'}")


def neox_file(prefix: str) -> Path:
    """GPT-NeoX's name of a file of results; a number tells apart those of one second.

    Source  GPT-NeoX, eval.py: {prefix}_eval_results_{%m-%d-%Y-%H-%M-%S}.json.
    """
    stem = f"{prefix}_eval_results_{time.strftime('%m-%d-%Y-%H-%M-%S')}"
    path = Path(f"{stem}.json")
    for number in count(2):
        if not path.exists():
            break
        path = Path(f"{stem}-{number}.json")
    return path


def write_neox_file(prefix: str, document: Mapping[str, Any]) -> Path:
    """Write a document under GPT-NeoX's name; returns the file."""
    path = neox_file(prefix)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, document)
    return path
