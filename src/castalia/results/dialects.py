"""Rows from the files that evaluations write: one reader for each form of lm-evaluation-harness."""

import csv
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from castalia.core.errors import DataError
from castalia.core.files import read_json
from castalia.results.schema import Labels, Result
from castalia.results.subjects import (
    subject_of_hub_id,
    subject_of_neox,
    subject_of_path,
)
from castalia.results.task_hash import HASH_DIGITS, Prompting, config_hash

FORMER_HARNESS = "lm-eval <0.4"
"""Files of the form before 0.4 record neither a version nor a commit."""
US_TIME = re.compile(r"\d\d-\d\d-\d{4}-\d\d-\d\d-\d\d")
"""MM-DD-YYYY-HH-MM-SS in a file name, as GPT-NeoX writes it."""
ISO_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d[-:]\d\d[-:]\d\d")
"""In a file name, as lm-eval 0.4 writes it."""
SHOTS = re.compile(r"(?<!\d)(\d+)-?shot")
SHOT_FOLDERS = {"zero-shot": 0, "five-shot": 5}
BETTER = {
    **dict.fromkeys(("acc", "acc_norm", "em", "exact_match", "f1", "bleu", "mcc"), True),
    **dict.fromkeys(("ppl", "word_perplexity", "byte_perplexity", "bits_per_byte"), False),
}
"""Whether a metric is better when higher, where the file does not say it."""
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float": "fp32", "half": "fp16"}
ENGINES = {"hf-causal": "hf", "gpt2": "hf", "hf-causal-experimental": "hf", "hf-auto": "hf"}
"""Names of models in the harness that are all transformers -> the name that it has now."""
FREQUENCY_COLUMNS = ["model", "checkpoint", "task", "fewshot", "acc", "acc_stderr"]
"""Of the tables of accuracy against the frequency of terms."""
UNKNOWN = "N/A"
"""What the harness writes for a version or an error that it does not know."""
OWN = "castalia:"
"""Before the engine in JSON that `castalia eval` wrote."""
EXPECTED = (
    "expected the JSON of lm-evaluation-harness: `results` (task -> metric -> number) or"
    " `table_results` (task+prompt -> numbers)"
)


def read_results(path: Path) -> list[Result]:
    """The rows of a file of results, .json or .csv.

    Raises  DataError naming the file, and what was expected, if it cannot be read or has none of
            the known forms.
    """
    if path.suffix == ".csv":
        rows = frequency_rows(path)
    else:
        rows = json_rows(read_json(path), path)
    if not rows:
        raise DataError(f"{path}: no numbers in it; {EXPECTED}")
    return rows


def json_rows(content: Mapping[str, Any], path: Path) -> list[Result]:
    """The rows of a JSON object, by the form that its keys show."""
    results = content.get("results")
    if isinstance(content.get("table_results"), Mapping):
        return prompted_rows(content["table_results"], content, path)
    if isinstance(results, list):
        return prompted_rows(by_prompt(results, path), content, path)
    if not isinstance(results, Mapping):
        keys = ", ".join(repr(key) for key in list(content)[:8]) or "no keys"
        raise DataError(f"{path}: no file of results: {EXPECTED}, got {keys}")
    for task, metrics in results.items():
        if not isinstance(metrics, Mapping):
            raise DataError(
                f"{path}: results of {task!r}: expected metric -> number, got"
                f" {type(metrics).__name__}"
            )
    if "n-shot" in content or "configs" in content or any("," in key for key in keys_of(results)):
        return present_rows(results, content, path)
    return former_rows(results, content, path)


def keys_of(results: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The names of all metrics."""
    return {key for metrics in results.values() for key in metrics}


def by_prompt(results: list[Any], path: Path) -> dict[str, Any]:
    """The list form as task+prompt -> numbers."""
    named = {}
    for each in results:
        if not isinstance(each, Mapping) or "task_name" not in each:
            raise DataError(f"{path}: results: each item needs `task_name`; {EXPECTED}")
        named[f"{each['task_name']}+{each.get('prompt_name')}"] = each
    return named


class Shared(NamedTuple):
    """What all rows of a file have in common, beside the subject."""

    harness: str
    shots: int | None
    dtype: str | None
    engine: str | None
    batch: int | None
    documents: int | None


def former_rows(
    results: Mapping[str, Mapping[str, Any]], content: Mapping[str, Any], path: Path
) -> list[Result]:
    """Rows of the form before 0.4: `acc` beside `acc_stderr`."""
    config = mapping(content, "config")
    versions = mapping(content, "versions")
    base = base_row(subject_of(config, content, path), shared(config, path), path)
    return [
        base._replace(
            task=task,
            metric=metric,
            value=float(value),
            stderr=number(metrics.get(f"{metric}_stderr")),
            higher_is_better=BETTER.get(metric),
            task_version=text(versions.get(task)),
        )
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if is_number(value) and not metric.endswith("_stderr")
    ]


def prompted_rows(table: Mapping[str, Any], content: Mapping[str, Any], path: Path) -> list[Result]:
    """Rows of the form with several prompts a task: the task is TASK+PROMPT, as in the file."""
    for task, metrics in table.items():
        if not isinstance(metrics, Mapping):
            raise DataError(f"{path}: table_results of {task!r}: expected an object; {EXPECTED}")
    return former_rows(table, content, path)


def present_rows(
    results: Mapping[str, Mapping[str, Any]], content: Mapping[str, Any], path: Path
) -> list[Result]:
    """Rows of the form since 0.4: `acc,none` beside `acc_stderr,none`."""
    config = mapping(content, "config")
    base = base_row(subject_of(config, content, path), shared(config, path), path)
    # Its first versions of this form did not write which one they were.
    version = content.get("lm_eval_version")
    harness = "lm-eval >=0.4"
    if version:
        harness = f"lm-eval {version}"
    base = base._replace(
        parameters=base.parameters or integer(config.get("model_num_parameters")),
        # The commit of the hub, as long as hashes of checkpoints are.
        checkpoint_hash=(text(config.get("model_sha")) or "")[:HASH_DIGITS] or None,
        harness=harness,
        evaluated_at=time_of(path, number(content.get("date"))),
    )
    rows = []
    for task, metrics in results.items():
        of_task = task_columns(task, content, base)
        better = mapping(mapping(content, "higher_is_better"), task)
        for key, value in metrics.items():
            metric, comma, answers = key.partition(",")
            # Keys without a filter are names and counts of documents.
            if not comma or metric.endswith("_stderr") or not is_number(value):
                continue
            is_better = better.get(metric, BETTER.get(metric))
            if not isinstance(is_better, bool):
                is_better = None
            # A count of the metric's own comes before that of its task.
            documents = mapping(metrics, "sample_count").get(key, metrics.get("sample_len"))
            if documents is None:
                documents = of_task.documents
            rows.append(
                of_task._replace(
                    metric=metric,
                    filter=answers,
                    value=float(value),
                    stderr=number(metrics.get(f"{metric}_stderr,{answers}")),
                    documents=integer(documents),
                    higher_is_better=is_better,
                )
            )
    return rows


def task_columns(task: str, content: Mapping[str, Any], base: Result) -> Result:
    """`base` with what the form since 0.4 records about a task."""
    config = mapping(mapping(content, "configs"), task)
    shots = mapping(content, "n-shot").get(task, config.get("num_fewshot", base.shots))
    version = mapping(content, "versions").get(task, mapping(config, "metadata").get("version"))
    if version == UNKNOWN:
        version = None
    # `effective` is what was read under a limit; `original` is the whole task.
    documents = mapping(mapping(content, "n-samples"), task).get("effective", base.documents)
    return base._replace(
        task=task,
        shots=integer(shots),
        documents=integer(documents),
        task_version=text(version),
        task_hash=hash_of(task, config, content),
    )


def hash_of(task: str, config: Mapping[str, Any], content: Mapping[str, Any]) -> str | None:
    """The hash of a task's config, as `castalia eval` has it; None for a file without configs."""
    written = mapping(content, "task_hashes").get(task)
    # The harness's own hashes there are of the documents, and longer.
    if isinstance(written, str) and len(written) == HASH_DIGITS:
        return written
    if not config:
        return None
    arguments = split_arguments(mapping(content, "config").get("model_args"))
    # The harness copies the arguments of the model into the metadata of every task.
    metadata = {k: v for k, v in mapping(config, "metadata").items() if k not in arguments}
    # An empty metadata would be a key that the task's own config lacks, and another hash.
    if "metadata" in config:
        config = {**config, "metadata": metadata}
    return config_hash(config, prompting_of(content))


def prompting_of(content: Mapping[str, Any]) -> Prompting:
    """How the prompts of a file's tasks were written."""
    seed = mapping(content, "config").get("fewshot_seed")
    if not isinstance(seed, int):
        # Files that do not say were made with the harness's own seed.
        seed = Prompting().fewshot_seed
    return Prompting(
        content.get("chat_template"),
        content.get("system_instruction"),
        content.get("fewshot_as_multiturn") is not False,
        seed,
    )


def frequency_rows(path: Path) -> list[Result]:
    """Rows of a table of accuracy against the frequency of terms."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if reader.fieldnames != FREQUENCY_COLUMNS:
                raise DataError(
                    f"{path}: expected the columns {','.join(FREQUENCY_COLUMNS)}, got"
                    f" {','.join(reader.fieldnames or [])[:200] or 'none'}"
                )
            return [frequency_row(line, path) for line in reader]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    # Numbers that are none, other bytes than UTF-8, short lines, a quote that never ends.
    except (ValueError, TypeError, csv.Error) as error:
        raise DataError(f"{path}: line {reader.line_num}: {error}") from None


def frequency_row(line: Mapping[str, str], path: Path) -> Result:
    """One line."""
    subject = subject_of_hub_id(line["model"], f"step{int(line['checkpoint'])}", path)
    shots = int(line["fewshot"])
    base = base_row(subject, Shared(FORMER_HARNESS, shots, None, "hf", None, None), path)
    return base._replace(
        task=line["task"],
        metric="acc",
        value=float(line["acc"]),
        stderr=float(line["acc_stderr"]),
        higher_is_better=True,
    )


def subject_of(config: Mapping[str, Any], content: Mapping[str, Any], path: Path) -> Labels:
    """The checkpoint that a JSON file is about."""
    arguments = config.get("model_args", content.get("model_args"))
    if isinstance(arguments, Mapping) and ("iteration" in arguments or "load" in arguments):
        return subject_of_neox(arguments, path)
    named = split_arguments(arguments)
    name = named.get("pretrained") or named.get("model") or content.get("model_name")
    if isinstance(name, str) and name:
        return subject_of_hub_id(name, text(named.get("revision")), path)
    return subject_of_path(path)


def split_arguments(arguments: Any) -> Mapping[str, Any]:
    """`pretrained=OWNER/NAME,revision=step0` as a mapping; a mapping as it is."""
    if isinstance(arguments, Mapping):
        return arguments
    if not isinstance(arguments, str):
        return {}
    pairs = (part.partition("=") for part in arguments.split(","))
    return {name.strip(): value.strip() for name, equals, value in pairs if equals}


def shared(config: Mapping[str, Any], path: Path) -> Shared:
    """What the config says about all numbers of a file."""
    arguments = config.get("model_args")
    named = split_arguments(arguments)
    # GPT-NeoX's arguments have `precision`.
    dtype = config.get("model_dtype") or named.get("dtype") or named.get("precision")
    engine = (text(config.get("model")) or "").removeprefix(OWN)
    shots = integer(config.get("num_fewshot"))
    if config.get("num_fewshot") is None:
        shots = shots_on(path)
    batch = config.get("batch_size")
    sizes = config.get("batch_sizes")
    # `auto` as a batch size; the one that it found stands in the list.
    if not isinstance(batch, int) and isinstance(sizes, list) and len(sizes) == 1:
        batch = sizes[0]
    limit = number(config.get("limit"))
    # A limit below 1 is a share of the documents, whose number is not in the file.
    if limit is not None and limit < 1:
        limit = None
    return Shared(
        harness=FORMER_HARNESS,
        shots=shots,
        dtype=short_dtype(dtype),
        engine=ENGINES.get(engine, engine) or None,
        batch=integer(batch),
        documents=integer(limit),
    )


def base_row(subject: Labels, columns: Shared, path: Path) -> Result:
    """A row without a number, for the numbers of a file."""
    known = {"evaluated_at": time_of(path), "source": str(path)}
    return subject.result("", "", float("nan"), **known, **columns._asdict())


def time_of(path: Path, recorded: float | None = None) -> datetime:
    """When a file's results were made: by its name, or else as `recorded` in it, in seconds since
    1970, or else by its modification time.
    """
    us = US_TIME.search(path.name)
    iso = ISO_TIME.search(path.name)
    try:
        if us is not None:
            return datetime.strptime(us[0], "%m-%d-%Y-%H-%M-%S")
        if iso is not None:
            return datetime.strptime(iso[0].replace(":", "-"), "%Y-%m-%dT%H-%M-%S")
    except ValueError:  # digits that are no date
        pass
    if recorded is None:
        recorded = path.stat().st_mtime
    # Without a zone, as the table has all its times: in UTC.
    return datetime.fromtimestamp(recorded, UTC).replace(tzinfo=None)


def shots_on(path: Path) -> int | None:
    """The shots that a file's name or its folder says; None if neither does."""
    match = SHOTS.search(path.name)
    if match is not None:
        return int(match[1])
    return SHOT_FOLDERS.get(path.parent.name)


def short_dtype(name: Any) -> str | None:
    """fp32, fp16, bf16; another name as it is; None for unknown and `auto`."""
    if not isinstance(name, str) or name in ("", "auto"):
        return None
    name = name.removeprefix("torch.")
    return DTYPES.get(name, name)


def mapping(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object at `key`; empty if there is none."""
    value = content.get(key)
    if isinstance(value, Mapping):
        return value
    return {}


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(value: Any) -> float | None:
    """A number; None for `N/A`."""
    if is_number(value):
        return float(value)
    return None


def integer(value: Any) -> int | None:
    """An integer; None for anything else."""
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    # 5.0 counts; NaN and infinity do not, since neither equals its own floor.
    if is_number(value) and value == value // 1:
        return int(value)
    return None


def text(value: Any) -> str | None:
    """A name or version as text; None if there is none."""
    if value is None:
        return None
    return str(value)
