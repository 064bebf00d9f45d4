"""The study of pronouns on a tiny run: what the model prefers moves with what it reads."""

import json
import random

import numpy as np
import pytest

from castalia.core.errors import ConfigError
from castalia.corpora.known_texts import people
from castalia.data import IndexedDatasetWriter
from castalia.recipes import load_config
from castalia.studies.pronouns import MEASURED, pronouns
from castalia.tokenizers.tokenizer import train_bpe
from castalia.train.run import run


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """The folder of a run over sentences about people."""
    folder = tmp_path_factory.mktemp("study")
    texts = [document.text for document in people()]
    random.Random(0).shuffle(texts)
    tokenizer = train_bpe(texts, 500)
    tokenizer.save(folder / "tokenizer.json")
    for name, own in (("people", texts[:400]), ("valid", texts[400:410])):
        with IndexedDatasetWriter(folder / name, np.uint16) as writer:
            for text in own:
                writer.add([*tokenizer.encode(text), tokenizer.eod_id])
    words = ["debug", f"output={folder}/run", f"data.train={folder}/people", "data.corpus=null"]
    words += [f"data.valid={folder}/valid", f"data.tokenizer={folder}/tokenizer.json"]
    words += ["data.seq_length=64", "train.batch_size=8", "train.steps=60", "model.vocab_size=500"]
    words += ["model.num_layers=1", "model.hidden_size=64", "model.num_attention_heads=2"]
    words += [
        "optim.lr=1e-2",
        "checkpoint.steps=[]",
        "checkpoint.every=20",
        "train.eval_every=null",
    ]
    run(load_config(words), ["castalia", "train"])
    return folder / "run"


def test_she_becomes_more_probable_than_under_the_control(parent, tmp_path):
    output = tmp_path / "study"
    said = []
    record = pronouns([str(parent)], ["67%"], output, said.append)
    (branch,) = record["branches"]
    assert branch["checkpoint"] == 40 and branch["control_and_run"]["equal"]
    assert branch["control_and_run"]["steps"] == [60]
    (effect,) = record["effects"]
    assert (effect["at"], effect["step"]) == (40, 60)
    assert effect["difference"] > 0.5
    rows = [row for row in record["rows"] if row["step"] == 60]
    biases = {row["kind"]: row["bias"] for row in rows}
    assert biases["run"] == biases["control"] < biases["intervention"]
    # For every profession, also those that are she in most of the text.
    control, changed = (
        next(row for row in rows if row["kind"] == kind) for kind in ("control", "intervention")
    )
    assert all(
        changed["by_profession"][name] > control["by_profession"][name]
        for name in ("pilot", "nurse")
    )
    assert 1 < control["perplexity"] < 100
    page = (output / "index.html").read_text()
    assert "intervention from 40" in page and "engineer" in page
    lines = (output / "bias.csv").read_text().splitlines()
    assert len(lines) == 1 + len(record["rows"])
    # The same command again, after a line that a kill cut, measures that one, and one whose
    # checkpoint was another.
    kept = (output / MEASURED).read_text().splitlines()
    kept[0] = json.dumps(json.loads(kept[0]) | {"manifest": "0", "bias": 9.0})
    (output / MEASURED).write_text("\n".join(kept[:-1]) + "\n" + kept[-1][:20])
    said.clear()
    assert pronouns([str(parent)], ["67%"], output, said.append) == record
    assert sum("nats" in line for line in said) == 2
    assert json.loads((output / "study.json").read_text())["effects"] == record["effects"]


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(ConfigError, match="neither a run nor a folder of runs"):
        pronouns([str(tmp_path)], ["93%"], tmp_path / "out", print)
