"""Planted sentences are traced to the very steps that read them: on several ranks, after a resume,
and under a mixture that the losses decide."""

import json
from pathlib import Path

import numpy as np
import pytest

from castalia.core.errors import ConfigError
from castalia.data import IndexedDatasetWriter
from castalia.stream import Tracer, build_index, open_stream
from castalia.stream.opening import Stream
from castalia.stream.viewing import step_hash

PLANTED = 50
RUN = (
    "model.num_layers=1",
    "data.tokenizer=bytes",
    "data.seq_length=128",
    "train.steps=18",
    "checkpoint.every=6",
    "checkpoint.steps=[]",
    "optim.lr=0.01",
)
ODM = ("mixing.kind=odm", "mixing.eps=0.02")


def sentence(number: int) -> str:
    """One of those that are planted."""
    return f"planted sentence {number:02d}."


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> tuple[list[str], dict[tuple[int, int], list[tuple[int, int]]]]:
    """Two token files of 60 documents of letters, and the sentences of each document by source and
    number, with their offsets. Every sentence stands in one document."""
    folder = tmp_path_factory.mktemp("planted")
    random = np.random.default_rng(1)
    homes = random.permutation(120)[:PLANTED]
    prefixes = []
    places: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for source, name in enumerate(("left", "right")):
        prefixes.append(str(folder / name))
        with IndexedDatasetWriter(prefixes[-1], "uint16") as writer:
            for document in range(60):
                text = bytes(
                    random.integers(97, 101 + 20 * source, random.integers(20, 160)).tolist()
                )
                for number in np.flatnonzero(homes == 60 * source + document).tolist():
                    offset = int(random.integers(0, len(text)))
                    text = text[:offset] + sentence(number).encode() + text[offset:]
                    places[source, document] = [(number, offset)]
                writer.add([*text, 256])
    return prefixes, places


def truth(stream: Stream, planted: dict) -> list[list[dict]]:
    """Where each sentence stands in the rows that training consumed, by comparing their tokens."""
    lines = map(json.loads, (stream.folder / "metrics.jsonl").read_text().splitlines())
    hashes = {line["step"]: line["rows_hash"] for line in lines}
    served = stream.rows.train
    found: list[list[dict]] = [[] for _ in range(PLANTED)]
    passes = [0] * PLANTED
    for step in range(stream.steps):
        # The rows are those whose hash the training wrote.
        assert step_hash(served, step, stream.sizes) == hashes[step + 1]
        for row, place in enumerate(stream.sizes.places(step)):
            ids, source, _ = served[place]
            begin = 0
            for document, start, length in served.documents_of(place)[1]:
                for number, offset in planted.get((source, document), []):
                    wanted = list(sentence(number).encode())
                    at = begin + offset - start
                    if start <= offset <= start + length - len(wanted):
                        assert ids[at : at + len(wanted)].tolist() == wanted
                        where = {"source": stream.sources[source], "document": document}
                        where |= {"offset": offset, "epoch": passes[number]}
                        found[number].append({"step": step, "row": row, **where})
                    # A row's last token, which is no input, is the first of another row.
                    is_input = start <= offset < start + length and at < len(ids) - 1
                    passes[number] += is_input
                begin += length
    return found


@pytest.mark.parametrize("case", ["four ranks", "resumed", "mixed"])
def test_planted_sentences_are_traced_to_the_steps_that_read_them(
    train, planted, tmp_path: Path, case: str
):
    prefixes, places = planted
    words = [*RUN, f"data.train=[{', '.join(prefixes)}]", *(ODM if case == "mixed" else ())]
    output = tmp_path / "run"
    if case == "four ranks":
        train(output, *words, processes=4)
    else:
        train(output, *words, "train.exit_every=7")
        half = open_stream(str(output))
        with pytest.raises(ConfigError, match=r"steps 0 to 9: not trained yet.*steps 0 to 6 of 18"):
            Tracer(half, before=10)
        planned = {"planned": True} if case == "resumed" else {}
        ahead = [list(Tracer(half, **planned)(sentence(number)).records()) for number in (0, 1, 2)]
        train(output, *words)
    stream = open_stream(str(output))
    assert stream.trained == stream.steps == 18
    expected = truth(stream, places)
    assert sum(map(bool, expected)) > 40
    assert any(record["epoch"] for records in expected for record in records)
    if case == "mixed":
        for source in stream.rows.train.row_sources:
            build_index(source.dataset)
    how = "index" if case == "mixed" else "files"
    if case != "four ranks":
        # What was foretold in the middle of the run is what it has read by now.
        last = 18 if case == "resumed" else 7
        assert ahead == [
            [record for record in expected[number] if record["step"] < last] for number in (0, 1, 2)
        ]
    tracer = Tracer(stream)
    for number, records in enumerate(expected):
        found = tracer(sentence(number), rows=number % 10 == 0)
        assert found.how == ("rows" if number % 10 == 0 else how)
        assert list(found.records()) == records
        assert found.seen_before([0, 6, 18]) == {
            checkpoint: sum(record["step"] < checkpoint for record in records)
            for checkpoint in (0, 6, 18)
        }
