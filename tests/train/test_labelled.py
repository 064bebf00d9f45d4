"""Answers with a label in the loop: what KTO learns, how files become rows, and what is refused."""

import json

import numpy as np
import pytest
import torch
from tests.seams.preferences import SMALL, words_of, write_labelled

from castalia.core.errors import ConfigError, DataError
from castalia.corpora.mismatched import mismatched_files
from castalia.data import IGNORED, IndexedDataset, IndexedDatasetWriter
from castalia.distributed import World
from castalia.recipes import load_config
from castalia.runs.named_corpus import ensure_corpus
from castalia.train.trainer import Trainer

ALONE = World(0, 1, torch.device("cpu"))
KTO = ("loss.kind=kto", "train.eval_every=1", "train.eval_batches=4")


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory):
    """Token, label and reward files, to train on and to validate on."""
    folder = tmp_path_factory.mktemp("labelled")
    return write_labelled(folder, "train", 128, 1), write_labelled(folder, "valid", 32, 2)


@pytest.fixture
def make(prefixes, tmp_path):
    """make(*overrides) -> a Trainer."""

    def build(*overrides):
        words = [*SMALL, *words_of(*prefixes), f"output={tmp_path / 'run'}", *KTO, *overrides]
        return Trainer(load_config(words), ALONE)

    return build


# GPT-NeoX's estimate takes the gain of desirable answers for divergence, so that more of them lie
# below it.
@pytest.mark.parametrize(("kl", "least"), [("mismatched", 0.95), ("halves", 0.8)])
def test_kto_prefers_what_is_desirable(make, kl, least):
    trainer = make(f"loss.kl={kl}", "train.steps=40")
    before = trainer.evaluate(trainer.rows.valid, 4).metrics
    trainer.fit()
    after = trainer.evaluate(trainer.rows.valid, 4).metrics
    assert before["reward_desirable"] == pytest.approx(0, abs=1e-5)
    assert after["accuracy"] > least
    assert after["reward_desirable"] > 0.1 > -0.1 > after["reward_undesirable"]


def test_the_divergence_is_that_of_the_step(make):
    """Micro-batches of any size compare with the same number."""
    results = []
    for micro in (16, 2):
        trainer = make(f"train.micro_batch_size={micro}")
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.mul_(0.5)
        read = next(trainer.training_batches())
        batches = trainer.prepared(read)
        assert {len(batch.tokens) for batch in batches} == {micro}
        baselines = torch.cat([batch.baseline for batch in batches])
        assert len(baselines) == 16 and len(baselines.unique()) == 1 and baselines[0] > 0.01
        results.append((float(baselines[0]), trainer.accumulate(batches).loss))
        # Row 2i + 1 has the prompt of row 2i and another answer.
        both = read[0]
        assert both.tokens[0::2, :4].equal(both.tokens[1::2, :4])
        assert not both.tokens[0::2].equal(both.tokens[1::2])
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_every_answer_is_mismatched_once(prefixes, tmp_path):
    train = prefixes[0]
    files = mismatched_files(train["train"], train["labels"], tmp_path)
    tokens = IndexedDataset(train["train"])
    others, other_labels = map(IndexedDataset, files)
    answers = [tuple(tokens[i][4:]) for i in range(len(tokens))]
    taken = [tuple(others[i][4:]) for i in range(len(others))]
    assert sorted(answers) == sorted(taken) and answers != taken
    for document in range(len(tokens)):
        assert np.array_equal(tokens[document][:4], others[document][:4])
        assert (other_labels[document][:4] == IGNORED).all()
        assert np.array_equal(other_labels[document][4:], others[document][4:])
    assert mismatched_files(train["train"], train["labels"], tmp_path) == files
    with IndexedDatasetWriter(tmp_path / "one", "uint16") as writer:
        writer.add([1, 2])
    with pytest.raises(DataError, match=r"one document, and loss\.kl=mismatched needs"):
        mismatched_files(str(tmp_path / "one"), str(tmp_path / "one"), tmp_path)


RECORDS = [
    {"prompt": "a b", "completion": " c", "label": True},
    {"prompt": "d", "completion": " e f", "label": 0},
]


def labelled(tmp_path, *records):
    """A config that names records."""
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = [f"data.labelled={file}", f"output={tmp_path / 'run'}", "data.tokenizer=bytes"]
    return load_config([*SMALL, *words, "model.vocab_size=257", "loss.kind=kto"])


def test_equal_answers_to_equal_prompts_stay(tmp_path):
    """Of pairs they are left out; here the other side is only compared with."""
    records = [{"prompt": "p", "completion": f" {i % 2}", "label": i % 2} for i in range(8)]
    trainer = Trainer(labelled(tmp_path, *records), ALONE)
    (source,) = trainer.rows.train.row_sources
    assert source.order.alike == 0 and len(set(source.order.documents.tolist())) == 8


def test_records_become_files(tmp_path):
    data = ensure_corpus(labelled(tmp_path, *RECORDS), lambda line: None).data
    tokens, labels = IndexedDataset(data.train[0]), IndexedDataset(data.labels[0])
    assert bytes(tokens[0][:-1].tolist()) == b"a b c" and tokens[0][-1] == 256
    assert labels[1].tolist() == [IGNORED, *b" e f", 256]
    assert [float(IndexedDataset(data.rewards[0])[i][0]) for i in range(2)] == [1.0, -1.0]
    assert bytes(IndexedDataset(data.mismatched[0])[1][:-1].tolist()) == b"d c"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 2}, "'label' is 2, expected true or false"),
        ({"label": None}, "needs the key 'label', true if it is desirable"),
        ({"completion": ""}, "'completion' is empty"),
        ({"completion": None}, "lacks the key 'completion'"),
    ],
)
def test_faulty_records_are_named(tmp_path, change, message):
    with pytest.raises(DataError, match=rf"answers.jsonl:2: .*{message}"):
        ensure_corpus(labelled(tmp_path, RECORDS[0], RECORDS[1] | change), lambda line: None)


def test_all_of_one_label_is_refused(tmp_path):
    config = labelled(tmp_path, RECORDS[0], RECORDS[1] | {"label": 1})
    with pytest.raises(DataError, match="all 2 answers are desirable"):
        Trainer(config, ALONE)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("data.rewards=[]", "data.train without rewards has none"),
        ("data.packing=packed", "each answer in a row of its own"),
        ("loss.kl=halves train.micro_batch_size=1", "which has one row"),
        ("data.labels=[]", "needs data.labels, one for each token file"),
        ("data.rewards={valid}", "has 64 rewards for the 256 documents"),
        ("loss.kind=next_token data.labelled=x.jsonl", "choose a loss of these: kto"),
        ("parallel.cp=2", "needs whole rows"),
    ],
)
def test_faults_are_named(make, prefixes, words, message):
    words = words.format(valid=prefixes[1]["rewards"])
    with pytest.raises((ConfigError, DataError), match=message):
        make(*words.split())
