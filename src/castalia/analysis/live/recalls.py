"""The job of the reader of memorized rows: a checkpoint continues the rows of a step."""

from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from castalia.analysis.live.jobs import Work
from castalia.analysis.live.readers import Batches, Row
from castalia.core.errors import ConfigError
from castalia.inference import LanguageModel, load
from castalia.memorization.recall import Recall, recall
from castalia.tokenizers.tokenizer import Tokenizer

THREADS = 1
"""Of torch: a run that trains on this machine keeps the other cores."""

DEFAULTS: dict[str, Any] = {"prompt": 32, "continuation": 32, "rows": 64}
"""Both lengths are the paper's."""

LoadModel = Callable[[str], LanguageModel]


class Question(NamedTuple):
    """What the reader asked for."""

    run: str
    """The run's name on the page."""
    checkpoint: int
    """Optimizer steps of the checkpoint."""
    step: int
    """The step whose rows are continued."""
    prompt: int
    continuation: int
    rows: int
    """The first rows of the step, at most."""


def question_of(body: Any) -> Question:
    """What a request asks for.

    Raises  ConfigError if a field is missing or of another type.
    """
    values = {
        "prompt": 32,
        "continuation": 32,
        "rows": 64,
        **(body if isinstance(body, dict) else {}),
    }
    chosen: dict[str, Any] = {}
    for name, kind in Question.__annotations__.items():
        value = values.get(name)
        if type(value) is not kind:
            raise ConfigError(f"{name}: expected {kind.__name__}, got {value!r}")
        chosen[name] = value
    if chosen["rows"] < 1:
        raise ConfigError(f"rows must be at least 1, got {chosen['rows']}")
    return Question(**chosen)


class Recalls:
    """Makes the work of a question; the newest model stays in memory."""

    def __init__(self, batches: Batches, load_model: LoadModel | None = None) -> None:
        self.batches = batches
        self.load_model = load_model or load_quietly
        self.key = ""
        self.model: LanguageModel | None = None

    def work(self, folder: Path, question: Question) -> Work:
        """The work of a job."""

        def prepare() -> tuple[int, Iterator[dict[str, Any]]]:
            rows, tokenizer = self.batches.ids_of(folder, question.step, question.rows)
            model = self.model_at(f"{folder}/step{question.checkpoint}")
            ids = [row.ids for row in rows]
            recalls = recall(model, ids, question.prompt, question.continuation)
            results = (
                result_of(number, row, found, question.prompt, tokenizer)
                for number, (row, found) in enumerate(zip(rows, recalls, strict=True))
            )
            return len(rows), results

        return prepare

    def model_at(self, path: str) -> LanguageModel:
        """A checkpoint, loaded. One job runs at a time, so that nothing has to be locked."""
        if self.model is None or self.key != path:
            self.model = None  # its memory first
            self.model = self.load_model(path)
            self.key = path
        return self.model


def result_of(
    number: int, row: Row, found: Recall, prompt: int, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """One row as JSON values."""
    return {
        "row": number,
        "source": row.source,
        "score": found.score,
        "prompt": text_of(tokenizer, row.ids[:prompt]),
        "parts": parts_of(tokenizer, found),
    }


def load_quietly(path: str) -> LanguageModel:
    """A checkpoint in fp32 on the CPU, on one core: a GPU and the others belong to runs."""
    import torch

    torch.set_num_threads(THREADS)
    return load(path, device="cpu")


def parts_of(tokenizer: Tokenizer | None, found: Recall) -> list[dict[str, Any]]:
    """The continuation in stretches of tokens that agree or differ, with both texts."""
    parts: list[dict[str, Any]] = []
    equal = (found.made == found.true).tolist()
    at = 0
    for same, group in groupby(equal):
        end = at + len(list(group))
        part: dict[str, Any] = {"same": same, "true": text_of(tokenizer, found.true[at:end])}
        if not same:
            part["made"] = text_of(tokenizer, found.made[at:end])
        parts.append(part)
        at = end
    return parts


def text_of(tokenizer: Tokenizer | None, ids: NDArray[np.int64]) -> str:
    """The text of tokens; without a tokenizer their ids."""
    if tokenizer is None:
        return " ".join(map(str, ids.tolist())) + " "
    return tokenizer.decode(ids.tolist())
