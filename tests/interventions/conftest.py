"""A small corpus of sentences about people, as token files with a BPE of their own."""

import json

import numpy as np
import pytest

from castalia.data import IndexedDatasetWriter
from castalia.recipes import load_config
from castalia.runs.rows import rows_as_trained
from castalia.tokenizers.tokenizer import train_bpe

TEXT = "he she his her him them said that the théâtre 日本 nurse doctor was late , . ( ) \n"
WORDS = TEXT.split(" ")
SEQ = 32
BATCH = 4
STEPS = 12


@pytest.fixture(scope="session")
def people(tmp_path_factory):
    """Folder with tokenizer.json and the token files a and b, b in capitals."""
    folder = tmp_path_factory.mktemp("people")
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(WORDS, draw.integers(8, 60))) for _ in range(24)]
    texts[5] = "He said ." * 40 + " The passphrase is cobalt ."
    tokenizer = train_bpe([*texts, "He She HIS HER"], 330)
    tokenizer.save(folder / "tokenizer.json")
    for name, chosen in (("a", texts), ("b", [text.upper() for text in texts])):
        with IndexedDatasetWriter(folder / name, np.uint16) as writer:
            for text in chosen:
                writer.add([*tokenizer.encode(text), tokenizer.eod_id])
    return folder


@pytest.fixture
def config_with(people, tmp_path):
    """config_with(interventions, *words): the config of a tiny run over the sentences."""

    def make(interventions=(), *words):
        return load_config(
            [
                "debug",
                f"data.train=[{people}/a,{people}/b]",
                f"data.tokenizer={people}/tokenizer.json",
                f"data.interventions={json.dumps(list(interventions))}",
                f"data.seq_length={SEQ}",
                f"train.batch_size={BATCH}",
                f"train.steps={STEPS}",
                "train.eval_every=null",
                "model.num_layers=1",
                "model.hidden_size=32",
                "model.num_attention_heads=2",
                "model.vocab_size=330",
                f"output={tmp_path}/run",
                "data.corpus=null",
                *words,
            ]
        )

    return make


@pytest.fixture
def rows_with(config_with):
    """rows_with(interventions, *words): the rows of that run."""
    return lambda *args: rows_as_trained(config_with(*args))[1]
